"""Marks of one answer: VQA accuracy, exact match, ChartQA's, DocVQA's and MMMU's open rules.

Every function takes words and gives a share between 0 and 1; `choices.py` holds what reads an
answer out of a few (yes or no, option letters), and is offered here too.  A rule named after a
benchmark does what that benchmark's own programme does, oddities included, so that scores can be
compared with published ones; `lenient` rules are ours, for our own tasks.  Easy to get wrong: the
oddities are the rule (ChartQA's "0" is a word, "1,000" is no number), so do not mend them there.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from .choices import (
    MME_COGNITION,
    MME_PERCEPTION,
    YesNo,
    option_letter,
    pair_scores,
    pair_units,
    yes_no,
    yes_no_marks,
    yes_no_scores,
)

# --- VQA accuracy ---------------------------------------------------------------------------------

VqaRule = Literal["vqa", "textvqa"]

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(value) for value, word in enumerate(NUMBERS)}
_VQA_WORDS = _DIGITS | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
# The programme's marks; the apostrophe, the colon and the full stop are not among them.
_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'

# What a word is mended to if one of its apostrophes is left out.  The programme's table lists each
# such form; its entries with capitals are not here, for words are in small letters by then.
_MENDED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _MENDED.split()
    for at in range(len(word))
    if word[at] == "'"
} | {"somebody'd": "somebodyd"}  # the other way round in the programme's table


def normalise_vqa(text: str, *, rule: VqaRule = "vqa") -> str:
    """An answer as VQA's evaluation sees it.

    Small letters; number words to ten (and "none") as digits; no articles; missing apostrophes of
    contractions set; full stops go unless a digit follows; other marks become a space, or vanish
    where one stands beside a space or the text has a comma between digits ("1,000" is "1000").
    Rule and programme: https://visualqa.org/evaluation.html, GT-Vision-Lab/VQA `vqaEval.py`.

    `textvqa` is the form of TextVQA and VizWiz (mmf's `EvalAIAnswerProcessor`), also what LLaVA and
    EVE put into upload files: commas and question marks vanish first, and "'s" is a word.

    >>> normalise_vqa("The two dogs, dont you think?")
    "2 dogs don't you think"
    """
    if rule == "textvqa":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    grouped = re.search(r"\d,\d", text) is not None
    bare = text
    for mark in _VQA_MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if beside_space or grouped else " ")
    # At most 32: the programme hands `re.UNICODE` (32) to `sub` where the count is expected.
    bare = re.sub(r"\.(?!\d)", "", bare, count=32)
    words = (_VQA_WORDS.get(word, word) for word in bare.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str], *, rule: VqaRule = "vqa") -> float:
    """Accuracy against the answers of several people, ten in VQAv2, VizWiz and TextVQA.

    For each person: a third for every other person who gave this answer, at most 1; then the mean
    over all persons (so 3 of 10 give 0.9).

    Both sides are always normalised, as the published rule says and lmms-eval does.  The current
    `vqaEval.py` leaves both as they are where all people agree word for word, so that "Yes" would
    be wrong where all said "yes"; uploads are in small letters for that reason.  In the `vqa` rule
    one comma between digits counts, as in `vqaEval.py`; lmms-eval takes "1,,000" for 1000 too.
    """
    if not references:
        return 0.0
    given = normalise_vqa(answer, rule=rule)
    same = [normalise_vqa(text, rule=rule) == given for text in references]
    shares = [min(1.0, (sum(same) - own) / 3) for own in same]
    return sum(shares) / len(shares)


# --- exact match ----------------------------------------------------------------------------------

MatchRule = Literal["exact", "gqa", "lenient"]

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# A number with its sign and the marks between its digits ("-3.5", "10:30"), or a word.
_WORD = re.compile(r"(?<![^\W_])-?(?:\.\d+|\d+(?:[.:,/]\d+)*)|[^\W_]+(?:'[^\W_]+)*")


def normalise_text(text: str) -> str:
    """Small letters, no articles, no marks but those inside numbers, number words as digits.

    >>> normalise_text("The Two cats: -3.5 (cm)!")
    '2 cats -3.5 cm'
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("\N{MINUS SIGN}", "-")
    words = (_DIGITS.get(word, word) for word in _WORD.findall(_THOUSANDS.sub("", text)))
    return " ".join(word for word in words if word not in _ARTICLES)


def exact_match(answer: str, references: Sequence[str], *, rule: MatchRule = "lenient") -> float:
    """1 if the answer is one of the references.

    `gqa`: small letters, full stops at the end cut, as LLaVA's and EVE's scripts prepare answers
    for GQA's `eval.py`, which compares whole strings.  lmms-eval drops all marks on both sides
    instead.  `lenient`: equal after `normalise_text`.  `exact`: equal but for space at the ends.
    """
    if rule == "gqa":
        return float(answer.strip().rstrip(".").lower() in references)
    if rule == "exact":
        return float(answer.strip() in {text.strip() for text in references})
    given = normalise_text(answer)
    return float(bool(given) and given in {normalise_text(text) for text in references})


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of the shares of common words, the best over the references.

    SQuAD's measure (Rajpurkar et al. 2016), but with `normalise_text`, which keeps marks inside
    numbers: "3.5" is not "35".
    """
    given = normalise_text(answer).split()
    best = 0.0
    for reference in references:
        wanted = normalise_text(reference).split()
        common = sum((Counter(given) & Counter(wanted)).values())
        if common:
            best = max(best, 2 * common / (len(given) + len(wanted)))
    return best


# --- numbers: ChartQA -----------------------------------------------------------------------------


def relaxed_accuracy(
    answer: str,
    reference: str,
    tolerance: float = 0.05,
    *,
    rule: Literal["chartqa", "lenient"] = "chartqa",
) -> float:
    """1 if a number is within `tolerance` of the reference, or words are the same.

    `chartqa` (Masry et al. 2022, section 5.1, as all harnesses have it): a side is a number if
    `float` reads it, "%" at its end means hundredths; else, and where the reference is 0, both are
    words that must agree but for case.  So "1,000" is not 1000 and "12%" is not 12.

    `lenient`, for our own charts: thousands separators, currency and units are dropped, "%" is a
    unit like others, a sentence with one number is that number, 0 must be met exactly.
    """
    answer, reference = answer.strip(), reference.strip()
    read = _plain_number if rule == "chartqa" else _only_number
    given, wanted = read(answer), read(reference)
    if given is not None and wanted:
        return float(abs(given - wanted) / abs(wanted) <= tolerance)
    if given is not None and wanted == 0 and rule == "lenient":
        return float(given == 0)
    if rule == "chartqa":
        return float(answer.lower() == reference.lower())
    return exact_match(answer, [reference])


def _plain_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _only_number(text: str) -> float | None:
    """The one number in a text, None if there is none or more than one."""
    text = _THOUSANDS.sub("", text.replace("\N{MINUS SIGN}", "-"))
    found = re.findall(r"(?<![\w.])[-+]?[$€£¥]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", text, re.I)
    return float(re.sub(r"[$€£¥]", "", found[0])) if len(found) == 1 else None


# --- letters: DocVQA ------------------------------------------------------------------------------


def levenshtein(first: str, second: str) -> int:
    """How many letters must be put in, taken out or changed."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for count, letter in enumerate(first, 1):
        left = count
        above = row
        row = [left]
        for at, other in enumerate(second):
            left = min(left + 1, above[at + 1] + 1, above[at] + (letter != other))
            row.append(left)
    return row[-1]


def anls(answer: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of DocVQA and ST-VQA, for one question.

    1 minus the distance over the longer length, the best over the references, 0 below `threshold`.
    Case and runs of space do not count in the distance.  As in the evaluation server's script
    (rrc.cvc.uab.es), which differs from its paper in one point: exactly `threshold` is kept (Biten
    et al. 2019 give 0), and lengths are those before runs of space are joined.
    """
    given = " ".join(answer.lower().split())
    best = 0.0
    for reference in references:
        wanted = " ".join(reference.lower().split())
        length = max(len(reference.upper()), len(answer.upper()))
        best = max(best, 1 - levenshtein(given, wanted) / length if length else 1.0)
    return best if best >= threshold else 0.0


# --- MMMU's open questions ------------------------------------------------------------------------

_KEY_MARKS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER_FORMS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234,567
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.5e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 12, 1.5, .5
)


def open_match(answer: str, references: Sequence[str]) -> float:
    """1 if an open answer has the reference in it, by the rule of MMMU's `eval_utils.py`.

    Of each line the shortest end after a word like "is" or "answer" (in the last line also "=") is
    looked at, or the whole answer if no line has one.  A reference that is a number must be among
    its numbers, to two decimals; other references must occur in it, in small letters.
    """
    text = answer.strip().strip(".").lower()
    lines = text.split("\n")
    ends = [_key_end(line, last=line_at == len(lines)) for line_at, line in enumerate(lines, 1)]
    keys = [end for end in ends if end] or [text]
    pieces = [*keys, *(n for key in keys for form in _NUMBER_FORMS for n in re.findall(form, key))]
    given = {value for piece in pieces for value in _open_values(piece)}
    wanted = {value for reference in references for value in _open_values(reference)}
    texts = [value for value in given if isinstance(value, str)]
    return float(
        any(
            any(value in piece for piece in texts) if isinstance(value, str) else value in given
            for value in wanted
        )
    )


def _key_end(line: str, *, last: bool) -> str:
    """The shortest end of a line after one of the key words; empty if there is none."""
    shortest = ""
    for mark in (*_KEY_MARKS, "=") if last else _KEY_MARKS:
        if mark in line:
            end = line.rpartition(mark)[2].strip()
            if not shortest or len(end) < len(shortest):
                shortest = end
    return "" if shortest in set(":,.!?;'") else shortest


def _open_values(text: str) -> list[float | str]:
    """A number to two decimals; else small letters; one letter only with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


__all__ = [
    "MME_COGNITION",
    "MME_PERCEPTION",
    "NUMBERS",
    "MatchRule",
    "VqaRule",
    "YesNo",
    "anls",
    "exact_match",
    "levenshtein",
    "normalise_text",
    "normalise_vqa",
    "open_match",
    "option_letter",
    "pair_scores",
    "pair_units",
    "relaxed_accuracy",
    "token_f1",
    "vqa_accuracy",
    "yes_no",
    "yes_no_marks",
    "yes_no_scores",
]
