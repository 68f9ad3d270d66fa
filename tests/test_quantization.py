"""Decoder weights in 8 and 4 bits: what is quantized, what is not, and that batches stay batches.

Independent side: the unquantized model's weights and answers. One thing a reader would get wrong:
answers of quantized weights are other answers; what must hold is that they do not depend on who else
is in the batch, and that pictures become the same tokens as before, bit for bit.
"""

import random

import pytest
import torch

import published
import tiny
from conversations import random_question
from eve_vlm import EveForConditionalGeneration, EveVisionConfig, load
from eve_vlm.decoders.initialize import initialize
from eve_vlm.quantization import FULL_PRECISION, KINDS, is_quantized, quantization_config
from eve_vlm.serve.engine import EveEngine
from small_decoders import decoder_folder

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A saved model whose matrices are large enough for blocks of 64 weights; read-only."""
    folder = tmp_path_factory.mktemp("wide")
    config = tiny.config(hidden_size=64, intermediate_size=128, head_dim=16)
    tiny.model(config).save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def kind(request):
    pytest.importorskip(PACKAGES[request.param], reason="needs the extra quantize")
    return request.param


def test_pictures_stay_as_they_were(wide, kind):
    """Patch embedding, projector and head bit for bit; every matrix of the decoder in fewer bits."""
    plain, small = load(wide, device="cpu").model, load(wide, device="cpu", quantize=kind).model
    given = tiny.packed([(3, 4), (1, 2)])
    assert torch.equal(
        plain.get_image_features(**given).last_hidden_state,
        small.get_image_features(**given).last_hidden_state,
    )
    before = plain.state_dict()
    kept = [name for name in before if name.startswith(("model.vision_tower", *FULL_PRECISION))]
    assert len(kept) > 10 and "lm_head.weight" in kept
    now = dict(small.named_parameters()) | dict(small.named_buffers())
    for name in kept:
        assert not is_quantized(now[name]) and torch.equal(now[name], before[name]), name
    matrices = [
        name
        for name, weight in small.model.language_model.named_parameters()
        if "proj" in name and is_quantized(weight)
    ]
    assert len(matrices) == 7 * tiny.LAYERS


def test_batches_answer_as_each_alone(wide, kind):
    engine = EveEngine.from_pretrained(wide, device="cpu", quantize=kind)
    rng = random.Random(0)
    for _ in range(10):
        batch = [random_question(rng, turns=2) for _ in range(4)]
        together = engine.answer(batch, max_new_tokens=4)
        alone = [engine.answer([one], max_new_tokens=4)[0] for one in batch]
        assert [one.token_ids for one in together] == [one.token_ids for one in alone]


def test_likelihoods_move_little(wide, kind):
    """Large random weights magnify it: 8 bits below 0.2 on average, 4 bits 1.2; none would be 0."""
    plain = EveEngine.from_pretrained(wide, device="cpu")
    small = EveEngine.from_pretrained(wide, device="cpu", quantize=kind)
    rng, gaps = random.Random(1), []
    for _ in range(6):
        prompt = plain.encode(random_question(rng, turns=1))
        with torch.no_grad():
            rows = [
                engine.model(prompt.input_ids[None], **prompt.pictures_from(0)).logits.log_softmax(
                    -1
                )
                for engine in (plain, small)
            ]
        best = rows[0].argmax(-1, keepdim=True)
        gaps.append((rows[0] - rows[1]).gather(-1, best).abs().mean().item())
    assert 0 < sum(gaps) / len(gaps) < {"int8": 0.2, "nf4": 2.0}[kind]


def test_published_checkpoints(tmp_path, kind):
    """Their names are mapped while they load; their matrices are quantized all the same."""
    config = published.tiny_config()
    published.write(tmp_path, config, published.tiny_weights(config), kind="bin")
    plain = load(tmp_path, device="cpu").model
    model = load(tmp_path, device="cpu", quantize=kind).model
    assert any(is_quantized(weight) for weight in model.model.language_model.parameters())
    for name, weight in model.model.vision_tower.named_parameters():
        assert torch.equal(weight, plain.model.vision_tower.get_parameter(name))


def test_saved_and_loaded_again(wide, kind, tmp_path, monkeypatch):
    """The folder says what it holds: the same answers, smaller files, no second quantization."""
    small = EveEngine.from_pretrained(wide, device="cpu", quantize=kind)
    small.model.save_pretrained(tmp_path)
    small.processor.save_pretrained(tmp_path)
    again = EveEngine.from_pretrained(tmp_path, device="cpu")
    rng = random.Random(2)
    asked = [random_question(rng, turns=1) for _ in range(6)]
    assert again.generate(asked, max_new_tokens=4) == small.generate(asked, max_new_tokens=4)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, wide)]
    assert sizes[0] < 0.7 * sizes[1]
    assert "quantized weights already" in tiny.refused(
        lambda: load(tmp_path, device="cpu", quantize=kind), end="."
    )
    monkeypatch.setattr(EveForConditionalGeneration, "from_pretrained", missing_package)
    assert 'pip install "eve-vlm[quantize]"' in tiny.refused(
        lambda: load(tmp_path, device="cpu"), end="."
    )


def missing_package(*arguments, **settings):
    raise ImportError("No module named 'somewhere'")


def test_matrices_that_are_passed_over_are_named(tmp_path):
    """GPT-2's are of a layer class of its own, which torchao leaves as they are."""
    pytest.importorskip("torchao", reason="needs the extra quantize")
    decoder = decoder_folder(tmp_path / "decoder", "gpt2")
    vision = EveVisionConfig(patch_size=4, merge_size=2, hidden_size=24, num_attention_heads=4)
    initialize(decoder, tmp_path / "new", vision=vision, longest_edge=tiny.EDGE)
    text = tiny.refused(lambda: load(tmp_path / "new", device="cpu", quantize="int8"), end=".")
    assert "8 matrices of this gpt2 decoder (h.0.attn.c_attn.weight" in text


def test_mistakes_are_one_sentence(wide, monkeypatch):
    assert "give one of int8, nf4" in tiny.refused(lambda: load(wide, quantize="int3"), end=".")
    monkeypatch.setattr("eve_vlm.quantization.is_torchao_available", lambda: False)
    text = tiny.refused(lambda: quantization_config("int8", torch.float32), end=".")
    assert "need torchao" in text and 'pip install "eve-vlm[quantize]"' in text
