"""LoRA by a recipe's section: what learns, what a run leaves, loading, merging, resuming, refusals.

Independent sides: PEFT's own `PeftModel.from_pretrained` on our folder, and W + alpha / rank * B A
computed here. Tolerances: 1e-5 of the largest logit where merged and unmerged are compared, because
x(W + BA) rounds otherwise than xW + (xA)B in float32; whatever does the same operations is compared
bit for bit.
"""

import json
import shutil
import subprocess
import sys
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from eve_vlm import EveForPreTraining, load
from eve_vlm.cli import main
from eve_vlm.export.folder import export
from eve_vlm.export.merged_run import merge_run
from eve_vlm.loading import load_config, load_model
from eve_vlm.lora_folder import attach_adapter, find_base, fingerprint, stored_notes
from eve_vlm.quantization import is_quantized
from eve_vlm.serve.engine import EveEngine
from eve_vlm.train import run as run_module
from eve_vlm.train.lora import find_targets, make_trainable
from eve_vlm.train.parameters import optimizer_groups, parameter_table
from eve_vlm.train.run import describe, train
from eve_vlm.train.trainer import EveTrainer

pytest.importorskip("peft", reason="needs the extra lora")

refused = partial(tiny.refused, end=".")
RANK, ALPHA = 4, 12.0
PICTURES = ("model.vision_tower.", "model.multi_modal_projector.")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    return tiny.llava_file(tmp_path_factory.mktemp("conversations"))


def base_folder(folder, *, seed=0, **text):
    """A saved model with its processor; two seeds give two models of the same shapes."""
    tiny.model(tiny.config(**text), seed=seed).save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path, conversations):
    """A recipe that puts adapters on `tmp_path / "base"`, with some overrides."""

    def made(*overrides, name="run", base="base", lora=None, **start):
        if not (tmp_path / base).exists():
            base_folder(tmp_path / base)
        keys = tiny.recipe_data(conversations, tmp_path / name, init_from=tmp_path / base, **start)
        keys["lora"] = {"rank": RANK, "alpha": ALPHA} | (lora or {})
        keys["stage"]["learning_rates"] = {"*": 1.0e-2}
        return tiny.recipe(tmp_path / f"{name}.yaml", keys, *overrides)

    return made


def trained(recipe, monkeypatch, **settings):
    """Runs a recipe; returns the model in memory as it was at the end, in eval mode."""
    seen = []
    plain = run_module.make_trainable
    with monkeypatch.context() as patch:
        patch.setattr(
            run_module, "make_trainable", lambda model, of: (seen.append(model), plain(model, of))
        )
        train(recipe, **settings)
    return seen[0].eval()


def inputs():
    processor = tiny.processor()
    texts = [
        processor.apply_chat_template(tiny.conversation(question), add_generation_prompt=True)
        for question in tiny.QUESTIONS[:2]
    ]
    pictures = [tiny.picture(16, 40), tiny.picture(32, 24, seed=1)]
    return processor(
        images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt"
    )


@torch.no_grad()
def logits_of(model):
    """Of a copy, whose weights lie at equally even addresses, as those of a file do not.

    In which order a product is summed up depends on that (MKL; 1.2e-5 of 3.9 between addresses that
    differ by 4 bytes on an AMD EPYC), so equal weights alone do not give equal bits.
    """
    return deepcopy(model).eval()(**inputs()).logits


def tokens_of(model):
    return model.eval().generate(**inputs(), max_new_tokens=8, do_sample=False)


def close(made, expected):
    """Equal but for rounding, and far from what differs in a weight."""
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(made, expected, rtol=0, atol=atol)


def assert_equal(made, expected):
    assert made.keys() == expected.keys()
    assert [name for name in made if not torch.equal(made[name], expected[name])] == []


