"""Whole runs over recorded layers: they learn what plain runs learn, and go on as if never stopped.

Without a GPU `recordings.stand_in` plays, with every habit of a recording.  Against plain runs 1e-4
for losses of 3 to 6 and weights that moved by 1e-2: float32 sums over rows of full length, which
the optimizer magnifies.  Against an uninterrupted run of the same kind: bit for bit.
"""

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import tiny
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.train import run as run_module
from eve_vlm.train.recorded_layers import RecordedLayers, layers_for, recorded_layers
from eve_vlm.train.run import train
from eve_vlm.train.sections import Recipe
from eve_vlm.train.trainer import EveTrainer
from recordings import stand_in

PACKED = "data.packing={tokens: 320, patches: 300, window: 8}"
SAME = 1e-4
STEPS = ("training.max_steps=6", "training.save_strategy=steps", "training.save_steps=2")
ASKED = "samples={every: 2, number: 2, max_new_tokens: 4}"


pytestmark = pytest.mark.usefixtures("no_drawings")  # one at each checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a teacher, and a base for adapters."""
    made = tmp_path_factory.mktemp("recorded")
    tiny.llava_file(made / "data", records=20)
    tiny.teacher_folder(made / "teacher")
    tiny.model().save_pretrained(made / "base")
    tiny.processor().save_pretrained(made / "base")
    return made


@pytest.fixture
def make(tmp_path, folder):
    def made(*overrides, name="run", adapters=False, aligned=False, stage=None):
        keys = tiny.recipe_data(
            folder / "data" / "data.json",
            tmp_path / name,
            teacher=folder / "teacher" if aligned else None,
            init_from=folder / "base" if adapters else None,
        )
        if adapters:
            keys["lora"] = {"rank": 4, "alpha": 8, "dropout": 0.1}
        keys["training"]["per_device_train_batch_size"] = 1
        keys["stage"] |= stage or {}
        return tiny.recipe(tmp_path / f"{name}.yaml", keys, PACKED, *STEPS, *overrides)

    return made


@pytest.fixture
def recorded(monkeypatch) -> Iterator[list[RecordedLayers]]:
    """From here on runs go over recordings; these are they."""
    made: list[RecordedLayers] = []

    class Kept:
        def __init__(self, recipe: Recipe, model: EveForConditionalGeneration, arguments: object):
            assert recipe.data.packing is not None
            decoder, tokens = model.model.language_model, recipe.data.packing.tokens
            self.manager = recorded_layers(decoder, tokens, record=stand_in)

        def __enter__(self) -> RecordedLayers:
            made.append(self.manager.__enter__())
            return made[-1]

        def __exit__(self, *error: object) -> None:
            self.manager.__exit__(*error)

    monkeypatch.setattr(run_module, "layers_for", Kept)
    return made


def weights(folder):
    names = ("model.safetensors", "adapter_model.safetensors")
    return load_file(next(folder / name for name in names if (folder / name).is_file()))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("stage", [None, {"trainable": ["model.vision_tower.*", "model.multi*"]}])
def test_a_recorded_run_learns_what_a_plain_one_learns(
    make, tmp_path, monkeypatch, request, aligned, stage
):
    """With taps and a teacher, whole or with a frozen decoder, and asked in between."""
    if stage and aligned:
        stage = stage | {"trainable": [*stage["trainable"], "aligner.*"]}
    plain = train(make(ASKED, aligned=aligned, stage=stage, name="plain"))
    made = request.getfixturevalue("recorded")
    found = train(make(ASKED, aligned=aligned, stage=stage))
    assert [(one.played, one.passed) for one in made] == [(6, 0)]
    terms = ("loss_lm", "loss_alignment") if aligned else ("loss_lm",)
    for ours, theirs in zip(found.losses, plain.losses, strict=True):
        for term in terms:
            assert ours[term] == pytest.approx(theirs[term], abs=SAME)
    assert found.losses[0]["loss_lm"] != pytest.approx(found.losses[-1]["loss_lm"], abs=100 * SAME)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=SAME, msg=name)
    answers = [(tmp_path / name / "samples.jsonl").read_text() for name in ("run", "plain")]
    assert answers[0] == answers[1]


class Stopped(BaseException):
    """As when the machine is switched off."""


@pytest.mark.parametrize("adapters", [False, True])
def test_a_recorded_run_goes_on_as_if_never_stopped(
    make, tmp_path, monkeypatch, recorded, adapters
):
    """Its weights are loaded into what was recorded before; adapters with dropout."""
    whole = train(make(name="whole", adapters=adapters))
    stopped, plain = make(name="stopped", adapters=adapters), EveTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Stopped
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(EveTrainer, "training_step", step)
        train(stopped)
    torch.manual_seed(1234)
    resumed = train(stopped)
    assert [one.played for one in recorded] == [6, 3, 4]
    assert [one["loss"] for one in resumed.losses] == [one["loss"] for one in whole.losses]
    ours, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_skipped_step_leaves_no_gradient(make, tmp_path, monkeypatch, recorded):
    """The guards drop the gradients of a bad step, so the next one finds an empty place."""
    plain = EveTrainer.compute_loss

    def loss(self, *args, **kwargs):
        made = plain(self, *args, **kwargs)
        return made * torch.nan if self.state.global_step == 2 else made

    monkeypatch.setattr(EveTrainer, "compute_loss", loss)
    result = train(make("guards.bad_step=skip"))
    assert recorded[0].played == 6 and result.losses[-1]["skipped_steps"] == 1
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "run").values())


# --- what cannot be recorded ----------------------------------------------------------------------

RECORDED = ("model.record_layers=true", "training.bf16=true", "training.use_cpu=false")


@pytest.mark.parametrize(
    ("override", "needs"),
    [
        ("data.packing=null", "data.packing"),
        ("training.per_device_train_batch_size=2", "training.per_device_train_batch_size: 1"),
        ("training.gradient_accumulation_steps=2", "training.gradient_accumulation_steps: 1"),
        ("training.gradient_checkpointing=true", "training.gradient_checkpointing: false"),
        ("training.torch_compile=true", "training.torch_compile: false"),
        ("training.bf16=false", "training.bf16: true"),
        ("model.attn_implementation=eager", "model.attn_implementation: sdpa"),
        ("devices.strategy=fsdp2", "devices.strategy: ddp"),
        ("lora={rank: 4, alpha: 8, quantize: int8}", "lora.quantize: null"),
    ],
)
def test_recipes_that_cannot_be_recorded_are_refused(make, override, needs):
    adapters = override.startswith("lora")
    assert make(*RECORDED, adapters=adapters).model.record_layers
    text = tiny.refused(lambda: make(*RECORDED, override, adapters=adapters))
    assert f"needs {needs}" in text


def test_without_a_gpu_of_its_own_a_run_is_refused(make, monkeypatch):
    recipe = make(*RECORDED)
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none")
    text = tiny.refused(lambda: layers_for(recipe, tiny.model(), arguments))
    assert "0 GPUs in each of 1 processes" in text
