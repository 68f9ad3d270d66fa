"""A few pictures that eve-small is shown with: drawn here, from what it was not trained on.

A thing, scenes of pictograms and a written word, each from the held-out side of its generator.
Easy to get wrong: which pictures these are is fixed here and by no answer, so wrong ones are shown
too.
"""

from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from eve_vlm.data.records import text_of
from eve_vlm.data.sources.made import made_source
from eve_vlm.serve.engine import EveEngine, user_message

SEED = 8
TWO = {"canvases": [[112, 112]], "grids": [[2, 2]], "num_concepts": 20, "min_objects": 2}
CROWD = {
    **{"canvases": [[168, 168]], "grids": [[3, 3]], "num_concepts": 20},
    **{"min_objects": 6, "max_objects": 7, "max_count": 5, "distractor_kinds": 3},
}
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "thing": ("scenes", {"families": {"name": 1}, "settings": {"single_canvases": [[112, 112]]}}),
    "there": ("scenes", {"families": {"presence": 1}, "settings": TWO}),
    "where": ("scenes", {"families": {"position": 1}, "settings": TWO}),
    "count": ("scenes", {"families": {"count": 1}, "settings": CROWD}),
    "word": ("rendered", {"what": "words", "groups": {"short": 1}, "families": {"word": 1}}),
}
"""{name of the file: kind and options of its source}."""


class AnsweredExample(NamedTuple):
    """A picture, what was asked, what the model said, and what is so."""

    file: Path
    question: str
    answer: str
    truth: str


def answered_examples(model: str | Path, folder: Path) -> list[AnsweredExample]:
    """Draws the pictures into a folder and asks a model about them.

    Raises:
        ValueError: if the model cannot be loaded, or what draws the pictures is not installed.
    """
    asked = []
    for name, (kind, options) in EXAMPLES.items():
        source = made_source(
            kind, {**options, "size": 1, "split": "held_out"}, seed=SEED, name=name
        )
        record = source[0]
        picture = record.images[0]
        assert isinstance(picture, Image.Image), "they are drawn, not read"
        question, truth = (text_of(message).strip() for message in record.messages[:2])
        asked.append((name, picture, question, truth))
    engine = EveEngine.from_pretrained(str(model))
    answers = engine.generate(
        [user_message(question, [picture]) for _, picture, question, _ in asked],
        max_new_tokens=24,
    )
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for (name, picture, question, truth), answer in zip(asked, answers, strict=True):
        picture.save(folder / f"{name}.png")
        shown.append(AnsweredExample(folder / f"{name}.png", question, answer, truth))
    return shown


__all__ = ["AnsweredExample", "answered_examples"]
