"""A run that is asked to stop saves at the end of its step, and says how to go on.

SIGTERM (Kubernetes, Slurm), SIGUSR1 (Slurm's warning before the time is up) and Ctrl-C end a run
so; a second Ctrl-C ends it at once.  Easy to get wrong: with several processes the signal may reach
only one, or each in another step, so at the end of every step all of them agree on whether to stop.
"""

import os
import signal
import sys
import threading
from functools import partial
from types import FrameType
from typing import Any

import torch
from accelerate.data_loader import DataLoaderAdapter
from torch import distributed
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

# Windows has no SIGUSR1.
SIGNALS = tuple(one for one in signal.Signals if one.name in ("SIGINT", "SIGTERM", "SIGUSR1"))


class RunStopped(Exception):
    """A run was asked to stop and has saved its state; the text says how to go on."""

    def __init__(self, *, step: int, of: int, signum: int):
        super().__init__(
            f"stopped at step {step:,} of {of:,}; the same command goes on from there."
        )
        self.exit_code = 130 if signum == signal.SIGINT else 143
        """What a shell expects of a process that ended so."""


class StopOnSignal(TrainerCallback):
    """Watches for signals as a context, and stops a trainer as its callback.

    Outside the main thread, as in some notebooks, no signal can be caught, and none is.
    """

    def __init__(self) -> None:
        self.signum = 0
        """The signal that came, in this process."""
        self.agreed = 0
        """The signal that all processes stop for; 0 while they go on."""
        self._interrupts = 0
        self._before: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> "StopOnSignal":
        """Begins to watch."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _came(self, number: int, _: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if not self.signum:
            self.signum = number
            # Not through a buffer, which may be in use by what the signal interrupted.
            more = " (once more stops at once)" if number == signal.SIGINT else ""
            os.write(2, f"\nstopping at the end of this step{more} ...\n".encode())

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Prepares processes that read data, and the exchange between those that train."""
        loader = kwargs["train_dataloader"]
        if isinstance(loader, DataLoaderAdapter):
            loader = loader.base_dataloader  # the one that starts the processes
        if isinstance(loader, DataLoader):
            loader.worker_init_fn = partial(_stay, then=loader.worker_init_fn)
        if args.world_size > 1 and distributed.get_backend() != "gloo":
            # Between hosts' memories: a flag on the GPU would make every step wait for it.
            self._group = distributed.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves and ends if any process got a signal; a last step ends anyway."""
        self.agreed = self.signum
        if args.world_size > 1:
            flag = torch.tensor(self.signum)
            distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self._group)
            self.agreed = int(flag)
        if self.agreed and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        else:
            self.agreed = 0


def _stay(worker: int, *, then: Any) -> None:
    """Lets a process that reads data live on when its whole group is told to end.

    Slurm and a terminal signal every process of a job; without its data the run could not finish
    its step.  The process that trains ends it by SIGTERM too, so it counts who sent the signal.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere nobody can ask for the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()
    if then is not None:
        then(worker)


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


__all__ = ["RunStopped", "StopOnSignal"]
