"""Generation through the library, with pictures in a batch: every way equals one by one.

Token ids are compared exactly. Greedy and beam search compare scores, so a difference of float32
rounding could flip a tie; the models here have large weights, so the best two are far apart.
"""

import pytest
import torch
from transformers import StaticCache

import tiny
from eve_vlm import EveForConditionalGeneration
from eve_vlm.cache_name_eve import CACHE
from eve_vlm.patch_embedding_eve import sample_of_picture

NEW = 6
# Pictures per sample, among them none and several; the middle one begins with two in a row.
SAMPLES = [[(2, 3)], [], [(1, 1), (4, 2)], [(3, 3), (1, 4), (2, 2)], []]


def sample(row, grids):
    """One prompt with its pictures, unpadded."""
    generator = torch.Generator().manual_seed(row)
    ids = [1, *torch.randint(10, 300, (3 + 2 * row,), generator=generator).tolist()]
    for rows, cols in grids:
        ids += [3] * (1 + rows * (cols + 1))
    ids += torch.randint(10, 300, (2,), generator=generator).tolist()
    inputs = {"input_ids": torch.tensor([ids])}
    return inputs | (tiny.packed(grids, seed=row) if grids else {})


def joined(samples):
    """Padded on the left, pictures packed."""
    longest = max(one["input_ids"].shape[1] for one in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(samples):
        length = one["input_ids"].shape[1]
        ids[row, -length:], mask[row, -length:] = one["input_ids"][0], 1
    batch = {"input_ids": ids, "attention_mask": mask}
    for name in ("pixel_values", "image_grid_thw"):
        pieces = [one[name] for one in samples if name in one]
        if pieces:
            batch[name] = torch.cat(pieces)
    return batch


@pytest.fixture(scope="module")
def samples():
    return [sample(row, grids) for row, grids in enumerate(SAMPLES)]


def generate(model, inputs, **settings):
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | settings
    inputs = {"attention_mask": torch.ones_like(inputs["input_ids"])} | inputs
    output = model.generate(**inputs, **settings)
    return output[:, inputs["input_ids"].shape[1] :]


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def embedded(model, one):
    """The sample as embeddings with its pictures in place, (1, T, D)."""
    words = model.get_input_embeddings()(one["input_ids"])
    if "pixel_values" not in one:
        return words.detach()
    features = model.get_image_features(one["pixel_values"], one["image_grid_thw"])
    placeholder = (one["input_ids"] == 3).unsqueeze(-1)
    return words.masked_scatter(placeholder, features.last_hidden_state).detach()


def alone(model, samples, **settings):
    """Each sample by itself, without pixels; the answers of all, padded at the right.

    By embeddings, because packed pixels that are repeated wrongly for beams are so in a batch of
    one, too; embeddings have a batch dimension, which the library repeats as it should.
    """
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | settings
    rows = []
    for one in samples:
        mask = torch.ones_like(one["input_ids"])
        rows += model.generate(inputs_embeds=embedded(model, one), attention_mask=mask, **settings)
    return padded(rows)


def assert_equal(made, expected):
    width = max(made.shape[1], expected.shape[1])
    made, expected = (
        torch.nn.functional.pad(one, (0, width - one.shape[1])) for one in (made, expected)
    )
    assert torch.equal(made, expected)


WAYS = {
    "greedy": {},
    "without cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
def test_batch_equals_one_by_one(model, samples, way):
    """Several pictures per sample and text-only samples among them; beams repeat pictures too."""
    settings = WAYS[way]
    if way == "static cache":
        settings = settings | {"disable_compile": True}
    made = generate(model, joined(samples), **settings)
    assert made.shape[0] == len(SAMPLES) * settings.get("num_return_sequences", 1)
    assert_equal(made, alone(model, samples, **settings))
    assert len({tuple(row) for row in made.tolist()}) > len(SAMPLES) // 2  # answers differ


def test_several_sampled_answers_see_their_own_pictures(model, samples):
    """With one possible token each, sampling n answers is greedy search n times."""
    made = generate(model, joined(samples), do_sample=True, top_k=1, num_return_sequences=3)
    assert_equal(made, generate(model, joined(samples)).repeat_interleave(3, 0))


@pytest.mark.parametrize("grids", [[[(2, 2)], [(2, 2)]], [[(1, 1), (1, 1)], [(1, 1)]]])
def test_same_sizes_are_told_apart(model, grids):
    """Equal grids keep all counts right even where pictures are mixed up, so only answers show it."""
    mine = [sample(10 + row, row_grids) for row, row_grids in enumerate(grids)]
    settings = {"num_beams": 3, "num_return_sequences": 2}
    assert_equal(generate(model, joined(mine), **settings), alone(model, mine, **settings))


def test_greedy_equals_the_largest_logit_word_by_word(model, samples):
    """Against a loop without any cache or generate()."""
    for one in samples:
        ids = one["input_ids"]
        for _ in range(NEW):
            with torch.no_grad():
                logits = model(**(one | {"input_ids": ids}), use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == 2:
                break
        assert_equal(generate(model, one), ids[:, one["input_ids"].shape[1] :])


def test_pictures_go_through_the_model_once(model, samples):
    """In the first step; later they are in the cache."""
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    generate(model, joined(samples))
    handle.remove()
    assert len(calls) == 1


def test_eager_generates_the_same(samples):
    eager = tiny.model(attn_implementation="eager")
    sdpa = tiny.model()
    assert_equal(generate(eager, joined(samples)), generate(sdpa, joined(samples)))


def test_a_cache_given_by_hand(model, samples):
    one = samples[0]
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    assert_equal(generate(model, one, **{CACHE: cache}), generate(model, one))


def test_answers_end_at_the_end_token(samples):
    """A model that always says the end token says it once, and rows that are done are padded."""
    made = tiny.model()
    with torch.no_grad():
        made.lm_head.weight.zero_()
        made.lm_head.weight[2] = 1.0
        hidden = made.model(**samples[0]).last_hidden_state[:, -1]
        made.lm_head.weight[2] = hidden[0]  # so that this logit is positive, all others zero
    assert generate(made, samples[0]).tolist() == [[2]]


def test_the_training_class_and_a_loaded_one_generate_alike(saved_model, model, samples):
    loaded = EveForConditionalGeneration.from_pretrained(saved_model)
    assert_equal(generate(loaded, joined(samples)), generate(model, joined(samples)))


def test_owner_of_each_picture(samples, model):
    batch = joined(samples)
    owner = sample_of_picture(batch["input_ids"], batch["image_grid_thw"], model.config)
    assert owner.tolist() == [0, 2, 2, 3, 3, 3]
