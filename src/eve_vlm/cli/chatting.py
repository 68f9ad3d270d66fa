"""The command that talks: `eve chat` is a conversation with pictures in a terminal.

What was said is kept by `Conversation`; here lines are read, commands understood and answers
printed.  Easy to get wrong: Ctrl-C may come at any moment, also between two pieces of an answer,
and must stop the answer, never the chat; and with piped input nobody can mend a line that is
refused, so the chat ends there.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .answering import (
    STOPPED,
    Attention,
    AttentionKind,
    CompileSteps,
    Device,
    MaxImageTokens,
    MaxNewTokens,
    ModelName,
    NumberType,
    Quantize,
    Seed,
    StaticCache,
    System,
    Temperature,
    TopK,
    TopP,
    open_engine,
    show,
)
from .default import default_model

if TYPE_CHECKING:
    from eve_vlm.serve.asking.conversation import Conversation
    from eve_vlm.serve.asking.terminal_picture import Colours
    from eve_vlm.serve.reply import Answer
    from eve_vlm.serve.sampling import Sampling

PROMPT = "> "
WHOLE_NUMBERS = ("max_new_tokens", "top_k", "seed", "max_image_tokens")


def chat(
    model: ModelName = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    max_image_tokens: MaxImageTokens = None,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw pictures small, in colours.")
    ] = True,
    device: Device = None,
    dtype: NumberType = None,
    attention: AttentionKind = Attention.sdpa,
    quantize: Quantize = None,
    static_cache: StaticCache = False,
    compile_steps: CompileSteps = False,
) -> None:
    """Talk with a model about pictures, in the terminal.

    eve chat --model runs/quickstart

    Lines are questions; /image cat.png adds a picture to the next one, /help lists the commands.
    """
    from eve_vlm.serve.asking.conversation import Conversation
    from eve_vlm.serve.asking.terminal_picture import colours_of
    from eve_vlm.serve.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        max_image_tokens=max_image_tokens,
    )
    name = model or default_model()
    engine = open_engine(
        name,
        device=device,
        dtype=dtype,
        attention=attention,
        quantize=quantize,
        static_cache=static_cache,
        compile_steps=compile_steps,
        batch_size=1,
        keep_tokens=None,
    )
    colours = colours_of(os.environ, terminal=pictures and sys.stdout.isatty())
    _Chat(Conversation(engine, system), sampling, colours).run(name)


class _Chat:
    """A conversation, and how it is shown."""

    def __init__(self, conversation: "Conversation", sampling: "Sampling", colours: "Colours"):
        self.conversation, self.sampling, self.colours = conversation, sampling, colours
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.answer: Answer | None = None  # the last one, if it was not stopped
        self.over = False

    def run(self, name: str) -> None:
        """Takes lines until there are no more."""
        if self.interactive:
            _edit_lines()
            show(f"{name}: ask away. /image PATH adds a picture, /help lists the commands.")
        while not self.over:
            try:
                line = input(PROMPT if self.interactive else "")
                self.take(line)
            except EOFError:
                show("", end="\n" * self.interactive)
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise typer.Exit(STOPPED) from None
                show("\n/quit or Ctrl-D leaves.")
            except ValueError as error:
                if not self.interactive:
                    raise
                self.complain(error)

    def take(self, line: str) -> None:
        """A question or a command.

        Raises:
            ValueError: if it cannot be done.
        """
        if not line.startswith("/"):
            if line.strip():
                self.say(line)
            return
        name, _, rest = line[1:].partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            hint = _near(name, COMMANDS, "/") or "/help lists them"
            raise ValueError(
                f"There is no command /{name}; {hint}, and a blank in front of / makes a question."
            )
        if command.usage[:1].isalpha() and not rest.strip():
            raise ValueError(f"/{name} lacks something; write /{name} {command.usage}.")
        command.do(self, rest.strip())

    def complain(self, error: ValueError) -> None:
        """Says what was refused, and how to go on where a conversation has become too long."""
        from eve_vlm.serve.engine import TooLongError

        show(f"eve: {error}", err=True)
        if isinstance(error, TooLongError):
            show(
                "Go on with /undo, /clear, /set max_new_tokens NUMBER or /set max_image_tokens "
                "NUMBER.",
                err=True,
            )

    def say(self, text: str) -> None:
        """Asks, and prints the answer while it comes."""
        from eve_vlm.errors import first_line

        self.answer = None
        try:
            with closing(self.conversation.say(text, **asdict(self.sampling))) as pieces:
                for piece in pieces:
                    show(piece.text, end="")
                    self.answer = piece.answer
            show("")
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            show("\n(stopped)")
        except RuntimeError as error:
            raise ValueError(f"Answering broke ({first_line(error)}); try it again.") from error

    # --- commands ---

    def image(self, text: str) -> None:
        """Adds pictures to the next question."""
        from eve_vlm.serve.asking.picture_sources import find_pictures
        from eve_vlm.serve.asking.terminal_picture import draw_small

        name = _path(text)
        if name == "-":
            raise ValueError("Standard input holds the conversation; name a file.")
        for source in find_pictures([name]):
            picture = source.open()
            self.conversation.add_picture(picture, name=source.name)
            if self.colours:
                typer.echo(draw_small(picture, colours=self.colours))
            if self.interactive:
                show(f"{source.name}: {picture.width} x {picture.height} pixels")

    def undo(self, _: str) -> None:
        """Takes the last thing back."""
        undone = self.conversation.undo()
        self.note(f"Took back {undone}." if undone else "There is nothing to take back.")

    def clear(self, _: str) -> None:
        """Begins anew."""
        self.conversation.clear()
        self.note("The conversation begins anew.")

    def system(self, text: str) -> None:
        """Sets the words in front."""
        self.conversation.system = text or None
        self.note("Set; it counts from the next answer on." if text else "There is none now.")

    def save(self, text: str) -> None:
        """Writes a file."""
        self.conversation.save(Path(_path(text)))
        self.note(f"Saved as {_path(text)}.")

    def load(self, text: str) -> None:
        """Reads a file, and shows what is in it."""
        self.conversation.load(Path(_path(text)))
        if self.interactive:
            for line in self.conversation.transcript():
                show(line)

    def set(self, text: str) -> None:
        """Changes a setting, or shows them."""
        settings = asdict(self.sampling)
        del settings["logprobs"]  # there is no place to show them
        name, _, value = text.partition(" ")
        if not name:
            for each, now in settings.items():
                show(f"{each} {_shown(now)}")
            return
        if name not in settings:
            hint = _near(name, settings) or f"there are {', '.join(settings)}"
            raise ValueError(f"There is no setting {name}; {hint}.")
        if not value:
            raise ValueError(f"{name} is {_shown(settings[name])}; write /set {name} VALUE.")
        self.sampling = replace(self.sampling, **{name: _parsed(name, value.strip())})
        self.note(f"{name} is {_shown(asdict(self.sampling)[name])} now.")

    def stats(self, _: str) -> None:
        """Shows what the last answer took."""
        answer = self.answer
        if answer is None:
            raise ValueError("There is no whole answer yet; ask something.")
        rate = answer.tokens_per_second
        for title, value in (
            ("prompt tokens", answer.prompt_tokens),
            ("  for pictures", answer.image_tokens),
            ("  reused from earlier turns", answer.cached_tokens),
            ("answer tokens", len(answer.token_ids)),
            ("seconds to the first", f"{answer.seconds_to_first:.2f}"),
            ("tokens a second after it", "-" if rate is None else f"{rate:.1f}"),
        ):
            show(f"{title:<28} {value:>8}")

    def help(self, _: str) -> None:
        """Lists the commands."""
        for name, command in COMMANDS.items():
            show(f"{f'/{name} {command.usage}':<24} {command.help}")
        show("Ctrl-C stops an answer, Ctrl-D leaves.")

    def quit(self, _: str) -> None:
        """Leaves."""
        self.over = True

    def note(self, text: str) -> None:
        """For somebody who looks; a pipe gets answers and what was asked for only."""
        if self.interactive:
            show(text)


class _Command(NamedTuple):
    """usage: in brackets if it can be left out."""

    usage: str
    help: str
    do: Callable[[_Chat, str], None]


COMMANDS = {
    "image": _Command(
        "PATH|URL", "Add a picture (or folder, PDF) to the next question.", _Chat.image
    ),
    "undo": _Command("", "Take back the picture added last, or the last question.", _Chat.undo),
    "clear": _Command("", "Begin anew, with the same system words.", _Chat.clear),
    "system": _Command("[TEXT]", "Instructions in front of the conversation.", _Chat.system),
    "save": _Command("FILE", "Write the conversation as JSON.", _Chat.save),
    "load": _Command("FILE", "Go on with a saved conversation.", _Chat.load),
    "set": _Command("[NAME VALUE]", "Change a setting, or show all of them.", _Chat.set),
    "stats": _Command("", "Tokens and times of the last answer.", _Chat.stats),
    "help": _Command("", "This list.", _Chat.help),
    "quit": _Command("", "Leave.", _Chat.quit),
}


def _edit_lines() -> None:
    """Arrow keys, history and completion of file names, where there is a library for it."""
    try:
        import readline
    except ImportError:  # on Windows, whose console does this itself
        return
    readline.parse_and_bind("tab: complete")


def _near(name: str, names: Iterable[str], mark: str = "") -> str:
    """Names that may have been meant."""
    names = list(names)
    near = get_close_matches(name, names) or [one for one in names if name and one.startswith(name)]
    return f"did you mean {' or '.join(mark + one for one in near)}?" if near else ""


def _path(text: str) -> str:
    """A path as people write or drop it: quoted, with backslashes, or from the home folder."""
    if not os.path.exists(text):
        with suppress(ValueError):  # a lonely quote is part of the name
            text = " ".join(shlex.split(text, posix=os.name != "nt"))
    return os.path.expanduser(text)


def _parsed(name: str, value: str) -> Any:
    """A setting's value from what was written."""
    if name == "stop":
        return () if value == "none" else tuple(shlex.split(value))
    if value == "none" and name in ("seed", "max_image_tokens"):
        return None
    kind = int if name in WHOLE_NUMBERS else float
    try:
        return kind(value)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} takes {wanted}, and {value} is none.") from None


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return shlex.join(value) or "none"
    return "none" if value is None else str(value)


__all__ = ["COMMANDS", "chat"]
