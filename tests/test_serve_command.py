"""The command `eve serve` as a process: what it says, who it lets in, how it stops.

One thing a reader would get wrong: the signals are sent while an answer runs, because a server that
is idle stops well in any case.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import tiny
from eve_vlm.cli import answering, serving
from eve_vlm.serve.http import running as http_running
from serving import KEY, chat

import httpx  # isort: skip  # behind serving, which skips all where it is lacking

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {name: text for name, text in os.environ.items() if name != "EVE_API_KEY"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model that has room for an answer of minutes."""
    made = tmp_path_factory.mktemp("models") / "my model"
    tiny.model(tiny.config(max_position_embeddings=65_536)).save_pretrained(made)
    tiny.processor().save_pretrained(made)
    return made


@contextmanager
def process(*arguments, **environment):
    """`eve serve` on a free port; the process and what it printed up to the line to try."""
    command = [sys.executable, "-m", "eve_vlm.cli", "serve", *map(str, arguments), "--port", "0"]
    running = subprocess.Popen(
        command,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        printed = ""
        while "curl" not in printed:
            line = running.stdout.readline()
            assert line, printed
            printed += line
        yield running, printed
    finally:
        running.kill()
        running.wait()
        running.stdout.close()


def url_in(printed):
    return re.search(r"Listens on (http://127\.0\.0\.1:\d+)/v1", printed)[1]


@contextmanager
def running_answer(url, headers, tokens):
    """The lines of a streamed answer that has begun."""
    body = chat(model="my model", max_tokens=tokens, stream=True)
    settings = {"json": body, "headers": headers, "timeout": 60}
    with httpx.stream("POST", f"{url}/v1/chat/completions", **settings) as stream:
        lines = filter(None, stream.iter_lines())
        assert next(lines).startswith("data: {")
        yield lines


def test_what_it_prints_can_be_tried_and_ctrl_c_ends_it(folder):
    """An answer that is not finished within the grace is told why it ends."""
    with process(folder, "--grace", 1, "--max-tokens", 60_000) as (running, printed):
        assert "my model: 50,368 parameters in float32 on cpu, 65,536 positions" in printed
        assert "a large square picture takes 21 tokens" in printed and "asks for no key" in printed
        words = shlex.split(printed[printed.index("curl") :])
        headers = dict(
            words[place + 1].split(": ") for place, word in enumerate(words) if word == "-H"
        )
        question = words[words.index("-d") + 1]
        answer = httpx.post(words[1], content=question, headers=headers, timeout=60)
        assert answer.status_code == 200 and answer.json()["model"] == "my model"
        with running_answer(url_in(printed), {}, 60_000) as lines:
            running.send_signal(signal.SIGINT)
            *_, last = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        assert running.wait(30) == 0


def test_keys_come_from_the_environment_and_running_answers_are_finished(folder):
    with process(folder, EVE_API_KEY=f"another {KEY}") as (running, printed):
        assert "asks for a key" in printed and KEY not in printed and "$EVE_API_KEY" in printed
        url, headers = url_in(printed), {"Authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        with running_answer(url, headers, 300) as lines:
            running.terminate()
            *_, before, last = lines
        assert last == "data: [DONE]" and '"finish_reason":"length"' in before
        assert running.wait(30) == -signal.SIGTERM  # as is expected of who was asked to end
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


# --- what is refused before a model is loaded ------------------------------------------------------


@pytest.fixture
def refused(monkeypatch):
    """Runs the command in this process; the sentence that it ends with."""
    app = typer.Typer()
    app.command()(serving.serve)
    monkeypatch.delenv("EVE_API_KEY", raising=False)

    def run(*arguments):
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert isinstance(result.exception, ValueError), result.output
        return tiny.refused(lambda: raise_(result.exception), end=".")

    return run


def raise_(error):
    raise error


def test_a_port_that_is_taken(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1 port {port}" in refused("nowhere", "--port", port)
    assert "give another --host" in refused("nowhere", "--host", "no.such.name.test")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_everybody_needs_a_key(refused, host):
    if host == "::" and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    text = refused("nowhere", "--host", host, "--port", 0)
    assert "EVE_API_KEY" in text and "--without-key" in text
    for allowed in (["--without-key"], ["--api-key", KEY]):  # it goes on and finds no model
        assert "nowhere" in refused("nowhere", "--host", host, "--port", 0, *allowed)
    assert "API key is empty" in refused("nowhere", "--port", 0, "--api-key", " ")


def test_a_missing_package_is_named(refused, monkeypatch):
    monkeypatch.setattr(http_running, "NEEDED", ("fastapi", "no_such_package"))
    assert "no_such_package, which is not installed; run: pip install 'eve-vlm[serve]'" in refused()


def test_a_hub_id_is_a_name_and_a_folder_lends_its_own(tmp_path):
    assert answering.public_name("BAAI/EVE-7B-v1.0") == "BAAI/EVE-7B-v1.0"
    assert (
        answering.public_name(f"{tmp_path}/")
        == answering.public_name(f"{tmp_path}/.")
        == tmp_path.name
    )


# --- many clients for a while ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_short_soak(saved_model):
    """Twenty seconds of what `benchmarks/soak_server.py` does in ten minutes."""
    done = subprocess.run(
        [sys.executable, "benchmarks/soak_server.py", saved_model, "--minutes", "0.33"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["problems"] == [] and seen["server_errors"] == 0
    assert all(seen["by_clients"][kind] > 0 for kind in ("whole", "streamed", "leaving", "bad"))
