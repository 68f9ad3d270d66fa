"""`eve inspect` against what it tells of: built models, real pictures, saved files, drawn pixels.

Counts are compared with a second count on a model in memory or with the published numbers, tokens
with what the processor really makes of a picture, and drawings pixel by pixel. One thing a reader
would get wrong: the expected values never come from the functions under test.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import published
import tiny
from eve_vlm import EveConfig, EveImageProcessor
from eve_vlm.checkpoint_files import WeightReader
from eve_vlm.cli import app
from eve_vlm.inspection.differences import collapsed, compare
from eve_vlm.inspection.grid_picture import DARK, LIGHT, draw_grid, save_grid, token_index
from eve_vlm.inspection.subjects import inspect, kind_of, parse_size, picture_settings
from eve_vlm.inspection.text import differences_json, differences_text, facts_json, facts_text
from tiny import refused

SHIPPED = ("eve_7b/1_prealign", "eve_7b/2_pretrain", "eve_7b/3_finetune", "eve_7b/3_finetune_hd")


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, processor):
    """A folder from training: the model with its aligner, and the processor."""
    folder = tmp_path_factory.mktemp("aligned")
    tiny.model(tiny.config(aligned=True)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["bin", "safetensors"])
def official(request, tmp_path_factory):
    """(folder, weights): a tiny checkpoint in the published layout, three shards, two teachers."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "teacher").mkdir()
    (folder / "teacher" / "config.json").write_text('{"hidden_size": 8}', encoding="utf-8")
    config = published.tiny_config(mm_vision_tower_clip=str(folder / "teacher"))
    weights = published.tiny_weights(config, teacher=8)
    return published.write(folder / "eve", config, weights, kind=request.param), weights


def run(*arguments: str):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


# --- what is meant --------------------------------------------------------------------------------


def test_kinds(saved_model, tmp_path, monkeypatch):
    tiny.picture(20, 30).save(tmp_path / "cat.png")
    tiny.picture(20, 30).save(tmp_path / "no_ending", format="PNG")
    assert kind_of(str(saved_model)) == "model"
    assert kind_of("BAAI/EVE-7B-v1.0") == "model"
    assert kind_of(str(saved_model / "config.json")) == "config"
    assert kind_of("tiny/1_prealign") == kind_of("recipes/tiny/1_prealign.yaml") == "recipe"
    assert kind_of(str(tmp_path / "cat.png")) == kind_of(str(tmp_path / "no_ending")) == "picture"
    assert kind_of("640x480") == "size"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "640x480").write_bytes(b"")
    assert kind_of("640x480") == "picture"  # what is there wins over how it is written


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing-here", "is not here"),
        ("tiny/1_prealing.yaml", "no such recipe"),
        ("cat.png", "is not a file"),
        ("0x480", "no picture size"),
        ("empty", "holds no model"),
        ("text.txt", "not a picture"),
        ("weights.bin", "file of weights"),
        ("cut.png", "damaged or cut short"),
        ("list.json", "no table of settings"),
        ("llama.json", "not an EVE model"),
    ],
)
def test_what_cannot_be_looked_at_is_said_in_a_sentence(tmp_path, monkeypatch, what, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello", encoding="utf-8")
    (tmp_path / "weights.bin").write_bytes(b"0")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "llama.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    tiny.picture(90, 90).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    assert said in refused(lambda: inspect(what))


@pytest.mark.parametrize("text", ["640", "640x", "x480", "640 x 480", "0x1", "-1x2", "axb"])
def test_sizes_that_are_none(text):
    assert "640x480" in refused(lambda: parse_size(text))


def test_options_that_do_not_fit_are_refused(saved_model):
    assert "--model" in refused(lambda: inspect(str(saved_model), models=["672"]))
    assert "--size" in refused(lambda: inspect("640x480", sizes=["2x2"]))
    for arguments in (
        (saved_model, "--weights"),
        (saved_model, "--out", "grid.png"),
        (saved_model, saved_model, "--shapes"),
        (saved_model, saved_model, "--out", "grid.png"),
        ("640x480", "--shapes"),
        ("1x1", "2x2", "3x3"),
        ("640x480", "tiny/1_prealign"),
        ("tiny/1_prealign", "tiny/1_prealign", "--weights"),
    ):
        result = run(*arguments)
        assert isinstance(result.exception, ValueError), arguments
        assert "\n" not in str(result.exception)


# --- models ---------------------------------------------------------------------------------------


def counted(model) -> dict[str, int]:
    """Parameters by the first words of their names, a second way to count."""
    return {
        key: sum(p.numel() for name, p in model.named_parameters() if name.startswith(key))
        for key in (
            "model.vision_tower",
            "model.multi_modal",
            "model.language",
            "lm_head",
            "aligner",
        )
    }


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "olmo2", "smollm3"])
@pytest.mark.parametrize("tied", [False, True])
def test_parts_are_the_models_own_parameters(kind, tied, tmp_path, processor):
    model = tiny.model(tiny.config(model_type=kind, tie_word_embeddings=tied, aligned=True))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    facts = inspect(str(tmp_path))
    sizes = {part.name: part.parameters for part in facts.parts}
    by_hand = counted(model)
    assert facts.parameters == sum(p.numel() for p in model.parameters()) == sum(by_hand.values())
    assert sizes["aligner"] == by_hand["aligner"]
    assert sizes["projector"] == by_hand["model.multi_modal"]
    assert sizes.get("language head", 0) == by_hand["lm_head"]
    assert ("language head" in sizes) is not tied and bool(facts.tied) is tied
    assert sizes["word embedding"] == 300 * tiny.WIDTH
    layers = model.model.language_model.layers
    assert sizes["decoder layers"] == sum(p.numel() for p in layers.parameters())
    # float32 everywhere, so the file holds four bytes a number and a header.
    stored = load_file(tmp_path / "model.safetensors")
    assert facts.bytes == sum(weight.nbytes for weight in stored.values())
    assert facts.weights.missing == facts.weights.unexpected == facts.weights.other_shape == ()


