"""The model `eve` of lmms-eval: its requests, answered as the engine answers the same questions.

Where lmms-eval is not installed a few lines stand for the classes that ours needs of it; that the
whole fits into the real harness is in `test_eval_lmms_real.py`. Answers are compared as text, scores
within 1e-4 (float32, batches of other shapes).
"""

import importlib
import importlib.util
import logging
import sys
import tomllib
import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from eve_vlm.eval import lmms_eval
from eve_vlm.eval.lmms_requests import conversation_of, settings_of
from eve_vlm.serve.engine import EveEngine, user_message

refused = partial(tiny.refused, end=".")
REAL = importlib.util.find_spec("lmms_eval") is not None
TASK, SPLIT = "toy", "test"
PICTURES = [tiny.picture(20 + number, 28, seed=number) for number in range(9)]
SHORT = {"max_new_tokens": 5}


@dataclass
class Result:
    """As the harness's `GenerationResult`."""

    text: Any
    token_counts: Any = None


@dataclass
class Counts:
    """As its `TokenCounts`."""

    input_tokens: int
    output_tokens: int


class Base:
    """As much of its class `lmms` as it needs to be mixed with."""

    def __init__(self):
        self.task_dict = {}


@pytest.fixture
def harness(monkeypatch):
    """What `log_metrics` was given; the harness's modules, real or stood in for."""
    given: list[dict] = []
    if REAL:
        metrics = importlib.import_module("lmms_eval.models.model_utils.gen_metrics")
    else:
        contents = {
            "lmms_eval": {},
            "lmms_eval.api": {},
            "lmms_eval.api.model": {"lmms": Base},
            "lmms_eval.api.instance": {"GenerationResult": Result, "TokenCounts": Counts},
            "lmms_eval.models": {},
            "lmms_eval.models.model_utils": {},
            "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": None},
        }
        for name, content in contents.items():
            module = types.ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        metrics = sys.modules["lmms_eval.models.model_utils.gen_metrics"]
    monkeypatch.setattr(metrics, "log_metrics", lambda **what: given.append(what))
    lmms_eval._classes.cache_clear()
    yield given
    lmms_eval._classes.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("eve")
    tiny.model().save_pretrained(made)
    tiny.processor().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def engine(folder):
    return EveEngine.from_pretrained(folder, device="cpu")


def subject(folder, *, simple=False, **arguments):
    """A model as the harness makes it, with a task of pictures."""
    made = (lmms_eval.EveLmmsSimple if simple else lmms_eval.EveLmms)(
        pretrained=str(folder), device="cpu", batch_size="3", **arguments
    )
    made.task_dict = {
        TASK: {SPLIT: [{"image": one, "number": n} for n, one in enumerate(PICTURES)]}
    }
    return made


def question(number):
    return f"{tiny.QUESTIONS[number % 4]} {number}"


def see(doc):
    return [doc["image"]]


def told(doc):
    parts = [
        {"type": "image", "url": doc["image"]},
        {"type": "text", "text": question(doc["number"])},
    ]
    return [{"role": "user", "content": parts}]


def request(number, settings, *, simple=False, words=None, ask=told):
    place = (number, TASK, SPLIT)
    words = question(number) if words is None else words
    arguments = (words, settings, see, *place) if simple else (words, ask, settings, *place)
    return types.SimpleNamespace(args=arguments)


def same_questions(numbers):
    return [user_message(question(number), [PICTURES[number]]) for number in numbers]


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("simple", [False, True])
def test_answers_are_the_engines_in_order(harness, folder, engine, simple):
    """Nine requests of two kinds, three rows at a time."""
    settings = [SHORT if number % 3 else {"max_new_tokens": 2, "until": "e"} for number in range(9)]
    asked = [request(number, one, simple=simple) for number, one in enumerate(settings)]
    results = subject(folder, simple=simple).generate_until(asked)
    for number, (result, one) in enumerate(zip(results, settings, strict=True)):
        stop = ("e",) if "until" in one else ()
        longest = one["max_new_tokens"]
        [answer] = engine.answer(same_questions([number]), max_new_tokens=longest, stop=stop)
        assert result.text == answer.text
        counts = (result.token_counts.input_tokens, result.token_counts.output_tokens)
        assert counts == (answer.prompt_tokens, len(answer.token_ids))
    assert len({result.text for result in results}) > 4
    assert harness[0]["additional_metrics"] == {"failed_requests": 0, "shortened": 0}
    made = sum(result.token_counts.output_tokens for result in results)
    assert harness[0]["total_gen_tokens"] == made