def weights_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def learning(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


# --- what learns ----------------------------------------------------------------------------------


def prepared(recipe, config=None):
    model = tiny.model(config or tiny.config())
    make_trainable(model, recipe)
    return model


def test_adapters_on_every_linear_layer_of_the_decoder_and_pictures_whole(make):
    """By name, and the number by hand: rank x (in + out) for each matrix."""
    model = prepared(make())
    chosen = learning(model)
    adapters = {name for name in chosen if "lora_" in name}
    assert chosen - adapters == {
        name for name, _ in model.named_parameters() if name.startswith(PICTURES)
    }
    assert len(adapters) == 2 * 7 * tiny.LAYERS
    assert all(name.startswith("model.language_model.layers.") for name in adapters)
    width, inner, keys = tiny.WIDTH, 48, 2 * 8  # keys and values have two heads of eight
    matrices = 2 * (width + width) + 2 * (width + keys) + 3 * (width + inner)
    pictures = sum(
        weight.numel() for name, weight in model.named_parameters() if name.startswith(PICTURES)
    )
    count = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert count == tiny.LAYERS * RANK * matrices + pictures


@pytest.mark.parametrize(
    ("globs", "tied", "whole"),
    [
        (["*"], False, []),
        (["*"], True, []),
        (["model.language_model.*"], False, []),
        (["model.vision_tower.*"], False, []),
        (["*", "lm_head.*"], False, ["lm_head.weight"]),
        (["lm_head.*"], True, ["model.language_model.embed_tokens.weight"]),
        (["*.embed_tokens.*"], False, ["model.language_model.embed_tokens.weight"]),
        (["model.language_model.norm.*"], False, ["model.language_model.norm.weight"]),
    ],
    ids=str,
)
def test_what_is_trained_whole_in_the_language_model(make, globs, tied, whole):
    recipe = make(f"stage.trainable={json.dumps(globs)}")
    model = prepared(recipe, tiny.config(tie_word_embeddings=tied))
    rest = {name for name in learning(model) if "lora_" not in name}
    assert {name for name in rest if not name.startswith(PICTURES)} == set(whole)
    assert {name for name, _ in model.named_parameters() if name.startswith(PICTURES)} <= rest


@pytest.mark.parametrize(
    ("globs", "trains"), [(["*"], True), (["model.vision_tower.*"], False)], ids=str
)
def test_the_aligner_trains_as_the_stage_says(make, globs, trains):
    recipe = make(f"stage.trainable={json.dumps(globs)}")
    model = prepared(recipe, tiny.config(aligned=True))
    assert any(name.startswith("aligner.") for name in learning(model)) is trains


def test_targets_by_last_name(make):
    recipe = make(lora={"target_modules": ["q_proj", "down_proj"]})
    model = prepared(recipe)
    adapted = {name.split(".lora_")[0] for name in learning(model) if ".lora_" in name}
    assert adapted == set(find_targets(tiny.model(), ["q_proj", "down_proj"]))
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "down_proj"}
    text = refused(lambda: prepared(make(lora={"target_modules": ["q_proj", "qproj"]})))
    assert "'qproj'" in text and all(name in text for name in LINEAR)
    # Linear layers elsewhere are no targets, and the head is none.
    assert "'lm_head'" in refused(lambda: prepared(make(lora={"target_modules": ["lm_head"]})))


def test_rates_by_globs_and_the_table(make):
    rates = {"*.lora_B.*": 3e-4, "*.lora_*": 2e-4, "model.vision_tower.*": 4e-5, "*": 1e-5}
    recipe = make(f"stage.learning_rates={json.dumps(rates)}", "stage.weight_decay=0.1")
    model = prepared(recipe)
    seen = {
        name: group["lr"]
        for group in optimizer_groups(model, recipe.stage)
        for name in group["names"]
    }
    assert seen.keys() == learning(model)
    for name, rate in seen.items():
        assert rate == next(rate for glob, rate in rates.items() if fnmatchcase(name, glob)), name
    table = parameter_table(model, recipe.stage)
    rows = {tuple(line.split()[:2]): line for line in table.splitlines()}
    assert "2.00e-04" in table and " no " in rows["model.language_model", "29"]
    assert "model.language_model (LoRA)" in table
    assert describe(recipe).count("model.language_model (LoRA)") == 2  # a row for each rate


def test_the_start_does_not_change_with_adapters(make):
    """B begins at zero: the model answers as its base, bit for bit."""
    assert torch.equal(logits_of(prepared(make())), logits_of(tiny.model()))


