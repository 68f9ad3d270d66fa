"""Time that watching a run takes: per step, per log, and per page of a report.

    python benchmarks/log_overhead.py

Prints one line of JSON, in milliseconds, each the median of many calls on this machine.  The batch
is of 8 rows of 2048 positions with a picture of 48 x 48 patches each, as in the second stage of the
published training.  Easy to get wrong: a page reads the whole log, so it is measured with one of
10,000 entries.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml

from eve_vlm import EveConfig
from eve_vlm.flops import terms_of_config
from eve_vlm.peaks import Peak
from eve_vlm.train.meter import Meter
from eve_vlm.train.progress import StageProgress
from eve_vlm.train.run_log import RunLog
from eve_vlm.train.run_report import write_run_report

ENTRIES = 10_000
LOGS = {
    **{f"grad_norm_{part}": 1.0 for part in ("projector", "aligner", "decoder_early", "head")},
    **{"loss": 2.5, "loss_lm": 2.0, "loss_alignment": 0.5, "learning_rate": 1e-4},
    **{f"loss_of/set {number}": 2.0 for number in range(8)},
    **{"tokens_per_second": 1e4, "mfu": 0.4, "data_wait": 0.01, "utilisation": 0.97},
}


def milliseconds(action: Callable[[], object], times: int) -> float:
    """Median of so many calls."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return round(1000 * statistics.median(taken), 3)


def batch() -> dict[str, torch.Tensor]:
    """Eight full rows with a picture each."""
    ids = torch.full((8, 2048), 7)
    grids = torch.tensor([[1, 48, 48]] * 8)
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "attention_mask": torch.ones_like(ids),
        "image_grid_thw": grids,
    }


def main() -> None:
    """Measures and prints."""
    config, given = EveConfig(), batch()
    peak = Peak(1e12, "told")
    device = torch.device("cpu")
    meter = Meter(terms_of_config(config), config, pad_token_id=0, peak=peak, device=device)
    state = SimpleNamespace(global_step=1, max_steps=ENTRIES, is_world_process_zero=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, shown = RunLog(folder), StageProgress("run", stream=io.StringIO(), every=0)
        shown.on_train_begin(None, state, None)
        measured = {
            "count of a micro-batch": milliseconds(lambda: meter.count(given), 200),
            "figures of a log": milliseconds(meter.figures, 200),
            "progress line": milliseconds(lambda: shown.on_log(None, state, None, logs=LOGS), 200),
            "log line": milliseconds(lambda: log.on_log(None, state, None, logs=LOGS), 200),
        }
        recipe = {"name": "run", "stage": {"name": "pretrain"}, "data": {"sources": []}}
        (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(recipe))
        for step in range(ENTRIES):
            state.global_step = step
            log.on_log(None, state, None, logs=LOGS)
        write_run_report(folder)  # the first one also imports matplotlib
        measured[f"page of {ENTRIES:,} entries"] = milliseconds(lambda: write_run_report(folder), 5)
    print(json.dumps(measured | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
