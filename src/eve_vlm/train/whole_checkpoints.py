"""`Trainer` with checkpoints that are whole, and with all that a run needs to go on bit for bit.

The library saves weights, optimizer, schedule and random numbers, in place and file by file, and
forgets what it added up since the last log.  Here the same files go through `checkpoints.py`, and
each process adds what it alone knows: sums of the running log, states of callbacks, the place in
the data.  Easy to get wrong: with several processes a checkpoint takes its name when the last of
them has written its files, so each step of saving below is reached by all of them or by none.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from transformers import Trainer

from eve_vlm.train.checkpoints import (
    checkpoints_in,
    files_below,
    flush_and_sum,
    is_disk_full,
    remove_old,
    seal,
    size_of,
    step_of,
)

logger = logging.getLogger(__name__)

DATA_STATE_FILE = "data_state.json"
TRAINING_ARGUMENTS_FILE = "training_args.bin"
SPARE = 16 * 2**20  # bytes beyond weights and optimizer: tokenizer, states, what the disk takes


class WholeCheckpoints(Trainer):
    """What `EveTrainer` inherits to save and to go on."""

    data_position: Stateful | None = None
    """The place in the data; saved as `data_state.json`, and taken up again."""

    _part: Path | None = None
    _begun_from: Path | None = None
    _saved_step: int | None = None

    def kept(self) -> dict[str, Stateful]:
        """Further states of this process by name, which a run that goes on needs again.

        Here those of callbacks that have `state_dict` and `load_state_dict`; trainers add theirs.
        """
        callbacks = self.callback_handler.callbacks
        return {type(one).__name__: one for one in callbacks if isinstance(one, Stateful)}

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Trains as the library does, from the beginning or from a checkpoint.

        Raises:
            ValueError: if a setting of the recipe makes checkpoints that nothing can go on from.
        """
        assert not isinstance(resume_from_checkpoint, bool), "name the checkpoint"
        if self.args.save_on_each_node:
            raise ValueError(
                "training.save_on_each_node is true, but a checkpoint is written once, into a "
                "folder that all machines see; set it to false."
            )
        if self.args.save_only_model and resume_from_checkpoint:
            raise ValueError(
                f"{resume_from_checkpoint} was saved with training.save_only_model and holds no "
                "optimizer, so the run cannot go on from it; start again in another output_dir "
                "without that key, or with model.init_from set to this checkpoint."
            )
        self._saved_step = None
        self._begun_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # --- saving -----------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        """Where the library puts `checkpoint-N`: while one is saved, a hidden folder."""
        return super()._get_output_dir(trial) if self._part is None else str(self._part)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Saves the model without the library's pickle, which only this machine could read."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            (folder / TRAINING_ARGUMENTS_FILE).unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves the state after this step, whole.

        Raises:
            ValueError: if the disk is too full for it; the checkpoints before stay as they are.
        """
        step = self.state.global_step
        if step == self._saved_step:  # at the end of a step, and again at the end of the epoch
            return
        folder = Path(self.args.output_dir)
        (writer,) = broadcast_object_list([os.getpid()])
        hidden = folder / f".checkpoint-{step}.part-{writer}"
        part, needed = hidden / f"checkpoint-{step}", self._bytes_needed()
        with self._only_whole(hidden):
            free = shutil.disk_usage(folder).free
            self._all_well(_too_full(folder, step, needed) if free < needed else None)
            with self._full_disk_in_words(folder, step, needed):
                super()._save_checkpoint(model, trial)
                self._save_kept(part)
            (names,) = broadcast_object_list([files_below(part)])
            mine = names[self.args.process_index :: self.args.world_size]
            with self._full_disk_in_words(folder, step, needed):
                sums = flush_and_sum(part, mine)
            sums = dict(gather_object(list(sums.items())))
            if self.is_world_process_zero():
                seal(part, folder / part.name, {name: sums[name] for name in names})
                hidden.rmdir()
                remove_old(folder, keep=self.args.save_total_limit)
        self._saved_step = step
        self.accelerator.wait_for_everyone()  # or one may end before the checkpoint has its name

    @contextmanager
    def _only_whole(self, hidden: Path) -> Iterator[None]:
        """Sends the library to the hidden folder, and leaves nothing of it when saving fails."""
        self._part = hidden
        done = False
        try:
            yield
            done = True
        finally:
            self._part = None
            if not done and self.is_world_process_zero():
                shutil.rmtree(hidden, ignore_errors=True)

    def _save_kept(self, part: Path) -> None:
        """Writes what this process alone knows."""
        state = {
            "world_size": self.args.world_size,
            "loss": self._tr_loss,
            "logged": self._globalstep_last_logged,
            "kept": {name: one.state_dict() for name, one in self.kept().items()},
        }
        torch.save(state, part / f"kept_{self.args.process_index}.pt")
        if self.data_position is not None:
            text = json.dumps(self.data_position.state_dict())
            (part / _data_file(self.args.process_index)).write_text(text, encoding="utf-8")

    def _bytes_needed(self) -> int:
        """The bytes of the last checkpoint; before the first, of what certainly will be saved."""
        folder = Path(self.args.output_dir)
        before = [one for one in checkpoints_in(folder) if step_of(one) == self._saved_step]
        if before:
            return size_of(before[0]) + SPARE
        assert self.optimizer is not None and self.model is not None
        learning = [one for one in self.model.parameters() if one.requires_grad]
        states = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        return sum(one.numel() * one.element_size() for one in (*learning, *states)) + SPARE

    @contextmanager
    def _full_disk_in_words(self, folder: Path, step: int, needed: int) -> Iterator[None]:
        """Turns a full disk in one process into one sentence in all of them."""
        problem = None
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_disk_full(error, folder, needed):
                raise
            problem = _too_full(folder, step, needed)
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                # The others wait in the middle of the library's saving, not where we meet.
                raise ValueError(problem) from error
        self._all_well(problem)

    def _all_well(self, problem: str | None) -> None:
        """Raises in all processes what went wrong in one; until then they wait for one another."""
        for found in gather_object([problem]):
            if found is not None:
                raise ValueError(found)

    # --- going on ---------------------------------------------------------------------------------

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One pass over the data, from where the run stood; none if all steps are done.

        The library would train one step more from a checkpoint of the last step.
        """
        if self._begun_from is not None:
            self._take_up(self._begun_from)
            self._begun_from = None
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _take_up(self, checkpoint: Path) -> None:
        """Restores what `_save_kept` wrote; the library has restored its own and reset the sums."""
        # The library goes on with the intervals of the checkpoint; they may have changed since.
        self.state.compute_steps(self.args, self.state.max_steps)
        self._saved_step = self.state.global_step
        index, world = self.args.process_index, self.args.world_size
        first = torch.load(checkpoint / "kept_0.pt", map_location="cpu", weights_only=True)
        same = first["world_size"] == world
        if self.data_position is not None:
            file = checkpoint / _data_file(index if same else 0)
            self.data_position.load_state_dict(json.loads(file.read_text(encoding="utf-8")))
        if not same:
            if self.is_world_process_zero():
                logger.warning(
                    "%s was saved by %d processes and %d go on: random numbers and the sums of "
                    "the running log begin anew, so the run will not be the same bit for bit.",
                    *(checkpoint, first["world_size"], world),
                )
            return
        file = checkpoint / f"kept_{index}.pt"
        device = self.args.device
        # torch knows no "cpu:0", as the device is called with several processes.
        where = "cpu" if device.type == "cpu" else device
        state = torch.load(file, map_location=where, weights_only=True)
        self._tr_loss += state["loss"]
        # The library reports the mean loss of the steps that this process made.
        self._total_loss_scalar = -float(state["loss"])
        self._globalstep_last_logged = state["logged"]
        for name, one in self.kept().items():
            if name in state["kept"]:  # a callback may be new
                one.load_state_dict(state["kept"][name])


def _data_file(index: int) -> str:
    """A process's place in the data; that of the first is the one that all have."""
    return DATA_STATE_FILE if index == 0 else DATA_STATE_FILE.replace(".", f"_{index}.")


def _too_full(folder: Path, step: int, needed: int) -> str:
    free = shutil.disk_usage(folder).free
    whole = checkpoints_in(folder)
    last = f"the last whole one is {whole[-1].name}" if whole else "there is none before it"
    return (
        f"{folder} has no room for the checkpoint of step {step}: at least {needed:,} bytes are "
        f"needed and {free:,} are free ({last}); make room and give the same command again."
    )


__all__ = ["DATA_STATE_FILE", "WholeCheckpoints"]
