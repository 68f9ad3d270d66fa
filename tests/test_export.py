"""Exported folders: used by a Python without this package, by this one, by PEFT's and llama.cpp's readers.

The other Python has no `eve_vlm` to import, which it asserts itself, before and after. One thing a
reader would get wrong: blocking the import is not enough for that, because an editable install puts our
sources on every path; the other Python starts without `site` and gets the libraries' folder alone.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.dynamic_module_utils import get_imports

import published
import small_decoders
import tiny
from eve_vlm import (
    EveConfig,
    EveForConditionalGeneration,
    EveForPreTraining,
    EveProcessor,
    EveVisionConfig,
    eve_grid,
)
from eve_vlm.cli import main
from eve_vlm.decoders.initialize import initialize
from eve_vlm.export.folder import export
from eve_vlm.loading import load_model, load_processor
from eve_vlm.published_eve import published_name
from oracle import patch_embedding as oracle
from test_architecture import HUB_LIBRARIES, HUB_OPTIONAL, SOURCE

refused = partial(tiny.refused, end=".")
SIZES = ((16, 40), (32, 24))
CONVERSATIONS = [tiny.conversation(question) for question in tiny.QUESTIONS[:2]]


def pictures():
    return [tiny.picture(*size, seed=seed) for seed, size in enumerate(SIZES)]


def answers(model, processor):
    """Logits of two pictures in one left-padded batch, greedy tokens, beams, picture tokens."""
    texts = [
        processor.apply_chat_template(one, add_generation_prompt=True) for one in CONVERSATIONS
    ]
    inputs = processor(
        images=pictures(), text=texts, padding=True, padding_side="left", return_tensors="pt"
    )
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        settings = {"max_new_tokens": 8, "do_sample": False}
        return {
            "logits": model(**inputs).logits,
            "tokens": model.generate(**inputs, **settings),
            "beams": model.generate(**inputs, **settings, num_beams=3, num_return_sequences=2),
            "features": torch.cat(list(features.pooler_output)),
            "rows": torch.tensor([len(one) for one in features.pooler_output]),
        }


def same(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])] == []


# --- a folder for people without this package -----------------------------------------------------

OTHER_PYTHON = """
import importlib.util, sys
assert importlib.util.find_spec("eve_vlm") is None
import torch
torch.set_num_threads(1)
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
folder, again, out, pictures = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
trust = {{"trust_remote_code": True}}
conversations = {conversations!r}

