"""A server held to its description, by schemathesis and hypothesis."""

from __future__ import annotations

import collections

import hypothesis
import requests
import schemathesis
from schemathesis import GenerationMode, checks
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi import checks as more

from glmv_jax.serving import openapi
from tests.serving import parrot

DOCUMENT = openapi.description([parrot.NAME], parrot.LIMITS, key=True)
OPERATIONS = [found.ok() for found in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()]
HELD = [
    checks.not_a_server_error, more.status_code_conformance, more.content_type_conformance,
    more.response_headers_conformance, more.response_schema_conformance, more.negative_data_rejection,
]  # fmt: skip


def modes(operation: APIOperation) -> list[GenerationMode]:
    """What can be sent: something wrong only where anything can be."""
    return list(GenerationMode) if operation.body or operation.path_parameters else [GenerationMode.POSITIVE]


def hold(
    url: str, session: requests.Session, operation: APIOperation, mode: GenerationMode, cases: int, seed: int = 0
) -> collections.Counter[int]:
    """Sends so many requests, of these that the description allows or of those that it forbids; the statuses of the
    replies. Raises what schemathesis has found, with the smallest request that shows it."""
    statuses: collections.Counter[int] = collections.Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=cases, deadline=None, database=None, phases=[
        hypothesis.Phase.generate, hypothesis.Phase.shrink], suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def sent(case) -> None:
        reply = case.call_and_validate(url, session, {"Authorization": f"Bearer {parrot.KEY}"}, HELD)
        statuses[reply.status_code] += 1

    sent()
    return statuses
