"""The language loss: every implementation equals plain cross-entropy on all logits, however cut.

The oracle is `F.cross_entropy` on the full logits, label by label, in a loop over positions.
Tolerances: `EXACT` 1e-12 in float64; `SAME` 1e-5 in float32, whose sums are cut differently (times
the largest entry beyond 1, and for gradients 1e-4 of their largest entry); one chunk is compared bit
for bit. Implementations that cannot run here are skipped by name.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils.generic import find_labels

import tiny
from eve_vlm import EveForConditionalGeneration, EveForPreTraining, language_loss_eve
from eve_vlm.data.label_weights import weights_of
from eve_vlm.language_loss_eve import language_loss

EXACT, SAME = 1e-12, 1e-5
ROWS, LENGTH, WIDTH, WORDS, GROUPS = 3, 9, 8, 20, 3
HERE = Path(__file__).resolve().parent
HAS_TORCH = "LinearCrossEntropyOptions" in dir(nn)  # torch 2.13
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="this torch has no linear cross-entropy")


def labels_of(kind):
    """(ROWS, LENGTH) labels; the first of a row is never a target."""
    generator = torch.Generator().manual_seed(1)
    full = torch.randint(1, WORDS, (ROWS, LENGTH), generator=generator)
    keep = {
        "some": torch.rand(ROWS, LENGTH, generator=generator) < 0.6,
        "all": torch.ones(ROWS, LENGTH, dtype=torch.bool),
        "none": torch.zeros(ROWS, LENGTH, dtype=torch.bool),
        "only first ones": torch.arange(LENGTH).expand(ROWS, LENGTH) == 0,
        "one": torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) == LENGTH + 3,
        "one row": torch.arange(ROWS)[:, None].expand(ROWS, LENGTH) == 1,
    }
    if kind == "label 0":
        return torch.zeros_like(full)
    return full.masked_fill(~keep[kind], -100)


def problem(kind="some", *, dtype=torch.float64, weighted=False, frozen=False):
    """States, a head, labels, and weights or None."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    head = nn.Linear(WIDTH, WORDS, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(WORDS, WIDTH, generator=generator, dtype=dtype))
    head.requires_grad_(not frozen)
    weights = torch.rand(ROWS, LENGTH, generator=generator) + 0.1 if weighted else None
    return hidden, head, labels_of(kind), weights


def plain(hidden, weight, labels, weights=None, items=None):
    """The loss in a loop over positions, on the full logits."""
    logits, total, count = hidden @ weight.T, hidden.sum() * 0 + weight.sum() * 0, 0.0
    for row in range(ROWS):
        for position in range(1, LENGTH):
            label = int(labels[row, position])
            if label != -100:
                factor = 1.0 if weights is None else float(weights[row, position])
                before = logits[row, position - 1]
                total = total + factor * F.cross_entropy(before[None], torch.tensor([label]))
                count += factor
    return total / (items or count or 1)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, [one for one in inputs if one.requires_grad])


def assert_close(made, expected, tolerance):
    made, expected = made.detach().double(), expected.detach().double()
    assert made.shape == expected.shape
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert float((made - expected).abs().max() if made.numel() else 0) <= tolerance * scale


@pytest.fixture
def small_chunks(monkeypatch):
    """Logits of at most three labels at once, so that there are several chunks and a rest."""
    monkeypatch.setattr(language_loss_eve, "LOGIT_BYTES", 3 * 4 * WORDS + 1)


# --- equal to plain cross-entropy -----------------------------------------------------------------

