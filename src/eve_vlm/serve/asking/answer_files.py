"""A file of answers, one JSON line for each, that a run can be stopped and taken up again with.

A line is written whole and at once, so whatever ends the run, only the last line can be broken; the
next run mends that and asks only what has no answer yet.  Easy to get wrong: whether a line without
its end is the last thing that we wrote or the text of somebody else's file, which must stay as it
is.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from eve_vlm.output_folder import written_whole
from eve_vlm.serve.asking.picture_answers import PictureAnswers, Question

START = b'{"id": '  # what every line of ours begins with


def json_line(record: dict[str, Any]) -> bytes:
    """A record as one line; a file name that is no UTF-8 comes back from it as it was."""
    # A byte of such a name is half a surrogate pair, which JSON has an escape for.
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def settings_of(question: Question, **more: Any) -> dict[str, Any]:
    """How a question is answered, as it stands in every line."""
    ways = asdict(question.sampling)
    del ways["logprobs"]  # lines have none
    others = {"system": question.system, "n": question.n, "beams": question.num_beams}
    return {**ways, "stop": list(ways["stop"]), **others, **more}


def records_of(result: PictureAnswers, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each answer, or one with the error.

    Args:
        asked: "question", "model" and "settings", which stand in every line.
    """
    begin = {"id": result.name, "question": asked["question"]}
    end = {"model": asked["model"], "settings": asked["settings"]}
    if result.error is not None:
        return [{**begin, "error": result.error, **end}]
    return [
        {
            **begin,
            "answer": answer.text,
            "index": index,
            "finish_reason": answer.finish_reason,
            "tokens": len(answer.token_ids),
            "prompt_tokens": answer.prompt_tokens,
            "picture_tokens": answer.image_tokens,
            **end,
        }
        for index, answer in enumerate(result.answers)
    ]


class AnswerFile:
    """Answers to one question by one model, added line by line; also a context manager.

    Args:
        path: made if it is not there; lines of an earlier run are checked and kept, save those of
            `ids` that have an error or too few answers, which are asked again.
        asked: what all lines have in common: "question", "model" and "settings".
        ids: what this run asks about.
        answers: lines that one id has when it is finished.

    Raises:
        ValueError: if the file cannot be read or written, holds something else, or answers to
            something else.
    """

    def __init__(
        self, path: Path, *, asked: dict[str, Any], ids: Collection[str], answers: int = 1
    ):
        self.path, self.asked = path, asked
        try:
            kept = self._read(frozenset(ids), answers)
            self._file = path.open("ab")
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written ({error.strerror}); name another --out file."
            ) from None
        self.done = frozenset(kept)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Writes what came of one id, all its lines at once."""
        self._file.write(b"".join(map(json_line, records)))
        self._file.flush()

    def close(self) -> None:
        """Nothing is added any more."""
        self._file.close()

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, ids: frozenset[str], answers: int) -> set[str]:
        """Ids that are finished; the file keeps only whole lines that need not be asked again."""
        if not self.path.exists():
            return set()
        if not self.path.is_file():
            raise ValueError(f"{self.path} is there already and is no file; name another --out.")
        counts: dict[str, int] = {}
        dropped = 0
        for _, record in self._lines():
            if record is not None and "error" not in record:
                counts[record["id"]] = counts.get(record["id"], 0) + 1
            else:
                dropped += 1
        finished = {id for id, count in counts.items() if count >= answers}
        if dropped or len(finished) < len(counts):
            # What a link points to, and not the link.
            with written_whole(self.path.resolve()) as part, part.open("wb") as file:
                for line, record in self._lines():
                    if record is not None and not self._again(record, ids, finished):
                        file.write(line)
        return finished

    @staticmethod
    def _again(record: dict[str, Any], ids: frozenset[str], finished: set[str]) -> bool:
        return record["id"] in ids and record["id"] not in finished

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """Each line with its record; None for a last one that was not written to its end."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield line, self._record(line, number)
                elif line[: len(START)] == START[: len(line)]:
                    yield line, None
                else:
                    raise self._foreign(number)

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            raise self._foreign(number) from None
        if not isinstance(record, dict) or not isinstance(record.get("id"), str):
            raise self._foreign(number)
        for name, here in self.asked.items():
            there = record.get(name)
            if there == here:
                continue
            if isinstance(here, dict) and isinstance(there, dict):
                name = next(one for one in {**here, **there} if here.get(one) != there.get(one))
                here, there = here.get(name), there.get(name)
            raise ValueError(
                f"{self.path} holds answers with another {name} ({json.dumps(there)} there, "
                f"{json.dumps(here)} now); name another --out file."
            )
        return record

    def _foreign(self, number: int) -> ValueError:
        return ValueError(
            f"{self.path} is there already and its line {number} is no answer that this command "
            "wrote; name another --out file."
        )


__all__ = ["START", "AnswerFile", "json_line", "records_of", "settings_of"]
