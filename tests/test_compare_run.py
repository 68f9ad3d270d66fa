"""`eve compare-run`: curves of a run beside recorded ones, or beside another run's.

Means and spreads are compared with numpy's to 1e-12, as both compute in float64.
"""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import tiny
from eve_vlm.cli import app
from eve_vlm.train import curves
from eve_vlm.train.curves import Curve, compare, read_run, reference, shipped_reference
from eve_vlm.train.recipe import load_recipe, recipes_folder
from eve_vlm.train.run import train

STAGES = ("0_language", "1_prealign", "2_pretrain", "3_finetune")
STEPS = list(range(10, 510, 10))


def falling(*, seed=0, noise=0.05, level=0.0):
    """A curve of fifty entries that falls from 2 to 0.5."""
    rng = np.random.default_rng(seed)
    return (
        0.5 + 1.5 * np.exp(-np.arange(50) / 8) + noise * rng.standard_normal(50) + level
    ).tolist()


def run_folder(folder, losses, *, name="mine", checkpoint=False, max_steps=500):
    """An output folder with these losses; with `checkpoint`, of a run that has not ended."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump({"name": name}))
    log = [
        {"step": step, "loss": loss, "loss_lm": loss, "grad_norm": 1.0}
        for step, loss in zip(STEPS, losses, strict=False)
    ]
    if checkpoint:
        state = folder / f"checkpoint-{log[-1]['step']}" / "trainer_state.json"
        state.parent.mkdir()
        state.write_text(json.dumps({"log_history": log, "max_steps": max_steps}))
    else:
        (folder / "run.json").write_text(json.dumps({"losses": log, "steps": log[-1]["step"]}))
    return folder


def asked(*arguments):
    """Exit code and output of the command."""
    done = CliRunner().invoke(app, ["compare-run", *map(str, arguments)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


# --- arithmetic -----------------------------------------------------------------------------------


def test_means_and_spreads_are_those_of_numpy():
    """Variance across three runs, over eleven neighbours, and a third more for the mean's own."""
    runs = [falling(seed=seed) for seed in range(3)]
    made = reference("three", STEPS, [{"loss": run} for run in runs])
    variances = np.var(runs, axis=0, ddof=1)
    for index in range(50):
        near = variances[max(index - 5, 0) : index + 6]
        expected = math.sqrt(near.mean() * (1 + 1 / 3))
        assert made.spreads["loss"][index] == pytest.approx(expected, rel=1e-12)
        mean = np.mean([run[index] for run in runs])
        assert made.means["loss"][index] == pytest.approx(mean, rel=1e-12)


def test_the_spread_of_one_run_is_its_noise():
    """0.05 at a step and as much in the other run, on average over forty seeds; to 5 %."""
    found = [
        reference("one", STEPS, [{"loss": falling(seed=seed)}]).spreads["loss"][25:]
        for seed in range(40)
    ]
    variance = float(np.mean(np.square(found)))
    assert math.sqrt(variance) == pytest.approx(0.05 * math.sqrt(2), rel=0.05)


def curve(values, *, steps=STEPS, term="loss"):
    return Curve(name="mine", steps=steps[: len(values)], terms={term: values}, max_steps=500)


@pytest.fixture
def expected():
    return reference("three", STEPS, [{"loss": falling(seed=seed)} for seed in range(3)])


@pytest.mark.parametrize("seed", range(10, 20))
def test_another_seed_is_within(expected, seed):
    assert compare(curve(falling(seed=seed)), expected).verdict == "within"


@pytest.mark.parametrize(("level", "verdict"), [(0.3, "above"), (-0.3, "below")])
def test_another_level_is_outside(expected, level, verdict):
    found = compare(curve(falling(seed=7, level=level)), expected)
    assert found.verdict == verdict and found.term == "loss"
    assert math.copysign(1, found.spreads) == math.copysign(1, level)
    row = found.rows["loss"][30]
    spread = expected.spreads["loss"][30]
    assert row.difference == pytest.approx((row.yours - row.reference) / spread, rel=1e-12)


def test_the_fifth_that_differs_is_named(expected):
    values = falling(seed=7)
    values[20:30] = [value + 0.5 for value in values[20:30]]
    found = compare(curve(values), expected)
    assert (found.verdict, found.first, found.last) == ("above", 210, 300)


def test_a_loss_that_is_no_number_is_above(expected):
    values = falling(seed=7)
    values[45] = math.nan
    found = compare(curve(values), expected)
    assert (found.verdict, found.first) == ("above", 410)


def test_runs_that_logged_other_steps_are_refused(expected):
    other = curve(falling(), steps=[step + 5 for step in STEPS])
    text = tiny.refused(lambda: compare(other, expected))
    assert "logged steps 15, 25, 35, ... but the reference 10, 20, 30, ...;" in text