def test_adapters_on_half_precision_are_float32(make):
    model = tiny.model().to(torch.bfloat16)
    make_trainable(model, make())
    kinds = {(".lora_" in name, weight.dtype) for name, weight in model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


# --- what a run leaves ----------------------------------------------------------------------------


def test_a_run_is_a_standard_folder_of_adapters_and_pictures(make, tmp_path, monkeypatch):
    model = trained(make(), monkeypatch)
    folder = tmp_path / "run"
    names = {file.name for file in folder.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert names >= {"processor_config.json", "parameters.txt", "run.json", "config.json"}
    assert not any(name.endswith((".bin", ".pt")) or name == "model.safetensors" for name in names)
    expected = {
        PREFIX + name.replace(".default.", "."): weight
        for name, weight in model.state_dict().items()
        if "lora_" in name or name.startswith(PICTURES)
    }
    assert_equal(weights_of(folder), expected)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "../base"
    assert (settings["r"], settings["lora_alpha"]) == (RANK, ALPHA)
    assert settings["modules_to_save"] == ["model.vision_tower", "model.multi_modal_projector"]
    assert stored_notes(folder)["eve_base"] == fingerprint(tmp_path / "base")


def test_the_base_stays_and_all_else_moves(make, tmp_path, monkeypatch):
    """Bit by bit, in memory and on disk."""
    base = load_model(base_folder(tmp_path / "base")).state_dict()
    files = {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    model = trained(make(), monkeypatch)
    after = {name.replace(".base_layer.", "."): w for name, w in model.state_dict().items()}
    for name, weight in base.items():
        assert torch.equal(after[name], weight) is not name.startswith(PICTURES), name
    assert all(weight.any() for name, weight in after.items() if "lora_B" in name)
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()}


def test_peft_itself_reads_the_folder(make, tmp_path, monkeypatch):
    """The same operations on the same weights: the same bits."""
    import peft

    model = trained(make(lora={"dropout": 0.1}), monkeypatch)
    theirs = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "run")
    expected = logits_of(model)
    assert torch.equal(logits_of(theirs), expected)
    assert (logits_of(tiny.model()) - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("tied", "globs"),
    [(False, ["*", "lm_head.*", "*norm*"]), (True, ["*", "*.embed_tokens.*"])],
    ids=["head and norms", "shared embedding"],
)
def test_parts_of_the_language_model_that_trained_whole_come_along(
    make, tmp_path, monkeypatch, tied, globs
):
    import peft

    base_folder(tmp_path / "base", tie_word_embeddings=tied)
    model = trained(make(f"stage.trainable={json.dumps(globs)}"), monkeypatch)
    expected = logits_of(model)
    close(logits_of(load(tmp_path / "run", device="cpu").model), expected)
    again = load_model(tmp_path / "run")
    assert again.config.tie_word_embeddings is tied
    weight = model.lm_head.weight
    assert torch.equal(again.lm_head.weight, weight)
    assert not torch.equal(load_model(tmp_path / "base").lm_head.weight, weight)
    theirs = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "run")
    assert torch.equal(logits_of(theirs), expected)


# --- loading and merging --------------------------------------------------------------------------


def test_loaded_is_base_plus_scaled_product(make, tmp_path):
    """W + alpha / rank * B A by hand; 1e-6 for one float32 product of four terms and its sum."""
    train(make())
    base, made = load_model(tmp_path / "base").state_dict(), load_model(tmp_path / "run")
    given = weights_of(tmp_path / "run")
    after = made.state_dict()
    assert after.keys() == base.keys()
    targets = find_targets(tiny.model(), None)
    for name, weight in base.items():
        if name.removesuffix(".weight") in targets:
            part = PREFIX + name.removesuffix(".weight")
            a, b = given[f"{part}.lora_A.weight"], given[f"{part}.lora_B.weight"]
            expected = weight.double() + ALPHA / RANK * (b.double() @ a.double())
            torch.testing.assert_close(after[name].double(), expected, rtol=0, atol=1e-6)
            assert not torch.equal(after[name], weight)
        else:
            assert torch.equal(after[name], given.get(PREFIX + name, weight)), name


def test_merged_answers_as_unmerged(make, tmp_path, monkeypatch, capsys):
    model = trained(make(), monkeypatch)
    expected, tokens = logits_of(model), tokens_of(model)
    monkeypatch.setattr(
        "sys.argv", ["eve", "merge", str(tmp_path / "run"), str(tmp_path / "merged")]
    )
    main_of_command()
    shown = capsys.readouterr().out
    assert "patch embedding: 19 weights replaced." in shown and "decoder: LoRA merged." in shown
    export(tmp_path / "base", tmp_path / "exported", lora=tmp_path / "run")
    export(tmp_path / "run", tmp_path / "from-run")
    for name in ("run", "merged", "exported", "from-run"):
        loaded = load(tmp_path / name, device="cpu")
        close(logits_of(loaded.model), expected)
        assert torch.equal(tokens_of(loaded.model), tokens), name
        assert not any("lora" in one or "base_layer" in one for one in loaded.model.state_dict())
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    pictures = {n: w for n, w in weights_of(tmp_path / "run").items() if "lora_" not in n}
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert_equal({n: merged[n.removeprefix(PREFIX)] for n in pictures}, pictures)


