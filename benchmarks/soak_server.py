"""Lets many kinds of clients loose on a real `eve serve` for minutes, and checks what must hold.

    python benchmarks/soak_server.py MODEL --minutes 10

Clients ask with and without pictures, whole and streamed, in several turns and for several answers;
some leave midway, some send nonsense, some open a new connection each time.  It checks that nothing
is answered with a 5xx, that every request gets exactly one answer, and the right one, that the
server's own counts agree, and that its memory does not grow.  One line of JSON says what was seen;
the exit code is 1 when something did not hold.

Easy to get wrong: memory is flat only behind a warm-up, in which caches and thread pools fill.
"""

import argparse
import base64
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
from PIL import Image

MIB = 2**20
WARM_UP = 0.2  # of the time
# Growth of the last quarter's mean over that of the first behind the warm-up: a leak of 1 KiB for
# each request would be 40 MiB in ten minutes of 70 requests a second.
MOST_GROWTH = 1.03
MOST_GROWTH_BYTES = 8 * MIB  # or this much, what the allocator keeps of one large batch
LENGTHS = (2, 5, 12)
BAD = (
    b"",
    b"{",
    b'{"model": NaN}',
    b'{"model":"other","messages":[{"role":"user","content":"?"}]}',
    b'{"messages":' + b"[" * 5000,
    b'{"model":"%s","messages":[{"role":"user","content":"?"}],"tools":[1]}',
    b'{"model":"%s","messages":[{"role":"user","content":[{"type":"image_url","image_url":'
    b'{"url":"https://127.0.0.1/x.png"}}]}]}',
    b'{"model":"%s","messages":[{"role":"user","content":[{"type":"image_url","image_url":'
    b'{"url":"data:image/png;base64,iVBORw0KGgo="}}]}]}',
)


@contextmanager
def served(model: str, *options: str) -> Iterator[str]:
    """`eve serve` in a process of its own; its URL.  Stopped as Ctrl-C stops it."""
    command = [sys.executable, "-m", "eve_vlm.cli", "serve", model, "--port", "0", *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"Listens on (\S+)/v1", line):
                break
        else:
            raise SystemExit("eve serve did not start:\n" + "".join(lines[-20:]))
        # Its log is read on, or the pipe would fill and hold it up.
        threading.Thread(target=lambda: [None for _ in process.stdout], daemon=True).start()
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)


def question(number: int) -> list[dict[str, Any]]:
    """The messages of a question; the same number asks the same."""
    rng = random.Random(number)
    content: list[dict[str, Any]] = []
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        size = rng.choice([(40, 30), (300, 200), (64, 640)])
        picture = Image.new("RGB", size, tuple(rng.choices(range(256), k=3)))
        picture.putpixel((0, 0), (number % 256, 0, 0))
        file = io.BytesIO()
        picture.save(file, format=rng.choice(["PNG", "JPEG"]))
        url = f"data:image/any;base64,{base64.b64encode(file.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": f"What is this, number {number}?"})
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if rng.random() < 0.3:
        turns += [{"role": "assistant", "content": "It is a colour."}]
        turns += [{"role": "user", "content": "Which one?"}]
    return turns