def test_model_arguments_reach_the_engine(harness, folder, engine):
    """Fewer tokens for a picture change what is answered; a task that says nothing gets 7 tokens."""
    small = subject(folder, max_image_tokens=6, max_new_tokens=7)
    results = small.generate_until([request(number, {}) for number in range(4)])
    answers = engine.answer(same_questions(range(4)), max_new_tokens=7, max_image_tokens=6)
    assert [result.text for result in results] == [answer.text for answer in answers]
    assert [result.token_counts.input_tokens for result in results] == [
        answer.prompt_tokens for answer in answers
    ]


def test_beams(harness, folder, engine):
    settings = {**SHORT, "num_beams": 3, "do_sample": False, "temperature": 0}
    results = subject(folder).generate_until([request(number, settings) for number in range(3)])
    answers = engine.generate(same_questions(range(3)), num_beams=3, **SHORT)
    assert (
        [result.text for result in results]
        == answers
        != engine.generate(same_questions(range(3)), **SHORT)
    )


def test_drawn_answers_follow_the_harness_seed(harness, folder):
    settings = {**SHORT, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    model = subject(folder)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)  # as `--seed` does
        runs.append([one.text for one in model.generate_until([request(0, settings)] * 6)])
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) > 1  # repeats of a question are other answers


def test_a_seed_of_the_task_is_kept(harness, folder, engine):
    settings = {**SHORT, "temperature": 1.5, "seed": 11}
    results = subject(folder).generate_until([request(number, settings) for number in range(3)])
    answers = engine.generate(same_questions(range(3)), temperature=1.5, seed=11, **SHORT)
    assert [result.text for result in results] == answers


def test_an_answer_has_the_room_that_the_model_has(harness, folder, engine):
    """A task may allow 16,384 tokens where the model takes 512 in all."""
    [result] = subject(folder).generate_until([request(1, {"max_new_tokens": 16384})])
    [messages] = same_questions([1])
    room = engine.max_length - len(engine.encode(messages))
    assert result.text == engine.generate([messages], max_new_tokens=room)[0]
    assert harness[0]["additional_metrics"]["shortened"] == 1


# --- failures -------------------------------------------------------------------------------------


def test_failures_are_counted_and_named_and_leave_the_others_alone(
    harness, folder, engine, caplog, tmp_path
):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    model = subject(folder)
    model.task_dict[TASK][SPLIT][4] = {"image": str(damaged), "number": 4}
    long = [{"role": "user", "content": [{"type": "text", "text": "q" * 2000}]}]
    asked = [request(number, SHORT) for number in range(6)]
    asked.append(request(6, SHORT, ask=lambda doc: long))
    with caplog.at_level(logging.WARNING):
        results = model.generate_until(asked)
    texts = [result.text for result in results]
    assert texts[4] == texts[6] == ""
    good = [0, 1, 2, 3, 5]
    assert [texts[number] for number in good] == engine.generate(same_questions(good), **SHORT)
    assert [(one.task, one.doc_id) for one in model.failures] == [(TASK, 4), (TASK, 6)]
    assert "damaged.png" in model.failures[0].reason and "512" in model.failures[1].reason
    assert "2 of 7 requests have no answer" in caplog.text and "toy 4, toy 6" in caplog.text
    assert harness[0]["additional_metrics"]["failed_requests"] == 2


def test_what_the_model_cannot_take_stops_the_run(harness, folder):
    heard = [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]
    model = subject(folder)
    assert "'audio'" in refused(
        lambda: model.generate_until([request(0, SHORT, ask=lambda doc: heard)])
    )
    part = {"type": "video", "url": "a.mp4", "start_time": 3.0}
    seen = [{"role": "user", "content": [part]}]
    assert "a part of the video" in refused(
        lambda: model.generate_until([request(0, SHORT, ask=lambda doc: seen)])
    )


