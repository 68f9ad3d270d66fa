"""`eve chat`: commands, piped input, and a real process in a pseudo-terminal.

Answers are compared with those of a conversation without a terminal.  One thing a reader would get
wrong: with piped input nothing but answers, and what a command was asked for, is printed.
"""

import os
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from io import BytesIO, TextIOWrapper

import numpy as np
import pytest
from PIL import Image

import tiny
from eve_vlm import cli
from eve_vlm.cli.chatting import COMMANDS
from eve_vlm.serve.asking.conversation import Conversation
from eve_vlm.serve.asking.terminal_picture import MAX_COLUMNS, MAX_ROWS, colours_of, draw_small
from eve_vlm.serve.engine import EveEngine, Sampling

pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")
TOKENS = 6


@pytest.fixture
def conversation(model, processor):
    return Conversation(EveEngine(model, processor))


def said(conversation, text, **settings):
    pieces = list(conversation.say(text, **{"max_new_tokens": TOKENS, **settings}))
    return pieces[-1].answer.text


def shown(text):
    """As a terminal gets it."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


@pytest.fixture
def chat(monkeypatch, capsys, tmp_path, saved_model):
    """Gives lines to `eve chat` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "dumb")

    def call(*lines, options=(), terminal=False, data=None):
        data = "".join(f"{line}\n" for line in lines).encode() if data is None else data
        stdin = TextIOWrapper(BytesIO(data), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(stdin, "isatty", lambda: terminal, raising=False)
        capsys.readouterr()
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
        words = ["eve", "chat", "--model", saved_model, "--max-new-tokens", TOKENS, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def cat(tmp_path):
    path = tmp_path / "my cat.png"
    tiny.picture(20, 32).save(path)
    return path


# --- piped input ----------------------------------------------------------------------------------


def test_piped_questions_get_answers_and_nothing_else(chat, conversation, cat):
    picture = tiny.picture(20, 32)
    expected = []
    conversation.add_picture(picture)
    expected.append(said(conversation, "What is this?"))
    expected.append(said(conversation, "Where is it?"))
    conversation.add_picture(picture)
    conversation.add_picture(picture)
    expected.append(said(conversation, "Is <image> like <image>?"))
    code, out, err = chat(
        *("/image my cat.png", "What is this?", "", "Where is it?"),
        *("/image 'my cat.png'", r"/image my\ cat.png", "Is <image> like <image>?"),
    )
    assert code == 0 and out == "".join(f"{answer}\n" for answer in expected)
    assert "eve:" not in err


def test_nothing_piped(chat):
    assert chat()[:2] == (0, "")
    assert chat("", "   ")[:2] == (0, "")
    assert chat("/quit", "What is this?")[:2] == (0, "")


def test_the_last_line_may_lack_its_end(chat, conversation):
    expected = said(conversation, "What is this?") + "\n"
    assert chat(data=b"What is this?")[:2] == (0, expected)


def test_options_are_the_first_settings(chat, conversation):
    conversation.system = "Be brief."
    expected = said(conversation, "Why?", temperature=1.5, seed=3, top_k=9, top_p=0.9) + "\n"
    options = ("--system", "Be brief.", "--temperature", 1.5, "--seed", 3, "--top-k", 9)
    assert chat("Why?", options=(*options, "--top-p", 0.9))[1] == expected
    lines = ("/system Be brief.", "/set temperature 1.5", "/set seed 3", "/set top_k 9")
    assert chat(*lines, "/set top_p 0.9", "Why?")[1] == expected


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("/imgae my cat.png", "no command /imgae; did you mean /image?"),
        ("/q", "did you mean /quit?"),
        ("/etc/passwd is what?", "/help lists them"),
        ("/", "no command /"),
        ("/image", "write /image PATH|URL"),
        ("/save", "write /save FILE"),
        ("/image gone.png", "gone.png is neither a file nor a folder"),
        ("/image 'gone", "'gone is neither"),
        ("/image -", "Standard input holds the conversation"),
        ("/load gone.json", "gone.json cannot be read"),
        ("/set temprature 1", "no setting temprature; did you mean temperature?"),
        ("/set zzz 1", "there are max_new_tokens"),
        ("/set temperature", "temperature is 0.0"),
        ("/set temperature warm", "temperature takes a number, and warm is none"),
        ("/set max_new_tokens 1.5", "takes a whole number"),
        ("/set max_new_tokens none", "takes a whole number"),
        ("/set top_p 7", "top_p is 7.0"),
        ("/set stop 'a", "quotation"),
        ("/set logprobs 3", "no setting logprobs"),
        ("/stats", "no whole answer yet"),
        ("Is <image> like <image>?", "2 <image> marks but 0 pictures"),
        ("word " * 600, "the model takes 512 in all"),
    ],
)
def test_a_refused_line_ends_a_pipe_and_not_a_talk(chat, conversation, cat, line, part):
    """Nobody could mend it there; at a terminal the next line is taken."""
    code, out, err = chat(line, "Why?")
    assert code == 2 and out == "" and "Traceback" not in err
    [sentence] = [each for each in err.splitlines() if each.startswith("eve: ")]
    assert part in sentence
    code, out, err = chat(line, "Why?", terminal=True)
    assert code == 0 and part in err and shown(said(conversation, "Why?")) in out


