"""The engine: marks say where pictures go, settings, files and folders, refusals.

That a batch answers as each question alone is in `test_running_batch.py`.

Answers are compared as text. Greedy search compares scores, so a tie within float32 rounding could
go either way; the models here have large weights, which keeps the best two far apart.
"""

import random
from functools import partial

import pytest
import torch
from PIL import Image

import tiny
from conversations import random_question
from eve_vlm import num_image_tokens
from eve_vlm.processing_eve import VICUNA_CHAT_TEMPLATE, VICUNA_SYSTEM
from eve_vlm.serve.engine import EveEngine, user_message

refused = partial(tiny.refused, end=".")


@pytest.fixture(scope="module")
def engine():
    return EveEngine(tiny.model(), tiny.processor())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_of_any_size_keep_the_order(engine, batch_size):
    rng = random.Random(1)
    questions = [random_question(rng) for _ in range(7)]
    answers = engine.generate(questions, max_new_tokens=4, batch_size=batch_size)
    assert answers == engine.generate(questions, max_new_tokens=4)
    assert engine.generate([]) == []


def test_questions_are_left_as_they_were_given(engine):
    picture = tiny.picture(20, 20)
    messages = user_message("What is this?", [picture])
    engine.generate([messages], max_new_tokens=1)
    assert messages == user_message("What is this?", [picture])


# --- one question ---------------------------------------------------------------------------------


def prompt_of(engine, question, pictures):
    """What the model is given: words, with a run of placeholders as the sizes of pictures."""
    words = engine.processor.tokenizer
    text, run = "", 0
    for id in [*engine.encode(user_message(question, pictures)).input_ids.tolist(), None]:
        if id == engine.processor.image_token_id:
            run += 1
            continue
        if run:
            text, run = f"{text}[{run}]", 0
        text += "" if id is None else words.decode([id])
    return text


WIDE, TALL = (20, 32), (32, 9)
W, T = num_image_tokens(3, 4), num_image_tokens(4, 2)


@pytest.mark.parametrize(
    ("question", "sizes", "expected"),
    [
        ("What is this?", [], "What is this?"),
        ("What is this?", [WIDE], f"[{W}]\nWhat is this?"),
        ("  What is this? ", [WIDE, TALL], f"[{W}]\n[{T}]\nWhat is this?"),
        ("<image>What is this?", [WIDE], f"[{W}]\nWhat is this?"),
        ("What is this?<image>", [WIDE], f"What is this?[{W}]"),
        ("Is <image> like <image>?", [TALL, WIDE], f"Is [{T}]\n like [{W}]\n?"),
        ("<image><image> Same?", [WIDE, TALL], f"[{W}]\n[{T}]\n Same?"),
    ],
)
def test_marks_say_where_pictures_go(question, sizes, expected):
    engine = EveEngine(tiny.model(), tiny.processor(chat_template=VICUNA_CHAT_TEMPLATE))
    pictures = [tiny.picture(*size) for size in sizes]
    prompt = prompt_of(engine, question, pictures)
    turn = squeezed(prompt).removeprefix(squeezed(f"<s> {VICUNA_SYSTEM}"))
    assert turn == squeezed(f"USER: {expected} ASSISTANT:")


def squeezed(text):
    """Without blanks: byte-level tokens bring their own."""
    return text.replace(" ", "")


def test_the_prompt_is_the_training_prompt():
    """Word for word what labels were learnt behind, start token once."""
    engine = EveEngine(tiny.model(), tiny.processor(chat_template=VICUNA_CHAT_TEMPLATE))
    prompt = prompt_of(engine, "Why?", [tiny.picture(*WIDE)])
    assert prompt.startswith("<s>") and prompt.count("<s>") == 1
    assert squeezed(prompt).endswith(f"questions.USER:[{W}]\nWhy?ASSISTANT:")


@pytest.mark.parametrize("question", ["", "   ", "\n", "<image>", " <image> \n"])
def test_an_empty_question_is_refused(engine, question):
    assert "question is empty" in refused(lambda: engine.ask(question, [tiny.picture(8, 8)]))


@pytest.mark.parametrize(("marks", "pictures"), [(1, 0), (1, 2), (2, 1), (3, 0)])
def test_marks_and_pictures_must_agree(engine, marks, pictures):
    question = "What? " + "<image>" * marks
    text = refused(lambda: engine.ask(question, [tiny.picture(8, 8)] * pictures))
    assert f"{marks} <image> marks but {pictures} pictures" in text


@pytest.mark.parametrize("number", [1, 3, 10])
def test_the_answer_is_no_longer_than_asked_for(engine, number):
    for answer in engine.answer([user_message("What?", [])] * 3, max_new_tokens=number):
        assert 0 < len(answer.token_ids) <= number
        assert answer.finish_reason == "length" or len(answer.token_ids) <= number


