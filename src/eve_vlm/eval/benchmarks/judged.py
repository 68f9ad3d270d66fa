"""Benchmarks whose answers a language model marks or reads: MM-Vet and MathVista.

The rubrics are our own words, not those of the benchmarks' programmes, so scores are near published
ones at best; results name the judge and the words.  Easy to get wrong: MathVista's judge does not
mark, it only says what the final answer is, and simple answers need no judge at all.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from eve_vlm.eval.metrics import levenshtein, option_letter
from eve_vlm.eval.task import Sample

from .base import Benchmark
from .judge import Rubric, no_judge


class JudgedBenchmark(Benchmark):
    """Asks a judge about every answer that is not empty."""

    needs_judge = True
    rubric: ClassVar[Rubric[Any]]

    def settings(self) -> dict[str, Any]:
        """Also the rubric."""
        return {**super().settings(), "rubric": self.rubric.facts}

    def samples(self) -> Sequence[Sample]:
        """All rows; the judge is asked a word first, so that a wrong key shows at once."""
        if self.judge:
            self.judge.check()
        return super().samples()

    def verdict(self, fields: Mapping[str, str]) -> Any:
        """What the judge says.

        Raises:
            ValueError: if there is no judge, or no verdict.
        """
        if self.judge is None:
            raise ValueError(no_judge(self.name))
        return self.judge.verdict(self.rubric, fields)

    @abstractmethod
    def marks(self, sample: Sample, answer: str) -> dict[str, float]:
        """Marks of an answer; an empty one costs no verdict."""


# --- MM-Vet ---------------------------------------------------------------------------------------


def _share(text: str) -> float | None:
    """The one number from 0 to 1 in a verdict."""
    found = re.findall(r"(?<![\d.])(?:0(?:\.\d+)?|1(?:\.0+)?)(?![\d.]*\d)", text)
    numbers = re.findall(r"\d+(?:\.\d+)?", text)
    return float(found[0]) if len(found) == len(numbers) == 1 else None


class MmVet(JudgedBenchmark):
    """MM-Vet."""

    name = "mmvet"
    title = "Questions that need several abilities at once, answered freely"
    metric = "score"
    columns = ("question_id", "question", "answer", "capability")
    rubric = Rubric(
        name="mmvet",
        version=1,
        words="""You grade an answer to a question about a picture. You do not see the picture; \
the right answer tells what is in it.

Give a number from 0.0 (nothing is right) to 1.0 (everything is right) in steps of 0.1. Where the \
right answer joins parts by <AND>, every part is needed, and the number is the share of the parts \
that the answer has; what it says besides and wrongly does not add. Where it joins them by <OR>, \
any one of them is fully right. Other words for the same thing are right.

Examples, each for the question "Which numbers solve the equation?" with the right answer \
"2 <AND> -3": the answer "7" gets 0.0, the answer "2" gets 0.5, the answer "It is 2 or 3." gets \
0.5, the answer "-3 and 2" gets 1.0.

Question: {question}
Right answer: {reference}
Answer: {answer}

Reply with the number alone.""",
        reminder="Reply with one number from 0.0 to 1.0 and nothing else.",
        read=_share,
    )

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row names the abilities that its question needs."""
        return {
            "id": row["question_id"],
            "question": row["question"],
            "answers": (row["answer"],),
            "group": ",".join(sorted(row["capability"].split(","))),
        }

    def marks(self, sample: Sample, answer: str) -> dict[str, float]:
        """The judge's number."""
        if not answer.strip():
            return {"score": 0.0}
        reference = re.sub(r" *<(AND|OR)> *", r" <\1> ", sample.answers[0])
        fields = {"question": sample.question, "reference": reference, "answer": answer}
        return {"score": self.verdict(fields)}


# --- MathVista ------------------------------------------------------------------------------------


def _final_line(text: str) -> str | None:
    """What stands behind the last "Final answer:", or a verdict of one line."""
    stated = re.findall(r"(?i)final answer:[ \t]*(.+)", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return stated[-1].strip() if stated else lines[0] if len(lines) == 1 else None


class MathVista(JudgedBenchmark):
    """MathVista."""

    name = "mathvista"
    title = "Mathematics about pictures"
    columns = (
        *("pid", "query", "image", "choices", "answer", "precision"),
        *("question_type", "answer_type", "metadata"),
    )
    pictures = ("decoded_image",)
    rubric = Rubric(
        name="mathvista",
        version=1,
        words="""A student was asked this:

{question}

The student replied:

{answer}

What is the final answer in this reply? Do not solve the problem, and do not correct the student. \
Write a line "Final answer:" and behind it: the letter of the option if there are options; a \
number without a unit if a number is asked for; a list such as [1, 2] if a list is asked for; \
"none" if the reply has no answer.""",
        reminder='Reply with one line that begins with "Final answer:".',
        read=_final_line,
    )

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row's `query` is its question with hint and choices."""
        return {
            "id": row["pid"],
            "question": row["query"],
            "options": tuple(row["choices"] or ()),
            "answers": (row["answer"],) if row["answer"] else (),
            "group": row["metadata"]["task"],
            "unit": row["image"],
            "facts": {
                "question_type": row["question_type"],
                "answer_type": row["answer_type"],
                "precision": int(row["precision"] or 0),
            },
        }

    def marks(self, sample: Sample, answer: str) -> dict[str, float]:
        """Whether the final answer is right, read by the judge where it is not plain."""
        if not answer.strip():
            return {"accuracy": 0.0}
        final = answer.strip()
        if _plain(sample, final) is None:
            final = self.verdict({"question": sample.question, "answer": answer})
        return {"accuracy": float(_value(sample, final) == sample.answers[0].strip())}


def _plain(sample: Sample, answer: str) -> str | None:
    """A final answer that needs no reading: an option or its letter, a number."""
    if sample.facts["question_type"] == "multi_choice":
        alone = re.fullmatch(r"\(?[A-Za-z]\)?\.?", answer)
        return answer if alone or answer in sample.options else None
    if sample.facts["answer_type"] == "list":
        return answer if re.fullmatch(r"\[[^\[\]]*\]", answer) else None
    return answer if _number(answer) is not None else None


def _value(sample: Sample, final: str) -> str | None:
    """A final answer in the form of the data set: an option's text, a rounded number, a list.

    As in the benchmark's programme, words that are no option count as the nearest one by letters.
    """
    if final.lower() == "none":
        return None
    if sample.facts["question_type"] == "multi_choice":
        letter = option_letter(final, sample.options)
        if letter:
            return sample.options["ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(letter)]
        return min(sample.options, key=lambda option: levenshtein(final, option))
    if sample.facts["answer_type"] == "list":
        return final
    value = _number(final)
    if value is None:
        return None
    if sample.facts["answer_type"] == "integer":
        return str(int(value))
    return str(round(value, sample.facts["precision"]))


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", text) else None


__all__ = ["JudgedBenchmark", "MathVista", "MmVet"]
