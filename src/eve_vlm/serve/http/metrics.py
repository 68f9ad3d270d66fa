"""What a server tells Prometheus: requests, tokens, times, and how long the queue is.

Each server has a registry of its own, so that several can live in one process.  Easy to get wrong:
tokens are counted when an answer ends, also one that nobody waits for any more, because the machine
made them all the same.
"""

from typing import Any

from eve_vlm.serve.reply import Answer
from eve_vlm.serve.running_batch import RunningBatch

FIRST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds; prompts on a CPU take long
TOKEN = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
OUTCOMES = ("answered", "refused", "busy", "late", "left", "failed")


class Metrics:
    """Counters of one server."""

    def __init__(self, batch: RunningBatch):
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Gauge,
            Histogram,
            ProcessCollector,
        )

        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory and processor time

        def made(kind: Any, name: str, about: str, **settings: Any) -> Any:
            return kind(f"eve_{name}", about, registry=self.registry, **settings)

        self._requests = made(
            Counter,
            "requests",
            "Chat requests: answered, refused (4xx), busy (429), late (time limit), left (the "
            "client went away), failed (our fault).",
            labelnames=["outcome"],
        )
        for outcome in OUTCOMES:  # so that each is there from the beginning, as 0
            self._requests.labels(outcome)
        self._prompt = made(Counter, "prompt_tokens", "Prompt tokens, pictures included.")
        self._image = made(Counter, "image_tokens", "Prompt tokens that are pictures.")
        self._cached = made(
            Counter, "cached_tokens", "Prompt tokens that an earlier turn had read."
        )
        self._completion = made(Counter, "completion_tokens", "Tokens of answers.")
        self._first = made(
            Histogram,
            "time_to_first_token_seconds",
            "From the place in the queue to the first token.",
            buckets=FIRST,
        )
        self._token = made(
            Histogram, "time_per_token_seconds", "Of each further token.", buckets=TOKEN
        )
        made(Gauge, "waiting_answers", "Answers that wait.").set_function(lambda: batch.waiting)
        made(Gauge, "running_answers", "Answers that are made together now.").set_function(
            lambda: batch.running
        )

    def count(self, outcome: str) -> None:
        """Counts a request that is over."""
        self._requests.labels(outcome).inc()

    def note(self, answer: Answer, *, first: bool) -> None:
        """Counts an answer's tokens, and its prompt's for the first answer; any thread may."""
        made = len(answer.token_ids)
        if first and made:  # else the prompt was perhaps never read
            self._prompt.inc(answer.prompt_tokens)
            self._image.inc(answer.image_tokens)
            self._cached.inc(answer.cached_tokens)
        self._completion.inc(made)
        if made:
            self._first.observe(answer.seconds_to_first)
        if made > 1:
            self._token.observe((answer.seconds - answer.seconds_to_first) / (made - 1))

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


__all__ = ["OUTCOMES", "Metrics"]