# --- what is recorded -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_recorded_curves_are_those_of_the_recipe(stage):
    """Steps and terms as the recipe logs them: re-record with benchmarks/record_curves.py."""
    recipe = load_recipe(f"tiny/{stage}")
    made = shipped_reference(recipe.name)
    every, last = recipe.training["logging_steps"], recipe.training["max_steps"]
    assert made.steps == list(range(every, last + 1, every))
    terms = {"loss", "loss_lm"} | ({"loss_alignment"} if recipe.stage.alignment else set())
    assert set(made.means) == terms
    assert all(len(values) == len(made.steps) for values in made.means.values())
    # They learn: the last tenth lies well below the first.
    loss = made.means["loss"]
    assert np.mean(loss[-len(loss) // 10 :]) < 0.7 * np.mean(loss[: len(loss) // 10])


@pytest.mark.parametrize("stage", STAGES)
def test_every_recorded_run_is_within_the_others(stage):
    name = load_recipe(f"tiny/{stage}").name
    file = recipes_folder() / "tiny" / curves.CURVES_FILE
    recorded = json.loads(file.read_text(encoding="utf-8"))["recipes"][name]
    if len(recorded["runs"]) == 1:
        pytest.skip("one seed is recorded, and there is nothing to compare it with")
    for index, run in enumerate(recorded["runs"]):
        others = recorded["runs"][:index] + recorded["runs"][index + 1 :]
        made = reference("others", recorded["steps"], [other["terms"] for other in others])
        mine = Curve(name=name, steps=made.steps, terms=run["terms"], max_steps=made.steps[-1])
        assert compare(mine, made).verdict == "within"


# --- the command ----------------------------------------------------------------------------------


def test_a_run_beside_another(tmp_path):
    mine = run_folder(tmp_path / "mine", falling(seed=1))
    other = run_folder(tmp_path / "other", falling(seed=2), name="other")
    code, text = asked(mine, "--with", other)
    assert code == 0 and "within: at the most, loss" in text
    assert f"mine, beside: {other} (other)" in text
    lines = [line.split() for line in text.splitlines() if line.startswith("loss  ")]
    assert [line[1] for line in lines] == [str(step) for step in range(50, 501, 50)]
    picture = Image.open(mine / "curves.png")
    assert picture.width > 300 and len(picture.convert("RGB").getcolors(10**6)) > 20


def test_a_run_that_differs_ends_with_1(tmp_path):
    mine = run_folder(tmp_path / "mine", falling(level=0.6))
    other = run_folder(tmp_path / "other", falling())
    code, text = asked(mine, "--with", other, "--plot", tmp_path / "here.png")
    assert code == 1 and "above: loss is" in text
    assert (tmp_path / "here.png").is_file() and not (mine / "curves.png").exists()


def test_blocks_go_from_high_to_low(tmp_path):
    mine = run_folder(tmp_path / "mine", falling(noise=0))
    _, text = asked(mine, "--with", mine)
    line = next(line for line in text.splitlines() if line.startswith("loss, yours"))
    blocks = line.split()[-1]
    assert len(blocks) == 50 and blocks[0] == "█" and blocks[-1] == "▁"
    assert list(blocks) == sorted(blocks, reverse=True)


def test_a_run_that_has_not_ended(tmp_path):
    """From the last checkpoint by number: 200 comes behind 90."""
    mine = run_folder(tmp_path / "mine", falling()[:9], checkpoint=True)
    run_folder(mine, falling()[:20], checkpoint=True)
    other = run_folder(tmp_path / "other", falling())
    assert read_run(mine).steps[-1] == 200
    code, text = asked(mine, "--with", other)
    assert code == 0 and "The run has come to step 200 of 500." in text


def test_other_lengths_are_said(tmp_path):
    mine = run_folder(tmp_path / "mine", falling()[:25])
    other = run_folder(tmp_path / "other", falling())
    _, text = asked(mine, "--with", other)
    assert "The run has 250 steps but the reference 500, so their learning rates differ." in text


def test_json(tmp_path):
    mine = run_folder(tmp_path / "mine", falling())
    code, text = asked(mine, "--with", mine, "--json")
    found = json.loads(text)
    assert code == 0 and found["verdict"] == "within" and found["spreads"] == 0
    assert [row["step"] for row in found["rows"]["loss"]] == STEPS


def test_without_matplotlib_there_is_no_picture(tmp_path):
    """In a process where it cannot be imported; only asked for it is an error."""
    mine = run_folder(tmp_path / "mine", falling())
    hidden = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a)\n"
        "from eve_vlm.cli import main; main()"
    )
    command = [sys.executable, "-c", hidden, "compare-run", str(mine), "--with", str(mine)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "loss, yours" in done.stdout
    assert not list(mine.glob("*.png"))
    done = subprocess.run(
        [*command, "--plot", "x.png"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "pip install 'eve-vlm[demo]'" in done.stderr


def test_what_cannot_be_compared_is_refused(tmp_path):
    mine = run_folder(tmp_path / "mine", falling())
    text = tiny.refused(lambda: asked(mine), end="compare with another run of yours by --with RUN.")
    assert "No reference is recorded for the recipe 'mine', only for tiny-language" in text
    assert "holds no run" in tiny.refused(lambda: read_run(tmp_path))
    (mine / "run.json").unlink()
    assert "neither a finished run nor a checkpoint" in tiny.refused(lambda: read_run(mine))


def test_a_real_run_is_read(tmp_path):
    """Finished, and from a checkpoint of the same run."""
    data = tiny.recipe_data(tiny.llava_file(tmp_path / "data"), tmp_path / "run")
    data["training"] |= {"save_strategy": "steps", "save_steps": 2}
    result = train(tiny.recipe(tmp_path / "recipe.yaml", data))
    whole = read_run(tmp_path / "run")
    assert whole.steps == [1, 2, 3, 4] and whole.name == "test" and whole.max_steps == 4
    assert whole.terms["loss"] == [entry["loss"] for entry in result.losses]
    (tmp_path / "run" / "run.json").unlink()
    assert read_run(tmp_path / "run") == whole
    assert set(whole.terms) == {"loss", "loss_lm"}