KINDS = ("some", "all", "none", "only first ones", "one", "one row", "label 0")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["auto", "chunked", pytest.param("torch", marks=needs_torch)])
def test_equal_to_plain_cross_entropy(name, kind, weighted, frozen, small_chunks):
    """Values and gradients in float64."""
    hidden, head, labels, weights = problem(kind, weighted=weighted, frozen=frozen)
    for items in (None, 7):
        expected = plain(hidden, head.weight, labels, weights, items)
        made = language_loss(
            *(hidden, head, labels),
            weights=weights,
            num_items_in_batch=items,
            implementation=name,
        ).total
        assert_close(made, expected, EXACT)
        pairs = zip(
            gradients(made, hidden, head.weight),
            gradients(expected, hidden, head.weight),
            strict=True,
        )
        for ours, theirs in pairs:
            assert_close(ours, theirs, EXACT)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_cut_equals_plain_cross_entropy(kind, weighted, small_chunks):
    """Its compiled form, which is what runs without CUDA; it computes in float32."""
    pytest.importorskip("cut_cross_entropy", reason="needs cut-cross-entropy")
    hidden, head, labels, weights = problem(kind, weighted=weighted, dtype=torch.float32)
    expected = plain(hidden, head.weight, labels, weights)
    made = language_loss(hidden, head, labels, weights=weights, implementation="cut").total
    assert_close(made, expected, SAME)
    pairs = zip(
        gradients(made, hidden, head.weight), gradients(expected, hidden, head.weight), strict=True
    )
    for ours, theirs in pairs:
        assert_close(ours, theirs, SAME)


LIGER = """
import torch, torch.nn.functional as F
from eve_vlm import language_loss_eve as ours
import test_language_loss as tests
for kind in tests.KINDS:
    hidden, head, labels, _ = tests.problem(kind, dtype=torch.float32)
    # On CUDA the choice is liger's; here it is made for it, and the rest is as it would be there.
    ours._implementation = lambda *asked, **more: "liger"
    groups = torch.zeros_like(labels)
    made = ours.language_loss(hidden, head, labels, groups=groups, num_groups=1)
    wanted = tests.plain(hidden, head.weight, labels)
    tests.assert_close(made.total, wanted, tests.SAME)
    both = tests.gradients(made.total, hidden, head.weight), tests.gradients(wanted, hidden, head.weight)
    for one, other in zip(*both, strict=True):
        tests.assert_close(one, other, tests.SAME)
    assert made.group_losses is None and made.group_counts is None
"""


