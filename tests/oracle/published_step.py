"""The whole model in the published programme's shape of work: reading, answering and training.

It runs our model's own weights, so that results and gradients can be compared: canvases and a round
for each picture (`published_shape`), texts and pictures put together one by one and padded on the
right, attention that keeps its T x T weights, the hidden states of all layers, logits of every
position in float32, one question at a time, the teacher run in full at every step, and the tapped
states of all positions stacked before each picture's cells are cut out.  Easy to get wrong: the
decoder is a second frame of the library around the same parameters, because how it attends is a
setting of the frame; gradients of both ways land in one place.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, DynamicCache, PreTrainedModel

from eve_vlm.cache_name_eve import CACHE
from eve_vlm.modeling_eve import EveForConditionalGeneration

from .patch_embedding import EPS, MERGE, NUM_HEADS, Weights
from .published_shape import box, embed, official

IGNORED = -100
# Parts of our aligner's parameters' names, and what they are called in a published checkpoint.
ALIGNER = {"norms": "0", "maps": "1", "input": "input_layer", "output": "output_layer"}


class Sample(NamedTuple):
    """One text with its picture on a canvas, and where the picture goes."""

    ids: Tensor
    """(T,) words without the picture."""
    place: int
    """How many words stand before the picture."""
    labels: Tensor
    """(T,), -100 where nothing is to be learnt."""


class Step(NamedTuple):
    """What a training step found."""

    loss: Tensor
    language: Tensor
    alignment: Tensor | None


class Published:
    """The programme around the weights of one of our models.

    Args:
        model: ours; with an aligner where `align` is to be used.
        attention: `eager`, as the programme answers anywhere and trains on a CPU; `sdpa` stands for
            the FlashAttention that it trains with on a GPU.
    """

    def __init__(self, model: EveForConditionalGeneration, *, attention: str = "eager"):
        inner = model.model
        self.vision = official(dict(inner.vision_tower.named_parameters()))
        self.projector = official(dict(inner.multi_modal_projector.named_parameters()))
        self.decoder = reframed(inner.language_model, attention)
        self.head = model.lm_head.weight
        self.patch = model.config.vision_config.patch_size

    def merged(
        self, samples: list[Sample], pictures: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Samples padded on the right: embeddings (B, T, D), labels and mask (B, T)."""
        words = self.decoder.get_input_embeddings()
        rows, labels = [], []
        for sample, tokens in zip(samples, pictures, strict=True):
            before, behind = words(sample.ids[: sample.place]), words(sample.ids[sample.place :])
            rows.append(torch.cat([before, tokens.to(before.dtype), behind]))
            ignored = sample.labels.new_full((len(tokens),), IGNORED)
            parts = [sample.labels[: sample.place], ignored, sample.labels[sample.place :]]
            labels.append(torch.cat(parts))
        longest = max(map(len, rows))
        embeds, wanted, masks = [], [], []
        for row, label in zip(rows, labels, strict=True):
            lacking = longest - len(row)
            embeds.append(torch.cat([row, row.new_zeros(lacking, row.shape[1])]))
            wanted.append(F.pad(label, (0, lacking), value=IGNORED))
            masks.append(F.pad(torch.ones_like(label), (0, lacking)))
        return torch.stack(embeds), torch.stack(wanted), torch.stack(masks)

    def logits(self, states: Tensor) -> Tensor:
        """Of every position, in float32."""
        return F.linear(states, self.head).float()

    @torch.no_grad()
    def read(self, samples: list[Sample], canvases: Tensor) -> tuple[Tensor, Tensor, DynamicCache]:
        """Prompts up to what decides the first token: logits (B, T, V), mask (B, T), the cache."""
        embeds, _, mask = self.merged(samples, embed(canvases, self.vision, self.projector))
        cache = DynamicCache()  # grows by copying
        states = self._through(cache, inputs_embeds=embeds, attention_mask=mask)
        return self.logits(states), mask, cache

    @torch.no_grad()
    def next(self, token: int, cache: DynamicCache) -> Tensor:
        """Logits behind one more token of one answer, (1, 1, V)."""
        return self.logits(self._through(cache, input_ids=self.head.new_tensor([[token]]).long()))

    def _through(self, cache: DynamicCache, **inputs: Tensor) -> Tensor:
        """Last states, with those of all layers asked for, as the programme does everywhere."""
        given = {CACHE: cache, "use_cache": True, "output_hidden_states": True, **inputs}
        return self.decoder(**given).last_hidden_state

    def answer(self, sample: Sample, canvas: Tensor, new_tokens: int) -> list[int]:
        """One question, the likeliest tokens one after the other."""
        logits, _, cache = self.read([sample], canvas[None])
        made = [int(logits[0, -1].argmax())]
        while len(made) < new_tokens:
            made.append(int(self.next(made[-1], cache)[0, -1].argmax()))
        return made

    def step(
        self,
        samples: list[Sample],
        canvases: Tensor,
        *,
        aligner: nn.Module | None = None,
        features: list[Tensor] | None = None,
    ) -> Step:
        """The forward pass of a training step.

        Args:
            aligner: ours, for its weights and sizes; None trains without alignment.
            features: the teacher's cells of each picture, each (cells, W).
        """
        embeds, labels, mask = self.merged(samples, embed(canvases, self.vision, self.projector))
        out = self.decoder(
            inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True, use_cache=False
        )
        logits = self.logits(out.last_hidden_state)[:, :-1]
        language = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=IGNORED
        )
        if aligner is None or features is None:
            return Step(language, language, None)
        taps = torch.stack([out.hidden_states[tap] for tap in aligner.taps])  # (L, B, T, D)
        losses = []
        masks = canvases[:, 3, :: self.patch, :: self.patch]
        for index, (sample, teacher) in enumerate(zip(samples, features, strict=True)):
            sides = (span.stop - span.start for span in box(masks[index]))
            rows, cols = (length // MERGE for length in sides)
            own = taps[:, index, sample.place : sample.place + 1 + rows * (cols + 1)]
            losses.append(self._picture_loss(own, (rows, cols), aligner, teacher))
        alignment = torch.stack(losses).mean()
        return Step(language + alignment, language, alignment)

    def _picture_loss(
        self, taps: Tensor, grid: tuple[int, int], aligner: nn.Module, teacher: Tensor
    ) -> Tensor:
        """One minus the mean cosine of a picture's cells; taps are (L, tokens, D)."""
        weights = aligner_weights(aligner)
        width = weights["input_layer.weight"].shape[0]
        pooled = cells_of(taps, grid, aligner.pool_size)  # (L, Z, D)
        views = []
        for index, tap in enumerate(pooled):
            scale, shift = (weights[f"{index}.0.{name}"] for name in ("weight", "bias"))
            normed = F.layer_norm(tap, tap.shape[-1:], scale, shift, EPS)
            views.append(F.linear(normed, weights[f"{index}.1.weight"]))
        heads = torch.stack(views, 1).unflatten(-1, (NUM_HEADS, -1))  # (Z, L, H, W/H)
        query, others = heads[:, :1].transpose(1, 2), heads[:, 1:].transpose(1, 2)
        shares = (query @ others.transpose(-2, -1) * width**-0.5).softmax(-1)
        attended = (shares @ others).flatten(1)  # (Z, W)
        student = F.linear(attended, weights["output_layer.weight"], weights["output_layer.bias"])
        student = student + F.linear(
            pooled[0], weights["input_layer.weight"], weights["input_layer.bias"]
        )
        return 1 - F.cosine_similarity(student, teacher.to(student.dtype), dim=-1).mean()


def reframed(decoder: PreTrainedModel, attention: str) -> PreTrainedModel:
    """The same decoder around the same parameters, with another attention."""
    config = copy.deepcopy(decoder.config)
    with torch.device("meta"):
        made = type(decoder)._from_config(config, attn_implementation=attention)
    for name, parameter in decoder.named_parameters():
        path, _, leaf = name.rpartition(".")
        made.get_submodule(path)._parameters[leaf] = parameter
    for name, buffer in decoder.named_buffers():
        path, _, leaf = name.rpartition(".")
        made.get_submodule(path)._buffers[leaf] = buffer
    return made.train(decoder.training)


def aligner_weights(aligner: nn.Module) -> Weights:
    """Weights of our aligner by tap, norm before map, and by their published names."""
    found = {}
    for name, weight in aligner.named_parameters():
        part, rest = name.split(".", 1)
        if part in ("norms", "maps"):
            index, kind = rest.split(".")
            found[f"{index}.{ALIGNER[part]}.{kind}"] = weight
        else:
            found[f"{ALIGNER[part]}.{rest}"] = weight
    return found


def cells_of(taps: Tensor, grid: tuple[int, int], pool: int) -> Tensor:
    """Tokens of one picture without class and row-end ones, averaged: (L, tokens, D) to (L, Z, D)."""
    rows, cols = grid
    table = taps[:, 1:].unflatten(1, (rows, cols + 1))[:, :, :cols]
    maps = F.avg_pool2d(table.permute(0, 3, 1, 2), pool)
    return maps.flatten(2).transpose(1, 2)


@torch.no_grad()
def teacher_cells(
    teacher: CLIPVisionModel, canvases: Tensor, sides: list[tuple[int, int]]
) -> list[Tensor]:
    """The teacher run in full on canvases (I, 3, S, S), and each picture's cells cut out.

    Args:
        sides: rows and columns of cells of each picture, which lies in the middle.
    """
    states = teacher(canvases, output_hidden_states=True).hidden_states[-2][:, 1:]
    side = teacher.config.image_size // teacher.config.patch_size
    found = []
    for state, (rows, cols) in zip(states.unflatten(1, (side, side)), sides, strict=True):
        top, left = (side - rows) // 2, (side - cols) // 2
        found.append(state[top : top + rows, left : left + cols].flatten(0, 1))
    return found
