"""A language model as a judge, behind any OpenAI-compatible endpoint.

What it is told is a `Rubric`: our own words, with a version, and a function that reads the verdict.
Rate limits and broken connections are tried again by the `openai` package, later each time.  Easy
to get wrong: a verdict that cannot be read is asked for again and then raised as `JudgeError`, so
that the answer is counted as a failure with its reason; it is never a silent 0.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

KEY, ADDRESS = "OPENAI_API_KEY", "OPENAI_BASE_URL"
NO_KEY = "none"  # for endpoints that ask for none; the package insists on a word
OPENAI = "https://api.openai.com/v1"
# The judge that lmms-eval 0.7.3 takes; published MM-Vet and video scores had older ones.
MODEL = "gpt-4o-2024-11-20"
TRIES = 3  # how often a verdict is asked for until it can be read

T = TypeVar("T")


class JudgeError(ValueError):
    """There is no verdict: the judge cannot be reached, or what it says cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeSettings:
    """Which judge is asked, and how."""

    api_key: str = field(repr=False)
    """Shown nowhere."""
    base_url: str = OPENAI
    """Of the endpoint, with `/v1`."""
    model: str = MODEL
    """As the endpoint calls it."""
    max_retries: int = 6
    """Tries after a rate limit or a broken connection, half a second to 8 s apart."""
    timeout: float = 60.0
    """Seconds for one verdict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rubric(Generic[T]):
    """What the judge is told, and how its verdict is read."""

    name: str
    version: int
    """Rises when the words or the reading change."""
    words: str
    """With the names of what is put in, in braces."""
    reminder: str
    """Said when a verdict could not be read."""
    read: Callable[[str], T | None]
    """The verdict; None if it cannot be read."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"name": self.name, "version": self.version, "words": self.words}


class Judge:
    """Asks for verdicts; safe to use from many threads.

    Raises:
        ValueError: if the package `openai` is not installed.
    """

    def __init__(self, settings: JudgeSettings):
        try:
            import openai
        except ModuleNotFoundError:
            raise ValueError(
                'A judge needs the package openai; install it with pip install "eve-vlm[serve]".'
            ) from None
        self.settings = settings
        self._checked = False
        self._error = openai.OpenAIError
        self._client = openai.OpenAI(
            api_key=settings.api_key,
            base_url=settings.base_url,
            max_retries=settings.max_retries,
            timeout=settings.timeout,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What a result says of it: all but the key."""
        kept = asdict(self.settings)
        return {name: kept[name] for name in ("base_url", "model")} | {"temperature": 0}

    def check(self) -> None:
        """Asks one word, once, so that a wrong key or address shows before a model has worked.

        Raises:
            JudgeError: if there is no reply.
        """
        if not self._checked:
            self._say([{"role": "user", "content": "Say yes."}])
            self._checked = True

    def verdict(self, rubric: Rubric[T], fields: Mapping[str, str]) -> T:
        """Asks until the verdict can be read, `TRIES` times at most.

        Args:
            fields: what is put into the rubric's words.

        Raises:
            JudgeError: if there is no verdict.
        """
        messages = [{"role": "user", "content": rubric.words.format(**fields)}]
        for _ in range(TRIES):
            said = self._say(messages)
            verdict = rubric.read(said)
            if verdict is not None:
                return verdict
            # Decoding is greedy: the same words would bring the same answer.
            messages += [
                {"role": "assistant", "content": said},
                {"role": "user", "content": rubric.reminder},
            ]
        raise JudgeError(
            f"The judge {self.settings.model} gave no verdict that can be read in {TRIES} tries, "
            f"{said[:80]!r} last; evaluate again, or take another judge."
        )

    def _say(self, messages: list[dict[str, str]]) -> str:
        try:
            reply = self._client.chat.completions.create(
                model=self.settings.model,
                messages=messages,  # type: ignore[arg-type]
                temperature=0,
                max_tokens=256,
            )
        except self._error as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise JudgeError(
                f"The judge {self.settings.model} at {self.settings.base_url} does not answer "
                f"({reason}); check {KEY} and {ADDRESS}, or evaluate again later."
            ) from None
        return (reply.choices[0].message.content or "") if reply.choices else ""


def judge_or_none(
    *,
    base_url: str | None = None,
    model: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Judge | None:
    """The judge that these words and the environment name; None where there is no key.

    Args:
        base_url: of an endpoint, which may need no key; else `OPENAI_BASE_URL`, else OpenAI's.
        model: as the endpoint calls it.
        environment: `os.environ` unless told otherwise; the key is in its `OPENAI_API_KEY`.
    """
    names = os.environ if environment is None else environment
    key = names.get(KEY) or (NO_KEY if base_url else "")
    if not key:
        return None
    address = base_url or names.get(ADDRESS) or OPENAI
    return Judge(JudgeSettings(api_key=key, base_url=address, model=model or MODEL))


def no_judge(task: str) -> str:
    """Why a task is skipped, in a sentence."""
    return (
        f"{task} is marked by a language model and none is named; set {KEY}, and {ADDRESS} for "
        "another endpoint than OpenAI's."
    )


__all__ = ["MODEL", "Judge", "JudgeError", "JudgeSettings", "Rubric", "judge_or_none", "no_judge"]
