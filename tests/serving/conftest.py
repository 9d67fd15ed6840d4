"""One parrot for the tests of both wire formats: its programs are compiled once."""

from __future__ import annotations

import pytest

from tests.serving import parrot


@pytest.fixture(scope="package", autouse=True)
def _programs():
    """In the place of the fixture that forgets programs after each file."""
    yield


@pytest.fixture(scope="package")
def bird():
    with parrot.running() as running:
        yield running