def test_liger_equals_plain_cross_entropy():
    """Its kernels in Triton's interpreter, in a process of their own: they are chosen at import."""
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    path = os.pathsep.join([str(HERE), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", LIGER],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_chunk_is_bit_equal_to_plain_logits_at_the_labels():
    """What fits at once needs no second computation, and is what it always was."""
    hidden, head, labels, _ = problem(dtype=torch.float32)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    wanted = targets != -100
    expected = F.cross_entropy(head(hidden[wanted]), targets[wanted], reduction="sum")
    expected = expected / wanted.sum()
    made = language_loss(hidden, head, labels).total
    assert torch.equal(made, expected)
    pairs = zip(
        gradients(made, hidden, head.weight), gradients(expected, hidden, head.weight), strict=True
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


class Seen(TorchDispatchMode):
    """The largest result of any operation, and how often a value was asked of the device."""

    def __init__(self):
        super().__init__()
        self.largest = self.asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        return out


@pytest.mark.parametrize("weighted", [False, True])
def test_no_tensor_of_all_logits_is_ever_made(weighted, small_chunks):
    """Neither forward nor backward; three labels' logits are 60 numbers, those of all 480."""
    hidden, head, labels, weights = problem("all", weighted=weighted)
    with Seen() as seen:
        language_loss(hidden, head, labels, weights=weights).total.backward()
    assert seen.largest == hidden.numel() > 3 * WORDS
    with Seen() as seen:
        plain(hidden, head.weight, labels, weights).backward()
    assert seen.largest == ROWS * LENGTH * WORDS


def test_chunks_are_as_large_as_the_constant_says():
    """1048 labels at once at 32,000 words."""
    assert language_loss_eve._rows(nn.Linear(1, 32_000)) == 2**27 // 4 // 32_000 == 1048
    with torch.device("meta"):
        assert language_loss_eve._rows(nn.Linear(1, 2**27)) == 1


@pytest.mark.parametrize("name", ["chunked", pytest.param("torch", marks=needs_torch)])
def test_half_precision_is_summed_in_float32(name, small_chunks):
    """bfloat16 by its own weights and by autocast: 1e-2 of the largest entry, two digits."""
    hidden, head, labels, _ = problem("all", dtype=torch.float32)
    expected = plain(hidden, head.weight, labels)
    wanted = gradients(expected, hidden, head.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = language_loss(hidden, head, labels, implementation=name).total
    assert made.dtype == torch.float32
    for ours, theirs in zip(gradients(made, hidden, head.weight), wanted, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), 2e-2)
    assert float(made.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    half = nn.Linear(WIDTH, WORDS, bias=False, dtype=torch.bfloat16)
    half.load_state_dict(head.state_dict())
    made = language_loss(hidden.bfloat16(), half, labels, implementation=name).total
    assert made.dtype == torch.float32
    assert float(made.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)


@pytest.mark.parametrize("name", ["chunked", pytest.param("torch", marks=needs_torch)])
def test_a_tied_head_learns_from_both_sides(name, monkeypatch):
    """The embedding's gradient is the sum of both uses; the oracle runs the decoder and one product."""
    monkeypatch.setattr(language_loss_eve, "LOGIT_BYTES", 3 * 4 * 300)
    made = tiny.model(tiny.config(tie_word_embeddings=True)).train()
    made.loss_implementation = name
    words = made.get_input_embeddings().weight
    assert made.lm_head.weight is words
    ids = torch.randint(4, 300, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    loss = made(input_ids=ids, labels=ids).loss
    logits = made.model(input_ids=ids, use_cache=False).last_hidden_state @ words.T
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(loss, expected, SAME)
    ours, theirs = gradients(loss, words)[0], gradients(expected, words)[0]
    assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), 1e-4)


# --- which implementation -------------------------------------------------------------------------


def asked(name, head, hidden, **settings):
    return lambda: language_loss(hidden, head, labels_of("all"), implementation=name, **settings)


def test_what_cannot_run_here_says_so(monkeypatch):
    """One sentence each, with what to do."""
    hidden, head, _, _ = problem(dtype=torch.float32)
    said = tiny.refused(asked("quick", head, hidden), end=".")
    assert "'quick'" in said and "auto, chunked, torch, liger, cut" in said
    said = tiny.refused(asked("liger", head, hidden), end="choose 'chunked', which always works.")
    assert "CUDA" in said and "on cpu" in said
    for name in ("torch", "liger", "cut"):
        with_bias = nn.Linear(WIDTH, WORDS)
        said = tiny.refused(asked(name, with_bias, hidden))
        assert "plain language head" in said and "'chunked'" in said
    monkeypatch.setattr(language_loss_eve, "_TORCH_HAS_IT", False)
    said = tiny.refused(asked("torch", head, hidden))
    assert "needs torch 2.13" in said and torch.__version__ in said
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)  # as if it were not installed
    said = tiny.refused(asked("cut", head, hidden))
    assert "pip install cut-cross-entropy" in said and "'chunked'" in said
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    said = tiny.refused(lambda: language_loss_eve._package("liger"))
    assert "pip install liger-kernel" in said
    said = tiny.refused(asked("auto", head, hidden, groups=labels_of("all")))
    assert "num_groups" in said


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({"asked": "liger", "weighted": True}, "gives only the sum"),
        ({"asked": "liger", "weighted": False}, None),
        ({"asked": "cut", "weighted": False}, "half precision"),
        ({"asked": "auto", "weighted": False}, None),
    ],
)
def test_what_cuda_would_say(case, said, monkeypatch):
    """The rules for CUDA, asked with states that only claim to be there."""

    class Claims:
        device, dtype = torch.device("cuda"), torch.float32

        def __len__(self):
            return 10**6

    monkeypatch.setattr(language_loss_eve, "_is_plain", lambda *_: True)
    _, head, _, _ = problem()
    name = case.pop("asked")

    def choose():
        return language_loss_eve._implementation(name, head, Claims(), **case)

    if said is None:
        # On CUDA nothing was measured, so it is the one that always works.
        assert choose() == ("chunked" if name == "auto" else name)
    else:
        assert said in tiny.refused(choose, end="choose 'chunked', which always works.")


@needs_torch
def test_auto_takes_what_was_fastest_on_a_cpu(small_chunks):
    """PyTorch's own for several chunks of a plain head in float32; all else is chunked."""
    hidden, head, _, _ = problem(dtype=torch.float32)
    states = hidden.flatten(0, 1)

    def chosen(head=head, states=states):
        return language_loss_eve._implementation("auto", head, states, weighted=True)

    assert chosen() == "torch"
    assert chosen(states=states[:3]) == "chunked"  # one chunk
    assert chosen(states=states.bfloat16()) == "chunked"
    assert chosen(head=nn.Linear(WIDTH, WORDS)) == "chunked"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chosen() == "chunked"