def answers(model, processor):
    texts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in conversations]
    opened = [Image.open(name) for name in pictures]
    inputs = processor(images=opened, text=texts, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        settings = {{"max_new_tokens": 8, "do_sample": False}}
        return {{
            "logits": model(**inputs).logits,
            "tokens": model.generate(**inputs, **settings),
            "beams": model.generate(**inputs, **settings, num_beams=3, num_return_sequences=2),
            "features": torch.cat(list(features.pooler_output)),
            "rows": torch.tensor([len(one) for one in features.pooler_output]),
        }}, inputs

done = {{}}
config = AutoConfig.from_pretrained(folder, **trust)
model = AutoModelForImageTextToText.from_pretrained(folder, **trust).eval()
processor = AutoProcessor.from_pretrained(folder, **trust)
done["first"], inputs = answers(model, processor)
headless = AutoModel.from_pretrained(folder, **trust).eval()
with torch.no_grad():
    done["hidden"] = headless(**inputs).last_hidden_state
pipe = pipeline("image-text-to-text", model=folder, **trust)
message = [{{"role": "user", "content": [{{"type": "image", "path": pictures[0]}}, {{"type": "text", "text": "Where is it?"}}]}}]
done["pipe"] = pipe(text=message, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
try:
    from transformers import AutoImageProcessor
    done["pixels"] = AutoImageProcessor.from_pretrained(folder, **trust)([Image.open(name) for name in pictures], return_tensors="pt")["pixel_values"]
except ImportError:
    done["pixels"] = None  # transformers 5.17 asks for torchvision
model.save_pretrained(again)
processor.save_pretrained(again)
done["again"], _ = answers(AutoModelForImageTextToText.from_pretrained(again, **trust).eval(), AutoProcessor.from_pretrained(again, **trust))
sizes = processor._get_num_multimodal_tokens(image_sizes=[opened.size[::-1] for opened in map(Image.open, pictures)])
done["counts"] = [list(sizes.num_image_tokens), list(sizes.num_image_patches)]
done["rows_of_pixels"] = inputs["image_grid_thw"].prod(-1).tolist()
done["emitted"] = sorted(set(inputs) - {{"input_ids", "attention_mask", "mm_token_type_ids"}})
offsets = processor(images=[Image.open(pictures[0])], text=["<image> a"], return_text_replacement_offsets=True)
done["offsets"] = "text_replacement_offsets" in offsets
done["classes"] = [type(model).__module__, type(config).__module__, type(processor).__module__, type(headless).__name__]
done["attention"] = model._supports_attention_backend
done["decoder"] = type(headless.get_decoder()).__name__
torch.save(done, out)
assert "eve_vlm" not in sys.modules and importlib.util.find_spec("eve_vlm") is None
"""


def run_elsewhere(code, *arguments, place):
    """Runs code in a Python that has the libraries and not this package."""
    libraries = place / "libraries"
    libraries.mkdir()
    for name in dict.fromkeys(["purelib", "platlib"]):
        for entry in Path(sysconfig.get_path(name)).iterdir():
            link = libraries / entry.name
            if "eve_vlm" not in entry.name and not link.exists():
                link.symlink_to(entry, target_is_directory=entry.is_dir())
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {
        "PYTHONPATH": str(libraries),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(place / "modules"),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    # -S leaves out `site`, and with it the .pth file of an editable install.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *map(str, arguments)],
        env=env,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,  # seconds, far above what it takes
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, saved_model):
    """The tiny model exported; read-only."""
    out = tmp_path_factory.mktemp("export") / "out"
    export(saved_model, out)
    return out


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, exported):
    """What the exported folder gave in a Python without this package, and where it was saved again."""
    place = tmp_path_factory.mktemp("elsewhere")
    files = []
    for index, one in enumerate(pictures()):
        files.append(place / f"{index}.png")
        one.save(files[-1])
    code = OTHER_PYTHON.format(conversations=CONVERSATIONS)
    run_elsewhere(code, exported, place / "again", place / "out.pt", *files, place=place)
    return torch.load(place / "out.pt"), place / "again"


def test_others_get_the_same_bits(elsewhere, exported):
    """Same files, same libraries, same machine: nothing may differ."""
    done, again = elsewhere
    assert same(done["first"], answers(load_model(exported).eval(), load_processor(exported)))
    assert same(done["again"], answers(load_model(again).eval(), load_processor(again)))


def test_others_get_the_model_that_was_exported(elsewhere, model, processor):
    """Logits up to 18: 1e-4, because products round by how a file's weights lie in memory (7e-6 seen)."""
    done, again = elsewhere
    here = answers(model, processor)
    for name in ("first", "again"):
        assert torch.equal(done[name]["tokens"], here["tokens"])
        assert torch.equal(done[name]["beams"], here["beams"])
        torch.testing.assert_close(done[name]["logits"], here["logits"], rtol=0, atol=1e-4)
    assert (
        len({tuple(row) for row in here["tokens"][:, -8:].tolist()}) == 2
    )  # no answer stands for all
    for name, weight in load_model(again).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_others_get_our_code_from_the_folder(elsewhere):
    done, _ = elsewhere
    *modules, headless = done["classes"]
    assert all(module.startswith("transformers_modules.") for module in modules)
    assert headless == "EveModel"


def test_others_get_pixels_and_hidden_states(elsewhere, exported, processor):
    done, _ = elsewhere
    model = load_model(exported)
    if done["pixels"] is not None:
        expected = processor.image_processor(pictures(), return_tensors="pt")["pixel_values"]
        assert torch.equal(done["pixels"], expected)
    assert torch.equal(model.lm_head(done["hidden"]).detach(), done["first"]["logits"])
    assert isinstance(done["pipe"], str)


def test_the_folder_keeps_what_servers_ask_for(elsewhere, exported):
    """What vLLM's transformers backend asks of a folder and its classes, as far as it needs no vLLM."""
    done, _ = elsewhere
    auto_map = json.loads((exported / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_eve.EveModel"
    assert {"AutoConfig", "AutoProcessor", "AutoModelForImageTextToText"} <= auto_map.keys()
    assert done["attention"] and done["decoder"] == "LlamaModel"
    # One tensor per picture, patches by the grid, and nothing else that is per picture.
    tokens, patches = done["counts"]
    assert done["first"]["rows"].tolist() == tokens
    assert done["rows_of_pixels"] == patches
    assert done["emitted"] == ["image_grid_thw", "pixel_values"]
    assert done["offsets"]


def test_saved_elsewhere_it_still_brings_its_code(elsewhere, exported):
    _, again = elsewhere
    assert {file.name for file in exported.glob("*.py")} == {
        file.name for file in again.glob("*.py")
    }
    ours, theirs = (
        json.loads((folder / "config.json").read_text())["auto_map"] for folder in (exported, again)
    )
    assert ours == theirs


def test_the_code_is_whole_and_needs_only_the_library(exported):
    """Every relative import of a copied file is copied too, and none asks for this package."""
    files = {file.stem: file for file in exported.glob("*.py")}
    assert {"configuration_eve", "modeling_eve", "processing_eve"} <= files.keys()
    assert "language_loss_eve" in files
    assert not {"alignment_eve", "loading"} & files.keys()
    for name, file in files.items():
        assert file.read_bytes() == (SOURCE / f"{name}.py").read_bytes()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in files, f"{name}: {ast.unparse(node)}"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                outside = (
                    [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else [a.name for a in node.names]
                )
                for module in outside:
                    top = module.split(".")[0]
                    known = HUB_LIBRARIES | HUB_OPTIONAL | sys.stdlib_module_names
                    assert top in known, f"{name}: {module}"
        # What the library itself asks for before it loads the file.
        assert not HUB_OPTIONAL & set(get_imports(file))


def test_here_the_folder_needs_no_remote_code(exported):
    again = AutoModelForImageTextToText.from_pretrained(exported).eval()
    processor = AutoProcessor.from_pretrained(exported)
    assert type(again) is EveForConditionalGeneration and type(processor) is EveProcessor
    expected = answers(load_model(exported).eval(), load_processor(exported))
    assert same(answers(again, processor), expected)


def test_exporting_leaves_no_marks_on_the_classes(exported, tmp_path, model, processor):
    assert EveConfig._auto_class is None and EveForConditionalGeneration._auto_class is None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in (tmp_path / "config.json").read_text()


def test_the_card_has_facts_and_no_licence(exported, model):
    text = (exported / "README.md").read_text()
    assert f"{model.num_parameters():,}" in text and "trust_remote_code=True" in text
    assert "\nlicense:" not in text


def test_no_place_of_this_machine_is_in_the_folder(exported, saved_model):
    for file in exported.iterdir():
        if file.suffix in (".json", ".md", ".jinja"):
            assert str(saved_model.parent) not in file.read_text(), file.name


def test_files_can_be_read_by_others(exported):
    """Safetensors alone would be 0600."""
    mask = os.umask(0)
    os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in exported.iterdir()} == {0o666 & ~mask}


def test_shards_and_dtype(tmp_path, saved_model, model):
    """Half the bytes, in files of at most 60 kB; rounding to bfloat16 is torch's own."""
    export(saved_model, tmp_path / "out", dtype="bfloat16", shard_size="60KB")
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 1 and max(sizes) < 70_000  # with a header of up to 10 kB
    again = load_model(tmp_path / "out")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.to(torch.bfloat16)), name


def test_the_aligner_stays_behind(tmp_path, processor):
    trained = tiny.model(tiny.config(aligned=True))
    assert isinstance(trained, EveForPreTraining)
    trained.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    done = export(tmp_path / "trained", tmp_path / "out")
    assert any("aligner" in note for note in done.notes)
    again = load_model(tmp_path / "out")
    assert again.config.alignment_config is None
    assert not [name for name in again.state_dict() if "aligner" in name]


# --- LoRA -----------------------------------------------------------------------------------------

DECODER = r".*language_model.*\.(q_proj|v_proj|down_proj)"
PICTURE_PARTS = ("model.vision_tower", "model.multi_modal_projector")


def trained_adapter(folder, *, base, steps=2, **settings):
    """Two steps of PEFT on a tiny model, saved; returns logits of the trained PEFT model, in eval mode."""
    peft = pytest.importorskip("peft", reason="needs the extra lora")
    settings = {"target_modules": DECODER, "modules_to_save": list(PICTURE_PARTS)} | settings
    processor = load_processor(base)
    inputs = training_inputs(processor)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        wrapped = peft.get_peft_model(
            load_model(base), peft.LoraConfig(r=4, lora_alpha=16, **settings)
        )
        optimizer = torch.optim.SGD([w for w in wrapped.parameters() if w.requires_grad], lr=0.05)
        for _ in range(steps):
            wrapped.train()
            wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    wrapped.save_pretrained(folder)
    with torch.no_grad():
        return wrapped.eval()(**inputs).logits


def training_inputs(processor):
    texts = [
        processor.apply_chat_template(one, add_generation_prompt=True) for one in CONVERSATIONS
    ]
    inputs = processor(images=pictures(), text=texts, padding=True, return_tensors="pt")
    return {
        name: inputs[name]
        for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    }


def logits_of(folder):
    with torch.no_grad():
        return load_model(folder).eval()(**training_inputs(load_processor(folder))).logits


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, saved_model):
    """An adapter that trained decoder and picture parts, and what it answers; read-only."""
    folder = tmp_path_factory.mktemp("adapter")
    return folder, trained_adapter(folder, base=saved_model)


def copy_of(adapter, folder):
    folder.mkdir()
    for file in adapter[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change_weights(folder, change):
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


def test_a_merged_adapter_answers_like_the_adapter(tmp_path, saved_model, adapter):
    """1e-5 of the largest logit: x(W + BA) rounds otherwise than xW + (xA)B (6e-6 of 7.4 seen)."""
    folder, expected = adapter
    done = export(saved_model, tmp_path / "out", lora=folder)
    merged = logits_of(tmp_path / "out")
    scale = expected.abs().max().item()
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5 * scale)
    # It has learnt something, in both parts, and what it learnt about pictures is there bit by bit.
    assert (logits_of(saved_model) - expected).abs().max() > 1e-2 * scale
    before, after = (load_model(one).state_dict() for one in (saved_model, tmp_path / "out"))
    trained = load_file(folder / "adapter_model.safetensors")
    for part in PICTURE_PARTS:
        names = [name for name in after if name.startswith(part)]
        assert names and all(
            torch.equal(after[name], trained[f"base_model.model.{name}"]) for name in names
        )
        assert any(not torch.equal(after[name], before[name]) for name in names)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name.split(".")[-2] for name in changed if "language_model" in name} == {
        "q_proj",
        "v_proj",
        "down_proj",
    }
    assert any(note.startswith("patch embedding: 19 weights replaced") for note in done.notes)
    assert any(note.startswith("decoder: LoRA merged") for note in done.notes)
    assert before.keys() == after.keys()


def test_an_adapter_for_the_decoder_alone_leaves_the_pictures_alone(tmp_path, saved_model):
    expected = trained_adapter(tmp_path / "adapter", base=saved_model, modules_to_save=None)
    done = export(saved_model, tmp_path / "out", lora=tmp_path / "adapter")
    atol = 1e-5 * expected.abs().max().item()  # as above
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=0, atol=atol)
    assert "patch embedding: as in the model; the adapter has none." in done.notes


