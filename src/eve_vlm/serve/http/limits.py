"""What one client may ask of a server, and the refusal that it gets otherwise.

Every number that keeps a stranger from using up the machine is here, in one place, and the request
classes and the OpenAPI document take their bounds from it.  Easy to get wrong: a limit that is
checked after the work is done limits nothing, so each is checked before memory or time is spent.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

LOW_DETAIL_TOKENS = 85  # of a picture with `detail: "low"`, as the protocol's inventor counts it
RETRY_AFTER = 1  # second; a queue moves with every answer that ends
# OpenAI's words for the kinds of errors; clients choose their exception by the status alone.
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
KINDS |= {408: "timeout_error", 429: "rate_limit_error"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of a server, for each request unless it says otherwise.

    Raises:
        ValueError: for a limit that would refuse everything.
    """

    max_body: int = 32 * 2**20
    """Bytes of a request, pictures included (base64 takes a third more than the file)."""
    max_pictures: int = 16
    """Pictures of all turns together."""
    max_picture_bytes: int = 16 * 2**20
    """Bytes of one picture file."""
    max_fetched_bytes: int = 32 * 2**20
    """Bytes of all pictures that come by URL."""
    max_pixels: int = 32_000_000
    """Width times height of one picture; read from its header before it is decoded."""
    max_text: int = 200_000
    """Letters of all turns together."""
    max_messages: int = 256
    """Turns of the conversation."""
    max_tokens: int = 4096
    """Longest answer that may be asked for, in tokens."""
    default_tokens: int = 512
    """Longest answer where the request names no length; less if the model has less room."""
    max_answers: int = 8
    """Answers to one request (`n`)."""
    queue: int = 64
    """Answers that may wait beside those that are made together, of all requests."""
    seconds: float = 600.0
    """From the first byte of a request to the last one of its answer."""
    fetch_seconds: float = 10.0
    """For one picture that comes by URL."""
    fetch: bool = True
    """Whether pictures may come by https URL at all."""
    threads: int = 2
    """Pictures that are decoded at the same time, of all requests."""
    fetch_threads: int = 8
    """Requests whose pictures are fetched at the same time."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name in ("queue", "max_pictures", "fetch") else 1
            if not least <= value < math.inf:
                raise ValueError(f"{name} is {value}; give a number of at least {least}.")


class RequestError(Exception):
    """A request that is refused, as the protocol says it.

    Args:
        message: a sentence for people.
        param: the part of the request that is wrong.
        code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The protocol's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": KINDS.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        if self.status == 429:
            return {"Retry-After": str(RETRY_AFTER)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


class Room:
    """Counts the answers that are being made or wait, from before their request is read.

    Only the event loop's thread uses it.
    """

    def __init__(self, size: int):
        self.size, self.used = size, 0

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Takes room for so many answers while the context lasts.

        Raises:
            RequestError: if there is none (429).
        """
        if self.used + count > self.size:
            raise RequestError(
                429,
                f"{self.used} answers are being made or wait already, and at most {self.size} may; "
                "ask again later.",
                code="queue_full",
            )
        self.used += count
        try:
            yield
        finally:
            self.used -= count


__all__ = ["LOW_DETAIL_TOKENS", "Limits", "RequestError", "Room"]
