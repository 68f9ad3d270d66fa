"""The recipes of eve-small and the command that runs them, with a tiny model and few steps.

One thing a reader would get wrong: the tiny run keeps the recipes' own settings (adapters, packed
rows, alignment, learning rates) and replaces only what makes them large: base, sources, sizes,
devices.
"""

import json
import sys
from pathlib import Path

import pytest
import tests.tiny as tiny
from typer.testing import CliRunner

from eve_vlm import small
from eve_vlm.cli import app
from eve_vlm.data.encode import Encoder
from eve_vlm.data.lengths import measure
from eve_vlm.data.sources.made import made_source
from eve_vlm.data.sources.source import outline_of
from eve_vlm.loading import load_model
from eve_vlm.small import merged_folder, stage_recipes, train_small
from eve_vlm.train.recipe import load_recipe

RECIPES = [load_recipe(f"eve_small/{name}") for name in small.STAGES]


def test_stages_follow_one_another():
    start = "runs/eve-small/base"
    for recipe, made in zip(RECIPES, stage_recipes(Path("runs/eve-small")), strict=True):
        assert recipe == made  # the command changes nothing of the shipped ones
        assert recipe.model.init_from == start
        assert recipe.model.vision == RECIPES[0].model.vision
        assert recipe.model.image == RECIPES[0].model.image
        start = str(merged_folder(recipe))
    assert [recipe.stage.name for recipe in RECIPES] == ["prealign", "pretrain", "finetune"]


def test_the_decoder_learns_through_adapters_alone():
    first, *others = RECIPES
    assert first.lora is None and not any("language" in glob for glob in first.stage.trainable)
    assert all(recipe.lora.target_modules is None for recipe in others)
    assert [recipe.stage.alignment is not None for recipe in RECIPES] == [True, True, False]


def test_nothing_held_out_is_trained_on():
    options = [source.options for recipe in RECIPES for source in recipe.data.sources]
    assert all(one.get("split", "train") == "train" for one in options)
    assert not any("held_out" in str(one) for one in options)


def test_steps_overrides_and_conversations_reach_their_stage(tmp_path):
    recipes = stage_recipes(
        tmp_path, steps_scale=0.5, overrides=["seed=7", "finetune:training.max_steps=9"]
    )
    steps = [recipe.training["max_steps"] for recipe in recipes]
    assert steps[0] == RECIPES[0].training["max_steps"] // 2 and steps[2] == 9
    assert {recipe.seed for recipe in recipes} == {7}
    (texts,) = [source for source in recipes[2].data.sources if source.kind == "messages"]
    assert texts.path == str(tmp_path / small.TEXTS)
    assert "no stage tune" in tiny.refused(lambda: stage_recipes(tmp_path, overrides=["tune:a=1"]))
    assert "above 0" in tiny.refused(lambda: stage_recipes(tmp_path, steps_scale=0))


