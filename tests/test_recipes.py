"""Recipes: every shipped file loads, and every mistake is one sentence that says how to mend it.

No numeric tolerance anywhere: texts, types and settings are compared exactly.
"""

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from eve_vlm.train import recipe as recipe_module
from eve_vlm.train.recipe import (
    OWNED,
    field_help,
    find_recipe,
    load_recipe,
    recipes_folder,
    resolved_yaml,
    stage_recipes,
    training_arguments_dict,
)
from eve_vlm.train.sections import ModelSection, Recipe, StageSection

SHIPPED = list(stage_recipes().values())
TINY = Path(__file__).with_name("fixtures") / "recipe.yaml"  # like a shipped one, but not tuned

# The paper's table 8 and the published scripts: rate, warm-up, batch on 32 GPUs, side, format.
PUBLISHED = {
    "1_prealign": (4e-4, 0.03, 512, 672, "plain"),
    "2_pretrain": (4e-5, 0.01, 512, 672, "plain"),
    "3_finetune": (2e-5, 0.01, 128, 672, "chat"),
    "3_finetune_hd": (2e-5, 0.01, 128, 1344, "chat"),
    "3_finetune_mixture": (2e-5, 0.01, 128, 672, "chat"),
    "3_finetune_hd_mixture": (2e-5, 0.01, 128, 1344, "chat"),
}

# The paper's table 7: thousands of samples, and how often they are used.
MIXTURE = {
    **{"llava": (158, 1), "svit": (158, 1), "sharegpt": (40, 1), "wizardlm": (70, 1)},
    **{"vqav2": (83, 2), "gqa": (72, 2), "okvqa": (9, 2), "aokvqa": (66, 2)},
    **{"textcaps": (22, 2), "synthdog": (30, 1), "ocrvqa": (80, 2), "refcoco": (48, 2)},
    **{"vg": (86, 2), "vision_flan": (186, 1), "chartqa": (18, 1), "dvqa": (200, 1)},
    **{"ai2d": (12, 1), "docvqa": (10, 1)},
}


def written(folder: Path, change=None, *, text: str | None = None) -> Path:
    """A copy of a shipped recipe, changed in memory or replaced by `text`."""
    file = folder / "mine.yaml"
    if text is None:
        data = yaml.safe_load(TINY.read_text(encoding="utf-8"))
        change(data)
        text = yaml.safe_dump(data, sort_keys=False)
    file.write_text(text, encoding="utf-8")
    return file


