"""Every command block in the README and the documents is run, or checked where running takes minutes.

The blocks run in one folder, in order, beside a picture and a quickstart run of two steps; so what they
print is not judged here, only that they work as written. One thing a reader would get wrong: `make`
lines are checked against the Makefile, because `make demo` takes ten minutes.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import published
import tiny
from eve_processes import Processes
from small_decoders import decoder_folder

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(kind: str) -> list[tuple[str, str]]:
    """(page, text) of every code block of the kind."""
    return [
        (page.name, text)
        for page in PAGES
        for found, text in BLOCK.findall(page.read_text(encoding="utf-8"))
        if found == kind
    ]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every command line, without its comment."""
    return [
        (page, words)
        for page, text in blocks("bash")
        for line in text.splitlines()
        if (words := shlex.split(line, comments=True))
    ]


EVE = list(
    dict.fromkeys((page, shlex.join(words)) for page, words in commands() if words[0] == "eve")
)


@pytest.fixture(scope="module")
def folder(quickstart, tmp_path_factory):
    """Where a reader stands: a picture, the last quickstart run, tiny "downloads" from the Hub."""
    here = tmp_path_factory.mktemp("reader")
    (here / "runs").mkdir()
    (here / "runs" / "quickstart").symlink_to(quickstart, target_is_directory=True)
    Image.new("RGB", (90, 60), "orange").save(here / "picture.png")
    turns = [
        {"from": "human", "value": "<image>\nWhich colour?"},
        {"from": "gpt", "value": "Orange."},
    ]
    asked = [{"id": "1", "image": "picture.png", "conversations": turns}]
    (here / "picture-questions.json").write_text(json.dumps(asked))
    published.hub_cache(here / "hub")
    decoder_folder(here / "my-decoder", "llama")
    tiny.lora_adapter(here / "runs" / "lora", base=quickstart)
    return here


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Runs a command in the folder, with this environment's programs first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, "HF_HUB_CACHE": str(folder / "hub")},
        capture_output=True,
        text=True,
        timeout=600,  # seconds; what waits for ever, such as a server, belongs into a text block
    )


def test_blocks_were_found():
    assert len(EVE) >= 5 and len(blocks("python")) >= 2


@pytest.fixture(scope="module")
def eve(folder, tmp_path_factory):
    """Runs an `eve` command in the folder, in a process of its own."""
    env = {"HF_HUB_CACHE": str(folder / "hub")}
    with Processes(tmp_path_factory.mktemp("commands"), without=(), env=env) as processes:
        yield lambda *words: processes.finish(*words, folder=folder, seconds=600)


@pytest.mark.parametrize(("page", "line"), EVE, ids=[line for _, line in EVE])
def test_eve_commands_work(eve, page, line):
    code, process = eve(*shlex.split(line)[1:])
    assert code == 0, f"{page}: {line}\n{process.err[-2000:]}"
    # A model of two steps may have nothing to say, all else prints what it did.
    assert process.out.strip() or "eve ask" in line


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_blocks_work(folder, page, text):
    result = run(folder, sys.executable, "-c", text)
    assert result.returncode == 0, f"{page}:\n{text}\n{result.stderr[-2000:]}"


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for _, words in commands() if words[0] == "make"}
    assert {"demo", "test"} <= named <= targets


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    installs = [words[-1] for _, words in commands() if words[:2] == ["pip", "install"]]
    assert installs
    for what in installs:
        for extra in re.findall(r"\[(.*)\]", what)[0].split(","):
            assert extra in extras


def test_every_command_is_of_a_known_kind():
    assert {words[0] for _, words in commands()} <= {"make", "pip", "eve", "torchrun"}
