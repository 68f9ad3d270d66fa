"""What every request passes before the application sees it, and what ends it.

Who may ask, how much is read, how long it takes, and that a client who leaves is not answered any
more: all of it is decided here for every route alike, so that the routes only answer.  What a
request holds (places in the queue, answers in the making) is put on its exit stack, and given back
whatever way it ends.

Easy to get wrong: a refusal may be sent before the body was read.  The connection stays open then
and uvicorn throws the rest away; one that is closed on unread bytes resets, and the client never
sees why.
"""

import asyncio
import hashlib
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlsplit

from .limits import Limits, RequestError, Room
from .metrics import Metrics
from .responses import error_event

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LAST_WORDS = 2.0  # seconds in which a client must take in why its request ended
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/health",)  # without a key: whoever watches over a server need not be able to ask


class _LeftError(Exception):
    """The client went away."""


class Gate:
    """An ASGI application around another one.

    Args:
        keys: any of them opens; without any, everybody may ask.
        hosts: names that a request may call this server by; None allows all.  Without this check, a
            web page whose name is made to point at 127.0.0.1 could talk to a server there.
    """

    def __init__(
        self,
        app: App,
        *,
        limits: Limits,
        room: Room,
        metrics: Metrics,
        keys: Collection[str] = (),
        hosts: Collection[str] | None = None,
    ):
        self.app, self.limits, self.room, self.metrics = app, limits, room, metrics
        self._keys = [_digest(key) for key in keys]
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sending, outcome = _Sending(send), ""
        try:
            async with asyncio.timeout(self.limits.seconds):
                with ExitStack() as stack:
                    scope.setdefault("state", {})["stack"] = stack
                    await self._serve(scope, receive, sending, stack)
        except RequestError as error:
            outcome = "busy" if error.status == 429 else "refused"
            await sending.refuse(error)
        except TimeoutError:
            outcome = "late"
            await sending.refuse(
                RequestError(
                    408,
                    f"The answer took longer than {self.limits.seconds:g} s, the limit of this "
                    "server; ask for a shorter one or again later.",
                    code="timeout",
                )
            )
        except _LeftError:
            outcome = "left"
        except asyncio.CancelledError:  # the server stops and waits no longer
            outcome = "failed"
            await sending.refuse(RequestError(503, "The server stops.", code="stopping"))
        finally:
            if scope["method"] == "POST":
                self.metrics.count(outcome or scope["state"].get("outcome") or sending.outcome)

    async def _serve(
        self, scope: Scope, receive: Receive, send: "_Sending", stack: ExitStack
    ) -> None:
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        self._check_host(headers.get("host", b"").decode("latin-1"))
        if scope["path"] not in OPEN_PATHS:
            self._check_key(headers.get("authorization", b""))
        if scope["method"] == "POST":
            stack.enter_context(self.room.taken(1))
        length = int(headers.get("content-length", b"0"))
        # Without a name, so that nobody holds the bytes while the answer is made.
        replay = _replay(await self._body(receive, declared=length))
        await _until_left(self.app(scope, replay, send), receive)

    def _check_host(self, host: str) -> None:
        if self._hosts is None:
            return
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name not in self._hosts:
            raise RequestError(
                403,
                "This server does not answer to that Host; call it by its own name or allow the "
                "other one with --allow-host.",
                code="unknown_host",
            )

    def _check_key(self, authorization: bytes) -> None:
        if not self._keys:
            return
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        # All are compared, and digests have one length: neither tells how close a guess was.
        matches = [hmac.compare_digest(given, own) for own in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise RequestError(
                401,
                "The API key is missing or wrong; send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
            )

    async def _body(self, receive: Receive, *, declared: int) -> bytes:
        """All of the body, counted while it comes in, whatever its header declares."""
        most, body, more = self.limits.max_body, bytearray(), True
        while more and max(declared, len(body)) <= most:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _LeftError
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if max(declared, len(body)) > most:
            raise RequestError(
                413,
                f"The request has more than {most:,} bytes; send smaller pictures.",
                code="request_too_large",
            )
        return bytes(body)


class _Sending:
    """What was sent of a response, so that an error still finds a way to be told."""

    def __init__(self, send: Send):
        self._send = send
        self._status, self._streamed, self._complete = 0, False, False

    @property
    def outcome(self) -> str:
        """The outcome by the status."""
        if 400 <= self._status < 500:
            return "busy" if self._status == 429 else "refused"
        return "answered" if self._complete and self._status < 400 else "failed"

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            kinds = [value for name, value in message["headers"] if name == b"content-type"]
            self._streamed = any(kind.startswith(b"text/event-stream") for kind in kinds)
        await self._send(message)
        self._complete = message["type"] == "http.response.body" and not message.get("more_body")

    async def refuse(self, error: RequestError) -> None:
        """Tells it as a response, or as the last event of a stream that has begun."""
        if self._complete or (self._status and not self._streamed):
            return
        body = json.dumps(error.body).encode()
        with suppress(TimeoutError):  # a client that does not read is not waited for
            async with asyncio.timeout(LAST_WORDS):
                if not self._status:
                    headers = error.headers | {
                        "content-type": "application/json",
                        "content-length": str(len(body)),
                    }
                    raw = [(name.lower().encode(), text.encode()) for name, text in headers.items()]
                    start = {"type": "http.response.start", "status": error.status, "headers": raw}
                    await self(start)
                else:
                    body = error_event(error.body).encode()
                await self({"type": "http.response.body", "body": body})


def _replay(body: bytes) -> Receive:
    """Gives the body once and then nothing, ever: leaving is watched for elsewhere."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Future()
        raise AssertionError("a future that nobody fulfils")

    return receive


async def _until_left(answering: Awaitable[None], receive: Receive) -> None:
    """Awaits an application, and cancels it when the client leaves."""

    async def leaving() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answering), asyncio.ensure_future(leaving())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        left = not tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    if left:
        raise _LeftError
    if error := tasks[0].exception():  # our mistake, of which the client was told
        logger.error("A request met a mistake of the server.", exc_info=error)


def _digest(key: str | bytes) -> bytes:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


__all__ = ["LOOPBACK", "Gate"]
