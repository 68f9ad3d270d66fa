"""What the page shows, without the page: a visitor's conversation, drawings, figures, examples.

Everything here is plain functions of an engine and of what a visitor did, so that it can be tested
without a browser.  Easy to get wrong: pictures are kept as files and opened when they are needed,
so that a hundred visitors are not a hundred conversations of open pictures; and names and answers
are strangers' words, which become HTML only escaped.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageChops, ImageDraw

from eve_vlm.image_processing_eve import EveGrid, num_image_tokens
from eve_vlm.inspection.grid_picture import (
    CLASS,
    MARGIN,
    PAPER,
    ROW_END,
    draw_grid,
    load_font,
)
from eve_vlm.pictures import WEB_FORMATS, open_picture, read_picture
from eve_vlm.serve.engine import EveEngine
from eve_vlm.serve.http.limits import Limits
from eve_vlm.serve.looking.answer_words import Word, words_of
from eve_vlm.serve.looking.attention_map import AttentionMaps, Shares, look
from eve_vlm.serve.looking.attention_picture import COLOURS, overlay
from eve_vlm.serve.messages import Messages, picture_parts, processor_within, user_message
from eve_vlm.serve.reply import Answer, Piece, Reply
from eve_vlm.serve.sampling import Sampling
from eve_vlm.serve.worker import Worker

LIMITS = Limits()  # the server's, because a page has strangers too
MAX_PICTURES = 4  # in one question; more than that no column of a page shows
SHOWN = 1024  # pixels; longest side of a heat map on the page
MEAN = -1  # in place of the number of a layer or head: the mean of all
WHOLE = -1  # in place of the number of a word: the whole answer
ENDS = {
    "stop": "ended by itself",
    "length": "cut off at the longest answer",
    "cancelled": "stopped",
}


class Figure(NamedTuple):
    """A line of the table of counts and timings."""

    name: str
    text: str


class View(NamedTuple):
    """How the heat map of a word is made: by which method, and from which layer and head."""

    method: str = "attention"
    layer: int = MEAN
    head: int = MEAN


@dataclass(kw_only=True)
class Looked:
    """A finished answer, as long as one may ask where the model looked.

    messages: what the model read; pictures are file names.
    """

    messages: Messages
    answer: Answer
    words: tuple[Word, ...]
    max_image_tokens: int | None
    maps: dict[View, AttentionMaps] = field(default_factory=dict)


@dataclass(kw_only=True)
class Visit:
    """One visitor: what was said, what is being answered, and the last answer."""

    turns: Messages = field(default_factory=list)
    asking: Messages | None = None  # the turns and a question that is being answered
    reply: Reply | None = None
    looked: Looked | None = None
    waiting: list[str] = field(default_factory=list)  # picture files for the next question
    closed: bool = False  # by Clear, which begins another visit

    @property
    def files(self) -> list[str]:
        """Picture files on the page: those of the conversation, and behind them those that wait."""
        asked = [part["image"] for part in picture_parts(self.asking or self.turns)]
        return [*asked, *self.waiting]

    def question(self, text: str, files: Sequence[str]) -> Messages:
        """The conversation with one question more, checked.

        Raises:
            ValueError: if there are too many pictures or words, one cannot be read, or the question
                is empty.
        """
        check_pictures(files, earlier=len(picture_parts(self.turns)))
        if len(text) > LIMITS.max_text:
            raise ValueError(
                f"The question has {len(text):,} letters, and at most {LIMITS.max_text:,} may be; "
                "make it shorter."
            )
        return [*self.turns, *user_message(text, files)]

    def answered(
        self, engine: EveEngine, messages: Messages, answer: Answer, budget: int | None
    ) -> bool:
        """Takes in an answer; says no to one that was stopped before its first word."""
        if answer.finish_reason == "cancelled" and not answer.text:
            return False
        said = {"role": "assistant", "content": [{"type": "text", "text": answer.text}]}
        self.turns = [*messages, said]
        self.looked = Looked(
            messages=messages,
            answer=answer,
            words=words_of(engine.tokenizer, answer.token_ids) if picture_parts(messages) else (),
            max_image_tokens=budget,
        )
        return True


def check_pictures(
    files: Sequence[str], *, earlier: int = 0, unread: Sequence[str] | None = None
) -> None:
    """Counts the pictures of a question, and opens each once, with a server's limits.

    Args:
        earlier: pictures that the conversation has already.
        unread: those that were not opened before; None means all.

    Raises:
        ValueError: if there are too many, or one is no picture that can be read.
    """
    if len(files) > MAX_PICTURES:
        raise ValueError(
            f"The question has {len(files)} pictures, and at most {MAX_PICTURES} may be; take some "
            "out."
        )
    if earlier + len(files) > LIMITS.max_pictures:
        raise ValueError(
            f"The conversation would have {earlier + len(files)} pictures, and at most "
            f"{LIMITS.max_pictures} may be; press Clear to begin a new one."
        )
    for file in files if unread is None else unread:
        with open(file, "rb") as stream:
            read_picture(
                stream,
                name=Path(file).name,
                max_pixels=LIMITS.max_pixels,
                formats=WEB_FORMATS,
            )


async def pieces_of(
    worker: Worker, visit: Visit, messages: Messages, sampling: Sampling
) -> AsyncGenerator[list[Piece], None]:
    """The answer as it comes; what came since the last time together.

    Closing it, or cancelling the task that reads it, ends the answer at its next token.

    Raises:
        ValueError: if the request is bad.
        RuntimeError: if too many wait already (`QueueFullError`), or answering broke.
    """
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

    def hand_over(piece: Piece | BaseException) -> None:
        loop.call_soon_threadsafe(waiting.put_nowait, piece)

    worker.require_room()
    # Not `submit`: if the visitor leaves meanwhile, the reply must not be in the queue.
    [reply] = await asyncio.to_thread(
        worker.engine.replies, messages, sampling, on_piece=[hand_over], on_error=hand_over
    )
    worker.enqueue([reply])
    visit.reply = reply
    try:
        yield []
        last = False
        while not last:
            taken = [await waiting.get()]
            while not waiting.empty():
                taken.append(waiting.get_nowait())
            pieces = [one for one in taken if isinstance(one, Piece)]
            if len(pieces) < len(taken):
                raise RuntimeError("The model could not finish the answer; ask again.")
            last = pieces[-1].answer is not None
            yield pieces
    finally:
        reply.cancel()
        visit.reply = None


# --- drawings -------------------------------------------------------------------------------------


def draw_tokens(
    engine: EveEngine, file: str, max_image_tokens: int | None
) -> tuple[Image.Image, EveGrid]:
    """A picture under its token grid without the legend, which `grid_html` is; and the grid.

    Raises:
        ValueError: if the picture cannot be read, or the budget is below the smallest picture.
    """
    pictures = processor_within(engine.processor.image_processor, max_image_tokens)
    drawn = draw_grid(open_picture(file), pictures=pictures)
    bottom = drawn.top + drawn.grid.height * drawn.scale + MARGIN
    image = drawn.image.crop((0, 0, drawn.image.width, bottom))
    paper = Image.new("RGB", image.size, PAPER)
    _, _, right, _ = ImageChops.difference(image, paper).getbbox() or (0, 0, image.width, 0)
    return image.crop((0, 0, right + MARGIN, bottom)), drawn.grid


def draw_heat(
    worker: Worker, looked: Looked, word: int, picture: int, view: View
) -> tuple[Image.Image, str]:
    """One picture under the heat of one word, and what the colours mean, as HTML.

    Args:
        word: its number, or `WHOLE`.

    Raises:
        ValueError: if there is no such word or picture, or the model does not tell its attention.
    """
    engine = worker.engine
    if view not in looked.maps:
        with worker.paused():
            looked.maps[view] = look(
                engine,
                looked.messages,
                answer=looked.answer.token_ids,
                max_image_tokens=looked.max_image_tokens,
                method=view.method,
                layers=None if view.layer == MEAN else view.layer,
                heads=None if view.head == MEAN else view.head,
                average=("layers", "heads"),
            )
    maps, asked = looked.maps[view], None if word == WHOLE else word
    top = maps.largest()
    shown = open_picture(picture_parts(looked.messages)[picture]["image"])
    drawn = overlay(
        shown,
        maps.map(asked, picture=picture),
        pictures=engine.processor.image_processor,
        top=top,
        longest=SHOWN,
        max_image_tokens=looked.max_image_tokens,
    )
    # Small pictures grow by a whole number, so that the browser does not blur their cells.
    scale = max(1, SHOWN // 2 // max(drawn.size))
    drawn = drawn.resize((scale * drawn.width, scale * drawn.height), Image.Resampling.NEAREST)
    named = "The whole answer" if asked is None else f"“{maps.words[asked].text.strip()}”"
    return drawn, heat_html(named, maps.shares(asked), top, view.method)


# --- words and figures ----------------------------------------------------------------------------


def heat_html(named: str, shares: Shares, top: float, method: str) -> str:
    """What a word looked at, and the scale of the colours."""
    weights = method == "attention"
    what, most = ("attention", f"{top:.1%}") if weights else ("positive effect", f"{top:.3g}")
    colours = ", ".join(f"rgb{colour}" for colour in COLOURS)
    return (
        f"<p><b>{escape(named)}</b>: {shares.cells:.1%} of its {what} fell on cells of pictures, "
        f"{shares.class_tokens + shares.row_ends:.1%} on class and row-end tokens, "
        f"{shares.text:.1%} on text.</p>"
        f'<p class="scale">0<span style="background:linear-gradient(90deg, {colours})"></span>'
        f"{most} on one cell</p>"
    )


def figures_html(figures: Sequence[Figure]) -> str:
    """A table of counts and timings."""
    rows = (f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in figures)
    return f"<table>{''.join(rows)}</table>"


def grid_html(grid: EveGrid) -> str:
    """How a picture becomes tokens, as a sum, with the colours of the drawing."""
    cells, tokens = grid.rows * grid.cols, num_image_tokens(grid.rows, grid.cols)
    return (
        f"<p>{grid.rows} rows x {grid.cols} columns = {cells:,} cells, + {_key(CLASS)} 1 class + "
        f"{_key(ROW_END)} {grid.rows} row-ends = <b>{tokens:,} tokens</b></p>"
    )


def _key(colour: tuple[int, int, int]) -> str:
    return f'<i style="background:rgb{colour}"></i>'


def prompt_figure(tokens: int, image_tokens: int, cached: int | None = None) -> Figure:
    """What the model reads, and how much of it was there from an earlier turn."""
    text = f"{tokens:,} tokens: {image_tokens:,} picture, {tokens - image_tokens:,} text"
    return Figure("Prompt", text if cached is None else f"{text}; {cached:,} reused")


def answer_figures(answer: Answer) -> list[Figure]:
    """What was read, how long the answer is, and how long it took."""
    made = len(answer.token_ids)
    figures = [
        prompt_figure(answer.prompt_tokens, answer.image_tokens, answer.cached_tokens),
        Figure("Answer", f"{made:,} {_tokens(made)}, {ENDS[answer.finish_reason]}"),
        Figure("First token", f"after {answer.seconds_to_first:.2f} s"),
    ]
    if answer.tokens_per_second is not None:
        figures.append(Figure("Speed", f"{answer.tokens_per_second:,.1f} tokens/s after the first"))
    return figures


def _tokens(number: int) -> str:
    return "token" if number == 1 else "tokens"


def shown_turns(turns: Messages, said: str | None = None) -> list[dict[str, Any]]:
    """Messages as the chat shows them: pictures by their files, words as they are.

    Gradio (6.31) takes words for HTML even where Markdown is off, so they are escaped: otherwise a
    model that says `<img src=...>` would have every visitor's browser fetch it.

    Args:
        said: the answer so far, if one is in the making.
    """
    answer = [{"role": "assistant", "content": [{"type": "text", "text": said or "..."}]}]
    return [
        {
            "role": message["role"],
            "content": [
                {"path": part["image"]}
                if part["type"] == "image"
                else {"type": "text", "text": escape(part["text"], quote=False)}
                for part in message["content"]
            ],
        }
        for message in [*turns, *(answer if said is not None else [])]
    ]


# --- examples -------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A picture and a question that a newcomer can begin with."""

    picture: Image.Image
    question: str