def test_what_is_missing_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("EVE_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "run"
    done = CliRunner().invoke(app, ["small", "train", "--dry-run", "--output", str(output)])
    assert done.exit_code == 0
    assert all(f"eve assets fetch {name}" in done.stdout for name in ("smollm2", "openclipart"))
    text = tiny.refused(lambda: train_small(output))
    assert "eve assets fetch smollm2" in text and not output.exists()


# --- a tiny run -----------------------------------------------------------------------------------

SCENES = (
    "data.sources=[{kind: scenes, name: scenes, weight: 1.0, options: {size: 24, families: "
    "{FAMILIES}, settings: {canvases: [[56, 56]], single_canvases: [[28, 28]]}}}]"
)


@pytest.fixture
def overrides(tmp_path):
    teacher = tiny.teacher_folder(tmp_path / "teacher")
    sizes = {
        "patch_size": tiny.PATCH,
        "merge_size": tiny.MERGE,
        "hidden_size": tiny.VISION_WIDTH,
        "num_attention_heads": 8,
    }
    return [
        "model.text_config=null",
        *(f"model.vision.{name}={value}" for name, value in sizes.items()),
        f"model.image.longest_edge={tiny.EDGE}",
        f"model.image.size_multiple={tiny.MULTIPLE}",
        "data.max_length=128",
        "data.packing.tokens=256",
        *(f"training.{name}=false" for name in ("bf16", "dataloader_pin_memory")),
        "training.tf32=null",
        "training.dataloader_num_workers=0",
        "training.dataloader_prefetch_factor=null",
        "training.use_cpu=true",
        "training.logging_steps=1",
        "training.max_steps=2",
        *(
            f"{stage}:stage.alignment.{key}={value}"
            for stage in ("prealign", "pretrain")
            for key, value in (("teacher", json.dumps(str(teacher))), ("tap_every", 1))
        ),
        *(
            f"{stage}:lora.{key}=2"
            for stage in ("pretrain", "finetune")
            for key in ("rank", "alpha")
        ),
        *(
            f"{stage}:{SCENES.replace('FAMILIES', families)}"
            for stage, families in (
                ("prealign", "caption_list: 1"),
                ("pretrain", "caption_list: 1"),
                ("finetune", "presence: 1"),
            )
        ),
    ]


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "given"
    tiny.model(tiny.config(tie_word_embeddings=True)).save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


def test_one_command_trains_merges_and_goes_on(tmp_path, monkeypatch, base, overrides):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no curves: 1.3 s for each stage
    monkeypatch.setenv("EVE_CACHE", str(tmp_path / "cache"))
    output, said = tmp_path / "run", []
    model = train_small(output, overrides=overrides, base=base, say=said.append)
    assert model == output / "finetune-merged"
    start, end = (load_model(one).state_dict() for one in (base, model))
    changed = {name for name in start if not start[name].equal(end[name])}
    # All picture parts and all linear layers of the decoder, and nothing else of it.
    linear = {name for name in start if name.endswith("_proj.weight")}
    pictures = {name for name in start if not name.startswith(("model.language_model", "lm_head"))}
    assert linear <= changed <= linear | pictures and len(changed & pictures) > 5
    for stage in ("prealign", "pretrain"):
        run = json.loads((output / stage / "run.json").read_text(encoding="utf-8"))
        assert run["steps"] == 2 and all(entry["loss_alignment"] > 0 for entry in run["losses"])

    said.clear()
    assert train_small(output, overrides=overrides, base=base, say=said.append) == model
    assert said == [
        f"{name}: finished before, kept" for name in ("prealign", "pretrain", "finetune")
    ]

    # A stage that is trained anew does not go with those that were trained from the old one.
    for file in (output / "prealign").iterdir():
        file.unlink()
    text = tiny.refused(lambda: train_small(output, overrides=overrides, base=base))
    assert f"{output / 'pretrain'} was trained from another {output / 'prealign'}" in text


# --- sizes without drawing ------------------------------------------------------------------------

DRAWN = [
    ("collages", {"styles": ["pictograms"], "families": {"presence": 1, "caption_list": 1}}),
    ("rendered", {"what": "documents", "families": {"questions": 1, "transcript": 1}}),
    ("rendered", {"what": "charts", "families": {"questions": 1, "transcript": 1}}),
]


@pytest.mark.parametrize(("kind", "options"), DRAWN)
def test_measuring_draws_nothing_and_is_right(kind, options, monkeypatch):
    source = made_source(kind, options | {"size": 6}, seed=0, name="drawn")
    encoder = Encoder(tiny.processor(), format="chat", max_length=4096)
    expected = [encoder.size(source[index]) for index in range(6)]
    assert [source[index].messages for index in range(6)] == [
        outline_of(source, index).messages for index in range(6)
    ]

    def drawn(*arguments):
        raise AssertionError("a picture was drawn")

    monkeypatch.setattr("eve_vlm.data.rendered.source.kept_picture", drawn)
    monkeypatch.setattr("eve_vlm.data.scenes.SceneDataset.render", drawn)
    lengths = measure(source, encoder)
    assert lengths.tokens.tolist() == [size.tokens for size in expected]
    assert lengths.patches.tolist() == [size.patches for size in expected]
