"""From bytes to replies that wait: pictures are fetched, decoded and cut into patches here.

All of it happens in a few threads of its own, so that a slow host or a large picture holds up
neither the event loop nor the thread that answers.  Easy to get wrong: fetching waits and decoding
computes, so each has threads of its own; somebody's slow hosts must not stop other people's
pictures.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from PIL import Image

from eve_vlm.pictures import WEB_FORMATS, read_picture
from eve_vlm.serve.engine import EveEngine
from eve_vlm.serve.fetch import fetch_picture_bytes, picture_bytes_of_data_uri
from eve_vlm.serve.messages import Messages, picture_parts
from eve_vlm.serve.reply import Reply

from .limits import Limits, RequestError
from .requests import ChatRequest, PictureSource, read_request


class Reader:
    """Reads requests in threads of its own.

    Args:
        kind: the pydantic class of a request.
    """

    def __init__(self, engine: EveEngine, kind: Any, limits: Limits):
        self.engine, self.kind, self.limits = engine, kind, limits
        self._computing = ThreadPoolExecutor(limits.threads, "eve-read")
        self._fetching = ThreadPoolExecutor(limits.fetch_threads, "eve-fetch")

    async def request(self, body: bytes) -> ChatRequest:
        """The request in a body.

        Raises:
            RequestError: if it is not one.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._computing, read_request, body, self.kind, self.limits
        )

    async def replies(self, request: ChatRequest, **listeners: Any) -> list[Reply]:
        """The answers to a request, which wait to be made.

        Args:
            listeners: as `EveEngine.replies` takes them.

        Raises:
            RequestError: if a picture cannot be had or the prompt leaves no room for the answer.
        """
        loop = asyncio.get_running_loop()
        files: list[bytes | None] = [None] * len(request.pictures)
        if not all(_is_data(source) for source in request.pictures):
            files = await loop.run_in_executor(self._fetching, self._fetched, request.pictures)
        make = partial(self._replies, request, files, **listeners)
        return await loop.run_in_executor(self._computing, make)

    def close(self) -> None:
        """Takes nothing new; what runs is not waited for."""
        for pool in (self._computing, self._fetching):
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetched(self, sources: Sequence[PictureSource]) -> list[bytes | None]:
        """The files that come by URL, one after the other: a request is no crowd for a host."""
        files: list[bytes | None] = []
        left = self.limits.max_fetched_bytes
        for source in sources:
            if _is_data(source):
                files.append(None)
                continue
            if not self.limits.fetch:
                raise _refused(source, "Pictures by URL are switched off here; send a data URI.")
            try:
                file = fetch_picture_bytes(
                    source.url,
                    max_bytes=min(left, self.limits.max_picture_bytes),
                    timeout=self.limits.fetch_seconds,
                )
            except ValueError as error:
                raise _refused(source, str(error)) from None
            left -= len(file)
            files.append(file)
        return files

    def _replies(
        self, request: ChatRequest, files: Sequence[bytes | None], **listeners: Any
    ) -> list[Reply]:
        pictures = [
            self._picture(index, source, file)
            for index, (source, file) in enumerate(zip(request.pictures, files, strict=True))
        ]
        messages = _filled(request.messages, pictures)
        try:
            replies = self.engine.replies(messages, request.sampling, request.n, **listeners)
        except ValueError as error:
            raise RequestError(400, str(error), param="messages") from None
        if request.max_tokens is None:
            room = self.engine.max_length - len(replies[0].prompt)
            length = min(self.limits.default_tokens, room)
            for reply in replies:
                reply.sampling = replace(reply.sampling, max_new_tokens=length)
        return replies

    def _picture(self, index: int, source: PictureSource, file: bytes | None) -> Image.Image:
        try:
            if file is None:
                most = self.limits.max_picture_bytes
                file = picture_bytes_of_data_uri(source.url, max_bytes=most)
            return read_picture(
                file,
                name=f"Picture {index + 1}",
                max_pixels=self.limits.max_pixels,
                formats=WEB_FORMATS,
            )
        except ValueError as error:
            raise _refused(source, str(error)) from None


def _is_data(source: PictureSource) -> bool:
    return source.url[:5].lower() == "data:"


def _refused(source: PictureSource, message: str) -> RequestError:
    return RequestError(400, message, param=source.param, code="invalid_image")


def _filled(messages: Messages, pictures: Sequence[Image.Image]) -> Messages:
    """The messages with their pictures in them."""
    filled = [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [dict(part) for part in message["content"]]}
        for message in messages
    ]
    for part, picture in zip(picture_parts(filled), pictures, strict=True):
        part["image"] = picture
    return filled


__all__ = ["Reader"]