def drawn_examples() -> list[Example]:
    """Simple drawings for a model of which nothing is known."""
    shapes = Image.new("RGB", (336, 224), "#f5efe0")
    draw = ImageDraw.Draw(shapes)
    draw.ellipse((28, 62, 128, 162), "#d62828")
    draw.rectangle((196, 52, 306, 162), "#1d5fa8")
    triangles = Image.new("RGB", (224, 224), "#dcecdc")
    draw = ImageDraw.Draw(triangles)
    for left, top in ((24, 30), (120, 24), (72, 120)):
        draw.polygon(((left, top + 80), (left + 80, top + 80), (left + 40, top)), "#2a7f3f")
    word = Image.new("RGB", (336, 112), "#ffffff")
    ImageDraw.Draw(word).text((96, 22), "HELLO", "#222222", load_font(56))
    return [
        Example(shapes, "What is in the picture?"),
        Example(triangles, "How many triangles are there?"),
        Example(word, "What does it say?"),
    ]


__all__ = [
    "LIMITS",
    "MAX_PICTURES",
    "MEAN",
    "WHOLE",
    "Example",
    "Figure",
    "Looked",
    "View",
    "Visit",
    "answer_figures",
    "check_pictures",
    "draw_heat",
    "draw_tokens",
    "drawn_examples",
    "figures_html",
    "grid_html",
    "heat_html",
    "pieces_of",
    "prompt_figure",
    "shown_turns",
]
