"""The server's service and its routes: requests become replies, and their tokens responses.

One service has one worker, one reader and one set of limits.  Easy to get wrong: an error has a
status only before the first byte, so a streamed response begins when the first token is there and
not when it begins to wait.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any

from eve_vlm.serve.engine import EveEngine
from eve_vlm.serve.reply import Answer, Piece, Reply
from eve_vlm.serve.worker import QueueFullError, Worker

from .gate import Gate
from .limits import Limits, RequestError, Room
from .metrics import Metrics
from .reading import Reader
from .requests import request_class
from .responses import DONE, ChatResponse, error_event

logger = logging.getLogger(__name__)

SCHEMAS = "#/components/schemas/{model}"


class Pieces:
    """Tokens of n answers, handed from the worker's thread to the event loop's."""

    def __init__(self, n: int, metrics: Metrics):
        self.n, self.answers = n, dict[int, Answer]()
        self._metrics, self._loop = metrics, asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece] | BaseException] = asyncio.Queue()

    @property
    def complete(self) -> bool:
        """Whether all answers are finished."""
        return len(self.answers) == self.n

    def listener(self, index: int, piece: Piece) -> None:
        """Takes a piece of one answer; called in the worker's thread."""
        if piece.answer is not None:
            self._metrics.note(piece.answer, first=index == 0)
        self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

    def failed(self, error: BaseException) -> None:
        """Takes note that answering broke; called in the worker's thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, error)

    async def next(self) -> tuple[int, Piece]:
        """The next piece, and of which answer it is.

        Raises:
            RequestError: if answering broke (500); why is in the log.
        """
        taken = await self._queue.get()
        if isinstance(taken, BaseException):
            logger.error("A request failed: %s", taken)
            raise RequestError(
                500, "The model could not finish the answer; ask again.", code="answering_failed"
            )
        index, piece = taken
        if piece.answer is not None:
            self.answers[index] = piece.answer
        return taken


class Service:
    """All that answers, without HTTP.

    Args:
        name: of the model, as clients say it.
    """

    def __init__(self, engine: EveEngine, *, name: str, limits: Limits | None = None):
        self.engine, self.name, self.limits = engine, name, limits or Limits()
        places = engine.batch_size + self.limits.queue
        self.worker = Worker(engine, queue_size=places)
        self.room = Room(places)
        self.metrics = Metrics(self.worker.batch)
        self.request_class = request_class(self.limits, name=name)
        self.reader = Reader(engine, self.request_class, self.limits)

    def close(self) -> None:
        """Stops at the next token."""
        self.reader.close()
        self.worker.close()

    def require_model(self, name: str) -> None:
        """Refuses any other name than this model's.

        Raises:
            RequestError: if it is another one (404).
        """
        if name != self.name:
            raise RequestError(
                404,
                f"There is no model {name[:100]!r} here, only {self.name!r}.",
                param="model",
                code="model_not_found",
            )

    async def chat(self, body: bytes, stack: ExitStack) -> tuple[ChatResponse, Pieces]:
        """Lets the answers to a request wait for their turn, until the first token is there.

        Args:
            stack: holds what the request takes up; closing it ends its answers.

        Raises:
            RequestError: if the request is bad, too many wait, or nobody answers.
        """
        request = await self.reader.request(body)
        self.require_model(request.model)
        stack.enter_context(self.room.taken(request.n - 1))  # one is taken since it came in
        pieces = Pieces(request.n, self.metrics)
        listeners = [partial(pieces.listener, index) for index in range(request.n)]
        replies = await self.reader.replies(request, on_piece=listeners, on_error=pieces.failed)
        stack.callback(_cancel, replies)
        if not self.worker.alive:
            raise RequestError(503, "The model does not answer any more.", code="stopped")
        try:
            self.worker.enqueue(replies)
        except QueueFullError as error:  # of replies that were given up while they waited
            raise RequestError(429, str(error), code="queue_full") from None
        response = ChatResponse(
            model=self.name,
            stream=request.stream,
            include_usage=request.include_usage,
            token_ids=request.token_ids,
        )
        return response, pieces

    def model(self) -> dict[str, Any]:
        """The model as `/v1/models` shows it."""
        from openai.types import Model

        model = Model(id=self.name, created=0, object="model", owned_by="eve")
        return model.model_dump() | {"max_model_len": self.engine.max_length}


def _cancel(replies: list[Reply]) -> None:
    for reply in replies:
        reply.cancel()


async def _events(
    response: ChatResponse, pieces: Pieces, first: tuple[int, Piece], state: Any
) -> AsyncIterator[str]:
    """The events of a streamed response, whose first piece is there."""
    try:
        yield "".join(map(response.role, range(pieces.n))) + response.piece(*first)
        while not pieces.complete:
            if text := response.piece(*await pieces.next()):
                yield text
        yield response.usage(pieces.answers) + DONE
    except RequestError as error:
        state.outcome = "failed"
        yield error_event(error.body)


def make_app(
    service: Service, *, keys: Collection[str] = (), hosts: Collection[str] | None = None
) -> Gate:
    """The ASGI application of a service; when it shuts down, the service is closed.

    Args:
        keys, hosts: see `Gate`.
    """
    from fastapi import FastAPI

    from eve_vlm import __version__

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title=f"EVE serves {service.name}",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    _add_errors(app)
    _add_chat(app, service)
    _add_models(app, service)
    _add_watching(app, service)
    return Gate(
        app,
        limits=service.limits,
        room=service.room,
        metrics=service.metrics,
        keys=keys,
        hosts=hosts,
    )


def _add_errors(app: Any) -> None:
    """Every error as the protocol's object."""
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def refuse(_: Request, error: Exception) -> JSONResponse:
        headers: Any = {}
        if isinstance(error, HTTPException):  # no such route, or not this method
            headers, status = error.headers, error.status_code
            error = RequestError(status, f"{error.detail}; see /openapi.json.", code="no_route")
        if not isinstance(error, RequestError):  # our mistake, which the gate logs
            error = RequestError(500, "The server made a mistake.", code="internal_error")
        return JSONResponse(error.body, error.status, {**error.headers, **(headers or {})})

    for kind in (RequestError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)


