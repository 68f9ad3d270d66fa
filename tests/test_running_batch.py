"""Answers that are made together are those that each gets alone, token for token.

Independent side: one prompt at a time, without padding, through the library's own `generate` (with
pixels, which the engine never gives it), and a plain forward pass for log-probabilities. Greedy
search compares scores, so a tie within float32 rounding could go either way; the models here have
large weights, which keeps the best two far apart.
"""

import random
import threading
from collections import Counter

import pytest
import torch

import tiny
from conversations import random_question
from eve_vlm import EveVisionConfig
from eve_vlm.decoders.initialize import initialize
from eve_vlm.serve.engine import EveEngine, Sampling, user_message
from eve_vlm.serve.running_batch import RunningBatch
from eve_vlm.serve.worker import QueueFullError, Worker
from small_decoders import decoder_folder

# The vision settings of a small model that `initialize` makes.
SMALL = EveVisionConfig(
    patch_size=tiny.PATCH, merge_size=tiny.MERGE, hidden_size=24, num_attention_heads=4
)


@pytest.fixture(scope="module")
def engine():
    return EveEngine(tiny.model(), tiny.processor())


def library_tokens(engine, messages, *, number, **settings):
    """The library's own greedy tokens for one prompt with its pixels, without our batch."""
    prompt = engine.encode(messages)
    pixels = {} if prompt.pixel_values is None else prompt.pictures_from(0)
    with torch.no_grad():
        output = engine.model.generate(
            input_ids=prompt.input_ids[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=number,
            do_sample=False,
            eos_token_id=engine.ends(),
            suppress_tokens=engine.never(),
            pad_token_id=0,
            **pixels,
            **settings,
        )
    return output[:, len(prompt) :].tolist()


def tokens(answers):
    return [answer.token_ids for answer in answers]


# --- batch == single ------------------------------------------------------------------------------


@pytest.mark.parametrize(("attention", "batches"), [("sdpa", 200), ("eager", 40)])
def test_mixed_batches_answer_as_each_alone(attention, batches):
    """Sizes, numbers of pictures, turns, lengths and answer lengths at random; few slots at times."""
    engine = EveEngine(tiny.model(attn_implementation=attention), tiny.processor())
    engine.model.generation_config.eos_token_id = list(range(5, 300, 9))  # answers of all lengths
    rng = random.Random(0)
    rows, lengths = Counter(), Counter()
    for _ in range(batches):
        batch = [random_question(rng, turns=2) for _ in range(rng.randint(2, 5))]
        alone = [library_tokens(engine, one, number=4)[0] for one in batch]
        answers = engine.answer(batch, max_new_tokens=4, batch_size=rng.choice([2, 3, 32]))
        assert tokens(answers) == alone
        rows.update(map(tuple, alone))
        lengths.update(len(one) for one in alone)
    assert len(rows) > batches  # the model is not one that says the same to everything
    assert min(lengths.values()) > batches // 10 and set(lengths) == {1, 2, 3, 4}


def padded_lengths(engine, lengths, attention):
    """For each longest prompt: a batch of it and shorter ones, against each alone."""
    for length in lengths:
        for cut in (0, 1, 15):
            batch = [user_message("x" * (length - cut), [tiny.picture(20, 28)])]
            batch += [user_message("What?", []), user_message("y" * 9, [tiny.picture(8, 60)])]
            alone = [library_tokens(engine, one, number=3)[0] for one in batch]
            assert tokens(engine.answer(batch, max_new_tokens=3)) == alone, (attention, length)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_lengths_around_multiples_of_32(attention):
    """Kernels change their ways there (transformers#47651 lost answers at some total lengths)."""
    engine = EveEngine(tiny.model(attn_implementation=attention), tiny.processor())
    own = len(engine.encode(user_message("x", [tiny.picture(20, 28)])))
    wanted = [multiple + offset for multiple in (64, 96, 128, 160) for offset in (-1, 0, 1, 2)]
    padded_lengths(engine, [one - own + 1 for one in wanted], attention)


@pytest.mark.slow
def test_flex_attention():
    """Heads of 32, because with smaller ones the kernel itself is wrong on a CPU (dev/LOG.md)."""
    flex = tiny.model(tiny.config(head_dim=32), attn_implementation="flex_attention")
    engine, plain = EveEngine(flex, tiny.processor()), plain_engine()
    rng = random.Random(0)
    for _ in range(4):
        one = random_question(rng, turns=2)
        assert tokens(engine.answer([one], max_new_tokens=3)) == library_tokens(
            plain, one, number=3
        )
    batch = [random_question(rng, turns=2) for _ in range(3)]
    try:
        answers = engine.answer(batch, max_new_tokens=3)
    except torch._inductor.exc.InductorError:
        pytest.skip("this torch cannot compile flex_attention for several rows of one token here")
    assert tokens(answers) == [library_tokens(plain, one, number=3)[0] for one in batch]
    own = len(engine.encode(user_message("x", [tiny.picture(20, 28)])))
    padded_lengths(engine, [one - own + 1 for one in (63, 64, 65, 127, 128, 129)], "flex_attention")


def plain_engine():
    """The model of the tests for other kernels, with the plain one and on the CPU."""
    return EveEngine(tiny.model(tiny.config(head_dim=32)), tiny.processor())


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_mixed_batches_on_a_gpu(attention):
    """In float32 with exact products, as on a CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny.model(tiny.config(head_dim=32), attn_implementation=attention)
    engine, plain = EveEngine(model.cuda(), tiny.processor()), plain_engine()
    rng = random.Random(0)
    for _ in range(50):
        batch = [random_question(rng, turns=2) for _ in range(rng.randint(2, 5))]
        alone = [library_tokens(plain, one, number=4)[0] for one in batch]
        try:
            answers = engine.answer(batch, max_new_tokens=4)
        except torch._inductor.exc.InductorError:
            pytest.skip("this torch has no flex_attention for 65 to 127 positions of shared heads")
        assert tokens(answers) == alone


@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral", "qwen3", "gpt2", "olmo2"])
def test_other_decoders(model_type, tmp_path):
    """Windows that slide, learned positions, norms inside the heads."""
    decoder = decoder_folder(tmp_path / "decoder", model_type)
    initialize(decoder, tmp_path / "new", vision=SMALL, longest_edge=tiny.EDGE)
    engine = EveEngine.from_pretrained(tmp_path / "new", device="cpu")
    rng = random.Random(0)
    for _ in range(8):
        batch = [random_question(rng, turns=2) for _ in range(4)]
        alone = [library_tokens(engine, one, number=5)[0] for one in batch]
        assert tokens(engine.answer(batch, max_new_tokens=5, batch_size=2)) == alone
        assert tokens(engine.answer(batch, max_new_tokens=5)) == alone


# --- newcomers ------------------------------------------------------------------------------------


def test_newcomers_join_between_two_tokens(engine):
    """Forty requests at random moments; none changes another, and many run side by side."""
    rng = random.Random(3)
    asked = [(random_question(rng, turns=2), rng.randint(1, 12)) for _ in range(40)]
    alone = [engine.answer([one], max_new_tokens=number)[0] for one, number in asked]
    batch = RunningBatch(engine.model, size=6, never=engine.never())
    replies, side_by_side = [], Counter()

    def more(piece=None):
        """Called with every token of every answer."""
        side_by_side[batch.running] += 1
        if len(replies) < len(asked) and (piece is None or rng.random() < 0.3):
            messages, number = asked[len(replies)]
            replies.extend(
                engine.replies(messages, Sampling(max_new_tokens=number), on_piece=[more])
            )
            batch.add(replies[-1:])

    while len(replies) < len(asked):
        more()
        batch.run()
    assert [reply.answer.token_ids for reply in replies] == tokens(alone)
    assert max(side_by_side) >= 3


def test_a_newcomer_does_not_wait_for_a_long_answer(engine):
    """It joins while the long answer runs, and is finished first."""
    ended = []
    batch = RunningBatch(engine.model, size=2, never=engine.never())
    joins = threading.Event()

    def on_long(piece):
        if len(long.token_ids) == 3 and not joins.is_set():
            joins.set()
            batch.add([short])
        if piece.answer:
            ended.append("long")

    [long] = engine.replies(
        user_message("Say more.", []), Sampling(max_new_tokens=60), on_piece=[on_long]
    )
    [short] = engine.replies(
        user_message("What is this?", [tiny.picture(20, 30)]),
        Sampling(max_new_tokens=4),
        on_piece=[lambda piece: ended.append("short") if piece.answer else None],
    )
    long._ends = frozenset()  # it goes on to its full length
    batch.add([long])
    batch.run()
    assert ended == ["short", "long"] and len(long.token_ids) == 60
    expected = engine.answer(
        [user_message("What is this?", [tiny.picture(20, 30)])], max_new_tokens=4
    )
    assert short.answer.token_ids == expected[0].token_ids


def test_one_who_leaves_frees_the_slot(engine):
    """With one slot: the second is answered although the first wants hundreds of tokens."""
    batch = RunningBatch(engine.model, size=1, never=engine.never())
    [long] = engine.replies(
        user_message("Say more.", []),
        Sampling(max_new_tokens=400),
        on_piece=[lambda piece: long.cancel() if len(long.token_ids) == 5 else None],
    )
    long._ends = frozenset()
    [gone] = engine.replies(user_message("Where is it?", []), Sampling())
    [second] = engine.replies(user_message("What is this?", []), Sampling(max_new_tokens=3))
    gone.cancel()
    batch.add([long, gone, second])
    batch.run()
    assert long.answer.finish_reason == "cancelled" and len(long.token_ids) <= 6
    assert gone.answer.finish_reason == "cancelled" and gone.token_ids == []
    assert (
        second.answer.token_ids
        == library_tokens(engine, user_message("What is this?", []), number=3)[0]
    )


# --- ways of choosing -----------------------------------------------------------------------------


def test_drawn_answers_are_the_same_alone_and_among_others(engine):
    """Every row has its own temperature and seed."""
    rng = random.Random(4)
    asked = []
    for seed in range(24):
        settings = Sampling(
            max_new_tokens=6,
            temperature=rng.choice([0.0, 0.7, 1.5]),
            top_p=rng.choice([1.0, 0.8]),
            top_k=rng.choice([0, 5, 50]),
            seed=seed,
        )
        asked.append((random_question(rng, turns=1), settings))

    def answer(chosen):
        batch = RunningBatch(engine.model, size=8, never=engine.never())
        replies = [engine.replies(*one)[0] for one in chosen]
        batch.add(replies)
        batch.run()
        return [reply.answer.token_ids for reply in replies]

    together = answer(asked)
    assert together == [answer([one])[0] for one in asked]
    assert len(set(map(tuple, together))) > 20


def test_drawing_follows_the_probabilities(engine):
    """A thousand first tokens against the softmax of a plain forward pass."""
    messages = user_message("What is this?", [tiny.picture(20, 30)])
    prompt = engine.encode(messages)
    with torch.no_grad():
        logits = engine.model(prompt.input_ids[None], **prompt.pictures_from(0)).logits[0, -1]
    logits[engine.never()] = -torch.inf
    expected = (logits / 0.8).softmax(-1)
    answers = engine.answer([messages], n=1000, max_new_tokens=1, temperature=0.8, seed=7)
    found = (
        torch.bincount(torch.tensor([one.token_ids[0] for one in answers]), minlength=300) / 1000
    )
    # Five standard deviations of a share of 1,000.
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / 1000).sqrt() + 1e-3).all()


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}])
def test_drawing_from_the_likeliest_alone_is_greedy(engine, settings):
    messages = [user_message("What is this?", [tiny.picture(20, 30)])]
    drawn = engine.answer(messages, temperature=2.0, max_new_tokens=6, **settings)
    assert tokens(drawn) == tokens(engine.answer(messages, max_new_tokens=6))


def test_several_answers_are_single_answers_with_the_next_seeds(engine):
    messages = user_message("Say more.", [tiny.picture(20, 30), tiny.picture(9, 50)])
    several = engine.answer([messages], n=4, temperature=1.0, seed=11, max_new_tokens=6)
    for index, answer in enumerate(several):
        [alone] = engine.answer([messages], temperature=1.0, seed=11 + index, max_new_tokens=6)
        assert answer.token_ids == alone.token_ids


def test_beams_are_the_librarys_beams(engine):
    """Prompt by prompt with its pixels, on mixed batches; all beams, the best first."""
    rng = random.Random(5)
    differ = 0
    for _ in range(12):
        batch = [random_question(rng, turns=2) for _ in range(3)]
        answers = engine.answer(batch, num_beams=3, n=2, max_new_tokens=5)
        expected = []
        for one in batch:
            expected += library_tokens(engine, one, number=5, num_beams=3, num_return_sequences=2)
        found = tokens(answers)
        assert found == [trimmed(row, engine.ends()) for row in expected]
        differ += found[::2] != tokens(engine.answer(batch, max_new_tokens=5))
    assert differ > 3  # beams are not greedy search


def trimmed(row, ends):
    """Up to and with the first end id: what follows is padding."""
    places = [index for index, token in enumerate(row) if token in ends]
    return row[: places[0] + 1] if places else row


def test_logprobs_are_those_of_a_plain_forward_pass(engine):
    """All of a mixed batch, against one forward pass each without cache or padding; 1e-4."""
    rng = random.Random(6)
    batch = [random_question(rng, turns=2) for _ in range(6)]
    for settings in ({}, {"temperature": 1.3, "seed": 1}):
        answers = engine.answer(batch, max_new_tokens=5, logprobs=3, **settings)
        for messages, answer in zip(batch, answers, strict=True):
            prompt = engine.encode(messages)
            ids = torch.cat([prompt.input_ids, torch.tensor(answer.token_ids)])
            with torch.no_grad():
                logits = engine.model(ids[None], **prompt.pictures_from(0)).logits[0]
            plain = logits[len(prompt) - 1 : -1].log_softmax(-1)
            assert len(answer.logprobs) == len(answer.token_ids)
            for step, (row, one) in enumerate(zip(plain, answer.logprobs, strict=True)):
                assert one.token_id == answer.token_ids[step]
                assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
                best = row.topk(3)
                assert [index for index, _, _ in one.top] == best.indices.tolist()
                assert [value for *_, value in one.top] == pytest.approx(
                    best.values.tolist(), abs=1e-4
                )


def test_a_budget_is_that_of_one_request(engine):
    """Pictures of other requests keep their size, and small ones are not enlarged by it."""
    messages = user_message("What is this?", [tiny.picture(32, 32)])
    full, small = engine.encode(messages), engine.encode(messages, Sampling(max_image_tokens=8))
    assert full.image_tokens == 21 and small.image_tokens == 7
    assert engine.encode(messages, Sampling(max_image_tokens=1000)).image_tokens == 21
    limited = engine.answer([messages], max_image_tokens=8, max_new_tokens=4)[0]
    assert limited.image_tokens == 7
    assert limited.token_ids != engine.answer([messages], max_new_tokens=4)[0].token_ids


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-39}, "temperature is 1e-39"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"stop": ("",)}, "not empty"),
        ({"stop": "word"}, "tuple of texts"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"seed": 2**63}, "seed is"),
        ({"max_image_tokens": 0}, "max_image_tokens is 0"),
        ({"max_image_tokens": 2}, "smallest picture takes"),
        ({"n": 0}, "n is 0"),
        ({"num_beams": 2, "temperature": 1.0}, "leave out temperature"),
        ({"num_beams": 2, "n": 3}, "there are 2 beams"),
        ({"batch_size": -1}, "batch_size is -1"),
    ],
)
def test_bad_settings_are_refused(engine, settings, part):
    messages = [user_message("What?", [tiny.picture(20, 20)])]
    assert part in tiny.refused(lambda: engine.answer(messages, **settings), end=".")


def test_a_message_that_the_template_leaves_out_is_refused(engine):
    """The templates here write system words in front only; later ones would vanish silently."""
    messages = [*user_message("What?", []), {"role": "system", "content": "Be brief."}]
    text = tiny.refused(lambda: engine.answer([messages]), end=".")
    assert "leaves out message 1, of the role system" in text


# --- stop texts and streams -----------------------------------------------------------------------


def test_stop_texts_end_one_row_only(engine):
    """A stop text taken from the middle of one answer leaves the others as they are."""
    rng = random.Random(8)
    batch = [random_question(rng, turns=1) for _ in range(5)]
    plain = engine.answer(batch, max_new_tokens=8)
    stop = next(letter for one in plain for letter in one.text[2:] if letter.isascii())
    for answer, before in zip(
        engine.answer(batch, max_new_tokens=8, stop=(stop,)), plain, strict=True
    ):
        place = before.text.find(stop)
        if place < 0:
            assert answer.token_ids == before.token_ids
        else:
            assert answer.text == before.text[:place].strip() and answer.finish_reason == "stop"
            assert len(answer.token_ids) <= len(before.token_ids)


def test_a_stream_is_the_answer_in_pieces(engine):
    rng = random.Random(9)
    for _ in range(15):
        messages = random_question(rng, turns=2)
        settings = {"max_new_tokens": 7, "logprobs": 1, "stop": ("a",)}
        pieces = list(engine.stream(messages, **settings))
        [whole] = engine.answer([messages], **settings)
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
        assert [bool(piece.answer) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert pieces[-1].answer.text == whole.text


def test_leaving_a_stream_ends_the_answer(engine):
    stream = engine.stream(user_message("Say more.", []), max_new_tokens=400)
    next(stream)
    stream.close()
    assert not [one for one in threading.enumerate() if "_answer_alone" in one.name]


def test_a_bad_question_fails_before_the_stream(engine):
    with pytest.raises(ValueError, match="empty"):
        next(engine.stream(user_message(" ", [])))


# --- earlier turns --------------------------------------------------------------------------------


def test_later_turns_read_only_what_is_new():
    """Long random conversations, pictures in any turn: the same tokens as without a memory."""
    rng = random.Random(10)
    plain = EveEngine(tiny.model(), tiny.processor())
    keeping = EveEngine(tiny.model(), tiny.processor(), keep_tokens=600)
    reused = 0
    for _ in range(12):
        messages = []
        for turn in range(3):
            messages = messages + random_question(rng, turns=1)
            [expected] = plain.answer([messages], max_new_tokens=6)
            [answer] = keeping.answer([messages], max_new_tokens=6)
            assert answer.token_ids == expected.token_ids
            assert answer.cached_tokens < answer.prompt_tokens
            reused += bool(turn and answer.cached_tokens)
            messages.append({"role": "assistant", "content": answer.text})
    assert reused > 15


def test_another_picture_is_not_taken_for_the_same():
    """Placeholders are alike, pictures are not; and the same picture is read once."""
    engine = EveEngine(tiny.model(), tiny.processor(), keep_tokens=600)
    plain = EveEngine(tiny.model(), tiny.processor())
    ask = "How many red squares are there in the picture? "
    first, other = tiny.picture(30, 30), tiny.picture(30, 30, seed=1)
    for picture, question, expected in (
        (first, "Say more.", False),
        (other, "Say more.", False),
        (first, "Why?", True),
        (other, "Why?", True),
    ):
        messages = [user_message(ask + question, [picture])]
        [answer] = engine.answer(messages, max_new_tokens=5)
        assert answer.token_ids == plain.answer(messages, max_new_tokens=5)[0].token_ids
        assert (answer.cached_tokens > answer.image_tokens) == expected


def test_what_is_kept_stays_in_bounds():
    engine = EveEngine(tiny.model(), tiny.processor(), keep_tokens=100)
    rng = random.Random(11)
    for _ in range(30):
        engine.answer([random_question(rng, turns=2)], max_new_tokens=3)
        assert engine.kept.tokens <= 100
    assert engine.kept.tokens > 0
    engine.kept.clear()
    assert engine.kept.tokens == 0


def test_the_same_question_twice_is_kept_once():
    engine = EveEngine(tiny.model(), tiny.processor(), keep_tokens=1000)
    messages = [user_message("How many red squares are there?", [tiny.picture(30, 30)])]
    engine.answer(messages, max_new_tokens=4)
    held = engine.kept.tokens
    [again] = engine.answer(messages, max_new_tokens=4)
    assert engine.kept.tokens == held and again.cached_tokens == again.prompt_tokens - 1


# --- the worker -----------------------------------------------------------------------------------


def test_the_worker_answers_many_threads_together(engine):
    """Sixteen threads at once get what each gets alone, in fewer legs than requests."""
    rng = random.Random(12)
    asked = [random_question(rng, turns=1) for _ in range(16)]
    alone = tokens([engine.answer([one], max_new_tokens=6)[0] for one in asked])
    found = [None] * len(asked)
    with Worker(engine, size=16) as worker:
        started = threading.Barrier(len(asked))

        def ask(index):
            done = threading.Event()
            pieces = []

            def on_piece(piece):
                pieces.append(piece)
                if piece.answer is not None:
                    done.set()

            started.wait()
            worker.submit(asked[index], Sampling(max_new_tokens=6), on_piece=[on_piece])
            assert done.wait(60)
            found[index] = pieces[-1].answer.token_ids

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert worker.alive
    assert found == alone and not worker.alive


def test_a_full_queue_refuses(engine):
    worker = Worker(engine, size=1, queue_size=2)
    try:
        with engine.lock:  # nothing is answered meanwhile
            worker.enqueue(engine.replies(user_message("What?", []), Sampling(), 2))
            with pytest.raises(QueueFullError, match="ask again later"):
                worker.enqueue(engine.replies(user_message("What?", []), Sampling()))
    finally:
        worker.close()


def test_a_broken_batch_is_told_and_the_next_is_answered(monkeypatch):
    engine = EveEngine(tiny.model(), tiny.processor())
    plain, failures = engine.model.generate, []

    def generate(**inputs):
        if not failures:
            failures.append("once")
            raise RuntimeError("out of memory")
        return plain(**inputs)

    monkeypatch.setattr(engine.model, "generate", generate)
    told, done = threading.Event(), threading.Event()
    errors = []
    with Worker(engine) as worker:
        worker.submit(
            user_message("What?", []),
            Sampling(max_new_tokens=2),
            on_piece=[lambda piece: None],
            on_error=lambda error: (errors.append(error), told.set()),
        )
        assert told.wait(30) and "out of memory" in str(errors[0])
        worker.submit(
            user_message("What?", []),
            Sampling(max_new_tokens=2),
            on_piece=[lambda piece: done.set() if piece.answer else None],
        )
        assert done.wait(30)
