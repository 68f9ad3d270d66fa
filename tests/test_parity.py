"""The comparison of all ways of asking: equal ones pass, and every kind of difference is seen.

Independent side: faults that are put into a path on purpose, with a size that is known.
"""

import json
import sys

import pytest
import torch

import tiny
from eve_vlm import cli
from eve_vlm.serve import parity
from eve_vlm.serve.engine import EveEngine, user_message
from eve_vlm.serve.parity import Told, Yardstick, compare, every_path, usual_questions, yardsticks

NUMBER = 6


@pytest.fixture(scope="module")
def engine():
    return EveEngine(tiny.model(), tiny.processor())


@pytest.fixture(scope="module")
def questions(engine):
    return usual_questions(engine)


@pytest.fixture(scope="module")
def sticks(engine, questions):
    return yardsticks(engine, questions, max_new_tokens=NUMBER)


def paths(engine, questions, sticks):
    found = every_path(engine, questions, sticks, max_new_tokens=NUMBER)
    return {row.path: row for row in found}


def test_all_every_path_agree(engine, questions, sticks):
    """Text alone, one picture, two, and a second turn; 1e-4 is float32 rounding."""
    assert {len(parity.pictures_of(one)) for one in questions} == {0, 1, 2}
    found = paths(engine, questions, sticks)
    assert set(found) == {"single", "batch", "joining", "stream", "chat"}
    for row in found.values():
        assert row.agrees(1e-4), row
        assert row.equal_tokens == row.tokens == sum(len(one.token_ids) for one in sticks)


def test_the_yardstick_is_the_most_likely_text(engine, sticks):
    """By its own forward pass: a check of the pipeline against it."""
    for stick in sticks:
        rows = stick.rows.clone()
        rows[:, engine.never()] = -torch.inf
        assert rows.argmax(-1).tolist() == stick.token_ids
        assert stick.rows.exp().sum(-1).allclose(torch.ones(len(stick.rows)))


# --- faults ---------------------------------------------------------------------------------------


def test_swapped_pictures_are_seen(engine, questions, sticks, monkeypatch):
    """The silent fault of packed pixels: counts match, pictures are another question's."""
    plain = parity.OUR_PATHS["batch"]

    def swapped(engine, given, settings):
        others = [given[2], given[1]]
        return [*plain(engine, [given[0], *others, *given[3:]], settings)]

    monkeypatch.setitem(parity.OUR_PATHS, "batch", swapped)
    row = paths(engine, questions, sticks)["batch"]
    assert not row.agrees(1e-4) and row.equal_answers == len(questions) - 2
    assert row.first.question == 1


def test_half_precision_is_seen(engine, questions, sticks, monkeypatch):
    """A path that computes in bfloat16: its log-probabilities differ by far more than rounding."""
    other = EveEngine(tiny.model().bfloat16(), tiny.processor())
    plain = parity.OUR_PATHS["single"]
    monkeypatch.setitem(parity.OUR_PATHS, "single", lambda _, *rest: plain(other, *rest))
    row = paths(engine, questions, sticks)["single"]
    assert row.worst > 1e-3 and not row.agrees(1e-3)


def test_what_a_comparison_says():
    """By hand: two questions, the second one differs in its third token."""
    rows = torch.tensor([[0.7, 0.2, 0.1]]).log().expand(3, -1)
    sticks = [Yardstick([0, 0], rows[:2], 5), Yardstick([0, 1, 0], rows, 6)]
    logs = rows[0].tolist()
    answers = [
        Told([0, 0], [logs[0], logs[0] + 0.01], 5),
        Told([0, 1, 2, 2], [logs[0], logs[1], logs[2], 0.0], 7),
    ]
    row = compare("mine", sticks, answers, 1.0)
    assert (row.equal_answers, row.questions) == (1, 2)
    assert (row.equal_tokens, row.tokens) == (4, 6)
    assert row.worst == pytest.approx(0.01, abs=1e-6)
    assert (row.first.question, row.first.position) == (1, 2)
    assert row.first.gap == pytest.approx(logs[0] - logs[2])
    assert row.other_prompts == 1


@pytest.mark.parametrize("answer", [[0, 0, 1], [0]])
def test_a_longer_or_shorter_answer_is_another_one(answer):
    rows = torch.zeros(2, 3).log_softmax(-1)
    row = compare("mine", [Yardstick([0, 0], rows, 5)], [Told(answer, [], 5)], 1.0)
    assert not row.agrees(1.0) and row.first.position == min(len(answer), 2)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def eve(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["eve", "parity", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_command_with_a_real_server(eve, saved_model):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="needs the extra serve")
    code, out, err = eve(saved_model, "--max-new-tokens", 5, "--no-vllm")
    assert code == 0, err
    assert "Every way gives the same answers." in out and "eve serve, all at once" in out
    assert out.count("7 of 7") == 7 and "differs" not in out


def test_the_command_sees_a_difference(eve, saved_model, monkeypatch):
    plain = parity.OUR_PATHS["chat"]

    def wrong(engine, questions, settings):
        return plain(engine, [*questions[:-1], user_message("What?", [])], settings)

    monkeypatch.setitem(parity.OUR_PATHS, "chat", wrong)
    code, out, _ = eve(saved_model, "--max-new-tokens", 3, "--no-server", "--no-vllm")
    assert code == 1 and "The answers differ." in out
    assert "chat: question 7 differs first" in out and "1 prompts have another length" in out


def test_json_for_programs(eve, saved_model, tmp_path):
    tiny.picture(20, 30).save(tmp_path / "a.png")
    code, out, _ = eve(
        *(
            saved_model,
            "--picture",
            tmp_path / "a.png",
            "--question",
            "What?",
            "--question",
            "Why?",
        ),
        *("--max-new-tokens", 2, "--no-server", "--no-vllm", "--json"),
    )
    result = json.loads(out)
    assert code == 0 and result["agrees"]
    assert [one["questions"] for one in result["paths"]] == [2] * 5


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--url", "vllm"), "is not NAME=URL"),
        (("--url", "x=http://127.0.0.1:9/v1"), "cannot be asked"),
        (("--picture", "no.png"), "is not a file"),
        (("--question", " "), "empty"),
        (("--vllm",), "vLLM is not installed"),
    ],
)
def test_mistakes_are_one_sentence(eve, saved_model, arguments, part):
    if arguments == ("--vllm",):
        try:
            import vllm  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("vLLM is installed here")
    pytest.importorskip("openai", reason="needs the extra serve")
    code, out, err = eve(saved_model, "--max-new-tokens", 1, "--no-server", *arguments)
    assert code == 2 and out == "" and "Traceback" not in err
    assert part in err.rsplit("eve: ", 1)[1]
