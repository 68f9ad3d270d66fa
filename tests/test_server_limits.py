"""What the server refuses, and that whoever leaves, is late or is one too many costs nobody else.

Every refusal is a 4xx in the protocol's shape; no request of a client is answered with a 5xx. One
thing a reader would get wrong: times here are limits far above what is needed, or far below what an
answer takes, so that a slow machine changes nothing.
"""

import json
import time
import tracemalloc

import pytest

import tiny
from eve_vlm.serve.engine import user_message
from serving import KEY, NAME, chat, data_uri, engine, refusal, running, wait_for, with_picture

import openai  # isort: skip  # behind serving, which skips all where it is lacking

LONG = {"max_tokens": 60_000, "stream": True}


@pytest.fixture(scope="module")
def server():
    with running(max_body=200_000, max_pictures=3, max_text=1000, max_pixels=10_000) as made:
        yield made


# --- who may ask ----------------------------------------------------------------------------------


def test_keys():
    with running(keys=("other", KEY)) as server:
        server.ask(user_message("What?", []), max_tokens=1)
        for header in ({}, {"Authorization": "Bearer no"}, {"Authorization": f"Basic {KEY}"}):
            error = refusal(server.post(chat(), headers=header), 401)
            assert error["code"] == "invalid_api_key" and KEY not in error["message"]
            for path in ("/metrics", "/v1/models", "/openapi.json", "/nothing"):
                refusal(server.http.get(path, headers=header), 401)
        with pytest.raises(openai.AuthenticationError):
            server.client.with_options(api_key="Other").models.list()
        assert server.http.get("/health").status_code == 200
        assert server.post(chat(), headers={"Authorization": "bearer other"}).status_code == 200


@pytest.mark.parametrize("host", ["evil.test", "evil.test:80", "127.0.0.1.evil.test", "", "[::1"])
def test_a_foreign_host_is_refused(server, host):
    """A web page whose name points at 127.0.0.1 sends its own name."""
    error = refusal(server.post(chat(), headers={"Host": host}), 403)
    assert error["code"] == "unknown_host"


def test_this_machines_names_are_answered_to(server):
    for host in ("localhost", "LOCALHOST:1234", "127.0.0.1:80", "[::1]:8000"):
        assert server.http.get("/health", headers={"Host": host}).status_code == 200
    assert b" 403 " in server.raw(b"GET /health HTTP/1.0\r\n\r\n")  # none at all


def test_web_pages_get_no_permission(server):
    """No CORS: a page may not ask first, nor read an answer."""
    headers = {"Origin": "https://evil.test", "Access-Control-Request-Method": "POST"}
    response = server.http.options("/v1/chat/completions", headers=headers)
    refusal(response, 405)
    answer = server.post(chat(), headers=headers)
    for one in (response, answer):
        assert not [name for name in one.headers if name.startswith("access-control")]


# --- what is no request ---------------------------------------------------------------------------

DEEP = b'{"model":"tiny","messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
MESSAGE = b'{"model":"tiny","max_tokens":1,"messages":[{"role":"user","content":%s}]}'
FIELD = b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"max_tokens":%s}'
MALFORMED = {
    "nothing": b"",
    "blank": b" ",
    "no JSON": b"hello",
    "cut": b'{"model":',
    "twice": json.dumps(chat()).encode() * 2,
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "a text": b'"x"',
    "single quotes": b"{'model': 'tiny'}",
    "a comma too many": b'{"model":"tiny",}',
    "a comment": b'{"model":"tiny"/* */}',
    "not UTF-8": MESSAGE % b'"\xff\xfe"',
    "UTF-16": json.dumps(chat()).encode("utf-16"),
    "a mark in front": b"\xef\xbb\xbf" + json.dumps(chat()).encode(),
    "half a letter": MESSAGE % b'"\\ud800"',
    "half a letter in a name": b'{"\\udc00":1}',
    "a control character": MESSAGE % b'"\x01"',
    "deep": DEEP,
    "deep objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "many values": b'{"model":"tiny","messages":[' + b"1," * 60_000 + b"1]}",
    "many names": b"{" + b",".join(b'"a%d":1' % one for one in range(9000)) + b"}",
    "NaN": FIELD % b"NaN",
    "infinity": FIELD % b"-Infinity",
    "beyond floats": FIELD % b"1e999",
    "huge": FIELD % (b"9" * 5000),
    "a fraction": FIELD % b"1.5",
    "a text for a number": FIELD % b'"1"',
    "true for a number": FIELD % b"true",
    "negative": FIELD % b"-1",
    "no model": b'{"messages":[{"role":"user","content":"x"}]}',
    "no messages": b'{"model":"tiny"}',
    "empty messages": b'{"model":"tiny","messages":[]}',
    "messages as a text": b'{"model":"tiny","messages":"x"}',
    "no role": b'{"model":"tiny","messages":[{"content":"x"}]}',
    "another role": b'{"model":"tiny","messages":[{"role":"tool","content":"x"}]}',
    "a list as role": b'{"model":"tiny","messages":[{"role":[],"content":"x"}]}',
    "no content": b'{"model":"tiny","messages":[{"role":"user"}]}',
    "null content": MESSAGE % b"null",
    "no parts": MESSAGE % b"[]",
    "texts as parts": MESSAGE % b'["x"]',
    "another part": MESSAGE % b'[{"type":"input_audio","input_audio":{}}]',
    "a picture without URL": MESSAGE % b'[{"type":"image_url","image_url":{}}]',
    "a URL as a text": MESSAGE % b'[{"type":"image_url","image_url":"https://x.test/"}]',
    "another detail": MESSAGE
    % b'[{"type":"image_url","image_url":{"url":"https://x.test/","detail":"ultra"}}]',
    "too long": MESSAGE % (b'"' + b"x" * 1001 + b'"'),
    "too long in parts": MESSAGE % (b"[" + b",".join([b'{"type":"text","text":"%s"}' % (b"x" * 600)] * 2) + b"]"),
    "a mark of a picture in the words": MESSAGE % b'"<image>"',
    "a name": b'{"model":"tiny","messages":[{"role":"user","content":"x","name":"y"}]}',
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_malformed_requests(server, name, stream):
    body = MALFORMED[name]
    if stream:
        body = body.replace(b'{"model":"tiny",', b'{"model":"tiny","stream":true,', 1)
    error = refusal(server.post(body), 400)
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 1000


