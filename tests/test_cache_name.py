"""Both names of the cache are understood, whatever the installed library calls it.

`past_key_values` up to transformers 5.23, `cache` from 5.24 on. A name that is not understood would not
fail by itself: it would go to the decoder among other keywords, or nowhere, and the model would answer
without its past. So each test asks for numbers that only the past can give.
"""

import inspect
import logging
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

import tiny
from eve_vlm import EveForConditionalGeneration, EveForPreTraining
from eve_vlm.cache_name_eve import CACHE, NAMES
from eve_vlm.modeling_eve import EveModel
from test_generation import generate, sample

GRIDS = [(2, 3), (1, 1)]


def conditional():
    return tiny.model()


def pre_training():
    return tiny.model(tiny.config(aligned=True))


def headless():
    return tiny.model().model


def under_peft():
    peft = pytest.importorskip("peft", reason="without PEFT there is nothing to wrap")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(tiny.model(), settings).eval()


MODELS = [conditional, pre_training, headless, under_peft]


def last(output):
    """The last position's logits, or its state where there is no head."""
    return (output["logits"] if "logits" in output else output["last_hidden_state"])[:, -1]


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_either_name_is_understood(build, name):
    """Pictures into the cache, then one word behind them; float32, so 1e-5 covers the order of sums."""
    model, inputs = build(), sample(1, GRIDS)
    ids = inputs.pop("input_ids")
    expected = last(model(input_ids=ids, **inputs, use_cache=False))
    cache = DynamicCache()
    first = model(input_ids=ids[:, :-1], **inputs, use_cache=True, **{name: cache})
    assert cache.get_seq_length() == ids.shape[1] - 1
    assert first[CACHE] is cache
    found = last(model(input_ids=ids[:, -1:], use_cache=True, **{name: cache}))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # It is the past that tells: without it the same word gives something else.
    alone = last(model(input_ids=ids[:, -1:]))
    assert (alone - expected).abs().max() > 1e-2


@pytest.mark.parametrize("build", MODELS[:3], ids=lambda build: build.__name__)
def test_both_names_at_once_are_refused(build):
    model, ids = build(), torch.tensor([[1, 20]])
    both = dict(zip(NAMES, (DynamicCache(), DynamicCache()), strict=True))
    text = tiny.refused(lambda: model(input_ids=ids, **both), end=".")
    assert all(name in text for name in NAMES)


@torch.no_grad()
def test_outputs_have_the_places_of_the_library():
    """By name and by position, next to the decoder's own model of the library."""
    model = conditional()
    library = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    ids = torch.tensor([[1, 20, 21]])
    ours, theirs = model(ids, use_cache=True), library(ids, use_cache=True)
    assert isinstance(ours, CausalLMOutputWithPast)
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [type(part) for part in model(ids, use_cache=True, return_dict=False)] == [
        type(part) for part in library(ids, use_cache=True, return_dict=False)
    ]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_generation_goes_on_from_its_cache(settings):
    """As many positions are computed as there are: the prompt once, then one for each new token."""
    model, inputs, seen = conditional(), sample(1, GRIDS), []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    generate(model, inputs, eos_token_id=None, **settings)
    handle.remove()
    assert seen == [inputs["input_ids"].shape[1], 1, 1, 1, 1, 1]


class Heard(logging.Handler):
    """What the library logs."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@torch.no_grad()
def test_no_call_of_ours_uses_a_name_that_goes_away():
    """The library says so by a `FutureWarning` or, once in a process, in its log."""
    log, heard = logging.getLogger("transformers"), Heard()
    logging.Logger.warning_once.cache_clear()  # what earlier tests heard would not be said again
    log.addHandler(heard)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(past_key_values|cache_params)")
            for build in (conditional, pre_training):
                generate(build(), sample(1, GRIDS))
            model = headless()
            model(torch.tensor([[1, 20]]), cache=DynamicCache(), use_cache=True)
    finally:
        log.removeHandler(heard)
    assert not [text for text in heard.texts if "past_key_values" in text]


def test_all_classes_name_both():
    """`generate` looks the names up in the signature, so keywords that are passed on do not do."""
    for cls in (EveForConditionalGeneration, EveForPreTraining, EveModel):
        assert set(NAMES) <= set(inspect.signature(cls.forward).parameters)
