"""Caches that grow in place and caches of fixed size hold what the library's own cache would.

Independent side: the library's `DynamicCache`, which copies everything for each token, and answers
over a growing cache. One thing a reader would get wrong: whether compiled code is right can be tested
on a CPU; whether a recording is, needs a GPU (`test_gpu.py`), and so does how fast either is.
"""

import random
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache

import tiny
from conversations import random_question
from eve_vlm import EveVisionConfig
from eve_vlm.decoders.initialize import initialize
from eve_vlm.layer_taps_eve import layers_of
from eve_vlm.serve.cache_rows import ROOM, GrowingCache, add_rows, keep_rows
from eve_vlm.serve.engine import EveEngine, Sampling, user_message
from eve_vlm.serve.static_rows import STEP, StaticRows, Steps
from small_decoders import decoder_folder

SMALL = EveVisionConfig(
    patch_size=tiny.PATCH, merge_size=tiny.MERGE, hidden_size=24, num_attention_heads=4
)
HEADS, WIDTH, LAYERS = 2, 8, 3


def grow(caches, rows, length, generator):
    """The same new states behind every row of both caches; what they return must be equal."""
    for layer in range(LAYERS):
        new = [torch.randn(rows, HEADS, length, WIDTH, generator=generator) for _ in range(2)]
        returned = [cache.update(*new, layer) for cache in caches]
        assert all(torch.equal(*pair) for pair in zip(*returned, strict=True))