def test_hooks_of_the_head_run_for_every_chunk(small_chunks):
    """Quantized, sharded and adapted heads do their work there; auto does not go around them."""
    hidden, head, labels, _ = problem("all", dtype=torch.float32)
    expected = gradients(plain(hidden, 2 * head.weight, labels), hidden)[0]
    calls = []

    def double(module, args, output):
        calls.append(len(output))
        return 2 * output

    head.register_forward_hook(double)
    made = language_loss(hidden, head, labels).total
    assert calls == [3] * 8  # 24 labels
    assert_close(gradients(made, hidden)[0], expected, SAME)
    assert "hooked" in tiny.refused(asked("torch", head, hidden))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_on_the_head_learn(dropout, small_chunks):
    """PEFT's layer called chunk by chunk; with dropout the second computation drops the same."""
    peft = pytest.importorskip("peft", reason="needs the extra lora")
    hidden, head, labels, _ = problem("all", dtype=torch.float32)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = head

    settings = peft.LoraConfig(target_modules=["lm_head"], r=2, lora_dropout=dropout)
    torch.manual_seed(0)
    adapted = peft.inject_adapter_in_model(settings, Holder()).lm_head.train()
    learnt = [adapted.lora_A["default"].weight, adapted.lora_B["default"].weight]
    with torch.no_grad():
        learnt[1].normal_()
    torch.manual_seed(1)
    made = language_loss(hidden, adapted, labels).total
    ours = gradients(made, hidden, *learnt)
    torch.manual_seed(1)
    states, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    logits = torch.cat([adapted(part) for part in states.split(3)])
    expected = F.cross_entropy(logits, targets)
    assert_close(made, expected, SAME)
    for one, other in zip(ours, gradients(expected, hidden, *learnt), strict=True):
        assert_close(one, other, SAME)


# --- weights and groups ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "chunked", pytest.param("torch", marks=needs_torch)])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_by_group_add_up(name, weighted, small_chunks):
    """Each group's sum and count equal the loss of its labels alone; nothing is differentiable."""
    hidden, head, labels, weights = problem("some", weighted=weighted)
    groups = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) * 7 % (GROUPS - 1)  # the last has none
    made = language_loss(
        *(hidden, head, labels),
        weights=weights,
        groups=groups,
        num_groups=GROUPS,
        implementation=name,
    )
    assert not made.group_losses.requires_grad and not made.group_counts.requires_grad
    for group in range(GROUPS):
        alone = labels.masked_fill(groups != group, -100)
        expected = plain(hidden, head.weight, alone, weights, items=1)
        counted = alone[:, 1:] != -100
        count = counted.sum() if weights is None else weights[:, 1:][counted].sum()
        assert_close(made.group_losses[group], expected, EXACT)
        assert_close(made.group_counts[group], count, SAME)
    assert_close(made.group_losses.sum() / made.group_counts.sum(), made.total, SAME)
    assert_close(made.total, plain(hidden, head.weight, labels, weights), EXACT)


def test_groups_ask_nothing_of_the_device(small_chunks):
    """No value is waited for beyond those of the loss without groups."""
    hidden, head, labels, weights = problem(weighted=True)
    counts = []
    for groups in (None, torch.zeros_like(labels)):
        with Seen() as seen:
            language_loss(hidden, head, labels, weights=weights, groups=groups, num_groups=1)
        counts.append(seen.asked)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", ["token", "sample", "sqrt"])
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_weights_of_a_record(kind, count):
    """By hand; the first label is never learnt, and so never counted."""
    labels = np.full(12, -100)
    labels[0] = 5
    labels[2 : 2 + count] = 0
    weights = weights_of(labels, kind)
    assert weights.dtype == np.float32 and weights.shape == labels.shape
    total = {"token": count, "sample": min(count, 1), "sqrt": count**0.5}[kind]
    assert weights.sum() == pytest.approx(total, abs=1e-6)  # float32
    assert (weights > 0).tolist() == [2 <= place < 2 + count for place in range(12)]
    assert len(set(weights[2 : 2 + count].tolist())) <= 1


