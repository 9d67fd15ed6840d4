"""The description at /openapi.json, and the server held to it by schemathesis: what may be sent, and what may not.

A few requests an operation here; `benchmarks/serve_fuzz.py` sends thousands. Not covered: events of streams, which the
SDKs' own tests read.
"""

from __future__ import annotations

import pytest
import requests

from glmv_jax.serving.app import Server
from tests.serving import held, parrot

CASES = 3


@pytest.fixture(scope="module")
def session(bird):
    bird.say("a red heart")
    with requests.Session() as session:
        yield session


@pytest.mark.parametrize("operation", held.OPERATIONS, ids=lambda operation: operation.path)
def test_the_server_does_as_its_description_says(bird, session, operation):
    for mode in held.modes(operation):
        assert held.hold(bird.url, session, operation, mode, CASES)


def test_all_routes_are_described(bird):
    app = Server(bird.answers, [parrot.NAME]).app()
    routes = {(r.path.replace("{name:path}", "{name}"), m.lower()) for r in app.routes for m in r.methods - {"HEAD"}}
    assert routes - {("/openapi.json", "get")} == {(of.path, of.method) for of in held.OPERATIONS}
    assert requests.get(f"{bird.url}/openapi.json").json() == held.DOCUMENT