# --- ranked options -------------------------------------------------------------------------------


def ranked(number, text):
    return types.SimpleNamespace(args=(question(number), text, see, number, TASK, SPLIT))


def test_ranked_options_have_losses(harness, folder, engine):
    """The least is the likeliest, as the harness takes it; texts may be made from the document."""
    options = [" two", " a red square", " top left"]
    asked = [ranked(number, text) for number in range(5) for text in options]
    asked.append(ranked(5, lambda doc: tiny.ANSWERS[doc["number"] % 4]))
    results = subject(folder, simple=True).loglikelihood(asked)
    numbers = [*(number for number in range(5) for _ in options), 5]
    texts = [*options * 5, tiny.ANSWERS[1]]
    for result, number, text in zip(results, numbers, texts, strict=True):
        loss, greedy = result.text
        [score] = engine.log_likelihood(same_questions([number]), [text])
        assert loss == pytest.approx(-score.total, abs=1e-4) and greedy == score.greedy
        assert loss > 0


def test_a_ranked_question_that_fails_fails_alone(harness, folder, engine, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    model = subject(folder, simple=True)
    model.task_dict[TASK][SPLIT][1] = {"image": str(damaged), "number": 1}
    results = model.loglikelihood([ranked(n, text) for n in range(3) for text in ("two", "top")])
    losses = [result.text[0] for result in results]
    assert losses[2:4] == [torch.inf] * 2 and [one.doc_id for one in model.failures] == [1]
    scores = engine.log_likelihood(same_questions([2, 2]), ["two", "top"])
    assert losses[4:] == pytest.approx([-score.total for score in scores], abs=1e-4)


def test_options_without_a_question_are_refused(harness, folder):
    alone = types.SimpleNamespace(args=("", "two"))
    model = subject(folder, simple=True)
    assert "acc_mutual_info" in refused(lambda: model.loglikelihood([alone]))


# --- talks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("simple", [False, True])
def test_later_rounds_are_asked_by_the_task(harness, folder, engine, simple):
    """One round for the first document, two for the second and so on, each with the last answer."""

    def words_of(doc, said):
        return f"{question(doc['number'])} {said[-1][:5] if said else ''} again?"

    def ask(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return told(doc)
        assert round_idx == len(previous_output) and previous_round_info == (
            None if round_idx == 1 else round_idx - 1
        )
        over = round_idx > doc["number"]
        words = words_of(doc, previous_output)
        if simple:
            return [doc["image"]], words, over, previous_output, round_idx
        content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": words}]
        return [{"role": "user", "content": content}], over, previous_output, round_idx

    place = [(number, TASK, SPLIT) for number in range(4)]
    arguments = [
        (question(one[0]), SHORT, see, ask, *one) if simple else ("", ask, SHORT, *one)
        for one in place
    ]
    requests = [types.SimpleNamespace(args=one) for one in arguments]
    talks = subject(folder, simple=simple).generate_until_multi_round(requests)
    for number, talk in enumerate(talks):
        doc = {"image": PICTURES[number], "number": number}
        said = [engine.generate(same_questions([number]), **SHORT)[0]]
        while len(said) <= number:
            messages = user_message(words_of(doc, said), [doc["image"]])
            said += engine.generate([messages], **SHORT)
        assert talk == said


# --- settings and messages ------------------------------------------------------------------------

settings = partial(settings_of, max_new_tokens=128, max_image_tokens=None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1},
            {"max_new_tokens": 16},
        ),
        ({"temperature": 0.2, "do_sample": False}, {}),  # says: the likeliest
        ({"temperature": 0, "top_p": 0}, {}),
        ({"temperature": 0.2}, {"temperature": 0.2}),
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"temperature": 0.7, "top_p": 0, "top_k": 1},
            {"temperature": 0.7, "top_p": 1e-6, "top_k": 1},
        ),
        ({"until": ["</s>", "Q:"]}, {"stop": ("</s>", "Q:")}),
        ({"until": "\n\n", "stop_sequences": ["\n\n", ""]}, {"stop": ("\n\n",)}),
        ({"until": []}, {}),
        ({"image_aspect_ratio": "original", "repetition_penalty": 1.0}, {}),
    ],
)
def test_settings(given, expected):
    made = settings(given)
    assert made.num_beams == 1
    plain = settings({}).sampling
    changed = {
        name: getattr(made.sampling, name)
        for name in plain.__slots__
        if getattr(made.sampling, name) != getattr(plain, name)
    }
    assert changed == expected and plain.max_new_tokens == 128


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"repetition_penalty": 1.2}, "--gen_kwargs repetition_penalty=1"),
        ({"image_aspect_ratio": "pad"}, "--gen_kwargs image_aspect_ratio=original"),
        ({"temperature": 0, "do_sample": True}, "temperature above 0"),
        ({"num_beams": 4, "temperature": 0.5}, "num_beams=1"),
        ({"visual_cot": True}, "visual_cot is not known"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": 1, "top_p": 3}, "top_p is 3"),
        ({"until": [str(number) for number in range(17)]}, "17 texts"),
    ],
)
def test_settings_that_are_refused(given, said):
    assert said in refused(lambda: settings(given))


