"""Packed rows record by record: the same as the library's masks, and as each record alone.

Tolerances are relative to the largest entry: float32 sums in another order differ by some 1e-6; a
record that sees another one differs by 1e-2 and more (the tiny decoders' weights are large).
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM

import small_decoders
import tiny
from eve_vlm import record_attention
from eve_vlm.record_attention import NAME, Records, records_of
from eve_vlm.train.build import attention_of

TOLERANCE = 1e-5
LENGTHS = [[7, 1, 12, 4], [3, 21]]  # of two rows
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def packed_rows():
    ids = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in LENGTHS])
    return ids, positions


def decoder(family, **more):
    settings = SHAPE | small_decoders.FAMILIES[family][0] | more
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings)).eval()


def run(model, attention, **inputs):
    """Logits and the gradient of the first matrix."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    logits = model(use_cache=False, **inputs).logits
    logits.square().mean().backward()
    weight = next(one for one in model.parameters() if one.ndim == 2)
    return logits.detach(), weight.grad.clone()


def close(one, other):
    assert (one - other).abs().max() < TOLERANCE * other.abs().max()


@pytest.mark.parametrize("family", list(small_decoders.FAMILIES))
def test_logits_and_gradients_are_those_of_the_masks(family):
    """With windows of 16 positions one record of 21 is longer than what it may see."""
    ids, positions = packed_rows()
    model = decoder(family)
    for inputs in (
        {"input_ids": ids, "position_ids": positions},
        {"input_ids": ids[:1], "position_ids": positions[:1]},
    ):
        masked = run(model, "eager", **inputs)
        for one, other in zip(run(model, NAME, **inputs), masked, strict=True):
            close(one, other)


def test_a_record_in_a_row_is_the_record_alone():
    ids, positions = packed_rows()
    model = decoder("llama")
    logits, _ = run(model, NAME, input_ids=ids, position_ids=positions)
    for row, sizes in enumerate(LENGTHS):
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            alone, _ = run(model, "eager", input_ids=ids[row : row + 1, part])
            close(logits[row, part], alone[0])
            start += size


def test_padded_rows_and_answers_go_the_old_way():
    ids, _ = packed_rows()
    model = decoder("llama")
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found, answers = [], []
    for attention in ("sdpa", NAME):
        found.append(run(model, attention, input_ids=ids, attention_mask=mask))
        given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        answers.append(model.generate(input_ids=ids, attention_mask=mask, **given))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(*answers)


def seen_by(family, **more):
    """What stood in the mask's place, layer by layer."""
    found = []

    def watched(module, query, key, value, attention_mask, **kwargs):
        found.append(attention_mask)
        return record_attention.attend_by_record(
            module, query, key, value, attention_mask, **kwargs
        )

    AttentionInterface.register(NAME, watched)
    try:
        ids, positions = packed_rows()
        run(decoder(family, **more), NAME, input_ids=ids, position_ids=positions)
    finally:
        record_attention.register()
    return found


def test_records_are_found_without_a_mask():
    for mask in seen_by("llama"):
        assert isinstance(mask, Records)
        assert mask.lengths == (7, 1, 12, 4, 3, 21)
        assert mask.bounds.tolist() == [0, 7, 8, 20, 24, 27, 48]


def test_windows_shorter_than_a_record_keep_their_mask():
    masks = seen_by("mistral")
    assert all(isinstance(mask, torch.Tensor) for mask in masks)
    longer = seen_by("mistral", sliding_window=21)
    assert all(isinstance(mask, Records) for mask in longer)


def test_what_looks_ahead_keeps_its_mask():
    """Blocks that see each other both ways, as pictures do in some decoders."""
    block = lambda b, h, q, k: (q // 4 == k // 4) | (k <= q)  # noqa: E731
    made = records_of(1, 8, 8, mask_function=block, allow_is_causal_skip=False)
    assert isinstance(made, torch.Tensor) and made.dtype == torch.bool
    assert made[0, 0, 0].tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), "sdpa"),
        (("data.packing={tokens: 256}",), NAME),
        (("data.packing={tokens: 256}", "model.attn_implementation=eager"), "eager"),
        (("data.packing={tokens: 256}", "model.compile_layers=true"), NAME),
    ],
)
def test_recipes_take_it_for_packed_rows(tmp_path, settings, expected):
    data = tiny.recipe_data(tiny.llava_file(tmp_path / "data", records=1), tmp_path / "run")
    assert attention_of(tiny.recipe(tmp_path / "recipe.yaml", data, *settings)) == expected


def test_what_the_one_kernel_is_given(monkeypatch):
    """In its place stands a loop over bounds, so that a machine without a GPU sees the layout."""

    def loop(query, key, value, begins, ends, longest, other, **causal):
        assert causal == record_attention.CAUSAL and longest == other == 21
        assert torch.equal(begins, ends) and begins.dtype == torch.int32
        made = []
        for start, end in itertools.pairwise(begins.tolist()):
            states = (each[start:end].transpose(0, 1)[None] for each in (query, key, value))
            made.append(F.scaled_dot_product_attention(*states, is_causal=True)[0].transpose(0, 1))
        return torch.cat(made)

    ids, positions = packed_rows()
    inputs = {"input_ids": ids, "position_ids": positions}
    model = decoder("llama")
    masked = run(model, "eager", **inputs)
    monkeypatch.setattr(record_attention, "_in_one_kernel", lambda *args, **kwargs: True)
    monkeypatch.setattr(record_attention, "varlen_attn", loop)
    for one, other in zip(run(model, NAME, **inputs), masked, strict=True):
        close(one, other)


@pytest.mark.gpu
def test_one_kernel_on_a_gpu_is_the_masks():
    """bfloat16: three decimal digits, and sums in another order."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    ids, positions = (part.cuda() for part in packed_rows())
    for family in ("llama", "smollm3"):
        model = decoder(family, initializer_range=0.02).to("cuda", torch.bfloat16)
        inputs = {"input_ids": ids, "position_ids": positions}
        for one, other in zip(
            run(model, NAME, **inputs), run(model, "eager", **inputs), strict=True
        ):
            assert (one - other).abs().max() < 0.03 * other.abs().max()
