"""The stage `captions`: drops captions that repeat themselves, stop half-way, refuse, or are alien.

The paper dropped pairs "with repetitive text or unfinished sentences".  Easy to get wrong: a
caption that was cut at its longest length usually ends in the middle of a word, and one that ends
in "etc." or a closing quote is finished.
"""

import re
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from eve_vlm.curate.blocks import with_reasons
from eve_vlm.curate.recipe import CaptionsSection
from eve_vlm.curate.tasks import Task, bins

if TYPE_CHECKING:
    import pyarrow as pa

GROUP = 4  # words that make a repetition
WORDS = (0, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400)  # bins of the histogram
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_FINISHED = re.compile(r"[.!?\u2026\u3002\uff01\uff1f\u0964]['\")\]\u00bb\u201d\u2019*_]*$")
_SCRIPT_WITHOUT_SPACES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")
_REFUSALS = re.compile(
    r"\b(i('|\u2019)?m (really |very |so )?(sorry|unable)|i am (sorry|unable)"
    r"|i (cannot|can('|\u2019)t|can not|won('|\u2019)t)"
    r"|as an? (ai|artificial|language model)|i do(n('|\u2019)t| not) have (the )?(ability|access)"
    r"|i apologi[sz]e|unable to (see|view|process|provide|describe)|no image (was|is|has been)"
    r"|(please|could you) (provide|upload|share) (the|an|your) image)",
    re.IGNORECASE,
)
_BEGINNING = 200  # letters in which a refusal shows itself; later it may be what a sign says


def keep_good_captions(rows: "pa.Table", task: Task) -> "pa.Table":
    """The rows with their caption tidied, each with why it is dropped or None."""
    import pyarrow as pa

    given = rows["caption" if "caption" in rows.column_names else "text"].to_pylist()
    cut = _cut(rows)
    texts = [None if text is None else " ".join(text.split()) for text in given]
    reasons = [
        broken_rule(text, task.recipe.captions, cut=one)
        for text, one in zip(texts, cut, strict=True)
    ]
    kept = [text for text, (why, _) in zip(texts, reasons, strict=True) if why is None]
    lengths = np.array([len(words_of(text)) for text in kept if text], int)
    task.counts["words of a caption"] += bins(lengths, WORDS)
    if "caption" in rows.column_names:
        rows = rows.drop_columns(["caption"])
    rows = rows.append_column("caption", pa.array(texts, pa.string()))
    return with_reasons(rows, [one[0] for one in reasons], [one[1] for one in reasons])


def _cut(rows: "pa.Table") -> list[bool]:
    """Whether each caption was cut at its longest length, where the captioner said so."""
    if "finish" not in rows.column_names:
        return [False] * len(rows)
    return [finish == "length" for finish in rows["finish"].to_pylist()]


def broken_rule(
    text: str | None, section: CaptionsSection, *, cut: bool = False
) -> tuple[str | None, str | None]:
    """The first rule that a caption breaks, and what broke it.

    Args:
        cut: it ended because it had its longest length.
    """
    if not text:
        return "no caption", None
    words = words_of(text)
    if section.refusals and (found := _REFUSALS.search(text[:_BEGINNING])):
        return "refusal", found[0]
    if len(words) < section.least_words:
        return "caption too short", f"{len(words)} words"
    if section.most_words is not None and len(words) > section.most_words:
        return "caption too long", f"{len(words)} words"
    if section.most_repeated is not None and (share := repeated(words)) > section.most_repeated:
        return "caption repeats itself", f"{share:.0%} of its groups of {GROUP} words"
    if section.finished and (cut or not _FINISHED.search(text)):
        return "unfinished caption", text[-40:]
    if section.languages is not None:
        language = language_of(text)
        if language not in section.languages:
            return "other language", language
    return None, None


def words_of(text: str) -> list[str]:
    """The words of a text in small letters; letters where a script has no spaces."""
    if _SCRIPT_WITHOUT_SPACES.search(text):
        return [letter for letter in text if letter.isalnum()]
    return _WORD.findall(text.lower())


def repeated(words: list[str]) -> float:
    """The share of groups of words that stood before in the text.

    >>> repeated("a b c d e f".split()), repeated("a b c d a b c d".split())
    (0.0, 0.2)
    """
    groups = Counter(tuple(words[at : at + GROUP]) for at in range(len(words) - GROUP + 1))
    total = sum(groups.values())
    return (total - len(groups)) / total if total else 0.0


def language_of(text: str) -> str:
    """The two-letter code of a text's language.

    Raises:
        ValueError: if the package that knows is not installed.
    """
    return str(_identifier().classify(text)[0])


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        import py3langid
    except ImportError:
        raise ValueError(
            "captions.languages needs the package py3langid; run `pip install "
            "'eve-vlm[curate]'`, or set captions.languages to null."
        ) from None
    return py3langid


__all__ = ["broken_rule", "keep_good_captions", "language_of", "repeated", "words_of"]
