"""Loading model folders: whatever is missing, surplus or foreign is listed, never filled in. Exact."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from eve_vlm import EveForConditionalGeneration, EveForPreTraining
from eve_vlm.errors import check_loaded
from eve_vlm.loading import load_model, load_processor, require_model_folder


@pytest.fixture
def folder(tmp_path, model, processor):
    """A saved model that a test may spoil."""
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


refused = partial(tiny.refused, end=".")


def test_a_whole_folder_loads(folder, model):
    loaded = load_model(folder)
    assert type(loaded) is EveForConditionalGeneration
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


def test_missing_weights_are_listed(folder):
    gone = "model.vision_tower.class_embedding"
    change_weights(folder, lambda weights: weights.pop(gone))
    text = refused(lambda: load_model(folder))
    assert str(folder) in text and "lacks 1 weights" in text and gone in text


def test_surplus_weights_are_listed(folder):
    change_weights(folder, lambda weights: weights.update({"model.extra.weight": torch.ones(2)}))
    text = refused(lambda: load_model(folder))
    assert "has surplus 1 weights (model.extra.weight)" in text


def test_long_lists_are_cut_short():
    names = [f"w{index}" for index in range(9)]
    text = refused(lambda: check_loaded("here", names, []))
    assert "lacks 9 weights (w0, w1, w2, w3, w4, w5 and 3 more)" in text


def test_weights_of_another_shape_are_refused(folder):
    def change(weights):
        weights["lm_head.weight"] = weights["lm_head.weight"][:10].clone()

    change_weights(folder, change)
    text = refused(lambda: load_model(folder))
    assert "1 weights" in text and "another shape" in text and "lm_head.weight" in text


def test_only_named_weights_may_be_new(folder):
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    load_model(folder, new=[r"lm_head\."])
    assert "lm_head.weight" in refused(lambda: load_model(folder, new=[r"aligner\."]))


def test_a_training_checkpoint_loads_both_ways(tmp_path):
    of = tiny.config(aligned=True)
    made = tiny.model(of)
    made.save_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is EveForConditionalGeneration
    again = load_model(tmp_path, config=of)
    assert type(again) is EveForPreTraining
    assert torch.equal(again.aligner.input.weight, made.aligner.input.weight)


def test_an_aligner_is_new_only_where_that_is_said(folder):
    of = tiny.config(aligned=True)
    text = refused(lambda: load_model(folder, config=of))
    assert "aligner." in text
    assert type(load_model(folder, config=of, new=[r"aligner\."])) is EveForPreTraining


def test_dtype_and_attention_are_chosen(folder):
    loaded = load_model(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.language_model.config._attn_implementation == "eager"
    loaded.save_pretrained(folder)
    assert {weight.dtype for weight in load_model(folder).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["nowhere", "empty", "file", "other model", "broken json"])
def test_folders_that_hold_no_model(tmp_path, model, kind):
    folder = tmp_path / "folder"
    if kind == "file":
        folder.write_text("x")
    elif kind != "nowhere":
        folder.mkdir()
    if kind == "other model":
        model.model.language_model.save_pretrained(folder)
    if kind == "broken json":
        (folder / "config.json").write_text("{")
    text = refused(lambda: load_model(folder))
    assert str(folder) in text
    if kind == "other model":
        assert "'llama', not an EVE model" in text


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert str(folder) in refused(lambda: load_model(folder))


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    assert str(folder) in refused(lambda: load_model(folder))


def test_require_model_folder(folder):
    assert require_model_folder(str(folder)) == folder


def test_a_processor_takes_other_picture_sizes(folder, processor):
    again = load_processor(folder)
    assert again.image_processor.grid_of(20, 32) == processor.image_processor.grid_of(20, 32)
    larger = load_processor(folder, longest_edge=64, size_multiple=16)
    assert larger.image_processor.grid_of(64, 64) == (64, 64, 8, 8)
    assert larger.image_processor(tiny.picture(64, 64))["image_grid_thw"].tolist() == [[1, 16, 16]]
    assert "longest_edge (60)" in refused(lambda: load_processor(folder, longest_edge=60))


def test_a_folder_without_a_processor(folder):
    for name in ("tokenizer.json", "processor_config.json"):
        (folder / name).unlink()
    assert str(folder) in refused(lambda: load_processor(folder))


def test_a_changed_configuration_is_seen(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = tiny.LAYERS + 1
    (folder / "config.json").write_text(json.dumps(config))
    assert f"layers.{tiny.LAYERS}." in refused(lambda: load_model(folder))