def _error_responses() -> dict[int | str, dict[str, Any]]:
    """What the document says of errors."""
    from pydantic import BaseModel

    class Error(BaseModel):
        message: str
        type: str
        param: str | None
        code: str | None

    class ErrorResponse(BaseModel):
        error: Error

    return {"4XX": {"model": ErrorResponse, "description": "Refused; `message` says why."}}


def _add_chat(app: Any, service: Service) -> None:
    from fastapi import Request, Response
    from fastapi.responses import StreamingResponse
    from openai.types.chat import ChatCompletion

    schema = service.request_class.model_json_schema(ref_template=SCHEMAS)
    shared = schema.pop("$defs")
    about = "The JSON of an OpenAI chat.completion.chunk, or [DONE]."
    event = {"type": "object", "properties": {"data": {"type": "string", "description": about}}}
    streamed = {"text/event-stream": {"schema": event}}

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": streamed}, **_error_responses()},
        openapi_extra={
            "requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}
        },
    )
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation; with `stream` token by token, as server-sent events."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # other types need no permission to be sent by a web page
            raise RequestError(415, "Send the request as Content-Type: application/json.")
        response, pieces = await service.chat(
            # Not `request.body()`, which would hold the pictures until the answer ends.
            b"".join([chunk async for chunk in request.stream()]),
            request.state.stack,
        )
        first = await pieces.next()
        if response.stream:
            return StreamingResponse(
                _events(response, pieces, first, request.state),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        while not pieces.complete:
            await pieces.next()
        # In a thread: thousands of tokens with their likeliest ones take seconds to write.
        text = await asyncio.to_thread(response.whole, pieces.answers)
        return Response(text, media_type="application/json")

    documented = app.openapi

    def openapi() -> dict[str, Any]:
        document = documented()
        document["components"]["schemas"] |= shared
        return document

    app.openapi = openapi


def _add_models(app: Any, service: Service) -> None:
    from fastapi.responses import JSONResponse
    from openai.types import Model

    @app.get("/v1/models", responses=_error_responses())
    async def models() -> JSONResponse:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [service.model()]})

    @app.get("/v1/models/{name:path}", response_model=Model, responses=_error_responses())
    async def model(name: str) -> JSONResponse:
        """The model of this name."""
        service.require_model(name)
        return JSONResponse(service.model())


def _add_watching(app: Any, service: Service) -> None:
    from fastapi.responses import JSONResponse, Response

    @app.get("/health", responses={503: {"description": "The model does not answer."}})
    async def health() -> JSONResponse:
        """Whether the model is loaded and answers."""
        alive = service.worker.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/metrics", response_class=Response, responses=_error_responses())
    async def metrics() -> Response:
        """Counters for Prometheus."""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(service.metrics.text(), media_type=kind)


__all__ = ["Pieces", "Service", "make_app"]