def test_lora_on_the_projector_is_merged_too(tmp_path, saved_model):
    expected = trained_adapter(
        tmp_path / "adapter",
        base=saved_model,
        target_modules=r".*(language_model.*q_proj|multi_modal_projector\.linear_\d)",
        modules_to_save=None,
    )
    done = export(saved_model, tmp_path / "out", lora=tmp_path / "adapter")
    atol = 1e-5 * expected.abs().max().item()  # as above
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=0, atol=atol)
    assert "projector: LoRA merged." in done.notes


@pytest.mark.parametrize("trained", ["head", "embedding"])
def test_a_shared_embedding_is_parted_where_training_parted_it(tmp_path, processor, trained):
    """Saved as shared, one of the two would be lost without a word."""
    base = tmp_path / "base"
    tiny.model(tiny.config(tie_word_embeddings=True)).save_pretrained(base)
    processor.save_pretrained(base)
    settings = (
        {"modules_to_save": ["lm_head"]}
        if trained == "head"
        else {"modules_to_save": None, "target_modules": ["embed_tokens", "q_proj"]}
    )
    expected = trained_adapter(tmp_path / "adapter", base=base, **settings)
    done = export(base, tmp_path / "out", lora=tmp_path / "adapter")
    atol = 1e-5 * expected.abs().max().item()  # as above
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=0, atol=atol)
    assert not load_model(tmp_path / "out").config.tie_word_embeddings
    assert "which the model shares" in done.notes[-1]


