"""Answers out of a few: yes or no, option letters, and the scores that are made of them.

Model answers are free text; these functions read which choice is meant, by the rule of the
benchmark that is named.  Easy to get wrong: an answer that cannot be read is no choice at all
(`other`, None); it is never given a random choice, and it is counted as wrong.
"""

import re
import string
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .task import COUNT, Row, Sums, ratio

# --- yes or no ------------------------------------------------------------------------------------

YesNo = Literal["yes", "no", "other"]
YesNoRule = Literal["pope", "mme"]


def yes_no(answer: str, *, rule: YesNoRule = "pope") -> YesNo:
    """Whether an answer says yes or no.

    `pope` (RUCAIBox/POPE `evaluate.py`, the same in LLaVA's and EVE's `eval_pope.py`): of the words
    before the first full stop, commas left out, "No", "no" or "not" means no; all else is yes,
    even "NO".  One difference: an answer without a word is `other`, where the programme has yes.

    `mme` (the benchmark's `calculation.py`): in small letters, a "yes" within the first four
    letters, else a "no" within them, else `other`.  lmms-eval also takes "y" and "n" alone, and
    leaves out full stops first.
    """
    answer = answer.strip()
    if rule == "mme":
        start = answer.lower()[:4]
        return "yes" if "yes" in start else "no" if "no" in start else "other"
    if not re.search(r"\w", answer):
        return "other"
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def yes_no_marks(answer: str, expected: str, *, rule: YesNoRule = "pope") -> dict[str, float]:
    """Marks `tp`, `fp`, `fn`, `tn` of one answer, where yes is the positive.

    An unreadable answer is `fn` where yes is right, and none of the four where no is right.
    """
    said, right = yes_no(answer, rule=rule), expected.strip().lower() == "yes"
    return {
        "tp": float(right and said == "yes"),
        "fp": float(not right and said == "yes"),
        "fn": float(right and said != "yes"),
        "tn": float(not right and said == "no"),
    }


def yes_no_scores(sums: Sums) -> dict[str, np.ndarray]:
    """POPE's columns in percent from sums of `yes_no_marks`.

    `yes` is the share of answers that are yes; lmms-eval's `yes_ratio` is that of the questions.
    """
    precision = ratio(sums["tp"], sums["tp"] + sums["fp"])
    recall = ratio(sums["tp"], sums["tp"] + sums["fn"])
    return {
        "accuracy": 100 * ratio(sums["tp"] + sums["tn"], sums[COUNT]),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * ratio(2 * precision * recall, precision + recall),
        "yes": 100 * ratio(sums["tp"] + sums["fp"], sums[COUNT]),
    }


# --- MME: two questions for each picture ----------------------------------------------------------

MME_PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
MME_COGNITION = (
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)


