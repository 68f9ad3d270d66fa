"""A real server in a thread, and what its tests send: protocol messages, data URIs, raw bytes.

One thing a reader would get wrong: the server has an engine of its own, and answers are compared
with those of another one, so that nothing they have in common hides a mistake of the server.
"""

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from PIL import Image

import tiny
from eve_vlm.serve.engine import EveEngine
from eve_vlm.serve.http.app import Service
from eve_vlm.serve.http.limits import Limits
from eve_vlm.serve.http.running import bound, make_server, url_of

for package in ("fastapi", "uvicorn", "openai", "httpx", "prometheus_client"):
    pytest.importorskip(package, reason="needs the extra serve")

import httpx  # noqa: E402
import openai  # noqa: E402

NAME, KEY = "tiny", "sesame"
PATIENCE = 60  # seconds, far above what anything here takes


@dataclass
class Running:
    """A server that runs, and how to reach it."""

    service: Service
    url: str
    client: openai.OpenAI
    http: httpx.Client
    stop: Callable[[], None]
    rows: list[int]  # of each call of the library's generate

    def ask(self, messages: list[dict], **settings: Any) -> Any:
        """By the client, from messages of the engine."""
        return self.client.chat.completions.create(
            model=NAME, messages=protocol(messages), **settings
        )

    def post(self, body: Any, path: str = "/v1/chat/completions", **settings: Any) -> Any:
        """Any JSON, or any bytes as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | settings.pop("headers", {})
        return self.http.post(path, content=content, headers=headers, **settings)

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(f"eve_{name}", labels) or 0.0

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=PATIENCE)

    def raw(self, data: bytes, *, leave: bool = False) -> bytes:
        """Sends bytes and reads until the server closes; with `leave`, as one who sends no more."""
        with self.connect() as sock:
            sock.sendall(data)
            if leave:
                sock.shutdown(socket.SHUT_WR)
            answer = b""
            with suppress(ConnectionResetError):  # when bytes were left unread
                while piece := sock.recv(65536):
                    answer += piece
            return answer


def engine(*, positions: int = 512, batch_size: int = 32, keep_tokens: int = 0) -> EveEngine:
    """A tiny engine; equal ones whenever it is called."""
    model = tiny.model(tiny.config(max_position_embeddings=positions))
    return EveEngine(model, tiny.processor(), batch_size=batch_size, keep_tokens=keep_tokens)


@contextmanager
def running(
    of: EveEngine | None = None, *, keys: tuple[str, ...] = (), grace: float = 5, **limits: Any
) -> Iterator[Running]:
    """A server on a free port of this machine, stopped behind the context."""
    of = of or engine()
    service = Service(of, name=NAME, limits=Limits(**limits))
    rows: list[int] = []
    plain = of.model.generate

    def generate(**inputs: Any) -> Any:
        rows.append(len(inputs["input_ids"]))
        return plain(**inputs)

    of.model.generate = generate  # type: ignore[method-assign]
    with bound("127.0.0.1", 0) as sock:
        server = make_server(service, sock, keys=keys, grace=grace, log_config=None)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        wait_for(lambda: server.started)
        url = url_of(sock)
        stop = partial(setattr, server, "should_exit", True)
        settings: dict[str, Any] = {"timeout": PATIENCE}
        api = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, **settings)
        try:
            with api, httpx.Client(base_url=url, **settings) as http:
                yield Running(service, url, api, http, stop, rows)
        finally:
            stop()
            thread.join()
    assert not service.worker.alive


def wait_for(what: Any) -> None:
    """Waits until it is true; fails when it does not become so."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def data_uri(picture: Image.Image, kind: str = "PNG") -> str:
    """A picture inside a URI; PNG loses nothing."""
    file = io.BytesIO()
    picture.save(file, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def image_part(url: str, **settings: Any) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **settings}}


def protocol(messages: list[dict]) -> list[dict]:
    """The engine's messages as the protocol has them."""

    def part(one: dict) -> dict:
        return image_part(data_uri(one["image"])) if one["type"] == "image" else one

    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [part(one) for one in message["content"]]}
        for message in messages
    ]


def chat(text: str = "What is this?", **settings: Any) -> dict:
    """The body of a small request."""
    messages = [{"role": "user", "content": text}]
    return {"model": NAME, "messages": messages, "max_tokens": 2} | settings


def refusal(response: httpx.Response, status: int) -> dict:
    """The error object of a refused request."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and isinstance(body["error"]["type"], str)
    return body["error"]


def with_picture(*urls: str, **settings: Any) -> dict:
    content = [*map(image_part, urls), {"type": "text", "text": "What is this?"}]
    return chat(messages=[{"role": "user", "content": content}], **settings)