def test_too_long_says_how_to_go_on(chat):
    _, _, err = chat("word " * 600, terminal=True)
    assert "Go on with /undo, /clear, /set max_new_tokens NUMBER" in err


def test_bytes_that_are_no_text(chat):
    code, out, err = chat(data=b"What \xff\xfe?\n")
    assert code == 2 and out == "" and "Traceback" not in err and "eve: " in err


# --- commands -------------------------------------------------------------------------------------


def test_undo_clear_and_system(chat, conversation, cat):
    conversation.add_picture(tiny.picture(20, 32))
    first = said(conversation, "What is this?")
    conversation.undo()
    other = said(conversation, "Where is it?")
    _, out, _ = chat("/image my cat.png", "What is this?", "/undo", "Where is it?")
    assert out == f"{first}\n{other}\n"
    conversation.clear()
    plain = said(conversation, "Why?")
    assert chat("/image my cat.png", "/undo", "Why?")[1] == f"{plain}\n"
    assert chat("What is this?", "/clear", "Why?")[1].endswith(f"{plain}\n")
    conversation.clear()
    conversation.system = "Be brief."
    brief = said(conversation, "Why?")
    lines = ("/system Be brief.", "Why?", "/clear", "Why?", "/clear", "/system", "Why?")
    assert chat(*lines)[1] == f"{brief}\n{brief}\n{plain}\n"
    out = chat("/undo", "/image my cat.png", "/undo", "Why?", "/undo", terminal=True)[1]
    for words in ("nothing to take back", "Took back the picture my cat.png", 'question "Why?"'):
        assert words in out


def test_a_saved_talk_goes_on_the_next_day(chat, conversation, cat, tmp_path):
    conversation.add_picture(tiny.picture(20, 32))
    first, second = said(conversation, "What is this?"), said(conversation, "Why?")
    assert chat("/image my cat.png", "What is this?", "/save t.json")[1] == f"{first}\n"
    assert chat("/load t.json", "Why?")[1] == f"{second}\n"
    out = chat("/load t.json", terminal=True)[1]
    assert f"> What is this?\n{shown(first)}\n" in out


def test_settings_are_shown_and_changed(chat, conversation):
    lines = ("/set seed 5", "/set stop 'a b' c", "/set max_image_tokens 9", "/set")
    out = chat(*lines)[1]
    values = dict(line.split(" ", 1) for line in out.splitlines())
    assert values.keys() == asdict(Sampling()).keys() - {"logprobs"}
    assert values["stop"] == "'a b' c" and values["max_image_tokens"] == "9"
    out = chat(
        *lines[:-1], "/set seed none", "/set stop none", "/set max_image_tokens none", "/set"
    )[1]
    for name in ("seed none", "stop none", "max_image_tokens none"):
        assert name in out.splitlines()
    assert "top_k is 3 now." in chat("/set top_k 3", terminal=True)[1]


