"""Training with the patch aligning layer: the aligner, its loss, and the model that carries it.

The aligner reads every `tap_every`-th decoder layer at the picture positions, pools them to the
teacher's cells, lets the last layer ask the others, and is pulled towards a frozen vision teacher's
features.  It is dropped at inference: a checkpoint of `EveForPreTraining` loads into
`EveForConditionalGeneration` as it is.  The teacher itself never enters a model; its features
arrive as an input.

Easy to get wrong: the loss is 1 - cosine per picture, averaged over pictures.  The paper calls it a
mean squared error of normalised vectors; that is the same up to a factor only when summed over
channels (`docs/differences.md`).

Legend: `N` image tokens, `K` picture tokens without class and row-end tokens, `Z` teacher cells of
all pictures, `D` decoder width, `W` teacher width, `L` taps, `I` pictures, `s` pool size.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .configuration_eve import EveConfig
from .modeling_eve import EveCausalLMOutput, EveForConditionalGeneration
from .patch_embedding_eve import PackedGrid, on_device, on_host
from .pooled_attention_eve import Float32LayerNorm, Float32Linear, at_least_float32
from .published_eve import DROPPED


def tap_indices(num_layers: int, tap_every: int | None) -> tuple[int, ...]:
    """Tapped layers, last first: L, L - tap_every, ... down to 0 or above (0 is the input).

    Only the last one where `tap_every` is None.

    >>> tap_indices(32, 4)
    (32, 28, 24, 20, 16, 12, 8, 4, 0)
    """
    if tap_every is None:
        return (num_layers,)
    return tuple(range(num_layers, -1, -tap_every))


def cells_per_image(
    image_grid_thw: torch.Tensor, *, merge_size: int, pool_size: int
) -> torch.Tensor:
    """Teacher cells of each picture, (I,); rows and columns that do not fill a cell are dropped."""
    side = merge_size * pool_size
    return (image_grid_thw[:, 1] // side) * (image_grid_thw[:, 2] // side)


class EvePatchAligner(nn.Module):
    """The patch aligning layer (paper section 3.1): tapped decoder states to the teacher's width.

    Every tap has its own norm and map.  Per cell the last layer's map asks the others' (which are
    keys and values as they are); what it gets is added to a direct map of the last layer.  With the
    last layer alone (`tap_every` None) nothing is attended to, and its direct map remains.
    """

    def __init__(self, config: EveConfig):
        super().__init__()
        alignment = config.alignment_config
        width, teacher_width = config.text_config.hidden_size, alignment.teacher_hidden_size
        self.taps = tap_indices(config.text_config.num_hidden_layers, alignment.tap_every)
        if len(self.taps) < 2 and alignment.tap_every is not None:
            raise ValueError(
                f"alignment_config.tap_every ({alignment.tap_every}) leaves one tap of "
                f"{self.taps[0]} decoder layers "
                "and nothing to attend to; choose at most the number of layers."
            )
        self.merge_size, self.pool_size = config.vision_config.merge_size, alignment.pool_size
        self.num_heads, self.scale = alignment.num_attention_heads, teacher_width**-0.5
        self.norms = nn.ModuleList(Float32LayerNorm(width, eps=1e-5) for _ in self.taps)
        self.maps = nn.ModuleList(
            Float32Linear(width, teacher_width, bias=False) for _ in self.taps
        )
        self.input = Float32Linear(width, teacher_width)
        self.output = Float32Linear(teacher_width, teacher_width)

    def forward(
        self, tapped: tuple[torch.Tensor, ...], image_grid_thw: torch.Tensor
    ) -> torch.Tensor:
        """Maps tapped states to teacher features.

        Args:
            tapped: for each of `self.taps` the states at all picture positions, (N, D).
            image_grid_thw: (I, 3) patch grids of the pictures, in the same order.

        Returns:
            (Z, W) float32: the cells of picture 0 in reading order, then those of picture 1, ...
        """
        # (Z, s*s) positions in the packed row
        (members,) = on_device(tapped[0].device, self._members_of_cells(on_host(image_grid_thw)))
        with torch.autocast(tapped[0].device.type, enabled=False):
            pooled = [at_least_float32(state)[members].mean(1) for state in tapped]  # L x (Z, D)
            mapped = [
                map_(norm(x)) for map_, norm, x in zip(self.maps, self.norms, pooled, strict=True)
            ]
            heads = torch.stack(mapped, 1).unflatten(-1, (self.num_heads, -1))  # (Z, L, H, W/H)
            query, others = heads[:, :1] * self.scale, heads[:, 1:]
            weights = (query * others).sum(-1, keepdim=True).softmax(1)  # (Z, L-1, H, 1)
            attended = (weights * others).sum(1).flatten(1)  # (Z, W)
            return self.input(pooled[0]) + self.output(attended)

    def _members_of_cells(self, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Packed positions of the s x s tokens of every teacher cell, (Z, s*s), without a loop.

        All on the host, as `PackedGrid`.
        """
        pool = self.pool_size
        fine = PackedGrid.from_grid_thw(image_grid_thw, self.merge_size)
        coarse = PackedGrid.from_grid_thw(image_grid_thw, self.merge_size * pool)
        image = coarse.image_of_cell
        # Column and row of each cell, from its place in reading order within its picture.
        cells = coarse.rows * coarse.cols
        within = torch.arange(len(image), device=image.device) - (cells.cumsum(0) - cells)[image]
        row, col = within // coarse.cols[image], within % coarse.cols[image]
        step = torch.arange(pool, device=image.device)
        rows = (row * pool).view(-1, 1, 1) + step.view(1, -1, 1)  # (Z, s, 1)
        cols = (col * pool).view(-1, 1, 1) + step.view(1, 1, -1)  # (Z, 1, s)
        stride = (fine.cols[image] + 1).view(-1, 1, 1)  # a row of tokens ends in its row-end token
        start = (fine.class_position[image] + 1).view(-1, 1, 1)
        return (start + rows * stride + cols).flatten(1)