def test_a_shared_embedding_stays_shared(tmp_path, processor):
    base = tmp_path / "base"
    tiny.model(tiny.config(tie_word_embeddings=True)).save_pretrained(base)
    processor.save_pretrained(base)
    trained_adapter(tmp_path / "adapter", base=base)
    export(base, tmp_path / "out", lora=tmp_path / "adapter")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert load_model(tmp_path / "out").config.tie_word_embeddings


def test_half_precision_stays_half_precision(tmp_path, saved_model, adapter):
    """PEFT keeps replaced parts in float32; in one folder there is one type."""
    export(saved_model, tmp_path / "base" / saved_model.name, dtype="bfloat16")
    export(tmp_path / "base" / saved_model.name, tmp_path / "out", lora=adapter[0])
    kinds = {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert kinds == {torch.bfloat16}


def spoil(kind, folder):
    if kind == "picture weights missing":
        change_weights(
            folder, lambda w: [w.pop(name) for name in list(w) if "vision_tower" in name]
        )
    elif kind == "one weight missing":
        change_weights(folder, lambda w: w.pop(next(name for name in w if "lora_B" in name)))
    elif kind == "surplus":
        change_weights(
            folder, lambda w: w.update({"base_model.model.model.more.weight": torch.ones(1)})
        )
    elif kind == "another shape":
        name = "base_model.model.model.vision_tower.class_embedding"
        change_weights(folder, lambda w: w.update({name: torch.ones(5)}))
    elif kind == "not a number":
        change_weights(folder, lambda w: w[next(n for n in w if "lora_B" in n)].fill_(float("nan")))
    elif kind == "truncated":
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:500])
    elif kind == "weights elsewhere":
        (folder / "non_lora_trainables.bin").write_bytes(b"x")
    elif kind == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    elif kind == "no adapter":
        (folder / "adapter_config.json").unlink()
    else:
        change_settings(folder, **kind)


