"""What is watched in every step: labels, loss, gradients by part, spikes, collapse.

Everything is judged once a step, when the gradients of all its micro-batches are there and neither
clipped nor used: one sum over processes and one wait for the device.  Every process gets the same
numbers, so all of them stop, skip or go on together.

A step is skipped by dropping its gradients: torch's optimizers leave a parameter without one
alone, its moments and its decay too. The schedule of the learning rate and the order of records go
on as if the step had been made.

Easy to get wrong: gradients must be looked at before they are clipped, because the factor of
clipping is one number for all of them, and a NaN of one part would be seen in all.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from eve_vlm.data.encode import IGNORED
from eve_vlm.train.bad_steps import step_folder, write_bad_step
from eve_vlm.train.collapse import Collapse, CollapseAlarm
from eve_vlm.train.gradients import GradientNorms
from eve_vlm.train.sections import GuardsSection

logger = logging.getLogger(__name__)

MEMORY = 0.98  # of the running mean: about the last 50 steps count
WARM_UP = 50  # steps before anything is called a spike
NAMED = 6  # record ids in a message; all of them are in the folder
BAD_LOSS, NO_LABEL = 1, 2  # what a process says of its own micro-batches


@dataclasses.dataclass(kw_only=True, slots=True)
class GuardMemory:
    """What guards know from the steps before; saved with every checkpoint."""

    mean: float = 0.0
    """Running mean of the loss, not yet divided by its weight."""
    weight: float = 0.0
    """Weight of the running mean; 1 after many steps."""
    steps: int = 0
    """Good steps that were seen."""
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Skipped steps by reason."""
    alarm: CollapseAlarm = dataclasses.field(default_factory=CollapseAlarm)
    """The collapse alarm."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What all processes together say of a step."""

    loss: float
    """Mean loss of the processes."""
    norms: dict[str, float]
    """Gradient norm by part; empty where gradients cannot be seen."""
    bad_loss: list[int]
    """Processes with a loss that is no number."""
    no_label: list[int]
    """Processes with records but no label in a micro-batch."""