class Soak:
    """What all clients share."""

    def __init__(self, url: str, *, questions: int):
        self.url = url
        self.model = self.client().models.list().data[0].id
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.ids: set[str] = set()
        self.memory: list[tuple[float, float]] = []
        self._lock = threading.Lock()
        self.questions = [
            (question(number), length) for number in range(questions) for length in LENGTHS
        ]
        # What each gets alone, before anybody else is there.
        client = self.client()
        self.alone = [
            self._create(client, messages, length).choices[0].message.content
            for messages, length in self.questions
        ]

    def client(self) -> openai.OpenAI:
        """A client that gives up at the first refusal."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def _create(
        self, client: openai.OpenAI, messages: list[Any], length: int, **settings: Any
    ) -> Any:
        return client.chat.completions.create(
            model=self.model, messages=messages, max_tokens=length, **settings
        )

    def note(self, kind: str, wrong: str = "") -> None:
        """Counts what a client saw."""
        with self._lock:
            self.seen[kind] += 1
            if wrong:
                self.wrong.append(f"{kind}: {wrong}")

    def answered(self, kind: str, id: str, told: list[str], expected: str) -> None:
        """One request's one answer, and the right one."""
        with self._lock:
            twice = id in self.ids
            self.ids.add(id)
        same = all(one == expected for one in told)
        wrong = "" if same and not twice else f"{told!r}, not {expected!r}, id {id}"
        self.note(kind, wrong)

    # --- kinds of clients ---

    def whole(self, client: openai.OpenAI, rng: random.Random) -> None:
        """Waits for one or two answers."""
        index = rng.randrange(len(self.questions))
        completion = self._create(client, *self.questions[index], n=rng.choice([1, 1, 2]))
        told = [choice.message.content for choice in completion.choices]
        self.answered("whole", completion.id, told, self.alone[index])

    def streamed(self, client: openai.OpenAI, rng: random.Random) -> None:
        """Reads a stream to its end."""
        index = rng.randrange(len(self.questions))
        chunks = list(self._create(client, *self.questions[index], stream=True))
        told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        ends = [
            chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason
        ]
        self.answered("streamed", chunks[0].id, [told], self.alone[index])
        if len(ends) != 1 or len({chunk.id for chunk in chunks}) != 1:
            self.note("streamed twice", f"{ends}")

    def leaving(self, client: openai.OpenAI, rng: random.Random) -> None:
        """After some tokens, or before the first."""
        messages, _ = rng.choice(self.questions)
        if rng.random() < 0.5:
            stream = self._create(client, messages, 200, stream=True)
            for _ in zip(range(rng.randint(1, 9)), stream, strict=False):
                pass
            stream.close()
        else:
            try:
                quick = client.with_options(timeout=rng.uniform(0.001, 0.2))
                self._create(quick, messages, 200)
            except (openai.APITimeoutError, openai.APIConnectionError):
                pass
        self.note("leaving")

    def bad(self, http: httpx.Client, rng: random.Random) -> None:
        """Sends what must be refused."""
        body = rng.choice(BAD).replace(b"%s", self.model.encode())
        response = http.post(
            "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
        )
        if response.status_code == 429:
            self.note("busy")
            return
        refused = 400 <= response.status_code < 500 and "error" in response.json()
        self.note("bad", "" if refused else f"{response.status_code} for {body[:80]!r}")

    def run_client(self, number: int, until: float) -> None:
        """One client until the end: mostly over one connection, sometimes over a new one."""
        rng = random.Random(number)
        client, http = self.client(), httpx.Client(base_url=self.url, timeout=120)
        while time.monotonic() < until:
            if rng.random() < 0.1:
                client.close()
                client = self.client()
            kind = rng.choices([self.whole, self.streamed, self.leaving, self.bad], [5, 5, 2, 2])[0]
            try:
                kind(http if kind == self.bad else client, rng)
            except openai.RateLimitError:
                self.note("busy")  # as a full queue says it, and no fault
                time.sleep(rng.uniform(0, 0.2))
            except (openai.OpenAIError, httpx.HTTPError) as error:
                self.note("failed", f"{kind.__name__}: {error!r}")
        client.close()
        http.close()

    # --- what the server says of itself ---

    def metrics(self) -> dict[str, float]:
        """The server's metrics by name."""
        lines = httpx.get(f"{self.url}/metrics", timeout=120).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def watch(self, until: float) -> None:
        """Notes the memory until the end."""
        while time.monotonic() < until:
            memory = self.metrics()["process_resident_memory_bytes"]
            self.memory.append((time.monotonic(), memory))
            time.sleep(0.5)


def soak(model: str, *, minutes: float, clients: int, questions: int) -> dict[str, Any]:
    """Runs all of it; `problems` is empty when everything held."""
    # A place for each client, but some ask for two answers: a few are told to come back.
    options = ("--batch-size", str(max(2, clients // 2)), "--queue", str(clients // 2))
    with served(model, *options) as url:
        made = Soak(url, questions=questions)
        before, start = made.metrics(), time.monotonic()
        until = start + 60 * minutes
        threads = [
            threading.Thread(target=made.run_client, args=(number, until))
            for number in range(clients)
        ]
        threads.append(threading.Thread(target=made.watch, args=(until,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        end = time.monotonic() + 30
        while (after := made.metrics())["eve_running_answers"] + after["eve_waiting_answers"]:
            assert time.monotonic() < end, "answers are made for nobody"
            time.sleep(0.1)
    counted = {name: after[name] - before[name] for name in after if name in before}
    outcomes = {
        name: int(counted[f'eve_requests_total{{outcome="{name}"}}'])
        for name in ("answered", "refused", "busy", "late", "left", "failed")
    }
    warm = [value for moment, value in made.memory if moment > start + WARM_UP * 60 * minutes]
    quarter = max(1, len(warm) // 4)
    first, last = (sum(part) / len(part) for part in (warm[:quarter], warm[-quarter:]))
    seen = made.seen
    problems = made.wrong[:20]
    if outcomes["failed"] or outcomes["late"]:
        problems.append(f"the server counts {outcomes}")
    if outcomes["refused"] != seen["bad"]:
        problems.append(f"{seen['bad']} bad requests, {outcomes['refused']} refused")
    # Who leaves may have been answered just before, or turned away.
    good = outcomes["answered"] - seen["whole"] - seen["streamed"]
    if not 0 <= good <= seen["leaving"]:
        problems.append(f"{dict(seen)} by the clients, {outcomes} by the server")
    if last > max(MOST_GROWTH * first, first + MOST_GROWTH_BYTES):
        problems.append(f"memory grew from {first / MIB:.1f} to {last / MIB:.1f} MiB")
    return {
        "minutes": minutes,
        "clients": clients,
        "requests": sum(seen.values()),
        "by_clients": dict(seen),
        "by_server": outcomes,
        "server_errors": outcomes["failed"],
        "completion_tokens": int(counted["eve_completion_tokens_total"]),
        "image_tokens": int(counted["eve_image_tokens_total"]),
        "cached_tokens": int(counted["eve_cached_tokens_total"]),
        "resident_mib": {
            "first": round(first / MIB, 1),
            "last": round(last / MIB, 1),
            "largest": round(max(value for _, value in made.memory) / MIB, 1),
        },
        "problems": problems,
    }


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model folder or Hub id")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument(
        "--questions", type=int, default=20, help="different ones, each in 3 lengths"
    )
    result = soak(**vars(parser.parse_args()))
    print(json.dumps(result))
    sys.exit(1 if result["problems"] else 0)


if __name__ == "__main__":
    main()