def change_settings(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("picture weights missing", ("lacks 19 weights", "model.vision_tower.")),
        ("one weight missing", ("lacks 1 weights", "lora_B")),
        ("surplus", ("no place for (model.more.weight)",)),
        ("another shape", ("(5,) there and (24,) here",)),
        ("not a number", ("NaN", "earlier checkpoint")),
        ("truncated", ("cannot be read",)),
        ("weights elsewhere", ("non_lora_trainables.bin", "modules_to_save")),
        ("no weights", ("no adapter_model.safetensors",)),
        ("no adapter", ("no adapter_config.json",)),
        ({"peft_type": "PROMPT_TUNING"}, ("PROMPT_TUNING", "only LoRA")),
        ({"base_model_name_or_path": "models/other"}, ("trained on models/other", "--any-base")),
        ({"target_modules": "nothing_like_it"}, ("No modules were targeted", "does not fit")),
    ],
    ids=str,
)
def test_adapters_that_are_refused(tmp_path, saved_model, adapter, kind, words):
    folder = copy_of(adapter, tmp_path / "adapter")
    spoil(kind, folder)
    text = refused(lambda: export(saved_model, tmp_path / "out", lora=folder))
    assert all(word in text for word in words), text
    assert [one.name for one in tmp_path.iterdir()] == ["adapter"]


def test_a_renamed_base_is_taken_where_that_is_said(tmp_path, saved_model, adapter):
    folder = copy_of(adapter, tmp_path / "adapter")
    change_settings(folder, base_model_name_or_path="models/other")
    export(saved_model, tmp_path / "out", lora=folder, any_base=True)
    change_settings(folder, base_model_name_or_path=f"elsewhere/{saved_model.name}")
    export(saved_model, tmp_path / "moved", lora=folder)
    change_settings(folder, base_model_name_or_path=None)
    done = export(saved_model, tmp_path / "unnamed", lora=folder)
    assert "does not say which model" in done.notes[-1]


