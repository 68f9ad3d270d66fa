"""What is added up between two logs: losses by term and by data set, tokens, waiting.

Losses stay on the device until they are logged, so no step waits for the device.  Easy to get
wrong: every process has its own share of each loss term (the divisor counts all processes), so
terms of all processes are added, not averaged; and all of them must come here together.
"""

import time
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate import Accelerator


@dataclass(kw_only=True)
class StepSums:
    """Sums since the last log."""

    steps: int = 0
    """Optimizer steps."""
    tokens: int = 0
    """Tokens without padding."""
    positions: int = 0
    """Tokens with padding."""
    data_wait: float = 0.0
    """Seconds spent waiting for batches."""
    started: float = field(default_factory=time.perf_counter)
    """When the sums began."""
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    """Loss by term, as shares of a step."""
    group_losses: torch.Tensor | None = None
    """(G,) summed loss of each data set."""
    group_counts: torch.Tensor | None = None
    """(G,) summed weight of its labels."""

    def state_dict(self) -> dict[str, Any]:
        """All sums, and the seconds that they were taken in."""
        state = {
            field.name: value
            for field in fields(self)
            if (value := vars(self)[field.name]) is not None
        }
        return state | {"started": time.perf_counter() - self.started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from saved sums."""
        vars(self).update(state)
        self.started = time.perf_counter() - state["started"]

    def add_losses(self, outputs: Any) -> None:
        """Adds the losses of one micro-batch, an `EveCausalLMOutput`."""
        for name, term in outputs["loss_terms"].items():
            self.terms[name] = self.terms.get(name, 0.0) + term
        if outputs.get("group_losses") is not None:
            losses, counts = outputs["group_losses"], outputs["group_counts"]
            if self.group_losses is None or self.group_counts is None:
                self.group_losses, self.group_counts = losses.clone(), counts.clone()
            else:
                self.group_losses += losses
                self.group_counts += counts

    def logs(self, accelerator: Accelerator, sources: tuple[str, ...]) -> dict[str, float]:
        """The sums of all processes as entries of the log.

        Returns:
            `loss_TERM`, `loss_of/SOURCE` for each data set that was seen, `tokens_per_second` of
            all processes, `utilisation` (share of positions that are no padding) and `data_wait`
            (share of the time that was spent waiting for data, the longest of all processes).
        """
        seconds = time.perf_counter() - self.started
        device = accelerator.device
        numbers = [torch.stack([term.float() for term in self.terms.values()])]
        groups = [one for one in (self.group_losses, self.group_counts) if one is not None]
        numbers += [one.float() for one in groups]
        sums = torch.tensor([self.tokens, self.positions], dtype=torch.float32, device=device)
        # One exchange for everything; counts up to 2^24 are exact in float32, beyond that to 1e-7.
        everything = accelerator.reduce(torch.cat([*numbers, sums]), reduction="sum").tolist()
        waits = accelerator.gather(torch.tensor([self.data_wait / seconds], device=device))
        terms, rest = everything[: len(self.terms)], everything[len(self.terms) :]
        logs = {
            f"loss_{name}": value / self.steps
            for name, value in zip(self.terms, terms, strict=True)
        }
        if groups:
            size = len(sources)
            for name, loss, count in zip(sources, rest[:size], rest[size : 2 * size], strict=True):
                if count:
                    logs[f"loss_of/{name}"] = loss / count
        tokens, positions = rest[-2:]
        logs["tokens_per_second"] = tokens / seconds
        logs["utilisation"] = tokens / max(positions, 1)
        logs["data_wait"] = float(waits.max())
        return logs


__all__ = ["StepSums"]
