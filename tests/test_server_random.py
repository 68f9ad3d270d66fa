"""Random requests, made by schemathesis from what the server itself says of them: never a 5xx.

Three kinds: as the document allows, the same with real pictures in them (these are answered), and
broken against the document. They are the same in every run. One thing a reader would get wrong: what
keeps the document's bounds may still be refused, as two lengths that differ.
"""

from collections import Counter

import pytest

import tiny
from serving import data_uri, running

schemathesis = pytest.importorskip("schemathesis", reason="needs the packages for development")
hypothesis = pytest.importorskip("hypothesis", reason="comes with schemathesis")

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
PICTURES = [data_uri(tiny.picture(*size)) for size in ((8, 8), (20, 32), (60, 9))]


@pytest.fixture(scope="module")
def server():
    """Short answers, and no network."""
    with running(max_tokens=4, default_tokens=2, max_answers=2, max_text=300, fetch=False) as made:
        yield made


def statuses(server, strategy, number, change=lambda body: None):
    """Sends so many random requests; how often each status came."""
    seen = Counter()

    @hypothesis.settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,  # machines differ
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=strategy)
    def send(case):
        change(case.body)
        response = case.call(base_url=server.url, timeout=60)
        case.validate_response(response, checks=CHECKS)
        seen[response.status_code] += 1

    send()
    return seen


def with_pictures(body):
    """Real pictures in a valid request, which is then answered."""
    for message in body["messages"]:
        parts = message["content"] if isinstance(message["content"], list) else []
        for index, part in enumerate(one for one in parts if one["type"] == "image_url"):
            part["image_url"] = {"url": PICTURES[index % len(PICTURES)]}
    for name in ("max_completion_tokens", "top_logprobs", "stream_options"):
        body.pop(name, None)


@pytest.mark.parametrize(
    "number", [150, pytest.param(1000, marks=pytest.mark.slow)], ids=["150", "1000"]
)
def test_random_requests(server, number):
    schema = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())
    chat = schema["/v1/chat/completions"]["POST"]
    valid = chat.as_strategy(generation_mode=GenerationMode.POSITIVE)
    broken = chat.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    answered = statuses(server, valid, number * 2 // 5, with_pictures)
    assert answered[200] > number // 10, answered  # it is not only refusals that are tried
    assert statuses(server, valid, number * 3 // 10)[400] > 0
    refused = statuses(server, broken, number * 3 // 10)
    assert refused[400] > number // 5 and set(refused) <= {200, 400, 404}, refused
    for path in ("/v1/models", "/v1/models/{name}", "/health", "/metrics"):
        statuses(server, schema[path]["GET"].as_strategy(), number // 30)
    assert server.metric("requests_total", outcome="failed") == 0
    assert server.service.worker.alive and server.service.room.used == 0
