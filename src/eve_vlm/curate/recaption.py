"""The stage `recaption`: writes a new caption for every picture, and keeps each one that was given.

Captions cost money or GPU hours, so each is noted in a journal as it comes; a unit that is tried
again asks only for what it lacks.  Easy to get wrong: pictures that failed are not noted until the
whole unit is finished, or a bad hour of a server would be remembered for ever.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from eve_vlm.curate.blocks import with_reasons
from eve_vlm.curate.endpoint import Captioned, Endpoint
from eve_vlm.curate.journal import Journal
from eve_vlm.curate.places import Row, open_rows
from eve_vlm.curate.recipe import CurateRecipe
from eve_vlm.curate.tasks import Task

if TYPE_CHECKING:
    import pyarrow as pa

FEW = 3  # failures of a block that say nothing about the captioner


def recaption(rows: "pa.Table", task: Task) -> "pa.Table":
    """The rows with captions, who wrote them and why they ended; failed pictures are dropped.

    Raises:
        ValueError: if the captioner is at fault; captions that it gave are kept for the next try.
    """
    import pyarrow as pa

    section = task.recipe.recaption
    assert section is not None, "the stage is left out without its section"
    listed = rows.to_pylist()
    journal = Journal(task.folder, "recaption", task.unit)
    lacking = [row for row in listed if row["id"] not in journal.finished]
    failed: dict[str, str | None] = {}
    most = max(FEW, section.most_failed * len(listed))
    for one in _captions(lacking, task) if lacking else ():
        if one.caption is not None:
            journal.add({"id": one.id, "caption": one.caption, "finish": one.finish})
            continue
        failed[one.id] = one.error
        if len(failed) > most:
            raise ValueError(
                f"{len(failed)} pictures of one block of {len(listed)} got no caption, the last "
                f"because: {one.error}. Mend what is wrong and run the same command again, or "
                "raise recaption.most_failed."
            )
    found = [journal.finished.get(row["id"], {}) for row in listed]
    names = [section.model if one else None for one in found]
    for name, values in (
        ("caption", [one.get("caption") for one in found]),
        ("finish", [one.get("finish") for one in found]),
        ("captioner", names),
    ):
        rows = rows.append_column(name, pa.array(values, pa.string()))
    task.facts["asked"] = len(lacking)
    task.afterwards.append(journal.remove)
    why = [None if one else "no caption was given" for one in found]
    return with_reasons(rows, why, [failed.get(row["id"]) for row in listed])


def _captions(rows: Sequence[Row], task: Task) -> Iterator[Captioned]:
    """Captions as they come, from wherever the recipe has them made; counts what they took."""
    section = task.recipe.recaption
    assert section is not None, "the stage is left out without its section"
    if section.endpoint is None:
        yield from _local(rows, task)
        return
    endpoint = Endpoint(task.recipe, workers=task.recipe.worker("recaption").most or 1)
    try:
        yield from endpoint.captions(rows)
    finally:
        task.facts |= dict(endpoint.counts)


def _local(rows: Sequence[Row], task: Task) -> Iterator[Captioned]:
    """Captions by a model in this process, a batch at a time."""
    section = task.recipe.recaption
    assert section is not None, "the stage is left out without its section"
    engine = _engine(section.model)
    settings = {
        "max_new_tokens" if k == "max_tokens" else k: v for k, v in section.sampling.items()
    }
    for first in range(0, len(rows), section.parallel):
        part = rows[first : first + section.parallel]
        pictures = []
        for picture in open_rows(part, task.recipe.decode):
            if section.longest_edge is not None:
                picture.thumbnail((section.longest_edge, section.longest_edge))
            pictures.append(picture)
        answers = engine.answer(
            [_conversation(task.recipe, picture) for picture in pictures],
            batch_size=section.parallel,
            **settings,
        )
        for row, answer in zip(part, answers, strict=True):
            _add(task, "requests", 1)
            _add(task, "prompt_tokens", answer.prompt_tokens)
            _add(task, "caption_tokens", len(answer.token_ids))
            error = None if answer.text else "it answered without a word"
            yield Captioned(row["id"], answer.text or None, answer.finish_reason, error)


def _conversation(recipe: CurateRecipe, picture: Any) -> list[dict[str, Any]]:
    """The question about one picture, as engines take it."""
    from eve_vlm.serve.messages import user_message

    assert recipe.recaption is not None, "the stage is left out without its section"
    asked = user_message(recipe.recaption.prompt, [picture])
    if recipe.recaption.system is None:
        return asked
    return [{"role": "system", "content": recipe.recaption.system}, *asked]


def _add(task: Task, name: str, number: int) -> None:
    task.facts[name] = task.facts.get(name, 0) + number


@lru_cache(maxsize=1)
def _engine(model: str) -> Any:
    """A local model that answers, ours or any of transformers, loaded once in a worker."""
    from eve_vlm.eval.model_files import find_or_say_how, is_eve
    from eve_vlm.eval.other_models import TransformersEngine
    from eve_vlm.serve.engine import EveEngine

    folder = find_or_say_how(model)
    return (EveEngine if is_eve(folder) else TransformersEngine).from_pretrained(folder)


__all__ = ["recaption"]
