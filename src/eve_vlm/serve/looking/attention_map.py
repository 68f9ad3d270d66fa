"""Where the model looked: for each word of an answer, the attention on every cell of the pictures.

In an encoder-free model a picture token is a piece of the picture, so what attention gives to it is
a map as it stands, without an encoder in between that has mixed the cells beforehand.

Easy to get wrong: a token is chosen at the position *before* it, so a word's attention is read
there, not at the word's own place; and a picture has class and row-end tokens too, whose attention
belongs to no cell but must be told, as must what falls on the text.

Legend: `L` layers, `H` heads, `A` answer tokens, `N` picture tokens, `S` positions so far.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import punctuation
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from eve_vlm.errors import listed
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.serve.engine import EveEngine
from eve_vlm.serve.looking.answer_words import Word, tokens_of, words_of
from eve_vlm.serve.looking.attention_rows import attention_rows
from eve_vlm.serve.messages import Messages, encode

METHODS = ("attention", "gradient")
# Layers whose attention over all positions is in a plain cache, windows made by the mask.
KNOWN_LAYERS = {"full_attention", "sliding_attention"}

Which = int | Sequence[int] | None


class Shares(NamedTuple):
    """What all attention (or positive effect) fell on; the four sum to 1."""

    cells: float
    """Cells of all pictures."""
    class_tokens: float
    row_ends: float
    text: float
    """The prompt's words and the answer so far."""
    by_picture: tuple[float, ...]
    """`cells`, picture by picture."""


