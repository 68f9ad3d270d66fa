"""Guards: bad steps are found, written down, and stop the run or leave no trace; collapse is heard.

What a skipped step must not touch is compared bit for bit. Norms are compared with torch's own to
1e-5 of themselves: float32 sums in another order.
"""

import dataclasses
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import guarded
import tiny
from eve_vlm.train import guards as guards_module
from eve_vlm.train.bad_steps import load_bad_step
from eve_vlm.train.collapse import BLOCK, PATIENCE, CollapseAlarm
from eve_vlm.train.gradients import GradientNorms, parameter_parts
from eve_vlm.train.guards import Guards
from eve_vlm.train.recipe import recipes_folder
from eve_vlm.train.run import train
from eve_vlm.train.sections import GuardsSection

SAME = 1e-5
SKIP = GuardsSection(bad_step="skip")
CPU = torch.device("cpu")


class Spoils(TrainerCallback):
    """Makes the gradient of one parameter NaN in some steps, and leaves the loss alone."""

    def __init__(self, parameter, steps):
        self.steps, self.now = steps, 0
        parameter.register_hook(lambda gradient: gradient * (math.nan if self.spoilt() else 1.0))

    def spoilt(self):
        return self.now in self.steps

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights_of(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def equal(some, others):
    return some.keys() == others.keys() and all(
        torch.equal(some[name], others[name]) for name in some
    )


# --- what is bad, and what is written -------------------------------------------------------------


def test_a_nan_in_a_picture_stops_the_run_before_the_weights_change(tmp_path):
    data = guarded.records(6)
    data[3] = guarded.with_nan_picture(data[3])
    trainer = guarded.trainer(tmp_path, data)
    trainer.add_callback(watch := guarded.Weights(2))
    text = tiny.refused(trainer.train, end=f"written to {tmp_path}/bad_steps/step-2-rank-0.")
    assert "The loss became nan by step 2; lower stage.learning_rates" in text
    assert "the records r2, r3," in text  # both rows of the micro-batch whose loss it is
    weights = weights_of(trainer)
    assert all(torch.equal(weights[name], watch.before[name]) for name in weights)


def test_what_is_written_is_what_was_read(tmp_path):
    """Tensors, ids, text; run again, the batch gives the loss that is no number."""
    data = guarded.records(6)
    data[3] = guarded.with_nan_picture(data[3])
    trainer = guarded.trainer(tmp_path, data, gradient_accumulation_steps=2, batch=1)
    tiny.refused(trainer.train)
    step = load_bad_step(tmp_path / "bad_steps" / "step-2-rank-0")
    assert len(step.batches) == 2
    for batch, record in zip(step.batches, data[2:4], strict=True):
        assert batch["input_ids"].tolist() == [record.input_ids.tolist()]
        assert batch["labels"].tolist() == [record.labels.tolist()]
        np.testing.assert_array_equal(batch["pixel_values"].numpy(), record.pixel_values)
    assert math.isnan(float(trainer.model(**step.batches[1])["loss"].detach()))
    assert math.isfinite(float(trainer.model(**step.batches[0])["loss"].detach()))
    said = step.records
    assert (said["step"], said["rank"], said["reason"]) == (2, 0, "loss")
    assert said["learning_rates"] == [1e-3, 1e-3] and said["loss"] == "nan"
    # Gradients of the good micro-batch are in the same sum, so every part is broken.
    assert set(said["gradient_norms"].values()) == {"nan"}
    first, second = said["micro_batches"]
    assert first["record_ids"] == [["r2"]] and second["record_ids"] == [["r3"]]
    assert first["loss"] == pytest.approx(said["running_mean"], rel=1) and second["loss"] == "nan"
    assert first["labels"] == int((data[2].labels != -100).sum())
    pieces = first["text"][0]
    learnt = [text for kind, text in pieces if kind == "learnt"]
    assert tiny.ANSWERS[2] in learnt[0] and tiny.QUESTIONS[2] in pieces[0][1]
    tokens = int((data[2].input_ids == 3).sum())
    assert f"<image>*{tokens}" in pieces[0][1]  # not so many times over


def test_a_folder_without_a_bad_step_is_refused(tmp_path):
    text = tiny.refused(lambda: load_bad_step(tmp_path))
    assert "holds no batch.safetensors" in text and "bad_steps/step-N-rank-R" in text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_weight_is_seen_in_the_loss(tmp_path, value):
    trainer = guarded.trainer(tmp_path, guarded.records(4))
    with torch.no_grad():
        next(trainer.model.model.multi_modal_projector.parameters()).view(-1)[0] = value
    assert "became nan by step 1" in tiny.refused(trainer.train)


def test_a_gradient_that_is_no_number_is_named_by_its_part(tmp_path):
    """Before clipping, which would spread it over all parts; the loss is finite all the while."""
    trainer = guarded.trainer(tmp_path, guarded.records(4))
    layer = trainer.model.model.language_model.layers[2].self_attn.q_proj.weight
    trainer.add_callback(Spoils(layer, [3]))
    text = tiny.refused(trainer.train)
    assert "The gradient of decoder_late became nan by step 3;" in text
    said = json.loads((tmp_path / "bad_steps/step-3-rank-0/records.json").read_text())
    finite = {name for name, norm in said["gradient_norms"].items() if norm != "nan"}
    assert said["reason"] == "gradient" and math.isfinite(said["loss"])
    assert finite == set(said["gradient_norms"]) - {"decoder_late"}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_without_a_label_is_bad(tmp_path, accumulation):
    """Beside another micro-batch too, where the loss is that of the other and looks fine."""
    data = guarded.records(4)
    data[1] = guarded.without_labels(data[1])
    trainer = guarded.trainer(tmp_path, data, batch=1, gradient_accumulation_steps=accumulation)
    text = tiny.refused(trainer.train)
    step = 2 // accumulation
    assert f"No label is left to learn in a micro-batch of step {step};" in text and "r1" in text


def test_a_row_without_a_label_beside_one_with_labels_is_none(tmp_path):
    data = guarded.records(4)
    data[1] = guarded.without_labels(data[1])
    guarded.trainer(tmp_path, data, batch=2).train()


class Shaken(TrainerCallback):
    """Weights of the head are many times as large during one step."""

    def __init__(self, model, step):
        self.head, self.step = model.lm_head.weight, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.kept = self.head.detach().clone()
            with torch.no_grad():
                self.head.mul_(20)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.head.copy_(self.kept)


@pytest.mark.parametrize("step", [9, 12])
def test_a_spike_is_found_once_there_is_a_mean(tmp_path, step, monkeypatch):
    monkeypatch.setattr(guards_module, "WARM_UP", 10)
    trainer = guarded.trainer(
        tmp_path, guarded.records(8), steps=14, guards=GuardsSection(bad_step="skip", spike=2.0)
    )
    trainer.add_callback(Shaken(trainer.model, step))
    trainer.train()
    if step <= 10:  # ten good steps are needed before
        assert trainer.guards.memory.skipped == {}
        return
    assert trainer.guards.memory.skipped == {"spike": 1}
    said = json.loads((tmp_path / f"bad_steps/step-{step}-rank-0/records.json").read_text())
    assert said["loss"] > 2 * said["running_mean"] and "(guards.spike is 2)" in said["message"]
    # What is skipped is not learnt to expect.
    assert trainer.guards.running_mean < said["running_mean"] * 1.05


def test_the_running_mean_is_that_of_the_losses(tmp_path):
    trainer = guarded.trainer(tmp_path, guarded.records(8), steps=12)
    trainer.train()
    losses = logged(trainer, "loss")
    factors = [0.98 ** (len(losses) - 1 - index) for index in range(len(losses))]
    mean = sum(factor * loss for factor, loss in zip(factors, losses, strict=True)) / sum(factors)
    assert trainer.guards.running_mean == pytest.approx(mean, rel=SAME)


# --- skipping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
@pytest.mark.parametrize("kind", ["picture", "gradient", "label"])
def test_a_skipped_step_leaves_weights_and_optimizer_bit_for_bit(tmp_path, kind, optimizer):
    """With moments and decay, which a gradient of zeros would move on; the rate goes on falling."""
    data = guarded.records(8)
    if kind != "gradient":
        spoil = guarded.with_nan_picture if kind == "picture" else guarded.without_labels
        data[4:6] = map(spoil, data[4:6])
    trainer = guarded.trainer(
        tmp_path, data, guards=SKIP, optim=optimizer, lr_scheduler_type="linear", max_grad_norm=1.0
    )
    if kind == "gradient":
        trainer.add_callback(Spoils(trainer.model.lm_head.weight, [3]))
    trainer.add_callback(third := guarded.Weights(3))
    trainer.add_callback(fourth := guarded.Weights(4))
    trainer.train()
    assert third.unchanged and third.rate_moved
    assert not fourth.unchanged
    reason = {"picture": "loss", "label": "no label"}.get(kind, kind)
    assert trainer.guards.memory.skipped == {reason: 1}
    assert logged(trainer, "skipped_steps") == [1, 1]
    assert all(bool(weight.isfinite().all()) for weight in weights_of(trainer).values())


def test_a_run_with_a_skipped_step_is_the_run_without_its_records(tmp_path):
    """Bit for bit, weights and moments, with a constant rate."""
    data = guarded.records(8)
    spoilt = [*data[:4], guarded.with_nan_picture(data[4]), data[5], *data[4:]]
    made = []
    for name, records, steps in (("spoilt", spoilt, 5), ("whole", data, 4)):
        trainer = guarded.trainer(tmp_path / name, records, steps=steps, guards=SKIP)
        trainer.train()
        made.append(trainer)
    assert made[0].guards.num_skipped == 1 and made[1].guards.num_skipped == 0
    assert equal(*map(weights_of, made))
    states = [trainer.optimizer.state_dict()["state"] for trainer in made]
    for index, state in states[1].items():
        assert equal(states[0][index], state)


def test_logs_are_of_the_good_steps(tmp_path):
    """Loss and terms are means over the steps that were made; an entry of skipped ones has none."""
    data = guarded.records(8)
    data[2] = guarded.with_nan_picture(data[2])
    each = guarded.trainer(tmp_path / "each", data, guards=SKIP)
    each.train()
    assert [entry["step"] for entry in each.state.log_history if "loss" in entry] == [1, 3, 4]
    pairs = guarded.trainer(tmp_path / "pairs", data, guards=SKIP, logging_steps=2)
    pairs.train()
    first, third, fourth = logged(each, "loss")
    assert logged(pairs, "loss") == pytest.approx([first, (third + fourth) / 2], rel=SAME)
    assert logged(pairs, "loss_lm") == pytest.approx(logged(pairs, "loss"), rel=SAME)


def test_more_skipped_steps_than_allowed_end_the_run(tmp_path):
    trainer = guarded.trainer(
        tmp_path, guarded.records(8), steps=9, guards=GuardsSection(bad_step="skip", max_skipped=2)
    )
    trainer.add_callback(Spoils(trainer.model.lm_head.weight, [2, 4, 5, 7]))
    text = tiny.refused(trainer.train)
    assert "3 steps had to be skipped (3 for its gradient), more than guards.max_skipped" in text
    assert sorted(path.name for path in (tmp_path / "bad_steps").iterdir()) == [
        f"step-{step}-rank-0" for step in (2, 4, 5)
    ]


def test_a_resumed_run_knows_what_was_before(tmp_path):
    """Counts, running mean and alarm are those of the run that was never stopped."""
    memories = {}
    for name in ("straight", "stopped"):
        for steps in (6,) if name == "straight" else (3, 6):
            trainer = guarded.trainer(
                tmp_path / name,
                guarded.records(2),  # the same in every step
                steps=6,
                guards=SKIP,
                save_strategy="steps",
                save_steps=3,
            )
            trainer.add_callback(Spoils(trainer.model.lm_head.weight, [2, 5]))
            if steps == 3:
                trainer.add_callback(Stops(3))
            last = tmp_path / name / "checkpoint-3"
            trainer.train(resume_from_checkpoint=str(last) if last.is_dir() else None)
        memories[name] = trainer.guards.memory
    assert memories["straight"].skipped == {"gradient": 2}
    assert memories["stopped"] == memories["straight"]


class Stops(TrainerCallback):
    """Ends a run behind a step, as a signal would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_steps_are_not_skipped_where_they_cannot_be(tmp_path):
    """DeepSpeed keeps gradients and makes the step itself, so a run can only stop there."""
    text = tiny.refused(lambda: Guards(SKIP, tmp_path, device=CPU, gradients=False))
    assert "guards.bad_step is skip" in text and "set it to stop" in text


def test_without_gradients_the_loss_is_watched_still(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="eve_vlm"):
        guards = Guards(GuardsSection(), tmp_path, device=CPU, gradients=False)
    assert caplog.text.count("Gradients are not watched by part") == 1
    model, step = tiny.model(), {"step": 7, "learning_rates": [1e-3]}
    batch = guarded.one_batch() | {"record_ids": [["a"], ["b"]]}
    guards.begin_step([batch])
    guards.after_loss(torch.tensor(1.0))
    assert guards.may_step(model, **step) and guards.norms == {}
    guards.after_engine_step(3.0, **step)
    text = tiny.refused(lambda: guards.after_engine_step(math.nan, **step))
    assert "DeepSpeed has changed the weights" in text and "the records a, b," in text
    assert load_bad_step(tmp_path / "bad_steps/step-7-rank-0").records["reason"] == "gradient"
    guards.begin_step([batch])
    guards.after_loss(torch.tensor(math.inf))
    assert "The loss became inf by step 7" in tiny.refused(lambda: guards.may_step(model, **step))


def test_a_recipe_says_what_is_done(tmp_path):
    """Through `eve train`'s own function: a rate that no model survives."""
    data = tiny.recipe_data(tiny.llava_file(tmp_path / "data"), tmp_path / "run")
    recipe = tiny.recipe(
        tmp_path / "recipe.yaml",
        data,
        "stage.learning_rates={'*': 1.0e+25}",
        "guards.bad_step=skip",
        "guards.max_skipped=1",
    )
    text = tiny.refused(lambda: train(recipe))
    assert "guards.max_skipped allows (1)" in text
    folder = sorted((tmp_path / "run" / "bad_steps").iterdir())[0]
    said = load_bad_step(folder).records
    assert said["micro_batches"][0]["record_ids"] and said["micro_batches"][0]["text"]


# --- gradients by part ----------------------------------------------------------------------------


def test_parts_are_all_of_the_model():
    model = tiny.model(tiny.config(aligned=True))
    parts = parameter_parts(model)
    assert list(parts) == [
        *("patch_embedding", "projector", "aligner", "embeddings"),
        *("decoder_early", "decoder_middle", "decoder_late", "head", "rest"),
    ]
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {part: {names[item] for item in items} for part, items in parts.items()}
    assert found["rest"] == {"model.language_model.norm.weight"}
    assert found["head"] == {"lm_head.weight"}
    for number, part in enumerate(("decoder_early", "decoder_middle", "decoder_late")):
        assert {name.split(".")[3] for name in found[part]} == {str(number)}
    assert sum(map(len, parts.values())) == len(names) == len(set().union(*found.values()))


def test_tied_and_frozen_weights():
    model = tiny.model(tiny.config(tie_word_embeddings=True))
    model.model.vision_tower.requires_grad_(False)
    parts = parameter_parts(model)
    assert "patch_embedding" not in parts and "head" not in parts and "embeddings" in parts


def test_norms_are_torchs_own(tmp_path):
    model = tiny.model(tiny.config(aligned=True)).train()
    model(**guarded.one_batch())["loss"].backward()
    watch = GradientNorms(model)
    norms = dict(zip(watch.names, watch.share(CPU).sqrt().tolist(), strict=True))
    for name, parameters in parameter_parts(model).items():
        expected = torch.cat([item.grad.flatten() for item in parameters]).double().norm()
        assert norms[name] == pytest.approx(float(expected), rel=SAME)
        assert float(expected) > 0


def test_norms_are_logged_as_they_were_before_clipping(tmp_path):
    trainer = guarded.trainer(tmp_path, guarded.records(4), max_grad_norm=1e-3)
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            parts = [value for name, value in entry.items() if name.startswith("grad_norm_")]
            assert len(parts) == 8  # no aligner here
            assert math.hypot(*parts) == pytest.approx(float(entry["grad_norm"]), rel=SAME)
            assert entry["grad_norm"] > 1e-3


# --- two processes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes saw, and their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).parent / "two_ranks_guards.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "--master-port", "29517", str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,  # seconds; a hang must not block the suite
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_all_processes_skip_what_one_of_them_sees(two_ranks):
    folder, seen = two_ranks
    for rank, said in enumerate(item["skip"] for item in seen):
        assert said["skipped"] == {"loss": 1}
        assert said["unchanged"] and said["equal"] and said["finite"]
        step = load_bad_step(folder / "skip" / "bad_steps" / f"step-2-rank-{rank}")
        (micro_batch,) = step.records["micro_batches"]
        assert micro_batch["record_ids"] == [[f"r{2 + rank}"]]
        assert math.isfinite(float(micro_batch["loss"])) == (rank == 0)
    assert seen[0]["skip"] == seen[1]["skip"]


def test_all_processes_stop_and_point_at_the_one(two_ranks):
    folder, (first, second) = two_ranks
    bad = folder / "stop" / "bad_steps" / "step-2-rank-1"
    assert first["stop"].endswith(f"look at the records of process 1, written to {bad}.")
    assert second["stop"].endswith(f"look at the records r3, written to {bad}.")


def test_norms_of_shards_are_those_of_the_whole(two_ranks):
    """FSDP2: rows of weights by process, some of them with none."""
    for said in (item["norms"] for item in two_ranks[1]):
        assert said["sharded"] == pytest.approx(said["whole"], rel=SAME)
    model = tiny.model(tiny.config(aligned=True)).train()
    model(**guarded.one_batch())["loss"].backward()
    watch = GradientNorms(model)
    alone = dict(zip(watch.names, watch.share(CPU).sqrt().tolist(), strict=True))
    assert two_ranks[1][0]["norms"]["sharded"] == pytest.approx(alone, rel=SAME)


# --- collapse -------------------------------------------------------------------------------------

# Loss in the stage pretrain by thousands of steps, read off figure 5 of the paper.
FROM_SCRATCH = (
    *((0, 7.1), (3.0, 1.4), (3.45, 6.2), (3.9, 4.1), (5.0, 2.7), (8.0, 2.3), (11.9, 2.0)),
    *((12.0, 4.0), (12.5, 7.3), (13.0, 3.4), (14.0, 6.0), (16.0, 4.5)),
)
WITHOUT_PREALIGN = (
    *((0, 4.7), (0.3, 1.1), (5.0, 0.75), (8.0, 0.65), (10.8, 0.55)),
    *((10.85, 1.1), (11.0, 0.8), (16.0, 0.8)),
)
WITH_PREALIGN = ((0, 1.2), (2.0, 0.83), (5.0, 0.70), (8.0, 0.57), (11.0, 0.52), (16.0, 0.47))


def heard(points, *, noise=0.0, seed=0, steps=16000):
    """The steps at which an alarm rings along a curve, with noise that is a share of the loss."""
    alarm, rng = CollapseAlarm(), np.random.default_rng(seed)
    thousands, values = zip(*points, strict=True)
    losses = np.interp(np.arange(1, steps + 1) / 1000, thousands, values)
    losses *= 1 + noise * rng.standard_normal(steps)
    return [
        seen
        for step, loss in enumerate(losses.tolist(), start=1)
        if (seen := alarm.update(step, loss)) is not None
    ]


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15])
@pytest.mark.parametrize(
    ("points", "jump"), [(WITHOUT_PREALIGN, 10800), (FROM_SCRATCH, 3000)], ids=["no stage 1", "new"]
)
def test_both_collapses_of_the_paper_are_heard(points, jump, noise):
    """Once, and within three blocks of 100 steps of where the loss begins to rise."""
    (seen,) = heard(points, noise=noise)
    assert jump < seen.step <= jump + (PATIENCE + 1) * BLOCK
    assert seen.after > 1.2 * seen.before


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15, 0.5])
def test_the_good_run_of_the_paper_is_not(noise):
    assert [heard(WITH_PREALIGN, noise=noise, seed=seed) for seed in range(3)] == [[]] * 3


