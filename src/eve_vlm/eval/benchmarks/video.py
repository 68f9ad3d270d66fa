"""Questions about videos: MSVD-QA, MSRVTT-QA, ActivityNet-QA, shown as a few frames.

A judge says whether an answer means what is expected, as is usual since Video-ChatGPT.  Easy to get
wrong: ActivityNet-QA is a data set of the Hub with zipped videos; the other two are folders as
Video-ChatGPT lays them out, with questions and answers in two files.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from eve_vlm.eval.task import COUNT, MissingDataError, Sample, Sums, ratio

from .frames import VIDEOS, video_frames
from .hub_data import data_folder
from .judge import Rubric
from .judged import JudgedBenchmark

PLACES = ("videos", "all_test")  # where videos lie below the folder of their data set
BEST = 5  # what the best answer gets
KINDS = (
    *("motion", "spatial relation", "temporal relation", "yes or no", "color"),
    *("object", "location", "number", "other"),
)
"""ActivityNet-QA's types by their numbers."""


def _same(text: str) -> tuple[bool, int] | None:
    """Yes or no, and a whole number from 0 to 5."""
    match = re.fullmatch(r"\W*(yes|no)\W+([0-5])(?:\.0)?\W*", text.strip(), re.IGNORECASE)
    return (match[1].lower() == "yes", int(match[2])) if match else None


class VideoBenchmark(JudgedBenchmark):
    """Questions about videos, with one right answer each."""

    columns: ClassVar[tuple[str, ...]] = ("video_name", "question_id", "question", "answer")
    pictures = ()
    rubric = Rubric(
        name="video",
        version=1,
        words="""You compare an answer to a question about a video with the right answer. You do \
not see the video.

The answer is right if it means the same as the right answer, in whatever words; a more special or \
a more general word for the same thing is right, more words around it do no harm. It is wrong if \
it says something else, or both the right thing and its contrary.

Question: {question}
Right answer: {reference}
Answer: {answer}

Reply with yes or no, then a whole number from 0 (nothing in common) to 5 (the same), such as \
"yes 4", and with nothing else.""",
        reminder='Reply with yes or no and a whole number from 0 to 5, such as "no 1".',
        read=_same,
    )

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row names its video."""
        return {
            "id": str(row["question_id"]),
            "question": row["question"],
            "answers": (row["answer"],),
            "unit": f"video {row['video_name']}",
            "facts": {"video": row["video_name"]},
        }

    def marks(self, sample: Sample, answer: str) -> dict[str, float]:
        """Whether the judge finds it right, and how near it is."""
        if not answer.strip():
            return {"accuracy": 0.0, "nearness": 0.0}
        right, near = self.verdict(
            {"question": sample.question, "reference": sample.answers[0], "answer": answer}
        )
        return {"accuracy": float(right), "nearness": near / BEST}

    def scores(self, sums: Sums) -> dict[str, np.ndarray]:
        """`nearness` is the mean from 0 to 5, which papers print beside the accuracy."""
        return {
            "accuracy": 100 * ratio(sums["accuracy"], sums[COUNT]),
            "nearness": BEST * ratio(sums["nearness"], sums[COUNT]),
        }

    def open(self, number: int, fields: Mapping[str, Any]) -> Sequence[Image.Image]:
        """Some frames of the video."""
        return video_frames(self._video(fields["facts"]["video"]), self.preset.frames)

    def folder(self) -> Path:
        """Where the data set lies."""
        return data_folder(self.preset.data, self.root)

    def with_videos(self, rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The rows, once all of their videos are there.

        Raises:
            MissingDataError: if one is lacking.
        """
        found = list(rows)
        names = dict.fromkeys(row["video_name"] for row in found)
        lacking = [name for name in names if self._stem(name) is None]
        if lacking:
            raise MissingDataError(
                f"{self.folder()} lacks {len(lacking)} of {len(names)} videos, {lacking[0]!r} "
                f"first; put each into {' or '.join(PLACES)} below it, as a file "
                f"({', '.join(VIDEOS)}) or a folder of frames."
            )
        return found

    def _video(self, name: str) -> Path:
        stem = self._stem(name)
        assert stem is not None, "with_videos has looked"
        return self._videos[stem]

    def _stem(self, name: str) -> str | None:
        # ActivityNet's files are called v_NAME.
        return next((stem for stem in (f"v_{name}", name) if stem in self._videos), None)

    @cached_property
    def _videos(self) -> dict[str, Path]:
        return {
            path.name if path.is_dir() else path.stem: path
            for place in PLACES
            if (self.folder() / place).is_dir()
            for path in sorted((self.folder() / place).iterdir())
            if path.is_dir() or path.suffix.lower() in VIDEOS
        }


class FolderBenchmark(VideoBenchmark):
    """A folder with `test_q.json`, `test_a.json` and `videos`."""

    def rows(self) -> Iterable[Mapping[str, Any]]:
        """Questions, each with its answer."""
        questions, answers = (self._entries(kind) for kind in ("q", "a"))
        known = {one["question_id"]: one["answer"] for one in answers}
        lacking = [one for one in questions if one["question_id"] not in known]
        if lacking:
            raise ValueError(
                f"{self.split}_a.json in {self.folder()} has no answer to question "
                f"{lacking[0]['question_id']}; fetch both files again."
            )
        return self.with_videos({**one, "answer": known[one["question_id"]]} for one in questions)

    def folder(self) -> Path:
        """Where the data set lies; it is not on the Hub."""
        folder = self.root / self.preset.data if self.root else None
        if folder is None or not folder.is_dir():
            raise MissingDataError(
                f"{self.preset.data} is not there; make ROOT/{self.preset.data} with "
                f"{self.split}_q.json, {self.split}_a.json and videos, as Video-ChatGPT's "
                "quantitative evaluation describes, and evaluate with --data-root ROOT."
            )
        return folder

    def _entries(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder() / f"{self.split}_{kind}.json"
        if not path.is_file():
            raise MissingDataError(
                f"{path} is not there; put it beside the videos, as Video-ChatGPT's quantitative "
                "evaluation describes."
            )
        needed = self.columns[:3] if kind == "q" else ("question_id", "answer")
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            return [{name: one[name] for name in needed} for one in entries]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is no list of entries with {', '.join(needed)} ({error!r}); fetch it "
                "again."
            ) from None


class MsvdQa(FolderBenchmark):
    """MSVD-QA."""

    name = "msvd_qa"
    title = "Questions about short videos of daily life"


class MsrvttQa(FolderBenchmark):
    """MSRVTT-QA."""

    name = "msrvtt_qa"
    title = "Questions about short videos of many kinds"


class ActivityNetQa(VideoBenchmark):
    """ActivityNet-QA."""

    name = "activitynet_qa"
    title = "Questions about what people do in long videos"
    columns = (*VideoBenchmark.columns, "type")

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row's question has small letters and no mark; its type is a number."""
        return {
            **super().fields(row, number),
            "question": row["question"].capitalize(),
            "group": KINDS[int(row["type"])],
        }

    def rows(self) -> Iterable[Mapping[str, Any]]:
        """Rows of the Hub's table."""
        return self.with_videos(super().rows())


__all__ = ["ActivityNetQa", "MsrvttQa", "MsvdQa", "VideoBenchmark"]
