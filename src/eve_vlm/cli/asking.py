"""The command that asks: `eve ask` puts one question about pictures, or to each of many.

Here options are read and answers printed; the engine and what handles files are imported inside, so
that `eve --help` does not wait for them.  Easy to get wrong: what can be refused is refused before
the model is loaded, which may take minutes.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    open_engine,
    show,
)
from .default import default_model

if TYPE_CHECKING:
    from eve_vlm.serve.asking.answer_files import AnswerFile
    from eve_vlm.serve.asking.picture_answers import PictureAnswers, Question
    from eve_vlm.serve.asking.picture_sources import PictureSource
    from eve_vlm.serve.engine import EveEngine

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PICTURE... QUESTION",
        help="Pictures: files, folders, PDFs (a.pdf, a.pdf#2-4), URLs, or - for the bytes of "
        "standard input. Then the question, in quotes.",
    ),
]
Each = Annotated[bool, typer.Option("--each", help="Ask about each picture separately.")]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl",
        help="Ask about each picture separately and add a line for each to this file. The same "
        "command again goes on where it was stopped.",
    ),
]
QuestionFile = Annotated[
    Path | None, typer.Option(help="Read the question from here; all words are pictures then.")
]
Recursive = Annotated[bool, typer.Option("--recursive", help="Look into folders of folders too.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for each answer.")]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Print one answer while it comes; without it that is done in a terminal.",
    ),
]
Beams = Annotated[int, typer.Option(min=1, help="Width of a beam search.")]
Number = Annotated[int, typer.Option("-n", min=1, help="Answers to each question.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures that are answered together.")]


def ask(
    words: Words = None,
    model: ModelName = None,
    each: Each = False,
    out: Out = None,
    question_file: QuestionFile = None,
    recursive: Recursive = False,
    as_json: AsJson = False,
    stream: Stream = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    max_image_tokens: MaxImageTokens = None,
    beams: Beams = 1,
    n: Number = 1,
    system: System = None,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: NumberType = None,
    attention: AttentionKind = Attention.sdpa,
    quantize: Quantize = None,
    static_cache: StaticCache = False,
    compile_steps: CompileSteps = False,
) -> None:
    """Ask a question about pictures.

    eve ask cat.png "What is this?"

    Single pictures go into one question together. A folder, a PDF of several pages, --each or --out
    asks about each picture separately.
    """
    names, text = _names_and_question(words or [], question_file)
    from eve_vlm.serve.asking.picture_answers import Question
    from eve_vlm.serve.asking.picture_sources import find_pictures
    from eve_vlm.serve.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        max_image_tokens=max_image_tokens,
    )
    question = Question(text=text, system=system, sampling=sampling, n=n, num_beams=beams)
    sources = list(find_pictures(names, recursive=recursive))
    # A folder of one picture is a folder; the pages of a PDF are more than the names.
    many = each or out is not None or any(map(os.path.isdir, names)) or len(sources) > len(names)
    if stream and (many or as_json or n > 1 or beams > 1):
        raise ValueError("--stream prints a single answer while it comes; leave it out here.")
    question.messages([source.name for source in sources[: 1 if many else None]])  # empty? marks?
    name = model or default_model()
    load = partial(
        open_engine,
        name,
        device=device,
        dtype=dtype,
        attention=attention,
        quantize=quantize,
        static_cache=static_cache,
        compile_steps=compile_steps,
    )
    asking = _Asking(
        question=question,
        load=partial(load, batch_size=batch_size),
        model=name,
        how={
            "dtype": dtype and dtype.value,
            "attention": attention.value,
            "quantize": quantize and quantize.value,
        },
        as_json=as_json,
    )
    raise typer.Exit(asking.about_each(sources, out) if many else asking.once(sources, stream))


def _names_and_question(words: list[str], file: Path | None) -> tuple[list[str], str]:
    """The words that are pictures, and the question."""
    if file is not None:
        try:
            return words, file.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ValueError(f"The question in {file} cannot be read ({error}).") from None
    if not words:
        raise typer.BadParameter("Name pictures, and put the question last, in quotes.")
    *names, question = words
    # os.path.exists, because Path.exists() raises for a question as long as a page.
    if os.path.exists(question) or re.fullmatch(r"-|https?://\S+", question):
        raise ValueError(f"There is no question behind {question}; put it last, in quotes.")
    return names, question


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asking:
    """A question, who is asked, and how answers are shown."""

    question: "Question"
    load: "Callable[[], EveEngine]"
    model: str
    how: dict[str, Any]
    as_json: bool

    @property
    def asked(self) -> dict[str, Any]:
        """What stands in every line of JSON."""
        from eve_vlm.serve.asking.answer_files import settings_of

        settings = settings_of(self.question, **self.how)
        return {"question": self.question.text.strip(), "model": self.model, "settings": settings}

    def once(self, sources: "Sequence[PictureSource]", stream: bool | None) -> int:
        """One question about all pictures; returns the exit code."""
        from eve_vlm.serve.asking.picture_answers import PictureAnswers

        pictures = [source.open() for source in sources]
        alone = self.question.n == self.question.num_beams == 1 and not self.as_json
        engine = self.load()
        try:
            if alone and (sys.stdout.isatty() if stream is None else stream):
                messages = self.question.messages(pictures)
                with closing(engine.stream(messages, **asdict(self.question.sampling))) as pieces:
                    for piece in pieces:
                        show(piece.text, end="")
                show("")
                return 0
            answers = self.question.answers(engine, pictures)
        except KeyboardInterrupt:
            show("\nStopped.", err=True)
            return STOPPED
        name = " ".join(source.name for source in sources)
        self.show(PictureAnswers(number=0, name=name, answers=answers), named=False)
        return 0

    def about_each(self, sources: "Sequence[PictureSource]", out: Path | None) -> int:
        """The question about each picture; returns the exit code."""
        from eve_vlm.serve.asking.answer_files import AnswerFile

        if not sources:
            raise ValueError("There is no picture to ask about; name some in front.")
        if out is not None and any(source.name == "-" for source in sources):
            raise ValueError(
                "--out goes on by the pictures' names, and standard input has none; save it first."
            )
        every = {source.name: source for source in sources}
        file = None
        if out is not None:
            file = AnswerFile(out, asked=self.asked, ids=every, answers=self.question.n)
        left = [source for name, source in every.items() if not (file and name in file.done)]
        run = _Run(out=out, total=len(every), before=len(every) - len(left))
        if left:
            with file or nullcontext():
                self._run(run, left, file)
        return run.conclude(quiet=self.as_json)

    def _run(
        self, run: "_Run", sources: "Sequence[PictureSource]", file: "AnswerFile | None"
    ) -> None:
        from tqdm import tqdm

        from eve_vlm.serve.asking.answer_files import records_of
        from eve_vlm.serve.asking.picture_answers import answer_each, in_order

        results = answer_each(self.load(), self.question, sources)
        shown = self.as_json or file is None
        # In a terminal the answers themselves show how far it is.
        hidden = True if shown and sys.stdout.isatty() else None
        bar = tqdm(total=run.total, initial=run.before, unit="picture", disable=hidden)
        try:
            with bar, closing(results if file else in_order(results)) as results:
                for result in results:
                    if file:
                        file.add(records_of(result, self.asked))
                    run.count(result)
                    if shown:
                        self.show(result)
                    bar.update()
        except KeyboardInterrupt:
            run.stopped = True

    def show(self, result: "PictureAnswers", *, named: bool = True) -> None:
        """Prints what came of one picture, or of all together."""
        from eve_vlm.serve.asking.answer_files import json_line, records_of

        if self.as_json:
            for record in records_of(result, self.asked):
                show(json_line(record).decode(), end="")
        elif result.error is not None:
            show(f"eve: {result.error}", err=True)
        else:
            for answer in result.answers:
                show(f"{result.name}: {answer.text}" if named else answer.text)


@dataclass(kw_only=True, slots=True)
class _Run:
    """How far a question to each of many pictures has come."""

    out: Path | None
    total: int
    before: int
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    stopped: bool = False

    def count(self, result: "PictureAnswers") -> None:
        """Takes in one result."""
        if result.error is None:
            self.answered += 1
        else:
            self.failed.append(result.name)

    def conclude(self, *, quiet: bool) -> int:
        """Says what was done, and returns the exit code."""
        from eve_vlm.errors import listed

        done = self.before + self.answered
        if self.failed:
            where = f"; {self.out} says why, and the same command tries again" if self.out else ""
            show(
                f"eve: {len(self.failed)} of {self.total} pictures have no answer "
                f"({listed(self.failed)}){where}.",
                err=True,
            )
        if self.stopped:
            how = "the same command goes on" if self.out else "with --out FILE it could go on"
            show(f"\nStopped with {done} of {self.total} pictures answered; {how}.", err=True)
        elif self.out:
            earlier = f", {self.before} of them earlier" if self.before else ""
            show(f"{self.out} has answers to {done} of {self.total} pictures{earlier}.", err=quiet)
        return STOPPED if self.stopped else 1 if self.failed else 0


__all__ = ["ask"]