def test_a_spike_that_heals_is_no_collapse():
    points = ((0, 2.0), (1.0, 0.8), (1.001, 8.0), (1.1, 0.8), (2.0, 0.75))
    assert heard(points, steps=2000) == []


def test_a_loss_near_zero_that_wavers_is_no_collapse():
    """From 0.005 to 0.007, 1.4 times, is less than one step's noise."""
    rng = np.random.default_rng(0)
    alarm = CollapseAlarm()
    for step in range(1, 3001):
        level = 0.005 if step % 1000 < 500 else 0.007
        assert alarm.update(step, level * rng.exponential()) is None


def test_the_recorded_tiny_curves_are_no_collapse():
    file = recipes_folder() / "tiny" / "curves.json"
    recipes = json.loads(file.read_text(encoding="utf-8"))["recipes"]
    assert len(recipes) == 4
    for curve in recipes.values():
        every = curve["steps"][1] - curve["steps"][0]
        for run in curve["runs"]:
            alarm = CollapseAlarm()
            for step, loss in zip(curve["steps"], run["terms"]["loss"], strict=True):
                assert alarm.update(step, loss, steps=every) is None


def test_an_alarm_that_was_saved_goes_on():
    losses = [1.0] * 250 + [2.0] * 300
    whole, saved = CollapseAlarm(), CollapseAlarm()
    rang = []
    for step, loss in enumerate(losses, start=1):
        saved = CollapseAlarm.from_dict(json.loads(json.dumps(dataclasses.asdict(saved))))
        rang.append((whole.update(step, loss), saved.update(step, loss)))
        assert whole == saved
    seen = [pair for pair in rang if pair != (None, None)]
    assert len(seen) == 1 and seen[0][0] == seen[0][1]
    assert (seen[0][0].since, seen[0][0].before, seen[0][0].after) == (201, 1.0, 1.75)


@pytest.mark.parametrize("policy", ["warn", "stop", "ignore"])
def test_what_is_done_about_a_collapse(tmp_path, policy, caplog):
    guards = Guards(GuardsSection(collapse=policy), tmp_path, device=CPU, gradients=False)
    batch = {"labels": torch.ones(1, 2)}

    def run():
        for step in range(1, 801):
            guards.begin_step([batch])
            guards.after_loss(torch.tensor(0.55 if step <= 300 else 0.8))
            guards.may_step(torch.nn.Module(), step=step, learning_rates=[])

    with caplog.at_level(logging.WARNING, logger="eve_vlm"):
        text = tiny.refused(run) if policy == "stop" else run() or caplog.text
    count = 0 if policy == "ignore" else 1
    assert text.count("stays at 0.8 since about step 301, 1.45 times the 0.55") == count
    assert text.count("train stage prealign before, or lower stage.learning_rates") == count
