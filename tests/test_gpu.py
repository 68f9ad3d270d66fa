"""What holds on a CPU holds on a GPU: the same losses and gradients, the same tokens, no more waits.

Left out without a CUDA device.  Independent side: the same model on the CPU, or each record alone.
One thing a reader would get wrong: float32 products on a GPU are rounded to TF32 where a process
allows it, which is 2,000 times coarser; here nothing allows it, so tolerances can be those of
float32.
"""

import copy
import random
import warnings
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import step_counts
import tiny
from conversations import random_question
from eve_vlm import load, record_attention
from eve_vlm.bench.measuring import Clock
from eve_vlm.bench.roof import measured_roof
from eve_vlm.layer_taps_eve import layers_of
from eve_vlm.peaks import gpu_peak
from eve_vlm.quantization import KINDS
from eve_vlm.serve.engine import EveEngine

pytestmark = pytest.mark.gpu
GPU = "cuda"
ATTENTIONS = ("sdpa", "eager", "flex_attention", record_attention.NAME)
# Sums in another order, through three layers with large weights: seen on a CPU between kernels 3e-6.
SAME = 5e-5
GRIDS = ((4, 4), (2, 3), (1, 4), (3, 3))
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


@pytest.fixture(autouse=True)
def exact():
    """Whole float32 products, whatever ran before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def made(attention="sdpa", *, aligned=True, **text):
    """Heads of 32, as flex attention wants at least 16."""
    config = tiny.config(aligned=aligned, hidden_size=128, head_dim=32, **text)
    return tiny.model(config, attn_implementation=attention)


def record(index):
    """Ids, labels, picture and teacher's features of one record."""
    rows, cols = GRIDS[index]
    count = 1 + rows * (cols + 1)
    # Alone up to 64 positions, in one row more than 128: between them torch 2.11 has no kernel of
    # flex attention for heads that share keys (its block of rows is wider than the mask's).
    ids = torch.tensor([1] + [3] * count + list(range(5 + index, 35 + 2 * index)))
    labels = ids.masked_fill(ids == 3, -100)
    labels[0] = -100
    generator = torch.Generator().manual_seed(index)
    features = torch.randn(rows * cols, tiny.TEACHER_WIDTH, generator=generator)
    return ids, labels, tiny.packed([GRIDS[index]], seed=index), features


def batch_of(indices, *, packed):
    """Some records in one packed row, or in padded rows."""
    found = [record(index) for index in indices]
    pictures = {
        name: torch.cat([one[2][name] for one in found])
        for name in ("pixel_values", "image_grid_thw")
    }
    rest = pictures | {"teacher_features": torch.cat([one[3] for one in found])}
    ids, labels = [one[0] for one in found], [one[1] for one in found]
    if packed:
        positions = torch.cat([torch.arange(len(one)) for one in ids])[None]
        return rest | {
            "input_ids": torch.cat(ids)[None],
            "labels": torch.cat(labels)[None],
            "position_ids": positions,
        }
    pad = torch.nn.utils.rnn.pad_sequence
    return rest | {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True),
    }


def on(device, batch):
    """A batch there."""
    return {name: value.to(device) for name, value in batch.items()}


def stepped(model, batch, *, dtype=None):
    """Losses by term, and every gradient on the CPU, of one step in train mode."""
    model.train().zero_grad()
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        out = model(**on(device, batch))
    out.loss.backward()
    gradients = {name: weight.grad.float().cpu() for name, weight in model.named_parameters()}
    return {name: float(term) for name, term in out.loss_terms.items()}, gradients


