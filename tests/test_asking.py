"""`eve ask` about many pictures: which question they become, files of answers, stops and resumes.

What is written is compared with what the engine says to each picture alone, letter for letter
(greedy, float32, weights large enough that no two tokens tie).  One thing a reader would get wrong:
the runs that are killed are real processes, because only there a line can be cut in two.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from io import BytesIO, TextIOWrapper

import pytest
import torch

import tiny
from eve_vlm import cli
from eve_vlm.cli.answering import show
from eve_vlm.serve.asking.answer_files import AnswerFile, json_line, records_of
from eve_vlm.serve.asking.picture_answers import (
    BATCHES_AHEAD,
    PictureAnswers,
    Question,
    answer_each,
    in_order,
)
from eve_vlm.serve.asking.picture_sources import PictureSource
from eve_vlm.serve.engine import EveEngine, Sampling
from eve_vlm.serve.static_rows import StaticRows

refused_by = partial(tiny.refused, end=".")
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def engine():
    return EveEngine(tiny.model(), tiny.processor())


@pytest.fixture
def eve(monkeypatch, capsys, tmp_path, saved_model):
    """Calls `eve ask ... --model` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words, tokens=4):
        words = [*words, "--model", saved_model, "--max-new-tokens", tokens]
        monkeypatch.setattr(sys, "argv", ["eve", "ask", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def refused(eve):
    """Calls `eve ask`, which must refuse before it answers; returns its sentence."""

    def call(*words):
        code, out, err = eve(*words)
        assert code == 2 and out == "" and "Traceback" not in err
        [line] = [line for line in err.splitlines() if line.startswith("eve: ")]
        return line

    return call


@pytest.fixture
def pets(tmp_path):
    """A folder of pictures in two formats, a file that is none, and a hidden one."""
    folder = tmp_path / "pets"
    folder.mkdir()
    for index in range(5):
        tiny.picture(12 + 6 * index, 40 - 5 * index, seed=index).save(folder / f"{index}.png")
    tiny.picture(9, 30, seed=7).save(folder / "9.jpg")
    (folder / "notes.txt").write_text("none")
    return folder


def alone(engine, *paths, question=QUESTION, **settings):
    return engine.ask(question, list(paths), **{"max_new_tokens": 4, **settings})


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- one question or many -------------------------------------------------------------------------


def test_single_pictures_are_one_question(eve, engine, pets):
    one, other = pets / "0.png", pets / "9.jpg"
    for pictures in ([one], [one, other], [other, one, one], []):
        code, out, _ = eve(*pictures, QUESTION)
        assert code == 0 and out == alone(engine, *pictures) + "\n"


def test_a_folder_or_each_asks_separately(eve, engine, pets):
    names = [f"pets/{name}" for name in ("0.png", "1.png", "2.png", "3.png", "4.png", "9.jpg")]
    code, out, err = eve("pets", QUESTION)
    expected = "".join(f"{name}: {alone(engine, name)}\n" for name in names)
    assert (code, out) == (0, expected) and "no answer" not in err
    assert eve(*names, QUESTION, "--each")[:2] == (0, expected)
    assert eve("pets", "pets/0.png", QUESTION, "--batch-size", 2)[:2] == (0, expected)
    (pets.parent / "one").mkdir()
    (pets / "0.png").rename(pets.parent / "one" / "0.png")
    assert eve("one", QUESTION)[1].startswith("one/0.png: ")


def test_pages_of_a_pdf(eve, tmp_path):
    pytest.importorskip("pypdfium2", reason="needs the extra pdf")
    pages = [tiny.picture(60, 40, seed=index) for index in range(3)]
    pages[0].save(tmp_path / "a.pdf", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "b.pdf")
    named = [line.split(":")[0] for line in eve("a.pdf", QUESTION)[1].splitlines()]
    assert [name for name in named if name.startswith("a.pdf#")] == [
        "a.pdf#1",
        "a.pdf#2",
        "a.pdf#3",
    ]
    for single in ("b.pdf", "a.pdf#2"):
        assert "pdf" not in eve(single, QUESTION)[1]


def test_standard_input(eve, engine, pets, monkeypatch, refused):
    data = (pets / "3.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(data)))
    assert eve("-", QUESTION)[:2] == (0, alone(engine, pets / "3.png") + "\n")
    assert "standard input has none" in refused("-", QUESTION, "--out", "a.jsonl")


def test_a_question_from_a_file(eve, engine, pets, tmp_path, refused):
    (tmp_path / "q.txt").write_text("Where is it?\n", encoding="utf-8")
    expected = alone(engine, pets / "0.png", question="Where is it?") + "\n"
    assert eve("pets/0.png", "--question-file", "q.txt")[:2] == (0, expected)
    (tmp_path / "q.txt").write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in refused("pets/0.png", "--question-file", "q.txt")
    assert "cannot be read" in refused("pets/0.png", "--question-file", "gone.txt")


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (("--temperature", "1.5", "--seed", "4"), {"temperature": 1.5, "seed": 4}),
        (
            ("--temperature", "2", "--seed", "1", "--top-k", "5", "--top-p", "0.9"),
            {"temperature": 2.0, "seed": 1, "top_k": 5, "top_p": 0.9},
        ),
        (("--max-image-tokens", "7"), {"max_image_tokens": 7}),
        (("--stop", "6", "--stop", "y"), {"stop": ("6", "y")}),
        (("--attention", "eager", "--dtype", "float32", "--device", "cpu"), {}),
        (("--no-stream",), {}),
        (("--stream",), {}),
    ],
)
def test_settings_reach_the_engine(eve, engine, pets, options, settings):
    picture = pets / "1.png"
    code, out, err = eve(picture, QUESTION, *options, tokens=12)
    assert code == 0, err
    assert out == alone(engine, picture, max_new_tokens=12, **settings) + "\n"


def test_system_words_and_several_answers(eve, engine, pets):
    picture = pets / "1.png"
    question = Question(text=QUESTION, system="Be brief.")
    [answer] = engine.answer([question.messages([picture])], max_new_tokens=4)
    assert eve(picture, QUESTION, "--system", "Be brief.")[1] == answer.text + "\n"
    assert answer.text != alone(engine, picture)

    messages = [Question(text=QUESTION).messages([picture])]
    drawn = engine.answer(messages, n=3, max_new_tokens=4, temperature=1.0, seed=5)
    options = ("-n", 3, "--temperature", 1, "--seed", 5)
    assert eve(picture, QUESTION, *options)[1] == "".join(f"{one.text}\n" for one in drawn)
    best = engine.answer(messages, n=2, num_beams=3, max_new_tokens=4)
    said = eve(picture, QUESTION, "-n", 2, "--beams", 3)[1]
    assert said == "".join(f"{one.text}\n" for one in best)


def test_json(eve, engine, pets, saved_model):
    code, out, _ = eve("pets/0.png", "pets/1.png", QUESTION, "--json")
    record = json.loads(out)
    [answer] = engine.answer(
        [Question(text=QUESTION).messages(["pets/0.png", "pets/1.png"])], max_new_tokens=4
    )
    assert code == 0 and record == {
        "id": "pets/0.png pets/1.png",
        "question": QUESTION,
        "answer": answer.text,
        "index": 0,
        "finish_reason": answer.finish_reason,
        "tokens": len(answer.token_ids),
        "prompt_tokens": answer.prompt_tokens,
        "picture_tokens": answer.image_tokens,
        "model": str(saved_model),
        "settings": record["settings"],
    }
    assert record["settings"]["max_new_tokens"] == 4 and record["settings"]["stop"] == []
    (pets / "1.png").write_text("none")
    code, out, err = eve("pets", QUESTION, "--json", "--out", "a.jsonl", "-n", 2)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and "5 of 6" in err
    assert sorted(map(str, records)) == sorted(map(str, lines_of(pets.parent / "a.jsonl")))
    assert [r["index"] for r in records if r["id"] == "pets/0.png"] == [0, 1]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("pets/0.png", "pets"), "no question behind pets"),
        (("pets/0.png", "https://example.org/cat.png"), "no question behind https"),
        (("pets/0.png", "-"), "no question behind -"),
        (("gone.png", QUESTION), "gone.png is neither a file nor a folder"),
        (("pets", "Is <image> like <image>?"), "2 <image> marks but 1 pictures"),
        (("pets", " "), "question is empty"),
        ((QUESTION, "--each"), "There is no picture"),
        ((QUESTION, "--out", "a.jsonl"), "There is no picture"),
        (("pets", QUESTION, "--stream"), "--stream prints a single answer"),
        (("pets/0.png", QUESTION, "--stream", "--json"), "--stream prints a single answer"),
        (("pets/0.png", QUESTION, "--top-p", "0"), "top_p is 0.0"),
        (("pets/0.png", QUESTION, "--stop", ""), "stop is"),
        (("pets/0.png", QUESTION, "--device", "toaster"), "--device"),
        (("pets/0.png", QUESTION, "--device", "cuda:77"), "--device"),
        (("pets/0.png", QUESTION, "--attention", "flash_attention_2"), "--attention"),
        (("pets/0.png", QUESTION, "--beams", "2", "--temperature", "1"), "beam search"),
        (("pets", QUESTION, "-n", "3", "--beams", "2"), "n is 3"),
        (("pets", QUESTION, "--out", "pets"), "pets is there already and is no file"),
        (("pets", QUESTION, "--out", "gone/a.jsonl"), "gone/a.jsonl cannot be written"),
    ],
)
def test_refusals(refused, pets, words, part):
    assert part in refused(*words)