@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_other_content_types(server, kind):
    """A web page may send these to anybody without asking first."""
    content = json.dumps(chat()).encode()
    headers = {} if kind is None else {"Content-Type": kind}
    refusal(server.http.post("/v1/chat/completions", content=content, headers=headers), 415)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("BREW", "/health", 405),
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("POST", "/v1/completions", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "//evil.test/..", 404),
        ("GET", "/v1/models/%00%ff%2e%2e%2f", 404),
        ("GET", "/v1/models/" + "x" * 9000, 404),
    ],
)
def test_other_methods_and_routes(server, method, path, status):
    refusal(server.http.request(method, path), status)


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no Host
        b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 10**6 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    ],
    ids=range(10),
)
def test_what_is_no_http(server, data):
    """Refused by uvicorn, in its own words; the server lives on."""
    answer = server.raw(data)
    assert not answer or b" 4" in answer.split(b"\r\n")[0]
    assert server.http.get("/health").status_code == 200


# --- how much -------------------------------------------------------------------------------------


def test_a_body_too_large_is_counted_while_it_comes_in(server):
    """Declared, or in chunks that declare nothing; the client of a large picture sees why."""
    error = refusal(server.post(b"x" * 300_000), 413)
    assert "200,000 bytes" in error["message"] and error["code"] == "request_too_large"
    chunks = iter([b"x" * 50_000] * 8)
    headers = {"Content-Type": "application/json"}
    refusal(server.http.post("/v1/chat/completions", content=chunks, headers=headers), 413)
    with pytest.raises(openai.APIStatusError) as caught:
        server.ask(user_message("What?", [tiny.picture(400, 400)]))
    assert caught.value.status_code == 413


