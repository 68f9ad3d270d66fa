"""An OpenAI-compatible server that fails as told, or a proxy with the same faults before a real one.

It counts by picture what was asked and what was delivered whole.  One thing a reader would get
wrong: a delivery is counted before its bytes are sent, so what is counted and was lost on the way is
the fault of who was killed, and never more than it had open.
"""

import hashlib
import json
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CAPTION = "Picture {} shows smooth waves in several colours."
BODIES = {
    "page": (200, "text/html", b"<html><body>Bad gateway, please wait</body></html>"),
    "empty": (200, "application/json", b""),
    "null": (200, "application/json", b'{"choices": null}'),
    "wordless": (200, "application/json", b'{"choices": [{"message": {"content": "  "}}]}'),
    "list": (200, "application/json", b"[1, 2]"),
    "500": (500, "application/json", b'{"error": {"message": "out of memory"}}'),
    "503": (503, "text/plain", b"overloaded"),
    "400": (400, "application/json", b'{"error": {"message": "image is too odd"}}'),
    "401": (401, "application/json", b'{"error": {"message": "who are you"}}'),
    "429": (429, "application/json", b'{"error": {"message": "slow down"}}'),
}


class FaultyServer:
    """A server and what it saw.

    Args:
        fault: for the number of a request and its picture (None without one), the name of what goes
            wrong, or None.
        forward: base URL of a real server that is asked when nothing goes wrong.
    """

    def __init__(
        self,
        fault: Callable[[int, str | None], str | None] = lambda number, picture: None,
        *,
        forward: str | None = None,
    ):
        self.fault, self.forward = fault, forward
        self.asked: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                outer.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        request = json.loads(body)
        picture = picture_of(request)
        with self.lock:
            number = len(self.requests)
            self.requests.append(request)
            self.headers.append({name.lower(): text for name, text in handler.headers.items()})
            self.asked[picture or "none"] += 1
        fault = self.fault(number, picture)
        if fault == "cut":
            handler.close_connection = True
            handler.connection.close()
            return
        if fault is not None:
            self._send(handler, *BODIES[fault], retry=fault == "429")
            return
        status, kind, answer = self._good(body, picture)
        with self.lock:
            self.delivered[picture or "none"] += 1
        self._send(handler, status, kind, answer)

    def _good(self, body: bytes, picture: str | None) -> tuple[int, str, bytes]:
        if self.forward is None:
            message = {"role": "assistant", "content": CAPTION.format(picture)}
            usage = {"prompt_tokens": 30, "completion_tokens": 10}
            choice = {"message": message, "finish_reason": "stop"}
            return (
                200,
                "application/json",
                json.dumps({"choices": [choice], "usage": usage}).encode(),
            )
        request = urllib.request.Request(
            f"{self.forward}/chat/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, "application/json", answer.read()

    @staticmethod
    def _send(handler, status, kind, body, *, retry=False):
        try:
            handler.send_response(status)
            handler.send_header("Content-Type", kind)
            handler.send_header("Content-Length", str(len(body)))
            if retry:
                handler.send_header("Retry-After", "0.05")
            handler.end_headers()
            handler.wfile.write(body)
        except OSError:
            pass  # who asked is gone


def picture_of(request: dict) -> str | None:
    """A short name for the picture of a request."""
    content = request["messages"][-1]["content"]
    if isinstance(content, str):
        return None
    url = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
    return hashlib.sha256(url.encode()).hexdigest()[:12]


@contextmanager
def faulty_server(*arguments, **settings) -> Iterator[FaultyServer]:
    """A server that runs as long as the context."""
    made = FaultyServer(*arguments, **settings)
    thread = threading.Thread(target=made.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()
        thread.join()