def test_an_adapter_for_a_wider_model_is_refused(tmp_path, processor, adapter):
    base = tmp_path / "base"
    tiny.model(tiny.config(hidden_size=64, head_dim=16)).save_pretrained(base)
    processor.save_pretrained(base)
    text = refused(lambda: export(base, tmp_path / "out", lora=adapter[0], any_base=True))
    assert "do not fit" in text and "another model" in text


# --- the decoder alone ----------------------------------------------------------------------------


def text_answers(model, tokenizer, template):
    """Greedy tokens to two questions without pictures, one by one."""
    answers = []
    for question in tiny.QUESTIONS[:2]:
        message = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        text = tokenizer.apply_chat_template(
            message, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        answers.append(model.generate(**ids, max_new_tokens=12, do_sample=False)[0].tolist())
    return answers


@pytest.mark.parametrize("beyond", [False, True], ids=["row", "no row"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "shared head"])
def test_the_decoder_folder_gives_the_same_text(tmp_path, processor, beyond, tied):
    """Same tokens, from a folder that knows nothing of EVE; also for a placeholder without a row."""
    words = processor.tokenizer
    of = tiny.config(tie_word_embeddings=tied)
    if beyond:
        words = tiny.tokenizer()
        words.add_special_tokens({"additional_special_tokens": ["<picture>"]})
        of.text_config.vocab_size = len(words) - 1
        of.image_token_id = len(words) - 1
        processor = EveProcessor(processor.image_processor, words, image_token="<picture>")
    tiny.model(of).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "out", format="decoder")
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(decoder).__name__ == "LlamaForCausalLM"
    here = load_model(tmp_path / "model").eval()
    expected = text_answers(here, words, processor.chat_template)
    assert text_answers(decoder, tokenizer, None) == expected
    assert decoder.get_input_embeddings().num_embeddings == of.text_config.vocab_size
    assert ("<picture>" in tokenizer.get_vocab()) is False
    assert max(tokenizer.get_vocab().values()) < of.text_config.vocab_size
    assert any("<picture>" in note for note in done.notes) is beyond
    text = "what is this? <s> USER: one"
    assert tokenizer.encode(text) == words.encode(text)


@pytest.mark.parametrize("kind", small_decoders.FAMILIES)
def test_decoders_of_all_families_come_out_as_they_went_in(tmp_path, kind):
    """Weights of the language model that was there first, bit by bit; rows were only added."""
    llm = small_decoders.decoder_folder(tmp_path / "llm", kind)
    vision = EveVisionConfig(hidden_size=24, num_attention_heads=8)
    initialize(llm, tmp_path / "model", vision=vision, longest_edge=56)
    export(tmp_path / "model", tmp_path / "out", format="decoder")
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / one) for one in ("llm", "out"))
    assert type(before) is type(after)
    expected, found = before.state_dict(), after.state_dict()
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name][: len(weight)], weight), name
    ids = torch.tensor([[5, 17, 30, 40]])
    with torch.no_grad():
        logits, whole = after(ids).logits, load_model(tmp_path / "model")(ids).logits
    # 1e-4 of logits of about 10: products round by how a file's weights lie in memory.
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == (
        tmp_path / "model" / "chat_template.jinja"
    ).read_text()


@pytest.mark.parametrize("format", ["transformers", "decoder"])
def test_published_checkpoints_are_exported_in_our_layout(tmp_path, format):
    """The decoder's names are the library's, and the placeholder, which has no row, is left out."""
    config = published.tiny_config()
    folder = published.write(
        tmp_path / "EVE-7B-v1.0", config, published.tiny_weights(config), kind="bin"
    )
    done = export(folder, tmp_path / "out", format=format)
    here = load_model(folder)
    if format == "transformers":
        again = load_model(tmp_path / "out")
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert stored.keys() == here.state_dict().keys()
    else:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert len(tokenizer) <= config["vocab_size"] == here.config.image_token_id
        assert done.notes[-1] == "The token <image> has no row in the embedding and was left out."
    ids = torch.tensor([[1, 17, 30, 40]])
    with torch.no_grad():
        logits, expected = again(ids).logits, here(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)  # as above