def main_of_command():
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def test_one_command_asks_a_run(make, tmp_path, monkeypatch, capsys):
    train(make())
    merge_run(tmp_path / "run", tmp_path / "merged")
    said = []
    tiny.picture(20, 20).save(tmp_path / "picture.png")
    for name in ("run", "merged"):
        arguments = [
            str(tmp_path / "picture.png"),
            "What is this?",
            "--model",
            str(tmp_path / name),
        ]
        monkeypatch.setattr("sys.argv", ["eve", "ask", *arguments, "--max-new-tokens", "6"])
        main_of_command()
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    engine = EveEngine.from_pretrained(tmp_path / "run", device="cpu")
    assert engine.ask("What is this?", [tiny.picture(20, 20)], max_new_tokens=6) in said[0]


def test_a_folder_of_peft_alone_is_loaded_too(tmp_path):
    """Without settings or processor of its own; base by an absolute path, no fingerprint."""
    base_folder(tmp_path / "base")
    tiny.lora_adapter(tmp_path / "adapter", base=tmp_path / "base")
    loaded = load(tmp_path / "adapter", device="cpu")
    assert torch.equal(logits_of(loaded.model), logits_of(tiny.model()))
    assert loaded.processor.image_processor.size_multiple == tiny.MULTIPLE
    merge_run(tmp_path / "adapter", tmp_path / "merged")
    assert torch.equal(logits_of(load_model(tmp_path / "merged")), logits_of(tiny.model()))


