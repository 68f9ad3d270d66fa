"""A thread that answers whoever asks: what a server, a page and a chat share.

Requests that wait together are answered together, and a newcomer joins between two tokens.  Easy to
get wrong: listeners are called in this thread, so they hand on and return; and `submit` reads
pictures and words in the caller's thread, so that a bad request is refused there and costs nobody
else anything.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .engine import EveEngine
from .messages import Messages
from .reply import Piece, Reply
from .sampling import Sampling

logger = logging.getLogger(__name__)


class Worker:
    """Answers in the background until it is closed; also a context manager.

    Args:
        size: answers that are made together at most; the engine's own if not given.
        queue_size: replies that may wait; more are refused.
    """

    def __init__(self, engine: EveEngine, *, size: int | None = None, queue_size: int = 256):
        self.engine, self.queue_size = engine, queue_size
        self.batch = engine.batch(size or engine.batch_size)
        self._work = threading.Event()
        self._closed = False
        self._pausing = threading.Lock()
        self._thread = threading.Thread(target=self._answer, name="eve-worker", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self._thread.is_alive() and not self._closed

    def submit(
        self,
        messages: Messages,
        sampling: Sampling,
        *,
        n: int = 1,
        on_piece: Sequence[Callable[[Piece], None]],
        on_error: Callable[[BaseException], None] | None = None,
    ) -> list[Reply]:
        """Lets n answers wait for their turn; `on_piece` has one listener for each of them.

        Raises:
            ValueError: if the request is bad (see `EveEngine.answer`).
            QueueFullError: if too many wait already.
        """
        self.require_room(n)
        replies = self.engine.replies(messages, sampling, n, on_piece=on_piece, on_error=on_error)
        self.enqueue(replies)
        return replies

    def require_room(self, n: int = 1) -> None:
        """Refuses early, before pictures are read.

        Raises:
            QueueFullError: if n more would be too many.
        """
        if self.batch.waiting + n > self.queue_size:
            raise QueueFullError(
                f"{self.batch.waiting} answers wait already, and at most {self.queue_size} may; "
                "ask again later."
            )

    def enqueue(self, replies: list[Reply]) -> None:
        """Puts replies that `EveEngine.replies` made into the queue.

        Raises:
            QueueFullError: if they are too many.
        """
        self.require_room(len(replies))
        self.batch.add(replies)
        self._work.set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gives the caller the model between two tokens of whoever is being answered.

        `EveEngine.lock` alone would wait until an answer ends.
        """
        with self._pausing:
            self.batch.may_go_on.clear()
            try:
                with self.engine.lock:
                    yield
            finally:
                self.batch.may_go_on.set()

    def close(self) -> None:
        """Stops at the next token; whoever still waits is told."""
        self._closed = True
        self._work.set()
        self._thread.join()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answer(self) -> None:
        try:
            while not self._closed:
                self._work.wait()
                self._work.clear()
                while self.batch.busy and not self._closed:
                    self.batch.may_go_on.wait()
                    try:
                        with self.engine.lock:
                            self.batch.step()
                    except RuntimeError as error:
                        # Whoever was being answered has been told; those behind them go on.
                        logger.error("A batch broke and its answers failed: %s", error)
        finally:
            self.batch.fail_all(RuntimeError("The server stopped before it could answer."))


class QueueFullError(RuntimeError):
    """Too many requests wait; the client may ask again later."""


__all__ = ["QueueFullError", "Worker"]