def test_a_body_that_only_its_header_has(server):
    """Refused before any of it comes, so nobody has to read it."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
    with server.connect() as sock:
        sock.sendall(head + b"Content-Length: 100000000000\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("declared", [-20, 20])
def test_a_body_of_another_length_than_its_header_says(server, declared):
    """Cut at the declared length, so it is no JSON; or awaited, until the client is gone."""
    body = json.dumps(chat()).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body) + declared}\r\n\r\n"
    )
    answer = server.raw(head.encode() + body, leave=declared > 0)
    assert answer.startswith(b"HTTP/1.1 400 ") if declared < 0 else answer == b""
    wait_for(lambda: server.service.room.used == 0)


def test_a_request_is_not_held_while_its_answer_is_made():
    """Of a body of 4 MB nothing large is left when the first token is there."""
    body = json.dumps(with_picture(data_uri(tiny.picture(1000, 1000)), **LONG)).encode()  # noise
    assert len(body) > 3_000_000
    with running(engine(positions=65_536), max_tokens=60_000) as server:
        tracemalloc.start()
        try:
            headers = {"Content-Type": "application/json"}
            with server.http.stream(
                "POST", "/v1/chat/completions", content=body, headers=headers
            ) as stream:
                next(stream.iter_lines())
                held = max(trace.size for trace in tracemalloc.take_snapshot().traces)
        finally:
            tracemalloc.stop()
    assert held < 1_000_000


def test_pictures_are_counted(server):
    picture = data_uri(tiny.picture(8, 8))
    assert server.post(with_picture(*[picture] * 3)).status_code == 200
    assert (
        "4 pictures; at most 3"
        in refusal(server.post(with_picture(*[picture] * 4)), 400)["message"]
    )


# --- how many and how long ------------------------------------------------------------------------


@pytest.fixture
def narrow():
    """One answer at a time, one more may wait, and room for an answer of minutes."""
    with running(engine(positions=65_536, batch_size=1), queue=1, max_tokens=60_000) as made:
        yield made


def test_a_client_that_leaves_a_stream_frees_its_slot(narrow):
    stream = narrow.ask(user_message("Say more.", []), **LONG)
    next(iter(stream))
    stream.close()
    told = narrow.ask(user_message("What?", []), max_tokens=2)
    assert told.usage.completion_tokens == 2
    wait_for(lambda: narrow.service.room.used == 0)
    wait_for(lambda: narrow.metric("requests_total", outcome="left") == 1)
    assert narrow.metric("completion_tokens_total") < 30_000


def test_a_client_that_leaves_without_a_stream_frees_its_slot(narrow):
    patient = narrow.client.with_options(timeout=1)
    with pytest.raises(openai.APITimeoutError):
        patient.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "Say more."}], max_tokens=60_000
        )
    assert narrow.ask(user_message("What?", []), max_tokens=2).usage.completion_tokens == 2
    assert narrow.metric("completion_tokens_total") < 30_000


def test_a_full_queue_and_who_leaves_it(narrow):
    """Who leaves the queue makes room in it at once, although a long answer is being made."""
    running_one = narrow.ask(user_message("Say more.", []), **LONG)
    next(iter(running_one))
    for _ in range(3):
        waiting = narrow.connect()
        body = json.dumps(chat(stream=True)).encode()
        waiting.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        wait_for(lambda: narrow.service.worker.batch.waiting == 1)
        response = narrow.post(chat())
        error = refusal(response, 429)
        assert error["code"] == "queue_full" and int(response.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            narrow.ask(user_message("What?", []), max_tokens=2)
        assert narrow.http.get("/health").status_code == 200
        waiting.close()
        wait_for(lambda: narrow.service.room.used == 1)
    wait_for(lambda: narrow.metric("requests_total", outcome="busy") == 6)
    running_one.close()
    wait_for(lambda: narrow.service.room.used == 0)
    refusal(narrow.post(chat(n=3)), 429)  # each answer takes a place
    assert narrow.post(chat(n=2)).status_code == 200


def test_given_up_replies_are_not_kept(narrow):
    """Who asks and leaves over and over, behind a long answer, fills no memory."""
    long = narrow.ask(user_message("Say more.", []), **LONG)
    next(iter(long))
    batch = narrow.service.worker.batch
    for _ in range(5):
        with pytest.raises(openai.APITimeoutError):
            narrow.client.with_options(timeout=0.3).chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "What?"}], max_tokens=2
            )
        wait_for(lambda: narrow.service.room.used == 1)
    assert len(batch._waiting) <= 1
    long.close()


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_limit(stream):
    """A status before the first byte; behind it, an error inside the stream."""
    of = engine(positions=65_536, batch_size=1)
    with running(of, seconds=1.5, max_tokens=60_000) as server:
        start = time.monotonic()
        if stream:
            with pytest.raises(openai.APIError, match=r"longer than 1.5 s") as caught:
                for _ in server.ask(user_message("Say more.", []), **LONG):
                    pass
            assert not isinstance(caught.value, openai.APIStatusError)
            assert caught.value.code == "timeout"
        else:
            with pytest.raises(openai.APIStatusError) as failed:
                server.ask(user_message("Say more.", []), max_tokens=60_000)
            assert failed.value.status_code == 408 and failed.value.type == "timeout_error"
        assert 1.4 < time.monotonic() - start < 30
        assert server.ask(user_message("What?", []), max_tokens=2).usage.completion_tokens == 2
        wait_for(lambda: server.metric("requests_total", outcome="late") == 1)
        wait_for(lambda: server.service.room.used == 0)


def test_a_body_that_never_comes_is_not_waited_for_forever():
    with running(seconds=1) as server, server.connect() as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
        )
        assert sock.recv(65536).startswith(b"HTTP/1.1 408 ")
        wait_for(lambda: server.service.room.used == 0)


def test_running_answers_are_ended_when_the_server_stops():
    """After the grace they are told, in the stream."""
    of = engine(positions=65_536)
    with running(of, max_tokens=60_000, grace=1) as server:
        stream = iter(server.ask(user_message("Say more.", []), **LONG))
        next(stream)
        server.stop()
        with pytest.raises(openai.APIError, match="The server stops"):
            for _ in stream:
                pass