def test_stats(chat, conversation, cat):
    conversation.add_picture(tiny.picture(20, 32))
    said(conversation, "What is this?")
    answer = list(conversation.say("Why?", max_new_tokens=TOKENS))[-1].answer
    lines = ("/image my cat.png", "What is this?", "Why?", "/stats")
    stats = chat(*lines)[1].splitlines()[-6:]
    values = {line[:28].strip(): line[28:].strip() for line in stats}
    assert values["prompt tokens"] == str(answer.prompt_tokens)
    assert values["for pictures"] == str(answer.image_tokens) != "0"
    assert int(values["reused from earlier turns"]) > answer.image_tokens
    assert values["answer tokens"] == str(len(answer.token_ids))
    assert (
        float(values["seconds to the first"]) >= 0 and float(values["tokens a second after it"]) > 0
    )


def test_help_lists_every_command(chat):
    out = chat("/help")[1]
    for name, command in COMMANDS.items():
        assert f"/{name} " in out and command.help in out
    assert "Ctrl-C" in out


# --- pictures in the terminal ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "terminal", "colours"),
    [
        ({"TERM": "xterm-256color"}, True, 256),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, True, 2**24),
        ({"TERM": "xterm-direct"}, True, 2**24),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, False, 0),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor", "NO_COLOR": "1"}, True, 0),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, True, 0),
        ({"TERM": "vt100"}, True, 0),
        ({"COLORTERM": "truecolor"}, True, 0),
        ({}, True, 0),
    ],
)
def test_how_many_colours(environment, terminal, colours):
    assert colours_of(environment, terminal=terminal) == colours


CELL = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀")


@pytest.mark.parametrize("size", [(30, 20), (300, 200), (20, 300), (3000, 10), (1, 1), (39, 24)])
def test_a_small_picture_shows_its_pixels(size):
    """Read back: two pixels a letter, never above the limits, the picture's mean within a step."""
    picture = tiny.picture(size[1], size[0])
    lines = draw_small(picture, colours=2**24).split("\n")
    cells = [CELL.findall(line) for line in lines]
    assert len(lines) <= MAX_ROWS and len({len(line) for line in cells}) == 1
    assert len(cells[0]) <= MAX_COLUMNS
    pixels = np.array(cells, dtype=int).reshape(len(lines), -1, 2, 3).transpose(0, 2, 1, 3)
    pixels = pixels.reshape(2 * len(lines), -1, 3)
    small = picture.resize(pixels.shape[1::-1], Image.Resampling.BOX)
    np.testing.assert_array_equal(pixels, np.asarray(small))
    for line in lines:
        assert CELL.sub("", line) == "\x1b[0m"