# --- GGUF -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def side_file(tmp_path_factory, model, processor):
    """Settings and weights of the patch embedding's file, as the gguf package reads them."""
    from eve_vlm.export.decoder import write_patch_embedding

    file = tmp_path_factory.mktemp("gguf") / "patch_embedding.gguf"
    write_patch_embedding(model, processor, file)
    reader = gguf.GGUFReader(file)
    settings = {field.name: field.contents() for field in reader.fields.values()}
    weights = {one.name: torch.tensor(np.array(one.data)) for one in reader.tensors}
    return settings, weights


def test_the_side_file_is_enough_to_compute_picture_tokens(side_file, model):
    """By the slow loops, from nothing but the file; 1e-5 of the largest value, as between any two orders of float32 sums."""
    settings, weights = side_file
    official = {published_name(f"model.{name}"): weight for name, weight in weights.items()}
    image = tiny.picture(16, 40)
    grid = eve_grid(
        image.height,
        image.width,
        longest_edge=settings["eve.picture.size.longest_edge"],
        size_multiple=settings["eve.picture.size_multiple"],
        patch_size=settings["eve.vision.patch_size"],
        merge_size=settings["eve.vision.merge_size"],
    )
    pixels = np.asarray(
        image.resize((grid.width, image.height), settings["eve.picture.resample"]).resize(
            (grid.width, grid.height), settings["eve.picture.resample"]
        )
    )
    pixels = pixels * settings["eve.picture.rescale_factor"] - settings["eve.picture.image_mean"]
    pixels = torch.tensor(pixels / settings["eve.picture.image_std"]).float().permute(2, 0, 1)
    tower = oracle.select(official, "model.vision_tower.")
    tokens = oracle.project(
        oracle.embed(pixels, tower).sequence, oracle.select(official, "model.mm_projector.")
    )
    inputs = tiny.processor().image_processor([image], return_tensors="pt")
    expected = model.get_image_features(**inputs).last_hidden_state.detach()
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_the_side_file_has_every_weight_and_setting(side_file, model, processor):
    settings, weights = side_file
    wanted = {
        name.removeprefix("model."): weight
        for name, weight in model.state_dict().items()
        if name.startswith(PICTURE_PARTS)
    }
    assert wanted.keys() == weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in wanted.items())
    pictures = processor.image_processor
    assert settings["general.architecture"] == "eve-patch-embedding"
    assert settings["eve.image_token_id"] == 3 and settings["eve.image_token"] == "<image>"
    assert settings["eve.vision.layer_norm_eps"] == model.config.vision_config.layer_norm_eps
    assert settings["eve.picture.image_mean"] == list(pictures.image_mean)
    assert settings["eve.picture.image_std"] == list(pictures.image_std)
    assert settings["eve.vision.num_attention_heads"] == 8
    assert settings["eve.decoder.hidden_size"] == tiny.WIDTH


def test_half_precision_weights_are_float32_in_the_side_file(tmp_path, processor):
    from eve_vlm.export.decoder import write_patch_embedding

    write_patch_embedding(tiny.model().to(torch.bfloat16), processor, tmp_path / "file.gguf")
    kinds = {one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "file.gguf").tensors}
    assert kinds == {"F32"}


FAKE_CONVERTER = """
import argparse, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--outfile")
parser.add_argument("--outtype")
given = parser.parse_args()
assert (pathlib.Path(given.model) / "tokenizer.json").is_file()
{body}
"""


def llama_cpp(folder, body):
    """A folder with a stand-in for the converter, which takes the arguments that ours gives."""
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(FAKE_CONVERTER.format(body=body))
    return folder


def test_gguf_is_two_files_and_a_card(tmp_path, saved_model):
    body = "pathlib.Path(given.outfile).write_text(given.outtype + pathlib.Path(given.model).name)"
    tools = llama_cpp(tmp_path / "tools", body)
    done = export(saved_model, tmp_path / "out", format="gguf", dtype="float16", llama_cpp=tools)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "decoder.gguf", "patch_embedding.gguf"}
    assert (tmp_path / "out" / "decoder.gguf").read_text() == "f16" + saved_model.name
    assert "no program reads patch_embedding.gguf yet" in done.notes[-1]