def assert_same_step(found, expected):
    """Losses to `SAME`; gradients to 5e-4 of the largest in their tensor, as sums are longer.

    Seen on an H200: 1.6e-4.
    """
    for name, term in expected[0].items():
        assert found[0][name] == pytest.approx(term, abs=SAME), name
    for name, gradient in expected[1].items():
        allowed = 5e-4 * float(gradient.abs().max()) + 1e-7
        assert float((found[1][name] - gradient).abs().max()) <= allowed, name


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_is_that_of_a_cpu(attention, packed):
    """Loss, alignment and all gradients, padded and packed; on the CPU with sdpa."""
    batch = batch_of(range(4), packed=packed)
    expected = stepped(made(), batch)
    assert_same_step(stepped(made(attention).to(GPU), batch), expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_is_separate(attention, checkpointing):
    """A packed row against each record alone: losses and gradients by label and by picture."""
    model = made(attention).to(GPU)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    labels = sum(int((record(index)[1] != -100).sum()) for index in range(4))
    counts = {
        "num_items_in_batch": torch.tensor(labels, device=GPU),
        "num_images_in_batch": torch.tensor(4, device=GPU),
    }
    together = stepped(model, batch_of(range(4), packed=True) | counts)
    losses: dict[str, float] = {}
    gradients: dict[str, torch.Tensor] = {}
    for index in range(4):
        terms, alone = stepped(model, batch_of([index], packed=True) | counts)
        for name, term in terms.items():
            losses[name] = losses.get(name, 0.0) + term
        for name, gradient in alone.items():
            gradients[name] = gradients.get(name, 0.0) + gradient
    assert_same_step(together, (losses, gradients))


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", record_attention.NAME])
def test_half_precision_is_near(attention):
    """bfloat16 autocast, as recipes train: 8 bits, so 2**-8 a rounding; three layers of a dozen
    roundings that add up as a walk: 2**-8 x sqrt(36) = 0.023 of the loss, and twice that here."""
    batch = batch_of(range(4), packed=True)
    exact, gradients = stepped(made(attention, initializer_range=0.05).to(GPU), batch)
    near, rounded = stepped(
        made(attention, initializer_range=0.05).to(GPU), batch, dtype=torch.bfloat16
    )
    for name, term in exact.items():
        assert near[name] == pytest.approx(term, rel=0.05), name
    for name, gradient in gradients.items():
        if float(gradient.norm()) > 1e-3:  # below that a sum of what cancels
            alike = torch.cosine_similarity(rounded[name].flatten(), gradient.flatten(), dim=0)
            assert float(alike) > 0.98, name


def test_compiled_layers_learn_the_same():
    """As `model.compile_layers` of a recipe compiles them."""
    batch = batch_of(range(4), packed=True)
    expected = stepped(made().to(GPU), batch)
    model = made().to(GPU)
    for layer in layers_of(model.model.language_model):
        layer.compile(dynamic=True)
    assert_same_step(stepped(model, batch), expected)


class Waiting(TorchDispatchMode):
    """Which operations the driver says the host waits in."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            out = func(*args, **(kwargs or {}))
        waits = sum("synchroniz" in str(one.message) for one in found)
        if waits:
            self.names[func.overloadpacket.__name__] += waits
        return out


def test_a_cpu_counts_all_waits():
    """What the driver says of each operation is no more than what `step_counts` calls a wait."""
    for name, step in steps_on(GPU).items():
        counted = step_counts.count(step)["waits"]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with Waiting() as waiting:
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        print(name, dict(waiting.names), counted)  # shown where it fails
        more = {one: count for one, count in waiting.names.items() if count > counted.get(one, 0)}
        assert not more, (name, more, counted)


def steps_on(device):
    """A training step with and without alignment, prepared on the device."""
    model, found = made().to(device).train(), {}
    for name in ("plain", "aligned"):
        batch = on(device, batch_of(range(4), packed=True))
        if name == "plain":
            batch.pop("teacher_features")

        def step(batch=batch):
            model.zero_grad()
            model(**batch).loss.backward()

        found[name] = step
    return found


# --- answering ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_logits_are_those_of_a_cpu(attention):
    """A padded batch with pictures, behind every word."""
    batch = batch_of(range(4), packed=False)
    given = {name: batch[name] for name in batch if name not in ("labels", "teacher_features")}
    words = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = made(aligned=False)(**given).logits[words]
        found = made(attention, aligned=False).to(GPU)(**on(GPU, given)).logits.cpu()[words]
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("static", [False, True])
def test_answers_are_those_of_a_cpu(static):
    """Token for token, over a growing cache and over a fixed one, whose steps are recorded once."""
    plain, rng = tiny.model(tiny.config(head_dim=32)), random.Random(0)
    plain.generation_config.eos_token_id = list(range(5, 300, 9))  # rows leave at many places
    there = EveEngine(copy.deepcopy(plain).to(GPU), tiny.processor(), static_cache=static)
    here = EveEngine(plain, tiny.processor())
    for _ in range(20):
        batch = [random_question(rng, turns=2) for _ in range(3)]
        answers = [one.answer(batch, max_new_tokens=6) for one in (here, there)]
        tokens = [[answer.token_ids for answer in some] for some in answers]
        assert tokens[0] == tokens[1]
    if static:
        recorded = [steps._graph is not None for steps in there.static._steps.values()]
        assert recorded and all(recorded) and there.static.joined.saved > 0


def test_weights_may_move_under_recordings():
    """Joined, they take no more memory than before; moved, no recording reads where they were."""
    question = random_question(random.Random(0), turns=1)
    gpu = tiny.model(tiny.config(head_dim=32)).to(GPU)
    held = torch.cuda.memory_allocated()
    there = EveEngine(gpu, tiny.processor(), static_cache=True)
    assert there.static.joined.saved and torch.cuda.memory_allocated() <= held
    [expected] = there.answer([question], max_new_tokens=8)
    for part in gpu.parameters():
        old, part.data = part.data, part.data.clone()
        old.fill_(torch.nan)
    for _ in range(2):
        [answer] = there.answer([question], max_new_tokens=8)
        assert answer.token_ids == expected.token_ids


def test_compiled_steps_are_those_of_a_cpu():
    """Recorded and compiled: one or two shapes, as each is compiled on its own."""
    plain, question = (
        tiny.model(tiny.config(head_dim=32)),
        random_question(random.Random(0), turns=2),
    )
    gpu = copy.deepcopy(plain).to(GPU)
    there = EveEngine(gpu, tiny.processor(), static_cache=True, compile_steps=True)
    [expected] = EveEngine(plain, tiny.processor()).answer([question], max_new_tokens=12)
    for _ in range(2):
        [answer] = there.answer([question], max_new_tokens=12)
        assert answer.token_ids == expected.token_ids


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights(kind, tmp_path):
    """Pictures as before, to float32's rounding; a batch answers as each of its prompts alone."""
    pytest.importorskip(PACKAGES[kind], reason="needs the extra quantize")
    config = tiny.config(hidden_size=64, intermediate_size=128, head_dim=16)
    tiny.model(config).save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    plain, small = load(tmp_path, device=GPU).model, load(tmp_path, device=GPU, quantize=kind).model
    given = on(GPU, tiny.packed([(3, 4), (1, 2)]))
    with torch.no_grad():
        expected, found = (
            model.get_image_features(**given).last_hidden_state.float() for model in (plain, small)
        )
    assert torch.allclose(found, expected, atol=1e-5)
    engine, rng = EveEngine(small, tiny.processor()), random.Random(0)
    batch = [random_question(rng, turns=1) for _ in range(4)]
    alone = [engine.answer([one], max_new_tokens=4)[0].token_ids for one in batch]
    assert [one.token_ids for one in engine.answer(batch, max_new_tokens=4)] == alone


# --- measuring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rate_is_beyond_the_data_sheet(dtype):
    """A clock that does not wait for the device would say so; 5 % for clocks above the sheet's."""
    peak = gpu_peak(torch.cuda.get_device_name(), dtype)
    if peak is None:
        pytest.skip("this GPU is not in the table of peaks")
    roof = measured_roof(Clock(torch.device(GPU, 0)), dtype)
    assert 0.05 * peak.flops < roof.flops < 1.05 * peak.flops