def test_a_model_that_says_picture_placeholders():
    """An untrained model may want to say `<image>`, which is no word of an answer."""
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.zero_()

    class Head(torch.nn.Linear):
        def forward(self, x):
            logits = super().forward(x)
            logits[..., 3] = 1.0
            return logits

    model.lm_head.__class__ = Head
    engine = EveEngine(model, tiny.processor())
    asked = user_message("What?", [tiny.picture(8, 8)])
    for settings in ({}, {"temperature": 1.0, "n": 3}, {"num_beams": 3, "n": 3}):
        for answer in engine.answer([asked], max_new_tokens=3, **settings):
            assert answer.token_ids and 3 not in answer.token_ids


# --- files and folders ----------------------------------------------------------------------------


def test_pictures_by_name_or_open(engine, tmp_path):
    path = tmp_path / "cat.png"
    tiny.picture(20, 32).save(path)
    expected = engine.ask("What?", [tiny.picture(20, 32)], max_new_tokens=4)
    for given in (path, str(path), Image.open(path), tiny.picture(20, 32).convert("RGBA")):
        assert engine.ask("What?", [given], max_new_tokens=4) == expected


def test_bad_picture_files_are_refused(engine, tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(b"no picture")
    assert str(path) in refused(lambda: engine.ask("What?", [path]))
    assert "is not a file" in refused(lambda: engine.ask("What?", [tmp_path / "dog.png"]))


def test_from_a_folder(saved_model, engine):
    loaded = EveEngine.from_pretrained(saved_model)
    assert not loaded.model.training
    picture = tiny.picture(20, 32)
    assert loaded.ask("What?", [picture], max_new_tokens=4) == engine.ask(
        "What?", [picture], max_new_tokens=4
    )


def test_a_cpu_computes_in_float32(tmp_path):
    """bfloat16 products are far slower there; the saved type does not decide."""
    tiny.model().bfloat16().save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    loaded = EveEngine.from_pretrained(tmp_path, device="cpu")
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}


@pytest.mark.gpu
def test_on_a_gpu(saved_model):
    loaded = EveEngine.from_pretrained(saved_model)
    assert loaded.model.device.type == "cuda"
    assert isinstance(loaded.ask("What?", [tiny.picture(20, 32)], max_new_tokens=4), str)


def test_a_model_in_training_is_put_to_rest():
    assert not EveEngine(tiny.model().train(), tiny.processor()).model.training


def test_answering_leaves_no_gradients(engine):
    engine.ask("What?", [tiny.picture(8, 8)], max_new_tokens=2)
    assert all(weight.grad is None for weight in engine.model.parameters())


# --- too long -------------------------------------------------------------------------------------


def engine_of(positions, *, edge=64):
    model = tiny.model(tiny.config(max_position_embeddings=positions))
    return EveEngine(model, tiny.processor(edge=edge))


def length_of(engine, question, pictures):
    text = engine.processor.apply_chat_template(
        user_message(question, pictures), tokenize=False, add_generation_prompt=True
    )
    inputs = engine.processor(text=text, images=pictures or None, add_special_tokens=False)
    return len(inputs["input_ids"][0])


@pytest.mark.parametrize("sizes", [[(64, 64)], [(64, 20)], [(20, 64), (64, 20)], [(7, 64)] * 3])
def test_too_long_prompts_name_a_size_that_fits(sizes):
    """The largest that fits: with it the question is answered, one step larger it is refused."""
    pictures = [tiny.picture(*size, seed=index) for index, size in enumerate(sizes)]
    room = length_of(engine_of(512), "What is this?", pictures)
    engine = engine_of(room - 3)
    text = refused(lambda: engine.ask("What is this?", pictures, max_new_tokens=4))
    for number in (room, 4, room - 3):
        assert f" {number}" in text
    fitting = int(text.split("longest_edge ")[1].split()[0])
    engine.processor.image_processor.size = {"longest_edge": fitting}
    assert isinstance(engine.ask("What is this?", pictures, max_new_tokens=4), str)
    if fitting + tiny.MULTIPLE < 64:
        engine.processor.image_processor.size = {"longest_edge": fitting + tiny.MULTIPLE}
        refused(lambda: engine.ask("What is this?", pictures, max_new_tokens=4))


def test_exactly_as_long_as_the_model_takes_is_answered():
    pictures = [tiny.picture(64, 64)]
    room = length_of(engine_of(512), "What?", pictures)
    engine = engine_of(room + 4)
    assert isinstance(engine.ask("What?", pictures, max_new_tokens=4), str)
    refused(lambda: engine.ask("What?", pictures, max_new_tokens=5))


def test_in_a_batch_the_size_is_that_of_the_long_prompt():
    """Pictures of other questions take no room from it."""
    engine = engine_of(80)
    long = user_message("What is this?", [tiny.picture(64, 64)])
    alone = refused(lambda: engine.generate([long], max_new_tokens=4))
    others = [user_message("What?", [tiny.picture(64, 20, seed=n)]) for n in range(5)]
    assert refused(lambda: engine.generate([*others, long], max_new_tokens=4)) == alone


def test_too_long_words_cannot_be_mended_by_a_size():
    engine = engine_of(64)
    text = refused(lambda: engine.ask("word " * 200, max_new_tokens=4))
    assert "shorten the question" in text and "0 of them for pictures" in text
    assert "shorten the question" in refused(
        lambda: engine.ask("word " * 200, [tiny.picture(64, 64)], max_new_tokens=4)
    )