class Guards(TrainerCallback, ExportableState):
    """Judges every step of a run; the trainer calls `begin_step`, `after_loss` and `may_step`.

    Args:
        section: what to do about a bad step.
        output_dir: folder of the run.
        device: where losses are.
        gradients: whether gradients can be seen; DeepSpeed keeps them, and fp16 scales them.
        decode: makes text of token ids, for what is written to disk.

    Raises:
        ValueError: if steps shall be skipped where gradients cannot be dropped.
    """

    def __init__(
        self,
        section: GuardsSection,
        output_dir: str | Path,
        *,
        device: torch.device,
        gradients: bool = True,
        decode: Callable[[list[int]], str] | None = None,
    ):
        if section.bad_step == "skip" and not gradients:
            raise ValueError(
                "guards.bad_step is skip, but with DeepSpeed or fp16 no step can be taken back; "
                "set it to stop, or use devices.strategy ddp or fsdp2 and bf16."
            )
        self.section, self.output_dir, self.device = section, Path(output_dir), device
        self.gradients, self.decode = gradients, decode
        self.memory = GuardMemory()
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.world = distributed.get_world_size() if together else 1
        self.norms: dict[str, float] = {}
        self._good: list[float] = []  # losses since the last log
        self._skipped_since_log = 0
        self._watch: GradientNorms | None = None
        self._batches: list[dict[str, Any]] = []
        self._losses: list[torch.Tensor] = []
        if not gradients:
            logger.warning(
                "Gradients are not watched by part, because DeepSpeed keeps them or fp16 scales "
                "them; labels, loss, spikes and collapse are."
            )

    # --- the trainer's seams ----------------------------------------------------------------------

    def begin_step(self, batches: Sequence[dict[str, Any]]) -> None:
        """Takes the micro-batches of a step as the collator made them."""
        self._batches = [dict(batch) for batch in batches]
        self._losses = []

    def after_loss(self, loss: torch.Tensor) -> None:
        """Takes the loss of a micro-batch, which is a share of the step's loss."""
        self._losses.append(loss.detach())

    def may_step(self, model: nn.Module, *, step: int, learning_rates: Sequence[float]) -> bool:
        """Judges the step that the gradients of `model` are of; False where it shall be skipped.

        Args:
            model: holds the gradients, neither clipped nor used.
            step: its number, from 1.
            learning_rates: of the optimizer's groups.

        Raises:
            ValueError: to end the run, with what was seen, whose records, and the folder.
        """
        verdict = self._ask_all(model)
        self.norms = verdict.norms
        reason, text = self._judge(verdict, step)
        if not reason:
            self._remember(verdict.loss, step)
            return True
        self._write(verdict, step, reason, text, learning_rates)
        text = f"{text} {self._records(verdict, step)}"
        if self.section.bad_step == "stop":
            raise ValueError(text)
        self._skip(reason, text)
        return False

    def after_engine_step(
        self, norm: float | None, *, step: int, learning_rates: Sequence[float]
    ) -> None:
        """Looks at the gradient norm of DeepSpeed, which is known only after it was used.

        Raises:
            ValueError: if it is no number.
        """
        if norm is None or math.isfinite(norm):
            return
        verdict = Verdict(loss=math.nan, norms={"all": norm}, bad_loss=[], no_label=[])
        text = (
            f"The gradient became {norm} by step {step}, and DeepSpeed has changed the weights by "
            "it, so go on from a checkpoint; lower stage.learning_rates, or look at"
        )
        self._write(verdict, step, "gradient", text, learning_rates)
        raise ValueError(f"{text} {self._records(verdict, step)}")

    def _write(
        self,
        verdict: Verdict,
        step: int,
        reason: str,
        text: str,
        learning_rates: Sequence[float],
    ) -> None:
        about = {
            "step": step,
            "rank": self.rank,
            "reason": reason,
            "message": f"{text} {self._records(verdict, step)}",
            "action": self.section.bad_step,
            "loss": verdict.loss,
            "running_mean": self.running_mean,
            "gradient_norms": verdict.norms,
            "learning_rates": list(learning_rates),
        }
        losses = [float(loss) for loss in self._losses]
        folder = step_folder(self.output_dir, step, self.rank)
        write_bad_step(folder, self._batches, about, losses=losses, decode=self.decode)

    def add_to_log(self, logs: dict[str, float]) -> None:
        """Adds the last step's gradient norm by part and the number of skipped steps so far.

        Where steps were skipped since the last log, `loss` becomes the mean of the others, because
        `Trainer` has counted all of them; it vanishes where there is none.
        """
        if self._skipped_since_log and not self._good:
            del logs["loss"]
        elif self._skipped_since_log:
            logs["loss"] = sum(self._good) / len(self._good)
        self._good, self._skipped_since_log = [], 0
        logs |= {f"grad_norm_{name}": norm for name, norm in self.norms.items()}
        if self.num_skipped:
            logs["skipped_steps"] = self.num_skipped

    @property
    def num_skipped(self) -> int:
        """Steps that were skipped, before a resume too."""
        return sum(self.memory.skipped.values())

    @property
    def running_mean(self) -> float | None:
        """Mean loss of about the last 50 good steps; None before the first."""
        return self.memory.mean / self.memory.weight if self.memory.weight else None

    # --- judging ----------------------------------------------------------------------------------

    def _ask_all(self, model: nn.Module) -> Verdict:
        """One vector, one sum over processes, one wait for the device."""
        names: list[str] = []
        shares = torch.zeros(0, device=self.device)
        if self.gradients:
            self._watch = self._watch or GradientNorms(model, processes=self.world)
            names, shares = self._watch.names, self._watch.share(self.device)
        losses = torch.stack([loss.float() for loss in self._losses]).to(self.device)
        said = torch.zeros(self.world, device=self.device)
        bad_loss = (~losses.isfinite()).any().float()
        said[self.rank] = BAD_LOSS * bad_loss + NO_LABEL * self._without_label()
        vector = torch.cat([shares, losses.sum().view(1) / self.world, said])
        if self.world > 1:
            distributed.all_reduce(vector)
        numbers = vector.tolist()
        codes = [int(code) for code in numbers[len(names) + 1 :]]
        return Verdict(
            loss=numbers[len(names)],
            norms={
                name: math.sqrt(square) if square >= 0 else math.nan
                for name, square in zip(names, numbers, strict=False)
            },
            bad_loss=[rank for rank, code in enumerate(codes) if code & BAD_LOSS],
            no_label=[rank for rank, code in enumerate(codes) if code & NO_LABEL],
        )

    def _without_label(self) -> torch.Tensor:
        """1 where a micro-batch has records but no label to learn; the first is never learnt."""
        empty = [
            (batch["labels"][:, 1:] == IGNORED).all().to(self.device)
            for batch in self._batches
            if any(batch.get("record_ids", [[""]]))  # none: all of its records are counted as bad
        ]
        return torch.stack(empty).any().float() if empty else torch.zeros((), device=self.device)

    def _judge(self, verdict: Verdict, step: int) -> tuple[str, str]:
        """Why a step is bad, as a word and as the beginning of a sentence; or nothing."""
        mean, spike = self.running_mean, self.section.spike
        if verdict.no_label:
            return "no label", (
                f"No label is left to learn in a micro-batch of step {step}; look at how its "
                "answers are marked:"
            )
        help = "lower stage.learning_rates, set training.max_grad_norm, or look at"
        if verdict.bad_loss:
            return "loss", f"The loss became {verdict.loss} by step {step}; {help}"
        broken = [name for name, norm in verdict.norms.items() if not math.isfinite(norm)]
        if broken:
            return "gradient", (
                f"The gradient of {', '.join(broken)} became {verdict.norms[broken[0]]} by step "
                f"{step}; {help}"
            )
        if spike is None or mean is None or self.memory.steps < WARM_UP:
            return "", ""
        if verdict.loss > spike * mean:
            return "spike", (
                f"The loss is {verdict.loss:.4g} in step {step}, {verdict.loss / mean:.1f} times "
                f"its running mean of {mean:.4g} (guards.spike is {spike:g}); {help}"
            )
        return "", ""

    def _records(self, verdict: Verdict, step: int) -> str:
        """Whose records they are and where, in words; of bad micro-batches where some are known."""
        folder = step_folder(self.output_dir, step, self.rank)
        culprits = verdict.no_label or verdict.bad_loss
        if culprits and self.rank not in culprits:
            folder = step_folder(self.output_dir, step, culprits[0])
            return f"the records of process {culprits[0]}, written to {folder}."
        batches = self._batches
        if verdict.bad_loss:
            pairs = zip(self._batches, self._losses, strict=True)
            batches = [batch for batch, loss in pairs if not math.isfinite(loss)]
        ids = [name for batch in batches for row in batch.get("record_ids", []) for name in row]
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        records = f"the records {', '.join(ids[:NAMED])}{more}" if ids else "the batch"
        return f"{records}, written to {folder}."

    def _skip(self, reason: str, text: str) -> None:
        counts = self.memory.skipped
        counts[reason] = counts.get(reason, 0) + 1
        self._skipped_since_log += 1
        if self.num_skipped > self.section.max_skipped:
            reasons = ", ".join(f"{number} for its {name}" for name, number in counts.items())
            raise ValueError(
                f"{self.num_skipped} steps had to be skipped ({reasons}), more than "
                f"guards.max_skipped allows ({self.section.max_skipped}); the last: {text}"
            )
        if self.rank == 0:
            logger.warning("skipped: %s", text)

    def _remember(self, loss: float, step: int) -> None:
        memory = self.memory
        memory.mean = MEMORY * memory.mean + (1 - MEMORY) * loss
        memory.weight = MEMORY * memory.weight + (1 - MEMORY)
        memory.steps += 1
        self._good.append(loss)
        seen = memory.alarm.update(step, loss)
        if seen is not None and self.section.collapse != "ignore":
            self._collapsed(seen)

    def _collapsed(self, seen: Collapse) -> None:
        help = (
            "the paper saw this without its first stage, so train stage prealign before, or lower "
            "stage.learning_rates, and start again from a checkpoint before that step"
        )
        if self.section.collapse == "stop":
            raise ValueError(f"{seen}; {help} (guards.collapse is stop).")
        if self.rank == 0:
            logger.warning("%s; %s.", seen, help)

    # --- checkpoints ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What goes into `trainer_state.json`."""
        return {"args": {}, "attributes": {"memory": dataclasses.asdict(self.memory)}}

    def state_dict(self) -> dict[str, Any]:
        """What was seen since the last log, which a checkpoint keeps for each process."""
        return {"good": self._good, "skipped": self._skipped_since_log}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with it."""
        self._good, self._skipped_since_log = list(state["good"]), state["skipped"]

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Goes on from what the checkpoint says."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            values = dict(saved["attributes"]["memory"])
            values["alarm"] = CollapseAlarm.from_dict(values["alarm"])
            self.memory = GuardMemory(**values)


__all__ = ["GuardMemory", "Guards", "Verdict"]