@pytest.mark.parametrize(
    "body", ["raise SystemExit('one line\\nthe last line.')", "print('did nothing')"]
)
def test_a_converter_that_refuses(tmp_path, saved_model, body):
    tools = llama_cpp(tmp_path / "tools", body)
    text = refused(lambda: export(saved_model, tmp_path / "out", format="gguf", llama_cpp=tools))
    assert ("(the last line)" in text) is ("SystemExit" in body) and "--format decoder" in text
    assert [one.name for one in tmp_path.iterdir()] == ["tools"]


@pytest.mark.slow
def test_the_real_converter(tmp_path):
    """Every decoder weight is in the file bit by bit; the converter reorders the rows of q and k."""
    tools = os.environ.get("LLAMA_CPP")
    if not tools:
        pytest.skip("needs llama.cpp's source; name its folder in LLAMA_CPP")
    # A vocabulary that the converter knows, from llama.cpp's own test files.
    words = AutoTokenizer.from_pretrained(Path(tools) / "models", gguf_file="ggml-vocab-gpt-2.gguf")
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    of = tiny.config(vocab_size=len(words) - 1)
    of.image_token_id = len(words) - 1
    here = tiny.model(of)
    here.save_pretrained(tmp_path / "model")
    template = tiny.tokenizer().chat_template
    EveProcessor(tiny.processor().image_processor, words, chat_template=template).save_pretrained(
        tmp_path / "model"
    )
    export(tmp_path / "model", tmp_path / "out", format="gguf", llama_cpp=tools)
    reader = gguf.GGUFReader(tmp_path / "out" / "decoder.gguf")
    found = {one.name: torch.tensor(np.array(one.data)) for one in reader.tensors}
    layer = here.model.language_model.layers[0]
    assert torch.equal(found["token_embd.weight"], here.get_input_embeddings().weight)
    assert torch.equal(found["output.weight"], here.lm_head.weight)
    assert torch.equal(found["blk.0.ffn_up.weight"], layer.mlp.up_proj.weight)
    rows = layer.self_attn.q_proj.weight.unflatten(0, (4, 2, 4)).transpose(1, 2).reshape(32, 32)
    assert torch.equal(found["blk.0.attn_q.weight"], rows)
    # And the library's own reader makes the same model of it.
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="decoder.gguf", dtype=torch.float32
    ).eval()
    ids = torch.tensor([[5, 17, 300, 4000]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, here(ids).logits, rtol=0, atol=1e-4)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "onnx"}, "transformers, decoder, gguf"),
        ({"dtype": "int4"}, "float32, bfloat16, float16"),
        ({"shard_size": "big"}, "500MB"),
        ({"shard_size": "0GB"}, "500MB"),
        ({"format": "gguf"}, "--llama-cpp"),
        ({"format": "gguf", "llama_cpp": "."}, "convert_hf_to_gguf.py"),
    ],
    ids=str,
)
def test_settings_that_are_refused(tmp_path, saved_model, settings, words, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert words in refused(lambda: export(saved_model, tmp_path / "out", **settings))
    assert not list(tmp_path.iterdir())


def test_no_model(tmp_path):
    assert "is no folder" in refused(lambda: export(tmp_path / "nowhere", tmp_path / "out"))


def test_a_folder_with_something_in_it_is_never_written_into(tmp_path, saved_model):
    (tmp_path / "out").mkdir()
    export(saved_model, tmp_path / "out")  # empty: taken
    text = refused(lambda: export(saved_model, tmp_path / "out"))
    assert "is there already" in text
    (tmp_path / "file").write_text("x")
    assert "is there already" in refused(lambda: export(saved_model, tmp_path / "file"))


def test_too_little_disk(tmp_path, saved_model, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    text = refused(lambda: export(saved_model, tmp_path / "deep" / "out"))
    assert "0.07 GB" in text and "0.00 GB" in text
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, saved_model, adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    text = tiny.refused(lambda: export(saved_model, tmp_path / "out", lora=adapter[0]))
    assert 'pip install "eve-vlm[' in text
    assert not (tmp_path / "out").exists()


def test_a_stop_half_way_leaves_nothing(tmp_path, saved_model, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("eve_vlm.export.folder._write_card", stop)
    with pytest.raises(KeyboardInterrupt):
        export(saved_model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, saved_model, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["eve", "export", str(saved_model), "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None)
    assert "50,368 parameters" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").is_file()