def test_the_published_7b_by_its_configuration_alone(tmp_path):
    flat = published.config_7b("BAAI/EVE-7B-HD-v1.0")
    (tmp_path / "config.json").write_text(json.dumps(flat), encoding="utf-8")
    for what in (tmp_path, tmp_path / "config.json"):
        facts = inspect(str(what))
        sizes = {part.name: part.parameters for part in facts.parts}
        aligner = sizes.pop("aligner")
        assert sum(sizes.values()) == 6_768_398_336 and aligner == 43_067_392
        own = ("patch projection", "merge attention", "class attention", "projector")
        assert sum(sizes[name] for name in own) + 2 * 1024 == 29_982_720
        assert facts.bytes == 2 * facts.parameters  # bfloat16
        assert "no row in the embedding" in facts_text(facts)
    text = facts_text(inspect(str(tmp_path)))
    assert "6,768,398,336" in text and "29,982,720" in text and "not on this machine" in text
    hd = next(fact for fact in inspect(str(tmp_path / "config.json")).tokens if fact.width == 640)
    assert (hd.rows, hd.cols, hd.tokens, hd.context) == (36, 48, 1 + 36 * 49, 4096)


def test_a_published_checkpoint(official):
    folder, weights = official
    facts = inspect(str(folder))
    names = [part for part in weights if ".vision_clip." in part or ".clip_layer." in part]
    names.append("model.layers.0.self_attn.rotary_emb.inv_freq")
    kept = [weight for name, weight in weights.items() if name not in names]
    assert facts.kind == "published checkpoint" and facts.alignment["teacher_hidden_size"] == 8
    assert facts.parameters == sum(weight.numel() for weight in kept)
    assert facts.bytes == sum(weight.nbytes for weight in kept)
    assert sorted(facts.weights.left_out) == sorted(names)
    assert not (facts.weights.missing or facts.weights.unexpected or facts.weights.other_shape)
    assert facts.images["size"]["longest_edge"] == 672 and "USER" in facts.chat_template
    assert f"Stored but not part of the model: {len(names)}" in facts_text(facts)
    found = compare(facts, inspect(str(folder)), weights=True)
    assert found.equal and len(found.weights) == len(kept)


BY_NAME = """
from eve_vlm.inspection.subjects import inspect
for name in ("BAAI/EVE-7B-v1.0", "BAAI/EVE-7B-HD-v1.0"):
    facts = inspect(name)
    print(facts.kind, facts.weights is not None, facts.images["size"]["longest_edge"])
"""


