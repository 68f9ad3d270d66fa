"""The command that looks inside: `eve look` draws where the model looked for each word it said.

The answer comes from the engine, the numbers from `attention_map`, the drawing from
`attention_picture`, all imported inside.  Easy to get wrong: layers, heads, words, rows and columns
are all counted from 0, as in Python.
"""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .answering import MaxNewTokens, ModelName, show
from .default import default_model

if TYPE_CHECKING:
    from PIL import Image

    from eve_vlm.image_processing_eve import EveImageProcessor
    from eve_vlm.serve.looking.attention_map import AttentionMaps


class Method(StrEnum):
    """What is drawn."""

    attention = "attention"
    gradient = "gradient"


def look(
    what: Annotated[
        list[str],
        typer.Argument(metavar="PICTURE... QUESTION", help="Picture files, then the question."),
    ],
    out: Annotated[Path, typer.Option(help="Draw into this PNG file.")] = Path("map.png"),
    model: ModelName = None,
    answer: Annotated[
        str | None, typer.Option(help="Explain this answer instead of the model's own.")
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="attention: the weights themselves. gradient: how far they made the word likelier."
        ),
    ] = Method.attention,
    word: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|TEXT",
            help="Show this word of the answer, by its number from 0 or its text. May be repeated.",
        ),
    ] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="Average over these layers only. May be repeated.")
    ] = None,
    head: Annotated[
        list[int] | None, typer.Option(help="Average over these heads only. May be repeated.")
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    numbers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json|FILE.npz",
            help="Write numbers too: .json for each word's map and shares, .npz for every layer, "
            "head and token.",
        ),
    ] = None,
) -> None:
    """See where the model looked for each word of its answer.

    eve look cat.png "What is this?" --out map.png
    """
    *files, question = what
    _check(files, question, out, numbers)
    from eve_vlm.pictures import open_picture
    from eve_vlm.serve.engine import EveEngine, user_message
    from eve_vlm.serve.looking.attention_map import look as look_where
    from eve_vlm.serve.looking.attention_picture import draw_map, save_map

    pictures = [open_picture(file) for file in files]
    messages = user_message(question, pictures)
    engine = EveEngine.from_pretrained(model or default_model())
    whole = numbers is not None and numbers.suffix.lower() == ".npz"
    maps = look_where(
        engine,
        messages,
        answer=answer,
        max_new_tokens=max_new_tokens,
        method=method.value,
        layers=layer or None,
        heads=head or None,
        average=() if whole else ("layers", "heads"),
    )
    asked = None if word is None else [int(one) if one.isdecimal() else one for one in word]
    processor = engine.processor.image_processor
    title = f"{question.replace('<image>', '')}\n{maps.answer}"
    drawn = draw_map(maps, pictures, pictures=processor, words=asked, title=title)
    lines = _lines(maps, pictures, processor, asked)
    if numbers is not None:
        _write_numbers(maps, numbers, {"question": question, "pictures": files})
    save_map(drawn, out)
    show("\n".join([maps.answer, "", *lines, "", f"{out} shows where each word looked."]))


def _check(files: list[str], question: str, out: Path, numbers: Path | None) -> None:
    """Refuses now what would be refused after minutes of answering."""
    if os.path.isfile(question):  # Path.is_file() raises for a question as long as a page
        raise ValueError(f"There is no question behind {question}; put it last, in quotes.")
    if not files:
        raise ValueError("There is no picture to look at; name one in front of the question.")
    if out.suffix.lower() != ".png":
        raise ValueError(
            f"--out {out} does not end in .png; the map is drawn as PNG, so rename it."
        )
    if numbers is not None and numbers.suffix.lower() not in (".json", ".npz"):
        raise ValueError(f"--numbers {numbers} ends in neither .json nor .npz; rename it.")


def _lines(
    maps: "AttentionMaps",
    pictures: "list[Image.Image]",
    processor: "EveImageProcessor",
    words: list[int | str] | None,
) -> list[str]:
    """A table: each word, its share on cells, its strongest cell."""
    from eve_vlm.serve.looking.attention_picture import cell_box

    places = range(len(maps.words)) if words is None else [maps.find(word) for word in words]
    texts = [maps.words[place].text.strip() for place in places]
    wide = max([len("word"), *map(len, texts)])
    lines = [f"{'':>3}  {'word':<{wide}}  on cells  strongest cell"]
    for place, text in zip(places, texts, strict=True):
        best = maps.strongest(place)
        left, top, right, bottom = cell_box(
            pictures[best.picture],
            best.row,
            best.col,
            shape=maps.grids[best.picture],
            pictures=processor,
        )
        where = f"picture {best.picture}, " if len(pictures) > 1 else ""
        where += f"row {best.row}, column {best.col}: pixels {left} to {right} across"
        share = f"{maps.shares(place).cells:.1%}"
        lines.append(f"{place:>3}  {text:<{wide}}  {share:>8}  {where}, {top} to {bottom} down")
    return lines


def _write_numbers(maps: "AttentionMaps", file: Path, about: dict[str, Any]) -> None:
    """Everything that the drawing is made of, whole or not at all."""
    import numpy as np

    from eve_vlm.output_folder import written_whole

    pictures = range(len(maps.grids))
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as part:
        if file.suffix.lower() == ".npz":
            names = np.full(maps.weights.shape[2], -1)  # tokens of no word, such as the end
            for place, word in enumerate(maps.words):
                names[list(word.tokens)] = place
            arrays: dict[str, Any] = {
                "weights": maps.weights,
                "text": maps.text,
                "layers": maps.layers,
                "heads": maps.heads,
                "words": [word.text for word in maps.words],
                "word_of_token": names,
            }
            arrays |= {f"cells_{picture}": maps.cell_tokens(picture) for picture in pictures}
            with part.open("wb") as stream:  # a name would get `.npz` appended
                np.savez(stream, **arrays)
            return
        told = [
            {
                "text": maps.answer if word is None else maps.words[word].text,
                "tokens": None if word is None else maps.words[word].tokens,
                "shares": maps.shares(word)._asdict(),
                "maps": [maps.map(word, picture=picture).tolist() for picture in pictures],
            }
            for word in (None, *range(len(maps.words)))
        ]
        facts: dict[str, Any] = {"method": maps.method, "layers": maps.layers}
        facts |= {"heads": maps.heads, "whole_answer": told[0], "words": told[1:]}
        part.write_text(json.dumps(about | facts, ensure_ascii=False, indent=1), encoding="utf-8")


__all__ = ["Method", "look"]
