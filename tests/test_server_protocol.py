"""The rest of the protocol through the real `openai` client: models, refusals by name, health, faults.

One thing a reader would get wrong: a field that changes no answer is accepted, because many clients
send all fields; one that would change it is refused and never ignored.
"""

import pytest

import tiny
from eve_vlm.serve.engine import user_message
from serving import NAME, chat, engine, running, wait_for

import openai  # isort: skip  # behind serving, which skips all where it is lacking


@pytest.fixture(scope="module")
def server():
    with running() as made:
        yield made


@pytest.fixture(scope="module")
def alone():
    return engine()


def test_models(server):
    client = server.client
    [model] = client.models.list().data
    assert model.id == NAME and model.object == "model" and model.max_model_len == 512
    assert client.models.retrieve(NAME) == model
    for name in ("other", "a/b", NAME + "/"):
        with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
            client.models.retrieve(name)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "?"}])
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"store": True}, "store"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"extra_body": {"min_p": 0.1}}, "min_p"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": 1e-30}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**63}, "seed"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(server, settings, param):
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask(user_message("What?", []), **settings)
    assert caught.value.param == param and param in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_what_asks_for_nothing_is_accepted(server, alone):
    """Fields that change no answer, as many clients send them."""
    neutral = {
        "tool_choice": "none",
        "parallel_tool_calls": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "store": False,
        "user": "someone",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "reasoning_effort": "none",
        "temperature": None,
        "top_p": 1,
        "n": 1,
        "stop": None,
        "max_completion_tokens": 6,
        "stream_options": None,
        "logprobs": False,
    }
    messages = user_message("What?", [])
    told = server.ask(messages, **neutral).choices[0].message.content
    assert told == alone.generate([messages], max_new_tokens=6)[0]


def test_every_field_of_the_protocol_is_known(server):
    """Also those that this version of the client has added: each is honoured or named as refused."""
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase

    fields = set(CompletionCreateParamsBase.__annotations__)
    assert fields <= set(server.service.request_class.model_fields)


def test_health_and_metrics(server):
    before = server.metric("prompt_tokens_total"), server.metric("image_tokens_total")
    usage = server.ask(user_message("What?", [tiny.picture(20, 32)]), max_tokens=4).usage
    assert server.metric("prompt_tokens_total") == before[0] + usage.prompt_tokens
    assert server.metric("image_tokens_total") == before[1] + 16
    health = server.http.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    # A row leaves behind its answer's last token, perhaps a moment after that was sent.
    wait_for(lambda: not server.metric("running_answers"))
    text = server.http.get("/metrics").text
    for name in (
        'eve_requests_total{outcome="answered"}',
        "eve_completion_tokens_total",
        "eve_time_to_first_token_seconds_count",
        "eve_time_per_token_seconds_sum",
        "eve_waiting_answers 0.0",
        "eve_running_answers 0.0",
    ):
        assert name in text
    assert server.http.get("/openapi.json").json()["openapi"].startswith("3.1")


def test_a_server_whose_model_died_says_so():
    with running() as server:
        server.service.worker.close()
        assert server.http.get("/health").status_code == 503
        with pytest.raises(openai.InternalServerError):
            server.ask(user_message("What?", []), max_tokens=2)


def test_a_broken_batch_is_an_error_and_no_end(monkeypatch):
    """Of the model: those in the batch are told, whole or streamed; the next one is answered."""
    with running() as server:
        batch = server.service.worker.batch
        plain, calls = batch.model.generate, []

        def generate(**inputs):
            calls.append(0)
            if len(calls) == 1:
                raise RuntimeError("out of memory")
            return plain(**inputs)

        monkeypatch.setattr(batch.model, "generate", generate)
        with pytest.raises(openai.InternalServerError, match="could not finish") as caught:
            server.ask(user_message("What?", []), max_tokens=2)
        assert "memory" not in str(caught.value)  # what goes on inside is in the log
        server.ask(user_message("What?", []), max_tokens=2)
        wait_for(lambda: server.metric("requests_total", outcome="failed") == 1)


def test_a_mistake_of_the_server_has_the_protocols_shape(monkeypatch):
    with running() as server:

        async def wrong(*_):
            raise KeyError("some secret")

        monkeypatch.setattr(server.service.reader, "request", wrong)
        response = server.post(chat())
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text
        assert server.http.get("/health").status_code == 200
        wait_for(lambda: server.metric("requests_total", outcome="failed") == 1)
