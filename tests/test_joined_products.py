"""Products of one input as one product: the same numbers, the same model, and who is left alone.

Independent side: the model before its layers were joined, its files, and the library's `generate`.
One thing a reader would get wrong: a joined layer shares its memory with its neighbours for good,
which files, copies and training must not show.
"""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.multiprocessing.reductions import StorageWeakRef

import tiny
from eve_vlm import EveForConditionalGeneration
from eve_vlm.serve.engine import EveEngine, user_message
from eve_vlm.serve.joined_products import JoinedProducts
from eve_vlm.serve.static_rows import StaticRows

PLAIN = [nn.Linear]
SAVED = 3 * tiny.LAYERS  # keys and values with queries, and up with gate


def decoder_of(model):
    return model.model.language_model


def with_biases():
    model = tiny.model(tiny.config(attention_bias=True, mlp_bias=True))
    with torch.no_grad():
        for name, part in model.named_parameters():
            if name.endswith("bias"):
                part.normal_(generator=torch.Generator().manual_seed(1))
    return model


def scores(model):
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(ids).logits


def kinds(model):
    return {type(part) for part in decoder_of(model).modules() if isinstance(part, nn.Linear)}


def engines(model, **settings):
    """Over a growing cache, and over a fixed one with joined products."""
    growing, joined = (EveEngine(model, tiny.processor()) for _ in range(2))
    joined.static = StaticRows(model, join=True, **settings)
    return growing, joined


def answers(engine, questions, **settings):
    return [one.token_ids for one in engine.answer(questions, **settings)]


QUESTIONS = [
    user_message("What is this?", [tiny.picture(20, 30)]),
    user_message("Say more.", []),
    user_message("What is in both?", [tiny.picture(9, 9), tiny.picture(40, 12)]),
]


@pytest.mark.parametrize("make", [tiny.model, with_biases])
def test_the_same_scores(make):
    """Within float32's rounding: sums of 32 numbers, which may come in another order."""
    model = make()
    expected, products = scores(model), JoinedProducts(decoder_of(model))
    assert products.saved == SAVED
    assert torch.equal(scores(model), expected)  # outside of `over` nothing is computed otherwise
    with products.over():
        found = scores(model)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert torch.equal(scores(model), expected)