# --- the model: one step however it is cut, padded or packed --------------------------------------

GRIDS = [[(2, 3)], [], [(1, 1), (3, 2)], [(4, 4)], [(1, 4)], [], [(2, 2)], [(3, 3)]]
CELL = tiny.config().image_token_id


def records():
    """Eight records of different lengths: words, pictures, an answer that is learnt, teacher cells."""
    made = []
    for index, grids in enumerate(GRIDS):
        generator = torch.Generator().manual_seed(index)
        ids = [1]
        for rows, cols in grids:
            ids += [CELL] * (1 + rows * (cols + 1)) + [9]
        start = len(ids) + 2
        ids += torch.randint(10, 300, (3 + (5 * index) % 11,), generator=generator).tolist()
        labels = torch.tensor(ids)
        labels[:start] = -100
        cells = sum(rows * cols for rows, cols in grids)
        pictures = tiny.packed(grids, seed=index) if grids else {}
        teacher = torch.randn(cells, tiny.TEACHER_WIDTH, generator=generator)
        made.append((torch.tensor(ids), labels, pictures, teacher))
    return made


def joined(chosen, kind, *, pack):
    """One batch: rows padded on the right, or one row with positions that start again."""
    ids, labels, pictures, teacher = zip(*chosen, strict=True)
    weights = [torch.from_numpy(weights_of(one.numpy(), kind)) for one in labels]
    groups = [torch.full_like(one, index % 2) for index, one in enumerate(labels)]

    def rows(parts, value):
        if pack:
            return torch.cat(parts)[None]
        return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    batch = {
        "input_ids": rows(ids, 0),
        "labels": rows(labels, -100),
        "label_weights": rows(weights, 0.0),
        "label_groups": rows(groups, 0),
        "num_groups": 2,
    }
    ones = [torch.ones_like(one) for one in ids]
    if pack:
        batch["position_ids"] = torch.cat([torch.arange(len(one)) for one in ids])[None]
    else:
        batch["attention_mask"] = rows(ones, 0)
    if any(pictures):
        for name in ("pixel_values", "image_grid_thw"):
            batch[name] = torch.cat([one[name] for one in pictures if one])
        batch["teacher_features"] = torch.cat(teacher)
    return batch


def step(model, batches, **counts):
    """Loss by term, losses by group, and gradients of some micro-batches together."""
    model.zero_grad()
    terms, groups = {}, 0
    for batch in batches:
        out = model(**batch, **counts)
        out.loss.backward()
        for name, value in {"loss": out.loss.detach(), **out.loss_terms}.items():
            terms[name] = terms.get(name, 0) + value
        groups = groups + torch.stack([out.group_losses, out.group_counts])
    return terms, groups, {name: w.grad.clone() for name, w in model.named_parameters()}


def assert_same_step(made, expected):
    assert made[0].keys() == expected[0].keys() == {"loss", "lm", "alignment"}
    for name, value in expected[0].items():
        assert_close(made[0][name], value, SAME)
    assert_close(made[1], expected[1], SAME)
    for name, gradient in expected[2].items():
        largest = gradient.abs().max() + 1e-9
        assert_close(made[2][name] / largest, gradient / largest, 1e-4)


def training_model(checkpointing):
    made = tiny.model(tiny.config(aligned=True)).train()
    made.alignment_weight = 0.7
    if checkpointing:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made


def totals(kind):
    """What the trainer counts of the whole batch, in words: labels or weights, and pictures."""
    counts = [int((labels != -100).sum()) for _, labels, _, _ in records()]
    items = {"token": sum(counts), "sample": 8, "sqrt": sum(n**0.5 for n in counts)}[kind]
    return {"num_items_in_batch": items, "num_images_in_batch": sum(map(len, GRIDS))}