def same(caches):
    one, other = caches
    assert one.get_seq_length() == other.get_seq_length()
    for a, b in zip(one.layers, other.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_growing_is_the_librarys_cache():
    """Random steps: tokens, prompts, rows left out and repeated, rows joined, cuts, beams."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    caches, rows = [DynamicCache(), GrowingCache()], 3
    grow(caches, rows, 5, generator)
    for _ in range(300):
        step = rng.choice(["token"] * 8 + ["prompt", "keep", "join", "crop", "reorder"])
        if step == "token":
            grow(caches, rows, 1, generator)
        elif step == "prompt":
            grow(caches, rows, rng.randint(2, 2 * ROOM), generator)
        elif step == "keep":
            order = [rng.randrange(rows) for _ in range(rng.randint(1, 4))]
            unused = rng.randrange(caches[0].get_seq_length() // 2)
            for cache in caches:
                keep_rows(cache, order, unused=unused)
            rows = len(order)
        elif step == "join" and rows < 6:
            newcomers = [DynamicCache(), GrowingCache()]
            grow(newcomers, 1, rng.randint(1, 40), generator)
            for cache, newcomer in zip(caches, newcomers, strict=True):
                add_rows(cache, newcomer)
            rows += 1
        elif step == "crop":
            for cache in caches:
                cache.crop(-2)
        elif step == "reorder":
            order = torch.tensor([rng.randrange(rows) for _ in range(rows)])
            for cache in caches:
                cache.reorder_cache(order)
        same(caches)


def test_a_token_moves_nothing():
    """The memory stays where it is for `ROOM` tokens, and then moves once."""
    generator, cache = torch.Generator().manual_seed(0), GrowingCache()
    grow([cache, DynamicCache()], 2, 7, generator)
    places = []
    for _ in range(2 * ROOM):
        for layer in range(LAYERS):
            cache.update(*torch.randn(2, 2, HEADS, 1, WIDTH, generator=generator), layer)
        places.append(cache.layers[0].keys.data_ptr())
    assert len(set(places[:ROOM])) == 1 and len(set(places)) == 2


# --- fixed size -----------------------------------------------------------------------------------


def engines(model, processor, **ends):
    """One engine over a growing cache, one over a fixed one, of the same weights."""
    return [EveEngine(model, processor, static_cache=static, **ends) for static in (False, True)]


def assert_alike(growing, static, *, batches, seed=0):
    """Random mixed batches: sizes, pictures, turns, few slots at times, answers of all lengths."""
    rng = random.Random(seed)
    for _ in range(batches):
        batch = [random_question(rng, turns=2) for _ in range(rng.randint(2, 5))]
        settings = {"max_new_tokens": rng.randint(2, 9), "batch_size": rng.choice([2, 3, 32])}
        answers = [engine.answer(batch, **settings) for engine in (growing, static)]
        tokens = [[one.token_ids for one in some] for some in answers]
        assert tokens[0] == tokens[1]


@pytest.fixture
def model():
    """Its answers end at many places, so that rows leave."""
    model = tiny.model()
    model.generation_config.eos_token_id = list(range(5, 300, 9))
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_fixed_caches_give_the_same_answers(model, attention):
    model.set_attn_implementation(attention)
    assert_alike(*engines(model, tiny.processor()), batches=20)


def test_fixed_caches_and_earlier_turns(model):
    assert_alike(*engines(model, tiny.processor(), keep_tokens=600), batches=10, seed=1)


@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral", "gpt2"])
def test_fixed_caches_of_other_decoders(model_type, tmp_path):
    """Windows that slide and learned positions."""
    decoder = decoder_folder(tmp_path / "decoder", model_type)
    initialize(decoder, tmp_path / "new", vision=SMALL, longest_edge=tiny.EDGE)
    loaded = EveEngine.from_pretrained(tmp_path / "new", device="cpu")
    assert_alike(*engines(loaded.model, loaded.processor), batches=6)


def test_newcomers_join_fixed_caches(model):
    """A newcomer during a long answer: both as alone."""
    growing, static = engines(model, tiny.processor())
    model.generation_config.eos_token_id = None
    batch, joins = static.batch(2), threading.Event()
    long_one = user_message("Say more.", [])
    short_one = user_message("What is this?", [tiny.picture(20, 30)])

    def on_piece(piece):
        if not joins.is_set() and len(long.token_ids) == 3:
            joins.set()
            batch.add([short])

    [long] = static.replies(long_one, Sampling(max_new_tokens=30), on_piece=[on_piece])
    [short] = static.replies(short_one, Sampling(max_new_tokens=4))
    batch.add([long])
    batch.run()
    for messages, reply in ((long_one, long), (short_one, short)):
        [alone] = growing.answer([messages], max_new_tokens=reply.sampling.max_new_tokens)
        assert reply.answer.token_ids == alone.token_ids


def test_steps_are_kept_at_their_place():
    """A recording belongs to its rows, its size and its place in memory."""
    generator, cache, rows = (
        torch.Generator().manual_seed(0),
        GrowingCache(),
        StaticRows(tiny.model()),
    )
    grow([cache, DynamicCache()], 3, 7, generator)
    first = rows.steps(cache, 20)
    place = first.cache.layers[0].keys.data_ptr()
    assert first.cache.layers[0].keys.shape[::2] == (4, STEP)  # three rows take the place of four
    assert rows.steps(cache, STEP) is first
    larger = rows.steps(cache, STEP + 1)
    assert larger.cache.layers[0].keys.shape[2] == 2 * STEP
    assert larger.cache.layers[0].keys.data_ptr() != place  # the memory was too small for it
    fewer = GrowingCache()
    grow([fewer, DynamicCache()], 1, 7, generator)
    assert (
        rows.steps(fewer, 20).cache.layers[0].keys.data_ptr()
        == larger.cache.layers[0].keys.data_ptr()
    )


def test_recorded_steps_run_ahead(model, monkeypatch):
    """With a recording that is none, as the CPU has none: what the loop around it does."""

    class Played:
        def __init__(self, steps):
            self.steps, self.logits = steps, torch.zeros(len(steps.ids), 300)

        def replay(self):
            self.logits.copy_(self.steps._step())

    def recording(steps):
        played.append(Played(steps))
        return played[-1], played[-1].logits

    played = []
    monkeypatch.setattr(Steps, "_recording", recording)
    growing, static = engines(model, tiny.processor(), keep_tokens=600)
    static.static = StaticRows(model, record=True)
    assert_alike(growing, static, batches=15, seed=2)
    # Up to eight rows of two sizes, some again behind a move to larger memory; of 60 legs and more.
    assert 0 < len(played) <= 12


def test_one_layer_is_compiled_for_all(model):
    """Answers as before, and no more graphs than numbers of rows and sizes; here without code."""
    growing, static = engines(model, tiny.processor())
    counter = CompileCounter()
    static.static = StaticRows(model, compiled={"backend": counter, "dynamic": False})
    batch = [user_message("What is this?", [tiny.picture(20, 30)])] * 2
    for _ in range(2):
        answers = [engine.answer(batch, max_new_tokens=6) for engine in (growing, static)]
        tokens = [[one.token_ids for one in some] for some in answers]
        assert tokens[0] == tokens[1]
    assert counter.frame_count <= 2 < tiny.LAYERS * 2  # two rows, and one that is left
    assert all("forward" not in vars(layer) for layer in layers_of(model.model.language_model))


def test_logprobs_over_a_fixed_cache(model):
    """Of each token its own, however early the next step begins."""
    growing, static = engines(model, tiny.processor())
    question = [user_message("What is this?", [tiny.picture(20, 30)])]
    one, other = (
        engine.answer(question, max_new_tokens=8, logprobs=2)[0] for engine in (growing, static)
    )
    assert [each.token_id for each in one.logprobs] == [each.token_id for each in other.logprobs]
    for mine, theirs in zip(other.logprobs, one.logprobs, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)  # sums of another order


@pytest.mark.slow
def test_compiled_code_gives_the_same_answers(model):
    """As on a GPU, but on the CPU; about a minute, nearly all of it compiling."""
    growing = EveEngine(model, tiny.processor())
    static = EveEngine(model, tiny.processor(), static_cache=True, compile_steps=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    try:
        assert_alike(growing, static, batches=12)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"code cannot be compiled here: {str(error).splitlines()[0]}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


def test_compiled_steps_need_a_fixed_cache(model):
    text = tiny.refused(lambda: EveEngine(model, tiny.processor(), compile_steps=True))
    assert "static_cache=True" in text