def test_a_hub_id_is_read_from_the_cache(tmp_path):
    """With the network off; the weights of one of the two were never downloaded."""
    published.hub_cache(tmp_path)
    for file in tmp_path.glob("*HD-v1.0/snapshots/*/pytorch_model*"):
        file.unlink()
    done = subprocess.run(
        [sys.executable, "-c", BY_NAME],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "published checkpoint True 672",
        "published checkpoint False 1344",
    ]


def test_no_weight_is_read(saved_model, aligned, official, monkeypatch):
    def forbidden(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(WeightReader, "read", forbidden)
    monkeypatch.setattr("safetensors.torch.load_file", forbidden)
    for folder in (saved_model, aligned, official[0]):
        inspect(str(folder))


def test_what_is_wrong_with_weights_is_listed(saved_model, tmp_path):
    shutil.copytree(saved_model, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    weights["model.surplus"] = torch.ones(2)
    name = "model.multi_modal_projector.linear_1.bias"
    weights[name] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    check = inspect(str(tmp_path)).weights
    assert check.missing == ("lm_head.weight",) and check.unexpected == ("model.surplus",)
    assert check.other_shape == (f"{name} is 3, not {tiny.WIDTH}",)
    assert "Missing: 1 weights (lm_head.weight)" in facts_text(inspect(str(tmp_path)))
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "cut off or corrupt" in refused(lambda: inspect(str(tmp_path)))


@pytest.mark.parametrize("stored", ["first", "second", "both"])
def test_tied_weights_are_one_under_either_name(stored, tmp_path):
    model = tiny.model(tiny.config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    words = weights.pop("model.language_model.embed_tokens.weight")
    if stored != "second":
        weights["model.language_model.embed_tokens.weight"] = words
    if stored != "first":
        weights["lm_head.weight"] = words.clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    facts = inspect(str(tmp_path))
    assert not (facts.weights.missing or facts.weights.unexpected)
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.bytes == 4 * facts.parameters
    assert compare(facts, inspect(str(tmp_path / "config.json"))).equal


def test_an_aligner_that_was_left_behind_is_not_counted(aligned, tmp_path):
    shutil.copytree(aligned, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not name.startswith("aligner.")}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    facts = inspect(str(tmp_path))
    assert facts.alignment is None and facts.parameters == sum(w.numel() for w in kept.values())
    assert not facts.weights.missing


def test_a_folder_without_a_processor(saved_model, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(saved_model / name, tmp_path)
    facts = inspect(str(tmp_path))
    assert facts.tokens == () and facts.images is None and "no processor" in facts.notes[0]


def test_decoders_that_are_stored_under_other_names_say_so(tmp_path):
    """Mixtral's experts are joined as they load, so names cannot be compared."""
    model = tiny.model(tiny.config(model_type="mixtral", num_local_experts=2))
    model.save_pretrained(tmp_path)
    facts = inspect(str(tmp_path))
    assert "mixtral" in facts.weights.not_compared and not facts.weights.missing
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.bytes == 4 * facts.parameters


def test_shapes_list_every_weight(saved_model, model):
    facts = inspect(str(saved_model))
    listed = {tensor.name: tensor.shape for tensor in facts.tensors}
    assert listed == {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    result = run(saved_model, "--shapes")
    line = next(line for line in result.output.splitlines() if ".q_proj" in line)
    name = "model.language_model.layers.{0-2}.self_attn.q_proj.weight"
    assert " ".join(line.split()) == f"{name} 32 x 32 float32 x3 decoder layers"


def test_names_are_collapsed_over_numbers():
    names = ["a.0.w", "a.1.w", "a.3.w", "b.7.w", "c.0.d.0", "e"]
    assert collapsed(names) == [("a.{0-1,3}.w", 3), ("b.7.w", 1), ("c.0.d.0", 1), ("e", 1)]


def test_bytes_by_type(tmp_path, processor):
    model = tiny.model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    facts = inspect(str(tmp_path))
    assert facts.bytes == 2 * facts.parameters
    assert all(set(part.dtypes) == {"bfloat16"} for part in facts.parts)


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(336, 336), (640, 480), (480, 640), (1240, 1754), (7, 900)])
def test_tokens_are_what_the_processor_makes_of_a_picture(size, saved_model, processor):
    width, height = size
    picture = tiny.picture(height, width)
    made = processor(images=[picture], text="<image>", return_tensors="pt")
    fact = next(
        fact
        for fact in inspect(str(saved_model), sizes=[f"{width}x{height}"]).tokens
        if (fact.width, fact.height) == size
    )
    assert fact.tokens == int((made["input_ids"] == processor.image_token_id).sum())
    assert fact.patches == len(made["pixel_values"])
    assert [1, 2 * fact.rows, 2 * fact.cols] == made["image_grid_thw"][0].tolist()
    assert fact.context == 512


def test_published_settings():
    facts = inspect("640x480")
    found = [
        (fact.settings, fact.resized_width, fact.resized_height, fact.tokens)
        for fact in facts.tokens
    ]
    # 672: in docs/architecture.md step by step; 1344: four times the cells, twice the row ends.
    assert found == [
        ("published 672", 672, 504, 451),
        ("published 1344", 1344, 1008, 1 + 36 * 49),
    ]


def test_token_budgets_come_through(tmp_path, saved_model):
    shutil.copytree(saved_model, tmp_path, dirs_exist_ok=True)
    pictures = EveImageProcessor(
        size={"longest_edge": 32}, size_multiple=8, patch_size=4, max_image_tokens=10
    )
    words = tiny.processor()
    words.image_processor = pictures
    words.save_pretrained(tmp_path)
    assert all(fact.tokens <= 10 for fact in inspect(str(tmp_path)).tokens)


# --- pictures -------------------------------------------------------------------------------------


def test_a_picture_that_exif_turns(tmp_path, saved_model):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    tiny.picture(40, 90).save(tmp_path / "turned.jpg", exif=exif)
    facts = inspect(str(tmp_path / "turned.jpg"), models=[str(saved_model)])
    assert (facts.stored_width, facts.stored_height) == (90, 40)
    assert (facts.width, facts.height) == (40, 90)
    assert facts.tokens[0].rows == 4 and facts.tokens[0].cols == 2  # 32 pixels high, 16 wide
    text = facts_text(facts)
    assert "JPEG" in text and "turned by 90 degrees, so it is seen as 40 x 90" in text


def test_an_animation_and_a_palette(tmp_path):
    frames = [Image.new("RGB", (12, 8), colour).convert("P") for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    facts = inspect(str(tmp_path / "two.gif"))
    assert facts.animated and facts.mode == "P" and "first frame" in facts_text(facts)
    tiny.picture(8, 8).save(tmp_path / "one.png")
    assert not inspect(str(tmp_path / "one.png")).animated


def test_pictures_above_the_librarys_limit_but_not_ours(tmp_path, monkeypatch):
    tiny.picture(50, 50).save(tmp_path / "fine.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # as if Pillow's own limit were low
    assert inspect(str(tmp_path / "fine.png")).width == 50
    assert Image.MAX_IMAGE_PIXELS == 100


# --- the drawing ----------------------------------------------------------------------------------

SETTINGS = {
    "tiny": {"size": {"longest_edge": 32}, "size_multiple": 8, "patch_size": 4},
    "672": {},
    "1344": {"size": {"longest_edge": 1344}, "size_multiple": 56},
    "unseen": {"size": {"longest_edge": 90}, "size_multiple": 18, "patch_size": 6},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("size", [(60, 90), (90, 60), (20, 300)])
def test_borders_are_where_the_cells_are(settings, size):
    """On a grey picture every pixel that is dark with a light one before it is a border."""
    pictures = EveImageProcessor(**SETTINGS[settings])
    height, width = size
    drawn = draw_grid(Image.new("RGB", (width, height), (128, 128, 128)), pictures=pictures)
    pixels = np.asarray(drawn.image)
    cell = pictures.patch_size * pictures.merge_size * drawn.scale
    grid = pictures.grid_of(height, width)
    assert drawn.cell == cell
    # One pixel above the lower border of the first row of cells, where no index stands.
    line = pixels[drawn.top + cell - 2, drawn.left - 1 : drawn.left + grid.cols * cell + 1]
    dark = np.flatnonzero((line[1:] == DARK).all(-1) & (line[:-1] == LIGHT).all(-1))
    assert dark.tolist() == [col * cell for col in range(grid.cols + 1)]
    column = pixels[drawn.top - 1 : drawn.top + grid.rows * cell + 1, drawn.left + cell - 2]
    dark = np.flatnonzero((column[1:] == DARK).all(-1) & (column[:-1] == LIGHT).all(-1))
    assert dark.tolist() == [row * cell for row in range(grid.rows + 1)]


def test_the_background_is_what_the_model_sees():
    """Inside the cells, away from borders and indices, every pixel is one of the model's own."""
    pictures = EveImageProcessor(**SETTINGS["tiny"])
    picture = tiny.picture(60, 90)
    drawn = draw_grid(picture, pictures=pictures)
    made = pictures(picture, return_tensors="np")
    shift, scale = np.array(pictures.image_mean), np.array(pictures.image_std)
    canvas = np.asarray(drawn.image)
    patches = made["pixel_values"].reshape(drawn.grid.rows, drawn.grid.cols, 2, 2, 3, 4, 4)
    for row in range(drawn.grid.rows):
        for col in range(drawn.grid.cols):
            seen = patches[row, col, 1, 1].transpose(1, 2, 0) * scale + shift  # lower right patch
            y = drawn.top + row * drawn.cell + 4 * drawn.scale
            x = drawn.left + col * drawn.cell + 4 * drawn.scale
            found = canvas[y :: drawn.scale, x :: drawn.scale][:4, :4]
            # Half a step of 8 bits covers the rounding of float32.
            assert np.abs(found - seen * 255).max() < 0.5


def test_token_indices_are_the_order_of_the_model():
    """The class token first, then row by row with row ends: counted out, one by one."""
    order = iter(range(1000))
    assert next(order) == 0
    for row in range(3):
        for col in range(6):
            assert token_index(row, col, 5) == next(order)


def test_drawings_are_written_whole(tmp_path):
    drawn = draw_grid(tiny.picture(20, 30), pictures=EveImageProcessor(**SETTINGS["tiny"]))
    file = save_grid(drawn, tmp_path / "new" / "grid.png")
    assert Image.open(file).size == drawn.image.size
    assert [path.name for path in file.parent.iterdir()] == ["grid.png"]
    assert "PNG" in refused(lambda: save_grid(drawn, tmp_path / "grid.jpg"))


def test_the_command_draws_for_every_model(tmp_path, saved_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.picture(60, 90).save("cat.png")
    result = run("cat.png", "--out", "grid.png")
    assert result.exit_code == 0
    assert sorted(path.name for path in tmp_path.glob("grid*")) == ["grid-1344.png", "grid-672.png"]
    result = run("cat.png", "--model", saved_model, "--out", "own.png", "--json")
    assert result.exit_code == 0 and Path("own.png").is_file()
    assert json.loads(result.stdout)["tokens"][0]["tokens"] == 1 + 3 * 5
    assert run("640x480", "--model", "672", "--out", "size.png").exit_code == 0


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_published_recipes(name):
    facts = inspect(name)
    trained = 29_982_720 if facts.stage == "prealign" else 6_768_398_336
    assert facts.parameters == 6_768_398_336 + 43_067_392
    assert facts.trained == trained + 43_067_392
    assert sum(group.parameters for group in facts.groups) == facts.trained
    square = next(fact for fact in facts.tokens if fact.width == fact.height)
    assert square.tokens == (1 + 48 * 49 if name.endswith("hd") else 1 + 24 * 25)
    assert "model.vision_tower" in facts_text(facts)


# --- differences ----------------------------------------------------------------------------------


def test_a_thing_does_not_differ_from_itself(saved_model, tmp_path):
    tiny.picture(8, 8).save(tmp_path / "cat.png")
    for what in (saved_model, saved_model / "config.json", tmp_path / "cat.png", "9x9"):
        found = compare(inspect(str(what)), inspect(str(what)))
        assert found.equal and not found.differences
        assert "do not differ" in differences_text(found)
    result = run(saved_model, saved_model, "--weights")
    assert result.exit_code == 0 and "53 of 53 compared weights are equal" in result.output


def test_a_configuration_against_its_checkpoint(saved_model, tmp_path):
    assert run(saved_model / "config.json", saved_model).exit_code == 0
    other = tmp_path / "config.json"
    config = tiny.config(intermediate_size=56)
    config.save_pretrained(tmp_path)
    found = compare(inspect(str(other)), inspect(str(saved_model)))
    by_name = {(one.section, one.name): (one.left, one.right) for one in found.differences}
    assert by_name["configuration", "text_config.intermediate_size"] == (56, 48)
    more = tiny.LAYERS * 3 * (56 - 48) * tiny.WIDTH
    left, right = by_name["parameters", "decoder layers"]
    assert left - right == more
    name = "model.language_model.layers.{0-2}.mlp.down_proj.weight x3"
    assert by_name["shapes", name] == ("32 x 56", "32 x 48")
    assert run(other, saved_model).exit_code == 1
    assert "--weights" in refused(
        lambda: compare(inspect(str(other)), inspect(str(saved_model)), weights=True)
    )


def test_values_are_compared_one_by_one(saved_model, tmp_path):
    shutil.copytree(saved_model, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    weights[name][0, :5] += 0.25
    weights["lm_head.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    found = compare(inspect(str(saved_model)), inspect(str(tmp_path)), weights=True)
    unlike = {one.name: one for one in found.weights if one.differing}
    assert unlike.keys() == {name, "lm_head.weight"} and not found.differences and not found.equal
    assert unlike[name].differing == 5
    # One rounding of float32 at values below 2.
    assert abs(unlike[name].largest - 0.25) < 2**-23
    assert unlike["lm_head.weight"].largest == float("inf")
    assert json.loads(differences_json(found))["equal"] is False
    both = compare(inspect(str(tmp_path)), inspect(str(tmp_path)), weights=True)
    assert both.equal  # NaN where NaN was is no difference


def test_pieces_cover_every_number(monkeypatch, saved_model, tmp_path):
    monkeypatch.setattr("eve_vlm.inspection.differences.PIECE", 7)
    other = tiny.model(seed=1)
    other.save_pretrained(tmp_path)
    found = compare(inspect(str(saved_model)), inspect(str(tmp_path)), weights=True)
    first, second = (
        load_file(saved_model / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    assert {one.name for one in found.weights} == first.keys()
    for one in found.weights:
        gap = (first[one.name].double() - second[one.name].double()).abs()
        assert one.differing == int((gap > 0).sum()) and one.elements == gap.numel()
        assert one.largest == float(gap.max())


def test_a_training_folder_against_the_plain_one(saved_model, aligned):
    found = compare(inspect(str(saved_model)), inspect(str(aligned)))
    weights = {one.name: one for one in found.differences if one.section == "weights"}
    assert weights["aligner.maps.{0-3}.weight x4"].left is None
    assert weights["aligner.maps.{0-3}.weight x4"].right == f"16 x {tiny.WIDTH} float32"


def test_recipes_by_dotted_key(teacher_folder, tmp_path):
    data = tiny.recipe_data(tmp_path / "data.json", tmp_path / "out", teacher=teacher_folder)
    files = []
    for name, rate in (("one", 1.0e-3), ("two", 2.0e-3)):
        data["stage"]["learning_rates"]["*"] = rate
        tiny.recipe(tmp_path / f"{name}.yaml", data)
        files.append(str(tmp_path / f"{name}.yaml"))
    found = compare(*map(inspect, files))
    assert [(one.name, one.left, one.right) for one in found.differences] == [
        ("stage.learning_rates.*", 1.0e-3, 2.0e-3)
    ]


def test_pictures_by_their_pixels(tmp_path):
    tiny.picture(8, 8).save(tmp_path / "one.png")
    other = tiny.picture(8, 8)
    red, green, blue = other.getpixel((3, 3))
    other.putpixel((3, 3), (red, green, blue ^ 1))
    other.save(tmp_path / "two.png")
    found = compare(inspect(str(tmp_path / "one.png")), inspect(str(tmp_path / "two.png")))
    notes = [one.right for one in found.differences if one.name == "pixels"]
    assert notes == ["1 pixels differ, by at most 1 of 255"]


# --- for machines ---------------------------------------------------------------------------------


def test_json(saved_model, model):
    data = json.loads(facts_json(inspect(str(saved_model))))
    assert data["kind"] == "model"
    assert data["parameters"] == sum(p.numel() for p in model.parameters())
    assert data["tokens"][0].keys() >= {"width", "height", "tokens", "patches", "context"}
    assert json.loads(facts_json(inspect("640x480")))["kind"] == "size"
    assert json.loads(run("tiny/0_language", "--json").stdout)["kind"] == "recipe"
    assert json.loads(run("1x1", "2x1", "--json").stdout)["equal"] is False


def test_settings_of_a_model_without_processor(tmp_path):
    EveConfig().save_pretrained(tmp_path)
    assert "no processor" in refused(lambda: picture_settings(str(tmp_path)))