def test_run_and_base_move_together(make, tmp_path):
    train(make("training.save_strategy=steps", "training.save_steps=2"))
    expected = logits_of(load_model(tmp_path / "run"))
    (tmp_path / "elsewhere").mkdir()
    for name in ("run", "base"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    assert torch.equal(logits_of(load_model(tmp_path / "elsewhere" / "run")), expected)
    checkpoint = tmp_path / "elsewhere" / "run" / "checkpoint-4"
    assert torch.equal(logits_of(load(checkpoint, device="cpu").model), expected)


# --- which base -----------------------------------------------------------------------------------


def test_a_base_that_is_not_there(make, tmp_path):
    train(make())
    expected = logits_of(load_model(tmp_path / "run"))
    shutil.move(tmp_path / "base", tmp_path / "renamed")
    text = refused(lambda: load(tmp_path / "run", device="cpu"))
    assert "../base" in text and f"eve merge {tmp_path / 'run'} OUT --base MODEL" in text
    assert "adapter_config.json" in text
    merge_run(tmp_path / "run", tmp_path / "merged", base=tmp_path / "renamed")
    assert torch.equal(logits_of(load_model(tmp_path / "merged")), expected)
    change_settings(tmp_path / "run", base_model_name_or_path=str(tmp_path / "renamed"))
    assert torch.equal(logits_of(load_model(tmp_path / "run")), expected)
    change_settings(tmp_path / "run", base_model_name_or_path=None)
    assert "does not say which model" in refused(lambda: load_model(tmp_path / "run"))


def change_settings(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_another_base_of_the_same_shapes_is_refused(make, tmp_path):
    train(make())
    shutil.rmtree(tmp_path / "base")
    base_folder(tmp_path / "base", seed=1)
    for action in (
        lambda: load(tmp_path / "run", device="cpu"),
        lambda: merge_run(tmp_path / "run", tmp_path / "merged"),
        lambda: export(tmp_path / "base", tmp_path / "merged", lora=tmp_path / "run"),
    ):
        text = refused(action)
        assert "whose weights are not those of" in text and "--any-base" in text
    assert not (tmp_path / "merged").exists()
    merge_run(tmp_path / "run", tmp_path / "merged", any_base=True)
    load_model(tmp_path / "merged")


def test_fingerprints_tell_models_apart_and_copies_not(tmp_path):
    one = base_folder(tmp_path / "one")
    export(one, tmp_path / "half", dtype="bfloat16")
    export(one, tmp_path / "shards", shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert fingerprint(one) == fingerprint(tmp_path / "half") == fingerprint(tmp_path / "shards")
    assert fingerprint(one) != fingerprint(base_folder(tmp_path / "two", seed=1))
    weights = load_file(one / "model.safetensors")
    weights["model.vision_tower.class_embedding"] *= 1.02
    save_file(weights, one / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(one) != fingerprint(tmp_path / "half")


def test_weights_are_accounted_for(make, tmp_path):
    train(make())
    given = weights_of(tmp_path / "run")
    notes = {"format": "pt", **stored_notes(tmp_path / "run")}

    def saved(weights):
        save_file(weights, tmp_path / "run" / "adapter_model.safetensors", metadata=notes)
        return refused(lambda: load(tmp_path / "run", device="cpu"))

    lost = next(name for name in given if "vision_tower" in name)
    assert "lacks 1 weights" in saved({n: w for n, w in given.items() if n != lost})
    extra = {f"{PREFIX}model.more.weight": torch.ones(1)}
    assert "no place for (model.more.weight)" in saved(given | extra)
    assert "do not fit" in saved(given | {lost: torch.ones(5)})


# --- resuming -------------------------------------------------------------------------------------

KEPT = ("training.max_steps=6", "training.save_strategy=steps", "training.save_steps=3")


class Stopped(BaseException):
    """As when the machine is switched off."""


def stop_at(patch, step):
    plain = EveTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Stopped
        return plain(self, *args, **kwargs)

    patch.setattr(EveTrainer, "training_step", training_step)


def states_of(folder):
    """Every tensor of a checkpoint's optimizer, whatever file holds it."""
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return {f"{i}.{key}": value for i, one in state.items() for key, value in one.items()}


def test_six_steps_are_three_and_three(make, tmp_path, monkeypatch):
    """Adapters, whole parts and moments, with dropout."""
    globs = "stage.trainable=['*', 'lm_head.*']"
    settings = (*KEPT, globs, "training.lr_scheduler_type=cosine")
    straight = train(make(*settings, name="straight", lora={"dropout": 0.1}))
    recipe = make(*settings, name="stopped", lora={"dropout": 0.1})
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Stopped):
            train(recipe)
    assert not (tmp_path / "stopped" / "run.json").exists()
    torch.manual_seed(1234)
    resumed = train(recipe, resume=True)
    assert [one["loss"] for one in resumed.losses] == [one["loss"] for one in straight.losses]
    assert_equal(weights_of(tmp_path / "stopped"), weights_of(tmp_path / "straight"))
    last = [states_of(tmp_path / name / "checkpoint-6") for name in ("stopped", "straight")]
    assert len(last[0]) > 3 * 2 * 7 * tiny.LAYERS
    assert_equal(*last)
    first = weights_of(tmp_path / "straight" / "checkpoint-3")
    moved = weights_of(tmp_path / "straight")
    assert all(not torch.equal(first[name], moved[name]) for name in first)


def test_a_base_that_changed_since_is_refused(make, tmp_path, monkeypatch):
    recipe = make(*KEPT)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Stopped):
            train(recipe)
    shutil.rmtree(tmp_path / "base")
    base_folder(tmp_path / "base", seed=1)
    text = refused(lambda: train(recipe, resume=True))
    assert "are not those that" in text and "checkpoint-3" in text


@pytest.mark.slow
def test_two_processes_train_what_one_does(make, tmp_path):
    """2 x 2 records against 4; 1e-5: sums in another order, and Adam magnifies it (1.4e-6 seen)."""
    make("training.per_device_train_batch_size=2", name="two")
    program = (
        "import sys, torch; torch.set_num_threads(1);"
        "from eve_vlm.train.recipe import load_recipe; from eve_vlm.train.run import train;"
        "train(load_recipe(sys.argv[1]))"
    )
    (tmp_path / "program.py").write_text(program)
    command = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29561")
    done = subprocess.run(
        [sys.executable, "-m", *command, tmp_path / "program.py", tmp_path / "two.yaml"],
        capture_output=True,
        text=True,
        timeout=300,  # seconds; about 25 here
    )
    assert done.returncode == 0, done.stderr[-2000:]
    train(make("training.per_device_train_batch_size=4", name="one"))
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)


# --- fewer bits -----------------------------------------------------------------------------------

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(params=["int8", "nf4"])
def kind(request):
    package = {"int8": "torchao", "nf4": "bitsandbytes"}[request.param]
    pytest.importorskip(package, reason="needs the extra quantize")
    return request.param


def decoder_bits(model):
    """The decoder's matrices as they lie in memory, by name."""
    found = {}
    for name, weight in model.model.language_model.named_parameters():
        if is_quantized(weight):
            data = weight.data if weight.dtype == torch.uint8 else weight.dequantize()
            found[name.replace("base_layer.", "")] = data.clone()
    return found


def test_quantized_weights_are_frozen_and_the_rest_learns(make, tmp_path, monkeypatch, kind):
    base_folder(tmp_path / "base", **WIDE)
    before = load_model(tmp_path / "base", quantize=kind)
    model = trained(make(lora={"quantize": kind}), monkeypatch)
    bits = decoder_bits(model)
    assert len(bits) == 7 * tiny.LAYERS
    assert_equal(bits, decoder_bits(before))
    for name, weight in model.named_parameters():
        if name.startswith((*PICTURES, "lm_head")):
            assert not is_quantized(weight)
            same = torch.equal(weight, before.get_parameter(name))
            assert same is name.startswith("lm_head"), name
        if "lora_B" in name:
            assert weight.any(), name
    table = (tmp_path / "run" / "parameters.txt").read_text()
    whole = tiny.model(tiny.config(**WIDE))
    adapters = sum(w.numel() for n, w in model.named_parameters() if "lora_" in n)
    assert f"{whole.num_parameters() + adapters:,} parameters" in table
    assert "quantization_config" not in (tmp_path / "run" / "config.json").read_text()
    # On the same bits it answers as it did in memory; merged it is a model in full precision.
    again = load(tmp_path / "run", device="cpu", quantize=kind).model
    assert torch.equal(logits_of(again), logits_of(model))
    assert not learning(again)
    merged = merge_run(tmp_path / "run", tmp_path / "merged")
    assert any(f"trained on {kind} weights" in note for note in merged.notes)
    assert torch.equal(
        logits_of(load_model(tmp_path / "merged")), logits_of(load_model(tmp_path / "run"))
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_give_the_same_adapters(make, tmp_path, kind, reentrant):
    """1e-5: a layer is computed again, in the same order; the last sums may round otherwise."""
    base_folder(tmp_path / "base", **WIDE)
    section = {"quantize": kind}
    train(make(name="plain", lora=section))
    again = ("training.gradient_checkpointing=true",)
    again += (
        f"training.gradient_checkpointing_kwargs={{use_reentrant: {str(reentrant).lower()}}}",
    )
    train(make(*again, name="checkpointed", lora=section))
    one, two = weights_of(tmp_path / "plain"), weights_of(tmp_path / "checkpointed")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)


def test_words_alone_reach_adapters_through_checkpointed_layers(make):
    """Reentrant checkpointing computes no gradient where no input asks for one."""
    model = prepared(make()).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    ids = torch.tensor([[1, 20, 30, 40]])
    model(input_ids=ids, labels=ids).loss.backward()
    # At the start B is zero, so only B has a gradient.
    grads = {n: w.grad for n, w in model.named_parameters() if "lora_B" in n}
    assert all(grad is not None and grad.any() for grad in grads.values())


def test_a_quantized_base_keeps_adapters_beside_it(make, tmp_path, kind):
    """And a base that is stored so cannot be quantized again, or merged into."""
    base_folder(tmp_path / "whole", **WIDE)
    small = load_model(tmp_path / "whole", quantize=kind)
    small.save_pretrained(tmp_path / "base")
    tiny.processor().save_pretrained(tmp_path / "base")
    train(make(name="run"))
    again = load_model(tmp_path / "run")
    assert any("lora_A" in name for name in again.state_dict())
    text = refused(lambda: merge_run(tmp_path / "run", tmp_path / "out"))
    assert "holds quantized weights" in text and "--base" in text
    text = refused(lambda: train(make(name="twice", lora={"quantize": kind})))
    assert "quantized weights already" in text


# --- stages ---------------------------------------------------------------------------------------


def test_stages_with_adapters_in_between(
    make, tmp_path, conversations, teacher_folder, monkeypatch
):
    """A pretrained folder, adapters with an aligner, merged, and a stage on top; or without merging."""
    keys = tiny.recipe_data(conversations, tmp_path / "pretrain", teacher=teacher_folder)
    train(tiny.recipe(tmp_path / "pretrain.yaml", keys))
    lora = make(base="pretrain", teacher=teacher_folder, name="lora")
    model = trained(lora, monkeypatch)
    assert isinstance(model, EveForPreTraining)
    given = weights_of(tmp_path / "lora")
    aligner = {name for name in given if ".aligner." in name}
    assert len(aligner) == len(model.aligner.state_dict()) > 0
    close(logits_of(load(tmp_path / "lora", device="cpu").model), logits_of(model))
    merge_run(tmp_path / "lora", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", config=load_config(tmp_path / "merged"))
    direct = load(tmp_path / "lora", device="cpu", aligner=True).model
    assert_equal(merged.state_dict(), direct.state_dict())
    assert_equal(merged.aligner.state_dict(), model.aligner.state_dict())
    for start in ("merged", "lora"):
        keys = tiny.recipe_data(
            conversations,
            tmp_path / f"on-{start}",
            teacher=teacher_folder,
            init_from=tmp_path / start,
        )
        train(tiny.recipe(tmp_path / f"on-{start}.yaml", keys))
    one, two = (load_file(tmp_path / f"on-{s}" / "model.safetensors") for s in ("merged", "lora"))
    assert_equal(one, two)
    # Adapters need a model of their own.
    text = refused(lambda: train(make(base="lora", name="again")))
    assert f"eve merge {tmp_path / 'lora'} MERGED" in text


def test_a_new_aligner_comes_from_the_adapter_folder(make, tmp_path, teacher_folder, monkeypatch):
    """The base has none; PEFT reads the folder all the same."""
    import peft

    model = trained(make(teacher=teacher_folder), monkeypatch)
    aligned = load(tmp_path / "run", device="cpu", aligner=True).model
    assert_equal(aligned.aligner.state_dict(), model.aligner.state_dict())
    theirs = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "run")
    assert torch.equal(logits_of(theirs), logits_of(model))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "overrides", "words"),
    [
        ({"rank": 0}, (), ("lora.rank", "above 0")),
        ({"alpha": -1.0}, (), ("lora.alpha", "above 0")),
        ({"dropout": 1.0}, (), ("lora.dropout", "below 1")),
        ({"target_modules": []}, (), ("lora.target_modules", "empty list")),
        ({"quantize": "nf4"}, ("devices.strategy=zero3",), ("lora.quantize", "zero3", "ddp")),
        ({"quantize": "int8"}, ("devices.strategy=fsdp2",), ("lora.quantize", "fsdp2")),
        ({}, ("model.init_from=null", "model.decoder=some/model"), ("lora", "`eve init`")),
        (
            {},
            ("model.init_from=null", "model.text_config={vocab_size: 300}"),
            ("lora", "`eve init`"),
        ),
    ],
    ids=str,
)
def test_recipes_that_are_refused(make, section, overrides, words):
    text = tiny.refused(lambda: make(*overrides, lora=section))
    assert all(word in text for word in words), text