def test_the_nearest_of_256_colours():
    """Every colour of the cube is itself, and any other one goes to the nearest."""
    levels = np.array([0, 95, 135, 175, 215, 255])
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (2, 20, 3), dtype=np.uint8)
    colours[0, :6] = levels[:, None]
    drawn = draw_small(Image.fromarray(colours), colours=256)
    codes = np.array(re.findall(r"38;5;(\d+);48;5;(\d+)m", drawn), dtype=int).T - 16
    cube = np.stack([codes // 36, codes // 6 % 6, codes % 6], -1)
    nearest = np.abs(colours.astype(int)[..., None] - levels).min(-1)
    np.testing.assert_array_equal(np.abs(colours - levels[cube]), nearest)


def test_without_colours_nothing_is_drawn():
    assert draw_small(tiny.picture(8, 8), colours=0) == ""


@pytest.mark.parametrize(
    ("options", "environment", "terminal", "drawn"),
    [
        ((), {}, True, True),
        (("--no-pictures",), {}, True, False),
        ((), {"NO_COLOR": "1"}, True, False),
        ((), {"TERM": "dumb"}, True, False),
        ((), {}, False, False),
    ],
)
def test_pictures_are_drawn_where_there_are_colours(
    chat, cat, monkeypatch, options, environment, terminal, drawn
):
    for name, value in ({"TERM": "xterm-256color", "NO_COLOR": ""} | environment).items():
        monkeypatch.setenv(name, value)
    code, out, _ = chat("/image my cat.png", options=options, terminal=terminal)
    assert code == 0 and ("▀" in out) == drawn
    assert ("my cat.png: 32 x 20 pixels" in out) == terminal


# --- a real terminal ------------------------------------------------------------------------------


class Terminal:
    """A process of `eve chat` at a pseudo-terminal, typed to and read."""

    def __init__(self, folder, model, *options, **environment):
        self.master, slave = pty.openpty()
        defaults = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "OMP_NUM_THREADS": "1"}
        without = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        words = ["chat", "--model", model, "--max-new-tokens", TOKENS, *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "eve_vlm.cli", *map(str, words)],
            cwd=folder,
            env=without | defaults | environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(slave)
        self.text = ""

    def type(self, text):
        os.write(self.master, text.encode())

    def read_to(self, pattern, seconds=120):
        """All up to a pattern, which must come; far above what a busy machine takes."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"{pattern!r} did not come; there is {self.text[-2000:]!r}"
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Linux says so when the process has ended
                data = b""
            assert data, f"ended before {pattern!r}; there is {self.text[-2000:]!r}"
            self.text += data.decode("utf-8", "replace").replace("\r\n", "\n")
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


def take_terminal():
    """Makes the pseudo-terminal the one whose Ctrl-C reaches the process."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(tmp_path, saved_model):
    opened = []

    def start(*options, **environment):
        opened.append(Terminal(tmp_path, saved_model, *options, **environment))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


PROMPT = r"(?m)^(\x1b\[\?2004h)?> "  # readline may announce that it takes pasted text


def test_a_talk_at_a_terminal(terminal, conversation, cat):
    """Prompt, completion, picture, streamed answer, history, Ctrl-C at both places, Ctrl-D."""
    conversation.add_picture(tiny.picture(20, 32))
    answer = shown(said(conversation, "What is this?"))
    chat = terminal()
    chat.read_to("/help lists the commands")
    chat.read_to(PROMPT)
    chat.type("/image my")
    time.sleep(0.2)
    chat.type("\t\n")  # the rest of the name
    assert CELL.search(chat.read_to(r"my cat.png: 32 x 20 pixels\n"))
    chat.read_to(PROMPT)
    chat.type("What is this?\n")
    chat.read_to(re.escape(answer) + "\n")
    chat.read_to(PROMPT)
    chat.type("/imgae\n")
    chat.read_to(r"did you mean /image\?")
    chat.read_to(PROMPT)

    chat.type("half a line")
    chat.read_to("half a line")
    time.sleep(0.2)  # Python loses a Ctrl-C between readline's output and its wait for keys
    chat.type("\x03")
    chat.read_to("/quit or Ctrl-D leaves")
    chat.read_to(PROMPT)
    chat.type("/set max_new_tokens 400\n")
    chat.read_to("max_new_tokens is 400 now")
    chat.read_to(PROMPT)
    chat.type("Say more.\n")
    chat.read_to(r"Say more\.\n(\x1b\[\?2004l\r)?.")  # its first letter
    chat.type("\x03")
    chat.read_to(r"\(stopped\)")
    chat.read_to(PROMPT)
    chat.type("/stats\n")
    chat.read_to("no whole answer yet")
    chat.read_to(PROMPT)
    chat.type("/undo\n")
    chat.read_to('Took back the question "Say more."')
    chat.read_to(PROMPT)
    chat.type("\x1b[A\n")  # the line before
    chat.read_to(re.escape('Took back the question "What is this?"'))
    chat.read_to(PROMPT)
    chat.type("\x04")
    assert chat.process.wait(60) == 0


def test_ctrl_c_ends_a_pipe(tmp_path, saved_model):
    """Nobody sits there to go on."""
    words = [sys.executable, "-m", "eve_vlm.cli", "chat", "--model", str(saved_model)]
    process = subprocess.Popen(
        [*words, "--max-new-tokens", "400"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"Say more.\n")
    process.stdin.flush()
    assert process.stdout.read(1)  # it answers
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