@pytest.mark.parametrize("kind", ["token", "sample", "sqrt"])
def test_micro_batches_add_up_to_the_batch(kind, monkeypatch):
    """(8 x 1) == (4 x 2) == (2 x 4) == (1 x 8), alignment included, in chunks of five labels."""
    monkeypatch.setattr(language_loss_eve, "LOGIT_BYTES", 5 * 4 * 300)
    model, all_of_it = training_model(False), records()
    whole = step(model, [joined(all_of_it, kind, pack=False)])
    assert whole[0]["loss"] == pytest.approx(
        float(whole[0]["lm"] + 0.7 * whole[0]["alignment"]), abs=SAME
    )
    for size in (4, 2, 1):
        batches = [
            joined(all_of_it[start : start + size], kind, pack=False) for start in range(0, 8, size)
        ]
        for batch, start in zip(batches, range(0, 8, size), strict=True):
            batch["label_groups"] += start * (size == 1) % 2  # the same group as in the batch
        assert_same_step(step(model, batches, **totals(kind)), whole)


def test_weightings_are_what_they_say():
    """Means over tokens, over records' means, and in between; from each record's loss alone."""
    model = training_model(False)
    alone = []
    for record in records():
        batch = joined([record], "token", pack=False)
        with torch.no_grad():
            loss = float(model(**batch).loss_terms["lm"])
        alone.append((loss, int((record[1] != -100).sum())))
    for kind, power in (("token", 1.0), ("sample", 0.0), ("sqrt", 0.5)):
        expected = sum(loss * n**power for loss, n in alone) / sum(n**power for _, n in alone)
        with torch.no_grad():
            out = model(**joined(records(), kind, pack=False))
        assert float(out.loss_terms["lm"]) == pytest.approx(expected, abs=SAME)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["token", "sqrt"])
def test_a_packed_row_equals_padded_rows(kind, checkpointing, monkeypatch):
    """Train mode, with pictures and alignment, and no mask: documents are told by positions alone."""
    monkeypatch.setattr(language_loss_eve, "LOGIT_BYTES", 5 * 4 * 300)
    model = training_model(checkpointing)
    padded = step(model, [joined(records(), kind, pack=False)])
    packed = step(model, [joined(records(), kind, pack=True)])
    assert_same_step(packed, padded)
    leaky = joined(records(), kind, pack=True)
    leaky["position_ids"] = torch.arange(leaky["input_ids"].shape[1])[None]
    assert abs(float(model(**leaky).loss.detach()) - float(padded[0]["loss"])) > 1e-2


def test_the_models_choice_is_passed_on(monkeypatch):
    """Both classes, by an attribute that is `auto` unless set."""
    for aligned in (False, True):
        made = tiny.model(tiny.config(aligned=aligned)).train()
        assert made.loss_implementation == "auto"
        made.loss_implementation = "quick"
        assert "'quick'" in tiny.refused(
            lambda made=made: made(
                input_ids=torch.ones(1, 3, dtype=torch.long), labels=torch.ones(1, 3).long()
            )
        )


@pytest.mark.parametrize("kind", [EveForConditionalGeneration, EveForPreTraining])
def test_trainer_looks_for_labels_alone(kind):
    """Each argument that it finds here must be in a batch, or evaluation has no loss."""
    assert find_labels(kind) == ["labels"]


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_ranks_with_different_numbers_of_labels_end(strategy, tmp_path):
    """A sharded head waits at each call, so one chunk here and five there would wait for ever.

    Two gloo processes; losses and the head's gradient equal one process with both batches, `SAME`.
    """
    if strategy == "zero3":
        pytest.importorskip("deepspeed", reason="needs the extra train")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(HERE / "ranks" / "head_calls.py")),
            *(strategy, str(tmp_path)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,  # seconds; a hang is the failure that is looked for
    )
    assert done.returncode == 0, done.stderr[-4000:]
    made = torch.load(tmp_path / "made.pt", weights_only=True)
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    assert made["calls"] == ([5, 1] if strategy == "ddp" else [5, 5])
    assert_close(made["loss"], expected["loss"], SAME)
    assert_close(made["gradient"], expected["gradient"], SAME)


def test_the_code_of_a_folder_asks_for_no_optional_package():
    """The library reads imports outside `try` as needed, even inside functions."""
    tree = ast.parse(Path(language_loss_eve.__file__).read_text(encoding="utf-8"))
    tried = {node for one in ast.walk(tree) if isinstance(one, ast.Try) for node in ast.walk(one)}
    found = [
        node.module.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node not in tried and not node.level
    ]
    assert set(found) == {"collections", "typing", "torch"}