def pair_units(rows: Sequence[Row], mark: str = "accuracy") -> list[dict[str, float]]:
    """Sums of one picture each for `pair_scores`; `Task.units` of a benchmark of pairs.

    Rows of the same `group` (category) and `unit` (picture) are a pair.  A pair is right as a whole
    if all of its questions are, and these are at least two: where a limited run cuts a pair, it
    is not.  Columns are `CATEGORY/questions`, `/right`, `/pictures` and `/pairs`.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row.group, row.unit or f"sample {row.id}"), []).append(row.marks[mark])
    return [
        {
            COUNT: float(len(marks)),
            f"{group}/questions": float(len(marks)),
            f"{group}/right": float(sum(marks)),
            f"{group}/pictures": 1.0,
            f"{group}/pairs": float(len(marks) > 1 and min(marks) == 1),
        }
        for (group, _), marks in found.items()
    ]


def pair_scores(sums: Sums) -> dict[str, np.ndarray]:
    """MME's points: 100 (acc + acc+) for each category, at most 200, and their sums.

    acc is the share of right questions, acc+ that of pictures with both right (Fu et al. 2023,
    section 2.3).  `perception` adds the ten categories of its table (at most 2000), `cognition`
    the other four (at most 800); a category without rows adds nothing.
    """
    groups = [name.removesuffix("/pictures") for name in sums if name.endswith("/pictures")]
    points = {
        group: 100
        * (
            ratio(sums[f"{group}/right"], sums[f"{group}/questions"])
            + ratio(sums[f"{group}/pairs"], sums[f"{group}/pictures"])
        )
        for group in groups
    }
    nothing = np.zeros_like(np.asarray(sums[COUNT], float))
    return {
        "perception": sum((points[name] for name in MME_PERCEPTION if name in points), nothing),
        "cognition": sum((points[name] for name in MME_COGNITION if name in points), nothing),
        **points,
    }


# --- option letters -------------------------------------------------------------------------------

OptionRule = Literal["lenient", "scienceqa", "seed", "mmmu"]


def option_letter(
    answer: str, options: Sequence[str], *, rule: OptionRule = "lenient"
) -> str | None:
    """The letter of the option that is meant, None if that cannot be read.

    `lenient`, ours: a letter alone or with marks ("b", "(B)", "B: a cat"), "the answer is B", the
    option's text, the only option that occurs in the answer, or the only letter that does (not the
    words "A" and "I"). Of several the one that is stated counts, at the start before the end.
    `scienceqa` (LLaVA's and EVE's `eval_science_qa.py`): the letter, "B. " and more, or "The answer
    is B" once and followed by anything.  lmms-eval takes small letters and "B." too, no sentence.
    `seed` (LLaVA's `convert_seed_for_submission.py`): the letter and nothing else.  lmms-eval takes
    the first letter of whatever is said, in either case.
    `mmmu` (`eval_utils.py`): "(B)", else "B " anywhere, else "B.", else in answers of more than
    five words an option's text; of several the last.  The programme draws a letter by chance where
    nothing is found (a quarter of those would be right); here it is None.
    """
    answer, letters = answer.strip(), string.ascii_uppercase[: len(options)]
    if not options:
        return None
    if rule == "seed":
        return answer if answer in list(letters) else None
    if rule == "scienceqa":
        found = _scienceqa_letter(answer)
        return found if found in list(letters) else None
    if rule == "mmmu":
        return _mmmu_letter(answer, dict(zip(letters, options, strict=True)))
    stated = _stated_letter(answer, letters) or _option_of_text(answer, options)
    # "A cat" and "I think" are words, "It is A" is a letter.
    lone = set(re.findall(rf"\b(?![AI][ '][a-z])[{letters}]\b", answer, re.ASCII))
    return stated or (lone.pop() if len(lone) == 1 else None)


def _scienceqa_letter(answer: str) -> str:
    if len(answer) == 1 or re.match(r"[A-E]\. ", answer):
        return answer[0]
    stated = re.findall(r"The answer is ([A-Z]).", answer)
    return stated[0] if len(stated) == 1 else ""


def _mmmu_letter(answer: str, options: dict[str, str]) -> str | None:
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer, small = f" {answer} ", f" {answer} ".lower()
    # The programme looks for "B." by where "B " is, so that of several the first is taken.
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in options if form.format(letter) in answer]
        if found:
            return max(found, key=lambda letter: answer.rfind(place.format(letter)))
    if len(answer.split()) > 5:
        found = [letter for letter, text in options.items() if text.lower() in small]
        if found:
            return max(found, key=lambda letter: small.rfind(options[letter].lower()))
    return None


def _stated_letter(answer: str, letters: str) -> str | None:
    """A letter that stands for itself; "A" before a word is an article."""
    forms = (
        rf"\W*([{letters}{letters.lower()}])\W*$",  # B   (b)   B.
        rf"\(([{letters}])\)|([{letters}])[.:)](?:\s|$)",  # (B) a cat   B: a cat
        # The answer is B   Answer: (B)
        rf".*\b(?i:answer|option|choice)(?: is)?:? \(?([{letters}])\b(?!(?<=A) \w)",
    )
    for form in forms:
        match = re.match(form, answer, re.DOTALL | re.ASCII)  # also after Chinese words
        if match:
            return next(letter for letter in match.groups() if letter).upper()
    return None


def _option_of_text(answer: str, options: Sequence[str]) -> str | None:
    """The option that the answer is, or the only one in it (not inside a longer one that is)."""
    given = _words(answer)
    texts = [_words(option) for option in options]
    found = [at for at, text in enumerate(texts) if text == given != " "]
    if not found:
        rest = given
        for at in sorted(range(len(texts)), key=lambda at: -len(texts[at])):
            if texts[at] != " " and texts[at] in rest:
                found.append(at)
                rest = rest.replace(texts[at], " | ")
    return string.ascii_uppercase[found[0]] if len(found) == 1 else None


def _words(text: str) -> str:
    """Words in small letters, each with a space on both sides."""
    return " ".join(["", *re.findall(r"[^\W_]+", text.lower()), ""])


__all__ = [
    "MME_COGNITION",
    "MME_PERCEPTION",
    "OptionRule",
    "YesNo",
    "YesNoRule",
    "option_letter",
    "pair_scores",
    "pair_units",
    "yes_no",
    "yes_no_marks",
    "yes_no_scores",
]