def alignment_loss(
    student: torch.Tensor, teacher: torch.Tensor, cells: torch.Tensor
) -> torch.Tensor:
    """1 - mean cosine of each picture's cells: (Z, W) twice and (I,) cell counts to (I,) losses.

    Raises:
        ValueError: if student and teacher differ in shape, or the counts do not add up to Z.
    """
    cells = on_host(cells)
    if student.shape != teacher.shape or int(cells.sum()) != student.shape[0]:
        raise ValueError(
            f"The aligner made features of shape {tuple(student.shape)} for {int(cells.sum())} "
            "cells but the teacher "
            f"gave {tuple(teacher.shape)}; teacher views and pictures must come from the same "
            "records."
        )
    cosine = F.cosine_similarity(student, teacher.to(student.dtype), dim=-1)  # (Z,)
    owner = torch.repeat_interleave(torch.arange(len(cells), device=cells.device), cells)
    owner, cells = on_device(cosine.device, owner, cells)
    return 1 - cosine.new_zeros(len(cells)).index_add(0, owner, cosine) / cells


class EveForPreTraining(EveForConditionalGeneration):
    """`EveForConditionalGeneration` with the patch aligning layer, for training.

    `config.alignment_config` must be set.  `alignment_weight` scales the alignment term in the loss
    (published: 1).
    """

    # Here the aligner is wanted, so a checkpoint's `aligner.*` is not surplus.
    _keys_to_ignore_on_load_unexpected = list(DROPPED)

    def __init__(self, config: EveConfig):
        if config.alignment_config is None:
            raise ValueError(
                "EveForPreTraining needs config.alignment_config; set it to an EveAlignmentConfig."
            )
        super().__init__(config)
        self.aligner = EvePatchAligner(config)
        self.alignment_weight = 1.0
        self.post_init()

    def forward(  # others pass through kwargs; `generate` looks for these by their names
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        teacher_features: torch.Tensor | None = None,
        num_images_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> EveCausalLMOutput:
        """Language loss plus alignment loss.

        Args:
            teacher_features: (Z, W), the teacher's cells of all pictures in order; without it (or
                without pictures) the alignment term is exactly zero, and still touches every
                aligner weight.
            num_images_in_batch: pictures in the whole accumulated batch, to divide the summed term
                by.

        Returns:
            `loss` is lm + weight x alignment; `loss_terms` has both, unweighted.
        """
        if image_grid_thw is not None:
            image_grid_thw = cast(torch.LongTensor, on_host(image_grid_thw))
        # Without pictures, too: every process has to do the same (`_untouched_aligner`).
        learning = teacher_features is not None or (self.training and labels is not None)
        output = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_taps=self.aligner.taps if learning else None,
            **kwargs,
        )
        if output.loss is None or output.loss_terms is None:
            return output
        if teacher_features is None or image_grid_thw is None or output.image_taps is None:
            term = self._untouched_aligner(output.image_taps or (), output.loss.device)
        else:
            term = self._alignment_term(
                output.image_taps, teacher_features, image_grid_thw, num_images_in_batch
            )
        output.loss = output.loss + self.alignment_weight * term
        output.loss_terms["alignment"] = term.detach()
        output.image_taps = None
        return output

    def _untouched_aligner(
        self, image_taps: tuple[torch.Tensor, ...], device: torch.device
    ) -> torch.Tensor:
        """Exactly zero, but by the way that pictures take: one blank cell, and every tap (0, D).

        DDP and ZeRO-3 wait for ever for parameters that one process did not touch, and that is not
        all.  ZeRO-2 adds up gradients of all processes in the order in which they appear: a sum
        over the weights mixed those of norms and maps without a word (measured: 1e-3 of the loss
        after one such step).  ZeRO-3 counts the outputs of each module that gradients come back
        to: without taps it waited for ever.
        """
        cell = self.aligner.merge_size * self.aligner.pool_size
        tokens = 1 + self.aligner.pool_size * (self.aligner.pool_size + 1)
        state = torch.zeros(tokens, self.config.text_config.hidden_size, device=device)
        states = [state + 0.0 * tap.sum() for tap in image_taps] or [state] * len(self.aligner.taps)
        grid = torch.tensor([[1, cell, cell]])
        return 0.0 * self.aligner(tuple(states), grid).sum()

    def _alignment_term(
        self,
        image_taps: tuple[torch.Tensor, ...],
        teacher_features: torch.Tensor,
        image_grid_thw: torch.Tensor,
        num_images_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        student = self.aligner(image_taps, image_grid_thw)
        cells = cells_per_image(
            image_grid_thw, merge_size=self.aligner.merge_size, pool_size=self.aligner.pool_size
        )
        per_image = alignment_loss(student, teacher_features, cells)
        return per_image.sum() / (
            len(per_image) if num_images_in_batch is None else num_images_in_batch
        )


__all__ = [
    "EveForPreTraining",
    "EvePatchAligner",
    "alignment_loss",
    "cells_per_image",
    "tap_indices",
]
