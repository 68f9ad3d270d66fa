"""Where a training step's time goes: the trainer itself, profiled for a few steps of a recipe.

    python benchmarks/profile_training.py eve_small/1_prealign output_dir=runs/profiled

Warms up, then profiles some steps whole, what `Trainer` does between two of them included: Python
functions of the main thread by their own time, the device's operations, and the host's.  Nothing is
saved of the model.

Easy to get wrong: functions that wait for the device seem slow; what they wait for stands in the
second table.
"""

import argparse
import cProfile
import pstats
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from eve_vlm.train import watching
from eve_vlm.train.recipe import load_recipe
from eve_vlm.train.run import train

LINES = 25


class Profiling(TrainerCallback):
    """Profiles whole steps, from the end of one to the end of another."""

    def __init__(self, first: int, steps: int):
        self.first, self.last = first, first + steps
        self.python, self.started = cProfile.Profile(), 0.0
        kinds = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(ProfilerActivity.CUDA)
        self.operations = profile(activities=kinds)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins and ends between two steps; python and device in two runs of steps."""
        steps = self.last - self.first
        if state.global_step == self.first:
            self._wait()
            self.started = time.perf_counter()
            self.python.enable()
        elif state.global_step == self.last:
            self._wait()
            self.python.disable()
            seconds = (time.perf_counter() - self.started) / steps
            print(f"\n{seconds:.3f} s a step, under Python's profiler")
            pstats.Stats(self.python).sort_stats("tottime").print_stats(LINES)
            pstats.Stats(self.python).sort_stats("cumulative").print_stats(2 * LINES)
            self.started = time.perf_counter()
        elif state.global_step == self.last + steps:
            self._wait()
            seconds = (time.perf_counter() - self.started) / steps
            print(f"{seconds:.3f} s a step, under none")
            self.operations.start()
        elif state.global_step == self.last + 2 * steps:
            self._wait()
            self.operations.stop()
            self._show(steps)
            control.should_training_stop = True

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _show(self, steps: int) -> None:
        found = self.operations.key_averages()
        for name in ("self_device_time_total", "self_cpu_time_total"):
            ordered = sorted(found, key=lambda one: -getattr(one, name))[:LINES]
            total = sum(getattr(one, name) for one in found) / 1e3 / steps
            print(f"{name}: {total:.1f} ms a step")
            for one in ordered:
                spent = getattr(one, name) / 1e3 / steps
                print(f"  {spent:9.2f} ms {one.count / steps:9.1f} x {one.key[:90]}")


def main() -> None:
    """Trains under profilers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--first", type=int, default=6, help="steps that warm up")
    parser.add_argument("--steps", type=int, default=3, help="steps that are profiled")
    given = parser.parse_args()
    last = given.first + 4 * given.steps
    fixed = (f"training.max_steps={last}", 'training.save_strategy="no"')
    recipe = load_recipe(given.recipe, (*given.overrides, *fixed))
    callback, watch = Profiling(given.first, given.steps), watching.watch

    def watched(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        trainer.add_callback(callback)
        return watch(trainer, *args, **kwargs)

    from eve_vlm.train import run

    run.watch = watched
    train(recipe, resume=False, say=print)


if __name__ == "__main__":
    main()
