"""How an answer is chosen, and the choice itself for a batch in which every row has its own way.

The library's `generate` knows one temperature and one random state for a whole batch.  Here each
row has its own, so a seeded answer is the same alone and among others.  Easy to get wrong: the
choice is made by a logits processor, which leaves only the chosen token possible, and `generate`
then merely takes the best.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

MAX_LOGPROBS = 20  # as the OpenAI protocol has it
# Scores divided by far less leave float32, and no token can be drawn for anybody in the batch.
LEAST_TEMPERATURE = 1e-6
MAX_STOPS, MAX_STOP_LENGTH = 16, 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How one answer is chosen.

    Raises:
        ValueError: for a value out of its range.
    """

    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw from so many likeliest tokens; 0 means all."""
    seed: int | None = None
    """The same seed draws the same answer; None draws another one each time."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    logprobs: int | None = None
    """None for no log-probabilities, 0 for those of the answer, k for the k likeliest as well."""
    max_image_tokens: int | None = None
    """Most tokens for each picture of the request; None leaves it to the model."""

    def __post_init__(self) -> None:
        given = asdict(self)
        for name, low, high in (
            ("max_new_tokens", 1, math.inf),
            ("temperature", 0, 100),
            ("top_p", 1e-6, 1),
            ("top_k", 0, math.inf),
            ("seed", -(2**63), 2**63 - 1),
            ("logprobs", 0, MAX_LOGPROBS),
            ("max_image_tokens", 1, math.inf),
        ):
            value = given[name]
            if value is not None and not low <= value <= high:
                limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"{name} is {value}; give a value that is {limits}.")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature is {self.temperature}; give 0 for the likeliest token, or at least "
                f"{LEAST_TEMPERATURE}."
            )
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop is {self.stop!r}; give a tuple of texts that are not empty.")
        if len(self.stop) > MAX_STOPS or max(map(len, self.stop), default=0) > MAX_STOP_LENGTH:
            raise ValueError(
                f"stop has {len(self.stop)} texts, the longest of "
                f"{max(map(len, self.stop))} letters; give at most {MAX_STOPS} of at most "
                f"{MAX_STOP_LENGTH}."
            )


class TokenLogprob(NamedTuple):
    """A token of an answer, its text, and how likely the model held it before any warping.

    top: (token id, text, natural logarithm of the probability) of the likeliest tokens there.
    """

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


class Chooser:
    """Chooses one row's tokens, with a random state of its own."""

    def __init__(self, sampling: Sampling, device: torch.device):
        self.wants_logprobs = sampling.logprobs is not None
        self.logprobs: torch.Tensor | None = None  # (vocabulary,) of the step that is being made
        self._generator: torch.Generator | None = None
        self._warpers = LogitsProcessorList()
        if sampling.temperature == 0:
            return
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn; otherwise the likeliest is taken."""
        return self._generator is not None

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        """Draws a token id (1, 1) from scores (1, vocabulary)."""
        warped: torch.Tensor = self._warpers(torch.empty(1, 0), scores)
        return torch.multinomial(warped.softmax(-1), 1, generator=self._generator)


class ChooseTokens(LogitsProcessor):
    """Makes every row's choice: behind it only the chosen token of a row that draws is possible.

    Args:
        choosers: one for each row.
        never: ids that no answer holds.
    """

    def __init__(self, choosers: Sequence[Chooser], never: Sequence[int]):
        self.choosers = choosers
        self.never = torch.tensor(list(never), dtype=torch.long)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores are (rows, vocabulary), float32, a copy that `generate` made for this."""
        for row, chooser in enumerate(self.choosers):
            if chooser.wants_logprobs:
                chooser.logprobs = scores[row].log_softmax(-1)
        self.never = self.never.to(scores.device)  # once: a list would be sent for each token
        scores.index_fill_(1, self.never, -math.inf)
        for row, chooser in enumerate(self.choosers):
            if chooser.draws:
                token = chooser.draw(scores[row : row + 1])
                scores[row] = -math.inf
                scores[row, token[0]] = 0.0
        return scores


__all__ = [
    "LEAST_TEMPERATURE",
    "MAX_LOGPROBS",
    "ChooseTokens",
    "Chooser",
    "Sampling",
    "TokenLogprob",
]