def message(path: Path | str, *overrides: str) -> str:
    """The error of a recipe that must not load; checked to be one line of one sentence."""
    with pytest.raises(ValueError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert "\n" not in text and not text.endswith(".") and ". " not in text.replace("'...", "")
    return text


def relative(file: Path) -> str:
    return file.relative_to(recipes_folder()).as_posix()


@pytest.mark.parametrize("file", SHIPPED, ids=relative)
def test_every_shipped_recipe_loads_and_round_trips(file, tmp_path):
    recipe = load_recipe(file)
    copy = tmp_path / "resolved.yaml"
    copy.write_text(resolved_yaml(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe
    assert resolved_yaml(load_recipe(copy)) == resolved_yaml(recipe)


@pytest.mark.parametrize("file", SHIPPED, ids=relative)
def test_shipped_recipes_are_complete_and_explained(file):
    text = file.read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    assert f"eve train {relative(file).removesuffix('.yaml')}" in text
    assert all(word in text for word in ("# Command", "# Hardware", "# Time"))
    for section, cls in (("model", ModelSection), ("stage", StageSection)):
        starts = {"init_from", "decoder", "text_config"}
        assert {field.name for field in dataclasses.fields(cls)} - starts <= set(data[section])
    assert "seed" in data and all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize("file", SHIPPED, ids=relative)
def test_training_arguments_can_be_built(file, tmp_path):
    arguments = training_arguments_dict(load_recipe(file, [f"output_dir={tmp_path}"]))
    for name in ("bf16", "tf32", "deepspeed"):  # these ask for a GPU or a package at once
        arguments.pop(name, None)
    built = TrainingArguments(**arguments)
    assert built.output_dir == str(tmp_path)
    assert built.remove_unused_columns is False
    assert 1 <= built.get_warmup_steps(1000) <= 30  # a share, not a count


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    rate, warmup, batch, edge, template = PUBLISHED[name]
    recipe = load_recipe(f"eve_7b/{name}")
    training = recipe.training
    product = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    assert product * 32 == batch
    assert set(recipe.stage.learning_rates.values()) == {rate}
    assert (training["warmup_steps"], training["num_train_epochs"]) == (warmup, 1)
    assert (training["bf16"], training["tf32"], recipe.stage.weight_decay) == (True, True, 0)
    assert recipe.devices.strategy == "zero3"
    assert training_arguments_dict(recipe)["deepspeed"]["zero_optimization"]["stage"] == 3
    assert (recipe.model.image.longest_edge, recipe.data.format) == (edge, template)
    assert recipe.model.image.size_multiple == edge // 24
    assert recipe.stage.alignment.teacher == "openai/clip-vit-large-patch14-336"
    assert (recipe.stage.alignment.layer, recipe.stage.alignment.tap_every) == (-2, 4)


def test_the_papers_mixtures_are_written_out():
    """All of table 7 with its uses, 1.81 M; and of it what LLaVA-mix-665K is made of, once each."""
    hd = load_recipe("eve_7b/3_finetune_hd_mixture").data.sources
    assert {source.name: source.repeat for source in hd} == {
        name: times for name, (_, times) in MIXTURE.items()
    }
    assert sum(MIXTURE[source.name][0] * source.repeat for source in hd) == 1814
    whole = load_recipe("eve_7b/3_finetune_mixture").data.sources
    assert sum(MIXTURE[source.name][0] * source.repeat for source in whole) == 664
    for source in (*hd, *whole):
        assert source.path.endswith(f"_{MIXTURE[source.name][0]}k.json")


@pytest.mark.parametrize("name", ["3_finetune", "3_finetune_hd"])
def test_a_mixture_recipe_differs_in_its_sources_alone(name):
    plain, mixture = load_recipe(f"eve_7b/{name}"), load_recipe(f"eve_7b/{name}_mixture")
    same = {"name": plain.name, "output_dir": plain.output_dir}
    data = dataclasses.replace(mixture.data, sources=plain.data.sources)
    assert dataclasses.replace(mixture, data=data, **same) == plain


@pytest.mark.parametrize("model", ["tiny", "eve_7b"])
def test_stages_follow_one_another(model):
    files = [file for file in SHIPPED if file.parent.name == model and file.stem.count("_") == 1]
    recipes = [load_recipe(file) for file in files]
    for before, after in itertools.pairwise(recipes):
        assert after.model.init_from == before.output_dir
        assert after.model.vision == before.model.vision
    assert recipes[0].model.init_from is None


UNKNOWN = [
    (lambda d: d.update(sed=1), ["sed is not a key", "did you mean 'seed'?"]),
    (lambda d: d["stage"].update(weight_decai=0), ["stage.weight_decai", "'weight_decay'"]),
    (
        lambda d: d["model"]["vision"].update(path_size=1),
        ["model.vision.path_size", "'patch_size'"],
    ),
    (
        lambda d: d["data"]["sources"][0].update(xyz=1),
        [
            "data.sources.0.xyz",
            "keys here are columns, image_folder, kind, name, options, path, repeat",
        ],
    ),
    (lambda d: d["training"].update(logging_step=1), ["TrainingArguments", "'logging_steps'"]),
    (lambda d: d["training"].update(warmup_ratio=0.1), ["warmup_ratio", "warmup_steps: 0.03"]),
    (lambda d: d.update({True: 1}), ["True is not a key"]),
]


@pytest.mark.parametrize(("change", "parts"), UNKNOWN)
def test_unknown_keys(tmp_path, change, parts):
    file = written(tmp_path, change)
    text = message(file)
    assert text.startswith(f"{file}: ")
    assert all(part in text for part in parts), text


WRONG_TYPES = [
    (("seed",), "7", ["seed must be a whole number (int)", "the text '7'", "write 7 without"]),
    (("seed",), True, ["must be a whole number (int)", "it is true"]),
    (("seed",), 3.0, ["a whole number (int)", "the number 3.0", "write 3"]),
    (("seed",), None, ["but it is null", "remove the key"]),
    (("name",), 12, ["must be text (str)", "the whole number 12", "put it in quotes"]),
    (("stage", "weight_decay"), "4e-4", ["a number (float)", "'4e-4'", "write 4.0e-4"]),
    (("stage", "weight_decay"), "4.5e4", ["write 4.5e+4"]),
    (("stage", "weight_decay"), False, ["a number (float)", "it is false"]),
    (("stage", "weight_decay"), float("nan"), ["must be a finite number (float)"]),
    (("stage", "learning_rates"), {"*": "4e-4"}, ["stage.learning_rates.*", "write 4.0e-4"]),
    (("stage", "learning_rates"), 4e-4, ["a section of name: a number", "below it, indented"]),
    (("stage", "learning_rates"), {3: 4e-4}, ["has the key 3", "in quotes"]),
    (("stage", "trainable"), "*", ["a list of text (str)", "in brackets"]),
    (("stage", "trainable"), ["*", 3], ["stage.trainable.1", "put it in quotes"]),
    (("stage", "alignment", "weight"), "1e0", ["stage.alignment.weight", "write 1.0e+0"]),
    (("stage", "alignment"), True, ["a section with teacher, layer", "or null", "it is true"]),
    (("stage", "name"), "pretain", ["one of language, prealign", "write pretrain"]),
    (("model", "dtype"), "bf16", ["one of float32, bfloat16", "'bf16'", "write bfloat16"]),
    (("model", "vision"), [14], ["a section with patch_size", "it is a list"]),
    (("model", "vision", "patch_size"), 14.5, ["a whole number (int)", "the number 14.5"]),
    (("data", "sources"), {"kind": "scenes"}, ["a list of a section", "it is a section"]),
    (("data", "sources", 0, "options"), [1], ["data.sources.0.options", "a section (dict)"]),
    (("training", "logging_steps"), "1e1", ["training.logging_steps", "write 1.0e+1"]),
    (("training", "max_steps"), 10.5, ["training.max_steps", "a whole number (int)"]),
    (("training", "bf16"), "yes", ["true or false (bool)", "without quotes"]),
    (("training", "tf32"), 1, ["true or false (bool) or null", "the whole number 1"]),
    (("training", "gradient_checkpointing"), "on", ["true or false (bool) or null"]),
    (("training", "lr_scheduler_type"), "cosin", ["one of linear, cosine", "write cosine"]),
    (("training", "optim"), "adamm", ["one of adamw_torch", "'adamm'"]),
    (("training", "deepspeed"), 3, ["a section (dict) or text (str) or null"]),
    (("training",), None, ["training must be a section", "it is null"]),
]


@pytest.mark.parametrize(("key", "value", "parts"), WRONG_TYPES)
def test_wrong_types(tmp_path, key, value, parts):
    def change(data):
        for step in key[:-1]:
            data = data[step]
        data[key[-1]] = value

    file = written(tmp_path, change)
    text = message(file)
    assert text.startswith(f"{file}: {'.'.join(map(str, key))}")
    assert all(part in text for part in parts), text


def test_yaml_reads_short_exponents_as_text(tmp_path):
    text = TINY.read_text(encoding="utf-8").replace('"*": 1.0e-3', '"*": 1e-3')
    assert "write 1.0e-3 (YAML takes 1e-3 for text)" in message(written(tmp_path, text=text))


MISSING = [
    (("name",), "name is missing; add this key with text (str)"),
    (("stage",), "stage is missing; add this key with a section with name, trainable"),
    (("stage", "alignment"), "stage.alignment is missing"),
    (("model", "image", "size_multiple"), "model.image.size_multiple is missing"),
    (("data", "sources", 0, "kind"), "data.sources.0.kind is missing; add this key with one of"),
    (("stage", "alignment", "teacher"), "stage.alignment.teacher is missing"),
    (("training", "max_steps"), "training.max_steps is missing; add max_steps or num_train"),
    (("training", "per_device_train_batch_size"), "training.per_device_train_batch_size is"),
]


@pytest.mark.parametrize(("key", "part"), MISSING)
def test_missing_keys(tmp_path, key, part):
    def change(data):
        for step in key[:-1]:
            data = data[step]
        del data[key[-1]]

    assert part in message(written(tmp_path, change))


VALUES = [
    ("stage.alignment.tap_every=0", "stage.alignment.tap_every must be above 0"),
    ("stage.learning_rates.*=-1.0", "stage.learning_rates.* must be above 0, but it is -1.0"),
    ("stage.learning_rates={}", "stage.learning_rates is empty"),
    ("stage.trainable=[]", "stage.trainable is an empty list"),
    ("stage.weight_decay=-0.1", "stage.weight_decay must not be negative"),
    ("stage.name=language", "stage.alignment must be null in the stage language"),
    ("data.max_bad_share=2", "data.max_bad_share must be between 0 and 1, but it is 2.0"),
    ("data.sources=[]", "data.sources is an empty list"),
    ("data.sources.0.kind=llava", "data.sources.0.path is missing"),
    ("data.sources.0.weight=0", "data.sources.0.weight must be above 0"),
    ("data.sources.0.repeat=0", "data.sources.0.repeat must be above 0"),
    ("data.max_length=0", "data.max_length must be above 0"),
    ("model.image.longest_edge=100", "is 100, not a multiple of size_multiple (28); 84 or 112"),
    ("model.image.size_multiple=21", "is 21, not a multiple of one token (28); 28 would do"),
    ("model.vision.num_attention_heads=5", "not a multiple of num_attention_heads (5)"),
    ("model.vision.patch_size=0", "model.vision.patch_size must be above 0"),
    ("model.init_from=", "model gives no start; add init_from, decoder, or text_config"),
    ("model.decoder=x", "gives init_from and decoder; keep the one that the stage starts from"),
    ("training.gradient_accumulation_steps=0", "must be at least 1, but it is 0"),
    ("training.activation_checkpointing=true", "says the same as"),
]


@pytest.mark.parametrize(("override", "part"), VALUES)
def test_values_that_types_cannot_refuse(override, part):
    assert part in message(TINY, override)


@pytest.mark.parametrize("name", sorted(OWNED))
def test_keys_that_the_recipe_owns(name):
    text = message(TINY, f"training.{name}=1")
    assert f"training.{name} is not set in this section; it belongs to {OWNED[name]}" in text


def test_overrides_are_applied_in_order():
    overrides = [
        "seed=3",
        "stage.learning_rates.*=4e-4",  # a number here, although YAML takes it for text
        "stage.learning_rates.model.vision_tower.*=1e-3",
        "stage.trainable=['*']",
        "data.sources.0.options.concepts=30",
        "data.sources.0.options.nested.deep=[1, 2]",
        "model.text_config={model_type: llama, rope_theta: 1e4}",
        "model.init_from=null",
        "training.max_steps=1",
        "training.max_steps=20",
        "training.logging_dir_is_not_touched=x",
    ]
    recipe = load_recipe(TINY, overrides[:-1])
    assert recipe.seed == 3 and recipe.training["max_steps"] == 20
    assert recipe.stage.learning_rates == {"*": 4e-4, "model.vision_tower.*": 1e-3}
    assert recipe.data.sources[0].options == {"concepts": 30, "nested": {"deep": [1, 2]}}
    assert recipe.model.text_config == {"model_type": "llama", "rope_theta": 1e4}
    assert "command line (over" in message(TINY, overrides[-1])


def test_whole_numbers_are_accepted_for_numbers():
    recipe = load_recipe(TINY, ["stage.weight_decay=1", "stage.alignment.weight=2"])
    assert (recipe.stage.weight_decay, recipe.stage.alignment.weight) == (1.0, 2.0)
    assert isinstance(recipe.stage.weight_decay, float)


BAD_OVERRIDES = [
    ("seed", ["'seed' is not an override; write key.path=value"]),
    ("=3", ["is not an override"]),
    ("stage..name=x", ["is not an override"]),
    ("stage.trainable=[*]", ["not valid YAML", "in quotes"]),
    ("sed=3", ["command line (over", "sed is not a key", "'seed'"]),
    ("seed=three", ["command line (over", "seed must be a whole number (int)", "'three'"]),
    ("seed.deep=3", ["cannot be set, because seed is the whole number 0"]),
    ("data.sources.1.weight=2", ["data.sources.1 is not in a list of 1", "from 0 to 0"]),
    ("data.sources.first.weight=2", ["data.sources.first is not in a list"]),
    ("name=4e4", ["name must be text (str)", "put it in quotes"]),
    ("stage.aligment.weight=2", ["stage.aligment is not a key", "'alignment'"]),
]


@pytest.mark.parametrize(("override", "parts"), BAD_OVERRIDES)
def test_bad_overrides(override, parts):
    text = message(TINY, override)
    assert text.startswith("command line")
    assert all(part in text for part in parts), text


def test_a_mistake_in_the_file_is_not_blamed_on_the_command_line(tmp_path):
    file = written(tmp_path, lambda data: data["stage"].update(weight_decay="x"))
    assert message(file, "seed=3").startswith(f"{file}: stage.weight_decay")


BAD_FILES = [
    ("", "is empty; start from a copy of a shipped recipe"),
    ("# only a comment\n", "is empty"),
    ("- a\n- b\n", "must be a section of key: value lines at the top, but it is a list"),
    ("just words\n", "but it is the text 'just words'"),
    ("name: x\nmodel: [1, 2\nstage: 3\n", "is not valid YAML at line 3, column 6"),
    ("name: x\n\tseed: 1\n", "is not valid YAML at line 2, column 1"),
    ("name: x\nseed: 1\nname: y\n", "at line 3, column 1 (the key 'name' stands here twice)"),
    ("a: 1\n---\nb: 2\n", "is not valid YAML at line 2"),
    ("name: !!python/object:os.system x\n", "is not valid YAML at line 1"),
    ("name: 2024-13-45\n", "is not valid YAML"),
    ("name: \x07\n", "is not valid YAML"),
]


@pytest.mark.parametrize(("text", "part"), BAD_FILES)
def test_bad_files(tmp_path, text, part):
    file = written(tmp_path, text=text)
    found = message(file)
    assert found.startswith(f"{file}: ") and part in found, found


def test_a_file_that_is_not_text(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"name: \xff\xfe")
    assert "is not UTF-8 text (byte 6)" in message(file)


def test_recipes_are_found_by_short_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny/1_prealign", "tiny/1_prealign.yaml", "recipes/tiny/1_prealign.yaml"):
        assert find_recipe(name) == recipes_folder() / "tiny" / "1_prealign.yaml"
    (tmp_path / "tiny").mkdir()
    shutil.copy(TINY, tmp_path / "tiny" / "1_prealign.yaml")
    assert load_recipe("tiny/1_prealign").name == "tiny-pretrain"  # what lies here comes first


def test_recipes_inside_the_package_are_preferred(monkeypatch, tmp_path):
    (tmp_path / "recipes").mkdir()
    shutil.copy(TINY, tmp_path / "recipes" / "only.yaml")
    monkeypatch.setattr(recipe_module.resources, "files", lambda package: tmp_path)
    assert find_recipe("only") == tmp_path / "recipes" / "only.yaml"


@pytest.mark.parametrize("path", ["tiny/1_prealing", "nowhere", "", ".", "tiny"])
def test_a_recipe_that_is_not_there(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    text = message(path)
    assert "there is no such recipe" in text and str(recipes_folder()) in text
    if path == "tiny/1_prealing":
        assert "did you mean 'tiny/1_prealign'?" in text


def test_every_field_has_its_help():
    pending = [Recipe]
    while pending:
        cls = pending.pop()
        assert set(field_help(cls)) == {field.name for field in dataclasses.fields(cls)}
        module = vars(recipe_module)
        pending += [
            module[name]
            for field in dataclasses.fields(cls)
            for name in module
            if name.endswith("Section") and name in str(field.type)
        ]


def test_training_arguments_come_from_the_whole_recipe():
    recipe = load_recipe(TINY, ["seed=5", "training.report_to=tensorboard"])
    arguments = training_arguments_dict(recipe)
    assert (arguments["seed"], arguments["data_seed"]) == (5, 5)
    assert arguments["learning_rate"] == max(recipe.stage.learning_rates.values())
    assert arguments["report_to"] == "tensorboard"
    assert training_arguments_dict(load_recipe(TINY))["report_to"] == "none"


@pytest.mark.parametrize("written_as", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("installed", ["old", "both", "new"])
def test_checkpointing_goes_by_the_installed_name(monkeypatch, written_as, installed):
    old, new = "gradient_checkpointing", "activation_checkpointing"
    real = recipe_module._training_hints()
    hints = {name: hint for name, hint in real.items() if name not in (old, new)}
    hints |= {"old": {old: bool}, "both": {old: bool, new: bool}, "new": {new: bool}}[installed]
    monkeypatch.setattr(recipe_module, "_training_hints", lambda: dict(hints))
    text = TINY.read_text(encoding="utf-8").replace(f"{old}: false", f"{written_as}: true")
    recipe = dataclasses.replace(load_recipe(TINY), training=yaml.safe_load(text)["training"])
    arguments = training_arguments_dict(recipe)
    expected, other = (old, new) if installed == "old" else (new, old)
    assert arguments[expected] is True and other not in arguments