class Cell(NamedTuple):
    """A cell of a picture and what it was given, all counted from 0."""

    picture: int
    row: int
    col: int
    weight: float


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionMaps:
    """The attention of every answer token on every picture token.

    method: "attention", or "gradient" for the positive part of attention x d log p / d attention.
    weights: (L, H, A, N) float32; an axis that was averaged has length 1.
    text: (L, H, A) float32, the sum over all positions that are not of a picture.
    words: of the answer; special tokens such as the end are in none.
    grids: (rows, cols) of each picture.
    layers, heads: numbers of those along `weights`, or that were averaged.
    averaged: axes that were averaged before they were kept.
    """

    method: str
    weights: np.ndarray
    text: np.ndarray
    words: tuple[Word, ...]
    grids: tuple[tuple[int, int], ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    averaged: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The words together."""
        return "".join(word.text for word in self.words).strip()

    def map(
        self,
        word: int | str | None = None,
        *,
        layer: Which = None,
        head: Which = None,
        picture: int = 0,
    ) -> np.ndarray:
        """The map of one word: attention from the positions that choose its tokens.

        Args:
            word: its number or its text; None means all words of the answer.
            layer, head: one or several, which are averaged; None means all that were kept.

        Returns:
            (rows, cols) float64, the mean over layers, heads and tokens of the weight on each cell.

        Raises:
            ValueError: if there is no such word, layer, head or picture.
        """
        if not 0 <= picture < len(self.grids):
            raise ValueError(
                f"There is no picture {picture}; the prompt has {len(self.grids)}, counted from 0."
            )
        weights, _ = self._mean(word, layer, head)
        return weights[self.cell_tokens(picture)]

    def shares(
        self, word: int | str | None = None, *, layer: Which = None, head: Which = None
    ) -> Shares:
        """How all that a word looked at is divided; arguments as in `map`.

        All are 0 where nothing had a positive effect, which only "gradient" can have.
        """
        weights, text = self._mean(word, layer, head)
        total = weights.sum() + text
        parts = np.append(weights, text) / (total if total > 0 else 1)
        cells = [self.cell_tokens(picture) for picture in range(len(self.grids))]
        by_picture = tuple(float(parts[places].sum()) for places in cells)
        class_tokens = float(sum(parts[places[0, 0] - 1] for places in cells))
        row_ends = float(sum(parts[places[:, -1] + 1].sum() for places in cells))
        return Shares(sum(by_picture), class_tokens, row_ends, float(parts[-1]), by_picture)

    def strongest(
        self, word: int | str | None = None, *, layer: Which = None, head: Which = None
    ) -> Cell:
        """The cell of any picture that got most; the first one of equals."""
        best = []
        for picture in range(len(self.grids)):
            heat = self.map(word, layer=layer, head=head, picture=picture)
            row, col = np.unravel_index(heat.argmax(), heat.shape)
            best.append(Cell(picture, int(row), int(col), float(heat[row, col])))
        return max(best, key=lambda cell: cell.weight)

    def largest(self, *, layer: Which = None, head: Which = None) -> float:
        """The largest weight that any word has on one cell: one scale for the maps of all words."""
        words = range(len(self.words))
        return max(self.strongest(word, layer=layer, head=head).weight for word in words)

    def cell_tokens(self, picture: int) -> np.ndarray:
        """(rows, cols) places along N of a picture's cells.

        The class token is the place before the first cell, a row-end token that behind each row.
        """
        sizes = [1 + rows * (cols + 1) for rows, cols in self.grids]
        rows, cols = self.grids[picture]
        places = sum(sizes[:picture]) + 1 + np.arange(rows * (cols + 1))
        return places.reshape(rows, cols + 1)[:, :-1]

    def find(self, word: int | str) -> int:
        """The number of a word given by number or by text, with or without punctuation around it.

        Raises:
            ValueError: if there is none, or several have that text.
        """
        if isinstance(word, str):
            exact, bare = [], []
            for place, one in enumerate(self.words):
                exact += [place] * (one.text.strip() == word.strip())
                bare += [place] * (one.text.strip().strip(punctuation) == word.strip())
            found = exact or bare
            if len(found) > 1:
                raise ValueError(
                    f"{word!r} stands {len(found)} times in the answer; give its number, one of "
                    f"{', '.join(map(str, found))}."
                )
        else:
            found = [word] if 0 <= word < len(self.words) else []
        if not found:
            named = listed(
                [f"{place} {one.text.strip()!r}" for place, one in enumerate(self.words)]
            )
            raise ValueError(f"There is no word {word!r} in the answer; it has {named}.")
        return found[0]

    def _mean(self, word: int | str | None, layer: Which, head: Which) -> tuple[np.ndarray, float]:
        """Weights on picture tokens (N,) and on text, averaged; in float64."""
        chosen = self.words if word is None else [self.words[self.find(word)]]
        places = np.ix_(
            self._along("layers", layer),
            self._along("heads", head),
            [token for one in chosen for token in one.tokens],
        )
        weights = self.weights[places].mean((0, 1, 2), dtype=np.float64)
        return weights, float(self.text[places].mean(dtype=np.float64))

    def _along(self, axis: Literal["layers", "heads"], asked: Which) -> list[int]:
        """Places along an axis of the layers or heads asked for."""
        kept = self.layers if axis == "layers" else self.heads
        if axis in self.averaged:
            if asked is not None:
                raise ValueError(
                    f"The {axis} were averaged when the maps were made; make maps that keep them, "
                    "or ask for none."
                )
            return [0]
        return list(range(len(kept))) if asked is None else _chosen(axis, asked, kept)


def look(
    engine: EveEngine,
    messages: Messages,
    *,
    answer: str | Sequence[int] | None = None,
    max_new_tokens: int = 128,
    max_image_tokens: int | None = None,
    method: str = "attention",
    layers: Which = None,
    heads: Which = None,
    average: Sequence[str] = (),
) -> AttentionMaps:
    """Answers a conversation and says where each word of the answer looked.

    Args:
        answer: explains this answer, a text or token ids, instead of the model's own greedy one.
        method, layers, heads, average: see `attention_maps`.

    Raises:
        ValueError: see `attention_maps`; or if the conversation cannot be answered.
    """
    if answer is None:
        [made] = engine.answer(
            [messages], max_new_tokens=max_new_tokens, max_image_tokens=max_image_tokens
        )
        ids: Sequence[int] = made.token_ids
    else:
        ids = tokens_of(engine.processor, messages, answer) if isinstance(answer, str) else answer
    prompt = encode(messages, engine.processor, max_image_tokens=max_image_tokens)
    inputs = {"input_ids": prompt.input_ids[None], **prompt.pictures_from(0)}
    with engine.lock:
        return attention_maps(
            engine.model,
            inputs,
            ids,
            tokenizer=engine.tokenizer,
            method=method,
            layers=layers,
            heads=heads,
            average=average,
        )


def attention_maps(
    model: EveForConditionalGeneration,
    inputs: Mapping[str, torch.Tensor],
    answer_ids: Sequence[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    method: str = "attention",
    layers: Which = None,
    heads: Which = None,
    average: Sequence[str] = (),
) -> AttentionMaps:
    """Reads the attention with which a model says an answer to one prompt.

    The prompt is read once as usual; only the answer's positions run with eager attention over its
    cache, so (A, S) rows of attention are made and never (S, S).  No other thread may use the model
    meanwhile, because its kind of attention is changed and put back.

    Args:
        inputs: one prompt as `EveProcessor` makes it: input_ids (1, T), pixel_values,
            image_grid_thw.
        answer_ids: token ids of the answer, which need not be what the model would say.
        method: "attention", or "gradient": the positive part of attention x the gradient of each
            token's own log-probability, one backward pass for each token.
        layers, heads: the ones to keep; None keeps all.
        average: "layers", "heads" or both are averaged before they are kept.  All weights of a 7B
            model for an HD picture and 128 answer tokens are 1.3 GB, their averages 1.2 MB.

    Raises:
        ValueError: for an empty answer, a prompt without a picture or of another form, numbers of
            layers or heads that are not there, or a decoder whose attention cannot be read.
    """
    _check_prompt(model, inputs, answer_ids)
    if method not in METHODS or not set(average) <= {"layers", "heads"}:
        raise ValueError(
            f"The method {method!r} or the average {average!r} is not known; methods are "
            "'attention' and 'gradient', and 'layers' and 'heads' can be averaged."
        )
    words = words_of(tokenizer, answer_ids)
    if not words:
        raise ValueError(
            "The answer has no words, so nothing was looked for; ask something else, or give an "
            "answer to explain."
        )
    config = model.config.text_config
    all_layers, all_heads = range(config.num_hidden_layers), range(config.num_attention_heads)
    kept_layers = list(all_layers) if layers is None else _chosen("layers", layers, all_layers)
    kept_heads = list(all_heads) if heads is None else _chosen("heads", heads, all_heads)
    axes = [axis for axis, name in enumerate(("layers", "heads")) if name in average]
    pictures: list[torch.Tensor] = []
    texts: list[torch.Tensor] = []
    # A caller's inference mode would forbid gradients.
    with torch.inference_mode(False):
        rows = attention_rows(model, inputs, answer_ids, kept_layers, gradient=method == "gradient")
        for block in rows:  # (L, H, some of A, S)
            block = block[:, kept_heads]
            ids = inputs["input_ids"][0].to(block.device)
            is_picture = torch.zeros(block.shape[-1], dtype=torch.bool, device=block.device)
            is_picture[: len(ids)] = ids == model.config.image_token_id
            for part, parts in (
                (block[..., is_picture], pictures),
                (block[..., ~is_picture].sum(-1), texts),
            ):
                part = part.mean(axes, keepdim=True) if axes else part
                parts.append(part.to("cpu", torch.float32))
    grids = inputs["image_grid_thw"][:, 1:] // model.config.vision_config.merge_size
    return AttentionMaps(
        method=method,
        weights=torch.cat(pictures, 2).numpy(),
        text=torch.cat(texts, 2).numpy(),
        words=words,
        grids=tuple((rows, cols) for rows, cols in grids.tolist()),
        layers=tuple(kept_layers),
        heads=tuple(kept_heads),
        averaged=tuple(name for name in ("layers", "heads") if name in average),
    )


def _chosen(axis: str, asked: int | Sequence[int], there: Sequence[int]) -> list[int]:
    """Places of the asked numbers among those that are there."""
    wanted = [asked] if isinstance(asked, int) else list(asked)
    wrong = [number for number in wanted if number not in there]
    if wrong or not wanted:
        given = ", ".join(map(str, wrong)) or "none"
        raise ValueError(
            f"The {axis} asked for ({given}) are not there; there are {len(there)}, from "
            f"{min(there)} to {max(there)}; give numbers of those."
        )
    return [list(there).index(number) for number in wanted]


def _check_prompt(
    model: EveForConditionalGeneration, inputs: Mapping[str, torch.Tensor], answer: Sequence[int]
) -> None:
    """Refuses what would give no map or a wrong one."""
    ids, config = inputs["input_ids"], model.config.text_config
    mask = inputs.get("attention_mask")
    placeholder, longest = model.config.image_token_id, config.max_position_embeddings
    length = ids.shape[-1] + len(answer) - 1
    problem = None
    if model.training:
        problem = "The model is in training mode, where attention is dropped at random; call eval()"
    elif ids.ndim != 2 or len(ids) != 1 or (mask is not None and not bool(mask.all())):
        problem = f"input_ids has the shape {tuple(ids.shape)} or is padded; give one bare prompt"
    elif not bool((ids == placeholder).any()) or inputs.get("image_grid_thw") is None:
        problem = "The prompt has no picture to look at; give one"
    elif int(ids[0, -1]) == placeholder:
        problem = "The prompt ends in a picture; let words follow, as a chat template does"
    elif bad := [id for id in answer if id == placeholder or not 0 <= id < config.vocab_size]:
        problem = f"The answer holds token {bad[0]}, which the model cannot say; leave it out"
    elif length > longest:
        problem = (
            f"Prompt and answer take {length} positions but the model has {longest}; give a "
            "shorter answer or a smaller picture"
        )
    elif odd := set(config.to_dict().get("layer_types") or ()) - KNOWN_LAYERS:
        problem = f"The decoder has layers of {sorted(odd)[0]}, which give no map; take another one"
    if problem is not None:
        raise ValueError(f"{problem}.")


__all__ = [
    "AttentionMaps",
    "Cell",
    "Shares",
    "Word",
    "attention_maps",
    "look",
]
