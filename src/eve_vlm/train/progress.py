"""What a person sees while a run goes on: a bar in a terminal, plain lines everywhere else.

A log file keeps every carriage return of a bar as a line of its own, hence the lines.  Only the
first process of a run shows anything.  Easy to get wrong: what is shown was logged (once every
`logging_steps`), and between two logs the bar only moves.
"""

import sys
import time
from typing import Any, TextIO

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments

EVERY = 30.0  # seconds between two plain lines at least
AT_MOST = 600.0  # seconds between two plain lines at most, if a step does not take longer
SHARES = {"mfu": "MFU", "utilisation": "filled", "data_wait": "data wait"}


class StageProgress(TrainerCallback):
    """Time left, loss by term, tokens per second, share of the peak, waiting, memory.

    Args:
        title: of the run.
        stream: where to; the error stream if left out, which leaves the output to results.
        every: seconds between two plain lines at least.
    """

    def __init__(self, title: str, *, stream: TextIO | None = None, every: float = EVERY):
        self.title, self.every = title, every
        self.stream = sys.stderr if stream is None else stream
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}
        self._first_step = self._written_step = 0
        self._began = self._written = 0.0
        self._plain = False

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Begins at the step that training starts from."""
        if not state.is_world_process_zero:
            return
        self._first_step = self._written_step = state.global_step
        self._began = self._written = time.perf_counter()
        self._plain = not self.stream.isatty()
        if not self._plain:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.title,
                dynamic_ncols=True,
                file=self.stream,
            )

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar; with long pauses between logs, says that the run goes on."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        elif self._plain and time.perf_counter() - self._written >= AT_MOST:
            self._write_line(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows the latest figures."""
        if not logs or "loss" not in logs or not (self._plain or self.bar is not None):
            return
        self.shown = shown_figures(logs)
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)
            return
        first = self._written_step == self._first_step
        last = state.global_step >= state.max_steps
        if first or last or time.perf_counter() - self._written >= self.every:
            self._write_line(state)

    def on_train_end(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Closes the bar, or writes the last line."""
        if self.bar is not None:
            self.bar.close()
        elif self._plain and self._written_step != state.global_step:
            self._write_line(state)

    def _write_line(self, state: Any) -> None:
        self._written, self._written_step = time.perf_counter(), state.global_step
        done = state.global_step - self._first_step
        spent = self._written - self._began
        left = spent / max(done, 1) * (state.max_steps - state.global_step)
        share = state.global_step / max(state.max_steps, 1)
        figures = ", ".join(f"{name} {value}" for name, value in self.shown.items())
        self.stream.write(
            f"{self.title}: step {state.global_step:,} of {state.max_steps:,} ({share:.0%}), "
            f"{human_time(left)} left{', ' if figures else ''}{figures}\n"
        )
        self.stream.flush()


def shown_figures(logs: dict[str, float]) -> dict[str, str]:
    """The entries of a log that are shown while a run goes on, as people read them.

    >>> shown_figures({"loss": 2.5, "loss_lm": 2.0, "tokens_per_second": 1234.5, "mfu": 0.414})
    {'loss': '2.500', 'lm': '2.000', 'tokens/s': '1,234', 'MFU': '41.4 %'}
    """
    shown = {
        name.removeprefix("loss_"): f"{value:.3f}"
        for name, value in logs.items()
        if name == "loss" or (name.startswith("loss_") and "/" not in name)
    }
    if "tokens_per_second" in logs:
        shown["tokens/s"] = f"{logs['tokens_per_second']:,.0f}"
    shown |= {title: f"{logs[name]:.1%}" for name, title in SHARES.items() if name in logs}
    if "memory_gib" in logs:
        shown["memory"] = f"{logs['memory_gib']:.1f} GiB"
    if logs.get("left_out_records"):
        shown["left out"] = f"{logs['left_out_records']:,}"
    return {name: value.replace("%", " %") for name, value in shown.items()}


def human_time(seconds: float) -> str:
    """A duration with its two largest units.

    >>> human_time(8), human_time(200), human_time(4320), human_time(400_000)
    ('8 s', '3 min 20 s', '1 h 12 min', '4 d 15 h')
    """
    whole = round(seconds)
    for unit, size, below, smaller in (
        ("d", 86_400, 3_600, "h"),
        ("h", 3_600, 60, "min"),
        ("min", 60, 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {smaller}"
    return f"{whole} s"


__all__ = ["StageProgress", "human_time", "shown_figures"]