def test_what_typer_refuses(eve, pets):
    for options in (
        ("--temperature", "-1"),
        ("--batch-size", "0"),
        ("--dtype", "int3"),
        ("-n", "0"),
    ):
        code, out, err = eve(pets / "0.png", QUESTION, *options)
        assert code == 2 and out == "" and "--help" in err


def test_pictures_that_cannot_be_read_are_counted_and_named(eve, engine, pets):
    (pets / "1.png").write_text("none")
    (pets / "5.png").write_bytes((pets / "4.png").read_bytes()[:200])
    code, out, err = eve("pets", QUESTION)
    assert code == 1
    assert "2 of 7 pictures have no answer (pets/1.png, pets/5.png)" in err
    assert "1.png is not a picture" in err and "5.png is damaged or cut short" in err
    assert len([line for line in out.splitlines() if line.startswith("pets/")]) == 5


# --- files of answers -----------------------------------------------------------------------------


def test_a_file_of_answers(eve, engine, pets, tmp_path, saved_model):
    code, out, _ = eve("pets", QUESTION, "--out", "a.jsonl")
    assert code == 0 and "a.jsonl has answers to 6 of 6 pictures." in out
    records = lines_of(tmp_path / "a.jsonl")
    assert len({record["id"] for record in records}) == 6
    for record in records:
        assert record["answer"] == alone(engine, record["id"])
        assert record["finish_reason"] in ("stop", "length")
        assert record["question"] == QUESTION and record["model"] == str(saved_model)
    before = (tmp_path / "a.jsonl").read_bytes()
    code, out, err = eve("pets", QUESTION, "--out", "a.jsonl")
    assert code == 0 and "6 of 6 pictures, 6 of them earlier" in out and "Loading" not in err
    assert (tmp_path / "a.jsonl").read_bytes() == before
    tiny.picture(20, 20, seed=20).save(pets / "new.png")
    assert "7 of 7 pictures, 6 of them earlier" in eve("pets", QUESTION, "--out", "a.jsonl")[1]
    assert (tmp_path / "a.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("pets", "Where is it?"), 'another question ("What is this?" there, "Where is it?" now)'),
        (("pets", QUESTION, "--seed", "3"), "another seed (null there, 3 now)"),
        (("pets", QUESTION, "--system", "No."), 'another system (null there, "No." now)'),
        (("pets", QUESTION, "--stop", "x"), 'another stop ([] there, ["x"] now)'),
        (("pets", QUESTION, "-n", "2"), "another n (1 there, 2 now)"),
        (("pets", QUESTION, "--dtype", "bfloat16"), 'another dtype (null there, "bfloat16" now)'),
    ],
)
def test_a_file_of_something_else(eve, refused, pets, tmp_path, words, part):
    eve("pets/0.png", QUESTION, "--out", "a.jsonl")
    before = (tmp_path / "a.jsonl").read_bytes()
    assert part in refused(*words, "--out", "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"hello\n",
        b"{}\n",
        b"[1]\n",
        b'{"id": 3}\n',
        b'{"id": "a"}\n{"id"',
        b"\0\0\0",
        b"\n",
    ],
)
def test_files_that_are_not_ours_stay_as_they_are(refused, pets, tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert "name another --out file" in refused("pets", QUESTION, "--out", "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == content


def test_unreadable_pictures_are_asked_again(eve, engine, pets, tmp_path):
    good = (pets / "1.png").read_bytes()
    (pets / "1.png").write_text("none")
    for _ in range(2):
        code, out, err = eve("pets", QUESTION, "--out", "a.jsonl")
        assert code == 1 and "answers to 5 of 6" in out and "(pets/1.png)" in err
        [failed] = [record for record in lines_of(tmp_path / "a.jsonl") if "error" in record]
        assert failed["id"] == "pets/1.png" and "not a picture" in failed["error"]
    (pets / "1.png").write_bytes(good)
    assert eve("pets", QUESTION, "--out", "a.jsonl")[0] == 0
    records = lines_of(tmp_path / "a.jsonl")
    assert len(records) == 6 and not any("error" in record for record in records)


ASKED = {"question": QUESTION, "model": "m", "settings": {"n": 2}}
IDS = ("ä.png", "b.png", "c.png", "d.png")


def two_lines(id):
    """What an id has with n = 2, or an error."""
    if id == "c.png":
        return [{"id": id, "question": QUESTION, "error": "No.", **ASKED}]
    return [{"id": id, "answer": f"{index}", "index": index, **ASKED} for index in range(2)]


def test_cut_anywhere_it_becomes_whole_again(tmp_path):
    """A run that ends behind any byte; the next one asks the rest, and nothing is there twice."""
    whole = b"".join(json_line(record) for id in IDS for record in two_lines(id))
    path = tmp_path / "a.jsonl"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with AnswerFile(path, asked=ASKED, ids=IDS, answers=2) as file:
            ended = whole[:cut].count(b"\n")
            assert len(file.done) == sum(ended >= lines for lines in (2, 4, 7))
            for id in IDS:
                if id not in file.done:
                    file.add(two_lines(id))
        assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert list(tmp_path.iterdir()) == [path]


def test_lines_of_other_pictures_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    with AnswerFile(path, asked=ASKED, ids=IDS, answers=2) as file:
        for id in IDS:
            file.add(two_lines(id))
    before = path.read_bytes()
    with AnswerFile(path, asked=ASKED, ids=["z.png"], answers=2) as file:
        file.add(two_lines("z.png"))
    assert path.read_bytes() == before + b"".join(map(json_line, two_lines("z.png")))


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.jsonl").write_bytes(json_line(two_lines("c.png")[0]))
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "real.jsonl")
    AnswerFile(tmp_path / "a.jsonl", asked=ASKED, ids=IDS).close()
    assert (tmp_path / "a.jsonl").is_symlink() and (tmp_path / "real.jsonl").read_bytes() == b""


def test_lines_can_be_read_whatever_is_in_them():
    odd = {"id": "\udcff\n\u2028.png", "answer": 'a "b"\n\x00\x1b[1m é 猫'}
    line = json_line(odd)
    assert line.count(b"\n") == 1 and json.loads(line) == odd


# --- stopped and taken up again -------------------------------------------------------------------


def started(folder, *words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "eve_vlm.cli", "ask", *map(str, words)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(process, path, count):
    """Until the file has so many lines, or a minute is over."""
    for _ in range(6000):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError(f"{path} never had {count} lines")


def test_killed_and_interrupted_runs_go_on(eve, tmp_path, saved_model):
    """Killed in the middle, then Ctrl-C, then to the end: the lines of a run without a stop."""
    folder, path = tmp_path / "many", tmp_path / "a.jsonl"
    folder.mkdir()
    for index in range(40):
        tiny.picture(8 + index % 24, 8 + index % 17, seed=index).save(folder / f"{index:03}.png")
    (folder / "020.png").write_text("none")
    words = ("many", QUESTION, "--batch-size", 4, "--temperature", 1, "--seed", 3, "-n", 2)
    assert eve(*words, "--out", "whole.jsonl", tokens=24)[0] == 1

    words = (*words, "--model", saved_model, "--max-new-tokens", 24, "--out", path)
    killed = started(tmp_path, *words)
    wait_for_lines(killed, path, 9)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    after_kill = path.read_bytes()
    with path.open("ab") as file:  # what a kill inside a write would leave
        file.write(json_line(two_lines("many/039.png")[0])[:40])

    stopped = started(tmp_path, *words)
    wait_for_lines(stopped, path, after_kill.count(b"\n") + 9)
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130 and "Traceback" not in err
    assert "of 40 pictures answered; the same command goes on" in err, err
    between = path.read_bytes()
    assert between.endswith(b"\n") and between.count(b"\n") < 79

    code, out, err = eve(*words[:-6], "--out", "a.jsonl", tokens=24)
    assert code == 1 and "39 of 40 pictures, " in out, err
    whole = (tmp_path / "whole.jsonl").read_bytes().splitlines()
    assert len(whole) == 79 and sorted(path.read_bytes().splitlines()) == sorted(whole)


# --- many pictures --------------------------------------------------------------------------------


def test_only_a_few_pictures_are_open_at_a_time(engine):
    """Never more than two batches, whatever comes first; each result once."""
    engine = EveEngine(engine.model, engine.processor, batch_size=3)
    opened, most, finished = 0, 0, 0

    def open_one(index):
        nonlocal opened, most
        opened += 1
        most = max(most, opened - finished)
        if index % 7 == 3:
            raise ValueError("No.")
        return tiny.picture(8 + index, 20, seed=index)

    sources = [PictureSource(name=f"{i}", open=partial(open_one, i)) for i in range(40)]
    question = Question(text=QUESTION, sampling=Sampling(max_new_tokens=5))
    results = []
    for result in answer_each(engine, question, sources):
        finished += 1
        results.append(result)
    assert most <= BATCHES_AHEAD * 3 and sorted(r.number for r in results) == list(range(40))
    for result in results:
        if result.number % 7 == 3:
            assert result.error == "No." and not result.answers
        else:
            picture = tiny.picture(8 + result.number, 20, seed=result.number)
            [answer] = engine.answer([question.messages([picture])], max_new_tokens=5)
            assert [one.token_ids for one in result.answers] == [answer.token_ids]


def test_a_broken_batch_is_said(engine, monkeypatch):
    def broken(**_):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    model = tiny.model()
    monkeypatch.setattr(model, "generate", broken)
    engine = EveEngine(model, engine.processor)
    sources = [PictureSource(name="a", open=lambda: tiny.picture(8, 8))]
    with pytest.raises(ValueError, match=r"Answering broke \(CUDA out of memory\); .* batch"):
        list(answer_each(engine, Question(text=QUESTION), sources))


def test_results_in_order():
    mixed = (PictureAnswers(number=number, name="") for number in (2, 0, 1, 4, 3))
    assert [result.number for result in in_order(mixed)] == [0, 1, 2, 3, 4]


def test_an_error_is_one_line():
    [record] = records_of(PictureAnswers(number=0, name="a", error="No."), ASKED)
    assert record == {"id": "a", "question": QUESTION, "error": "No.", **ASKED}


# --- printing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terminal", "said"), [(True, "a\ufffd[2Jb\tc\n"), (False, "a\x1b[2Jb\tc\n")]
)
def test_a_terminal_gets_no_control_characters(monkeypatch, terminal, said):
    """A file gets what the model said."""
    stream = TextIOWrapper(BytesIO(), encoding="utf-8")
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    show("a\x1b[2Jb\tc")
    stream.flush()
    assert stream.buffer.getvalue().decode() == said


def test_letters_that_a_terminal_lacks(monkeypatch):
    stream = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    show("é\udcff")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9\\udcff\n"


# --- the fastest way ------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--static-cache", "--compile-steps"])
def test_options_reach_what_makes_the_tokens(eve, engine, pets, monkeypatch, option):
    """The same answer; what is compiled is run as it is here, for compiling takes a minute."""
    compiled, made = [], []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    calls = StaticRows.__call__
    monkeypatch.setattr(
        StaticRows, "__call__", lambda *args, **kwargs: made.append(1) or calls(*args, **kwargs)
    )
    code, out, _ = eve(pets / "0.png", QUESTION, option)
    assert (code, out.strip()) == (0, alone(engine, pets / "0.png").strip())
    assert made and len(compiled) == (option == "--compile-steps")