def test_without_peft_it_says_how_to_get_it(make, tmp_path, monkeypatch):
    train(make())
    monkeypatch.setitem(sys.modules, "peft", None)
    for action in (
        lambda: train(make(name="other")),
        lambda: load(tmp_path / "run", device="cpu"),
    ):
        assert 'pip install "eve-vlm[lora]"' in tiny.refused(action)


def test_fits_knows_the_recipe_s_adapters(make, tmp_path, monkeypatch, capsys):
    make(lora={"rank": 6})
    arguments = ["fits", str(tmp_path / "run.yaml"), "--task", "train"]
    monkeypatch.setattr("sys.argv", ["eve", *arguments])
    main_of_command()
    assert "finetune, LoRA 6" in capsys.readouterr().out


def test_other_commands_take_a_run_as_the_model_it_makes(make, tmp_path, monkeypatch, capsys):
    train(make())
    for command, words in (
        (("inspect", tmp_path / "run"), ("50,368", "LoRA adapters")),
        (("fits", tmp_path / "run", "--task", "answer", "--length", "64"), ("it fits",)),
    ):
        monkeypatch.setattr("sys.argv", ["eve", *map(str, command)])
        main_of_command()
        shown = capsys.readouterr().out
        assert all(word in shown for word in words), shown


def test_an_adapter_for_another_architecture_does_not_attach(make, tmp_path):
    train(make())
    other = tiny.model(tiny.config(hidden_size=64, head_dim=16))
    text = refused(lambda: attach_adapter(other, tmp_path / "run", base="other"))
    assert "belongs to another model" in text
    assert find_base(tmp_path / "run").endswith("base")