def test_a_refused_setting_names_the_task(harness, folder):
    model = subject(folder)
    text = refused(lambda: model.generate_until([request(0, {"repetition_penalty": 1.2})]))
    assert text.startswith("Task toy: ")


def test_marks_in_the_words_say_where_pictures_go():
    one, two = PICTURES[:2]
    parts = [{"type": "image", "url": one}, {"type": "image", "url": two}]
    words = {"type": "text", "text": "Is <image> like <image>?"}
    made = conversation_of([{"role": "user", "content": [*parts, words]}], max_frames=1)
    assert made == user_message("Is <image> like <image>?", [one, two])


def test_a_video_is_its_frames(tmp_path):
    av = pytest.importorskip("av", reason="needs the extra video")
    file = tmp_path / "film.mp4"
    with av.open(str(file), "w") as film:
        stream = film.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(0, 250, 25):
            picture = tiny.Image.new("RGB", (64, 48), (shade, shade, shade))
            film.mux(stream.encode(av.VideoFrame.from_image(picture)))
        film.mux(stream.encode())
    told = [{"role": "user", "content": [{"type": "video", "url": str(file)}]}]
    [message] = conversation_of(told, max_frames=4)
    shades = [part["image"].getpixel((30, 20))[0] for part in message["content"]]
    # First, last and evenly between; compressed pictures are off by a few of 255.
    assert shades == pytest.approx([0, 75, 150, 225], abs=6)


# --- found by the harness -------------------------------------------------------------------------


def test_the_entry_point_names_what_is_there(harness, monkeypatch):
    root = Path(__file__).resolve().parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, function = project["entry-points"]["lmms_eval.models"]["eve"].split(":")
    if not REAL:
        registry = types.ModuleType("lmms_eval.models.registry_v2")
        registry.ModelManifest = lambda **what: types.SimpleNamespace(**what)
        monkeypatch.setitem(sys.modules, registry.__name__, registry)
    made = getattr(importlib.import_module(module), function)()
    for path, simple in ((made.chat_class_path, False), (made.simple_class_path, True)):
        module, name = path.rsplit(".", 1)
        assert getattr(importlib.import_module(module), name).is_simple is simple
    assert made.model_id == "eve"


@pytest.mark.skipif(REAL, reason="lmms-eval is installed here")
def test_our_module_needs_no_harness_until_it_is_asked_for_its_class():
    lmms_eval._classes.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="lmms_eval"):
        lmms_eval.EveLmms  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'EveLlms'"):
        lmms_eval.EveLlms  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"pretrained": ""}, "pretrained=NAME"),
        ({"max_pixels": 3}, "max_pixels is not known"),
        ({"dtype": "int3"}, "float32"),
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"batch_size": "0"}, "at least 1"),
    ],
)
def test_model_arguments_that_are_refused(harness, folder, arguments, said):
    given = {"pretrained": str(folder), **arguments}
    assert said in refused(lambda: lmms_eval.EveLmms(**given))
