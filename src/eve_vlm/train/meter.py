"""What this process does per second, as a share of what its device could do, and its memory.

The trainer shows it every batch and asks for figures when it logs.  Counts stay where the batch is
and are read once per log, so that no step waits for the device.  Easy to get wrong: padding is no
work (`eve_vlm.flops`), so packed rows have a better share than padded ones at equal speed; and what
is repeated by activation checkpointing is no work either, as in the published definition (PaLM,
arXiv 2204.02311, appendix B).
"""

import time
from collections.abc import Mapping, Sequence

import torch

from eve_vlm.configuration_eve import EveConfig
from eve_vlm.flops import Term, Work, flops_of, sliding_window
from eve_vlm.peaks import Peak

UNITS = (
    *("passes", "pictures", "patches", "cells", "image_tokens", "teacher_cells"),
    *("tokens", "pairs", "window_pairs", "labels"),
)


class Meter:
    """Counts the work of one process.

    Args:
        terms: what each part of the model costs; none leave the share of the peak out.
        config: of the model.
        pad_token_id: what fills up packed rows.
        peak: of the device; None leaves the share of it out.
        device: whose memory is watched.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        config: EveConfig,
        *,
        pad_token_id: int,
        peak: Peak | None,
        device: torch.device,
    ):
        self.terms, self.config, self.pad_token_id = terms, config, pad_token_id
        self.peak, self.device = peak, device
        self._counts: torch.Tensor | None = None  # (UNITS,) int64, since the last figures
        self._started = time.perf_counter()

    def count(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Adds one batch as the model gets it."""
        counts = counts_of(batch, self.config, pad_token_id=self.pad_token_id)
        self._counts = counts if self._counts is None else self._counts + counts

    def work(self) -> Work:
        """What was counted since the last figures."""
        if self._counts is None:
            return Work(passes=0)
        return Work(**dict(zip(UNITS, self._counts.tolist(), strict=True)))

    def figures(self) -> dict[str, float]:
        """Entries for the log: `mfu` where it is known, and `memory_gib`; begins anew."""
        work, now = self.work(), time.perf_counter()
        seconds, self._counts, self._started = now - self._started, None, now
        figures = {}
        if self.peak is not None and self.terms:
            needed = flops_of(self.terms, work).needed
            figures["mfu"] = needed / seconds / self.peak.flops
        return figures | {"memory_gib": memory_bytes(self.device) / 2**30}


def memory_bytes(device: torch.device) -> int:
    """Peak bytes of tensors on a GPU; on a CPU the process's bytes in memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil  # comes with accelerate

    return psutil.Process().memory_info().rss


def counts_of(
    batch: Mapping[str, torch.Tensor], config: EveConfig, *, pad_token_id: int
) -> torch.Tensor:
    """The counts of `Work` for one batch, (UNITS,) int64, on its device."""
    ids = batch["input_ids"]
    if "attention_mask" in batch:
        real = batch["attention_mask"].long()
        seen = real.cumsum(1) * real  # what each position sees, itself included
    else:  # packed: positions start again with every record; what fills up the end is none
        real = (ids != pad_token_id).long().flip(1).cumsum(1).flip(1).clamp(max=1)
        seen = (batch["position_ids"] + 1) * real
    window = sliding_window(config)
    near = seen if window is None else seen.clamp(max=window)
    labels = (batch["labels"][:, 1:] != -100).sum()
    pictures = _picture_counts(batch, config)
    return torch.stack([*pictures, real.sum(), seen.sum(), near.sum(), labels])


def _picture_counts(batch: Mapping[str, torch.Tensor], config: EveConfig) -> list[torch.Tensor]:
    """Passes and pictures; a batch without any passes one blank cell (see `EveModel._embed`)."""
    merge, device = config.vision_config.merge_size, batch["input_ids"].device
    grids = batch.get("image_grid_thw")
    if grids is None:
        grids = torch.tensor([[1, merge, merge]], device=device)
    rows, cols = grids[:, 1] // merge, grids[:, 2] // merge
    cells = (rows * cols).sum()
    pool = 1 if config.alignment_config is None else config.alignment_config.pool_size
    one = torch.ones((), dtype=torch.long, device=device)
    taught = ((rows // pool) * (cols // pool)).sum()
    if "teacher_pixel_values" not in batch:
        taught = 0 * one
    tokens = len(grids) * one + cells + rows.sum()
    return [one, len(grids) * one, cells * merge**2, cells, tokens, taught]


__all__ = ["UNITS", "Meter", "counts_of", "memory_bytes"]