def test_one_product_for_all_of_an_input(monkeypatch):
    """Also in another order; another input is another product, whoever was asked before."""
    model = tiny.model()
    products, attention = JoinedProducts(decoder_of(model)), decoder_of(model).layers[0].self_attn
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    one, other = torch.randn(2, 3, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    expected = [layer(x).detach() for layer, x in ((q, one), (k, other), (v, other), (q, other))]
    calls, product = [], torch.nn.functional.linear

    def linear(x, weight, bias=None):
        calls.append(weight.shape[0])
        return product(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    with torch.no_grad(), products.over():
        found = [layer(x) for layer, x in ((q, one), (k, other), (v, other), (q, other))]
        assert calls == [8 * (4 + 2 + 2)] * 2
        assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("make", [tiny.model, with_biases])
def test_answers_are_those_of_the_library(make, compiled):
    """Token for token, together and alone; compiled layers are still one code for all of them."""
    model, counter = make(), CompileCounter()
    settings = {"compiled": {"backend": counter, "fullgraph": True}} if compiled else {}
    growing, joined = engines(model, **settings)
    prompts = [growing.encode(one) for one in QUESTIONS]
    library = [
        model.generate(prompt.input_ids[None], max_new_tokens=8, **prompt.pictures_from(0))[0]
        for prompt in prompts
    ]
    ends = growing.ends()
    expected = [made[len(prompt) :].tolist() for made, prompt in zip(library, prompts, strict=True)]
    assert not any(token in ends for made in expected for token in made)
    assert answers(joined, QUESTIONS, max_new_tokens=8) == expected
    graphs = counter.frame_count
    assert [answers(joined, [one], max_new_tokens=8)[0] for one in QUESTIONS] == expected
    assert kinds(model) == set(PLAIN)
    if compiled:
        assert (
            0 < graphs <= 2 and counter.frame_count <= 4
        )  # one by number of rows, then one for all


def test_the_model_is_the_same_to_everybody_else(tmp_path):
    """Names, files of both ways of saving, and copies."""
    model = tiny.model()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    products = JoinedProducts(decoder_of(model))
    assert [*model.state_dict()] == [*before] and kinds(model) == set(PLAIN)
    model.save_pretrained(tmp_path)
    after = EveForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    save_file(decoder_of(model).state_dict(), tmp_path / "decoder.safetensors")
    twin = copy.deepcopy(model)
    decoder_of(twin).layers[0].self_attn.k_proj.weight.data.zero_()
    for name, part in before.items():
        assert torch.equal(after[name], part) and torch.equal(model.state_dict()[name], part)
    assert products.lay()


def test_no_second_copy_stays():
    """Neither of the weights as they lay before, nor of joined ones that were moved since."""
    model = tiny.model()
    alone, held = memory_of(model), bytes_of(model)
    products = JoinedProducts(decoder_of(model))
    with products.over():
        scores(model)
    assert all(one.expired() for one in alone) and bytes_of(model) == held
    together = memory_of(model)
    model.double()
    assert products.saved == SAVED and all(one.expired() for one in together)


def projections(model):
    return [
        part.weight for name, part in decoder_of(model).named_modules() if name.endswith("k_proj")
    ]


def memory_of(model):
    return [StorageWeakRef(weight.untyped_storage()) for weight in projections(model)]


def bytes_of(model):
    """Of the memory of all weights, each once."""
    storages = (part.untyped_storage() for part in model.parameters())
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def test_training_afterwards():
    """Answers, a step of training, answers: as of a model that was never joined, bit for bit."""
    model, other = tiny.model(), tiny.model()
    growing, joined = engines(model)
    first = answers(joined, QUESTIONS, max_new_tokens=6)
    for one in (model, other):
        ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(one.parameters(), 5.0)
        one(ids).logits.log_softmax(-1)[..., 7].mean().neg().backward()
        optimizer.step()
    for (name, part), fresh in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(part, fresh), name
    expected = answers(EveEngine(other, tiny.processor()), QUESTIONS, max_new_tokens=6)
    assert answers(joined, QUESTIONS, max_new_tokens=6) == expected != first
    assert answers(growing, QUESTIONS, max_new_tokens=6) == expected


@pytest.mark.parametrize("how", ["assigned", "loaded", "moved", "shared by two engines"])
def test_weights_that_change_place(how):
    """Whoever gives a layer other memory is heard; recordings of the old place are forgotten."""
    model, other = tiny.model(), tiny.model(seed=1)
    growing, joined = engines(model)
    answers(joined, QUESTIONS, max_new_tokens=4)
    steps = dict(joined.static._steps)
    if how == "assigned":
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.data = theirs.data.clone()
    elif how == "loaded":
        model.load_state_dict(other.state_dict())
    elif how == "moved":
        model.double().float()
    else:
        StaticRows(model, join=True)
    assert answers(joined, QUESTIONS, max_new_tokens=4) == answers(
        growing, QUESTIONS, max_new_tokens=4
    )
    kept = all(joined.static._steps.get(size) is one for size, one in steps.items())
    assert kept == (how in ("loaded", "shared by two engines"))


def test_what_is_no_plain_matrix_is_left_alone():
    """Adapters, layers of other numbers, and layers that share their weights."""
    model = tiny.model()
    layers = decoder_of(model).layers
    inject_adapter_in_model(LoraConfig(target_modules=["layers.0.self_attn.k_proj"]), model)
    layers[1].mlp.up_proj.double()
    layers[2].self_attn.v_proj.weight = layers[2].self_attn.k_proj.weight
    products = JoinedProducts(decoder_of(model))
    assert products.saved == 1 + 2 + 1  # gate and up, queries to values, gate and up
    with products.over():
        assert type(layers[0].self_attn.q_proj) is nn.Linear
        assert type(layers[1].self_attn.q_proj) is not nn.Linear


def test_adapters_that_come_later():
    """Around joined layers they answer as around plain ones."""
    model = tiny.model()
    growing, joined = engines(model)
    before = answers(joined, QUESTIONS, max_new_tokens=6)
    settings = LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    inject_adapter_in_model(settings, model)
    model.eval()
    expected = answers(growing, QUESTIONS, max_new_tokens=6)
    assert answers(joined, QUESTIONS, max_new_tokens=6) == expected != before


def test_only_on_a_gpu_by_itself():
    assert EveEngine(tiny.model(), tiny.processor(), static_cache=True).static.joined is None
