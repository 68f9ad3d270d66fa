"""Judges and videos of the benchmarks: a real HTTP server that speaks OpenAI's protocol, real files.

The server's words are written by hand, nonsense and errors included.  One thing a reader would get
wrong: the waiting between tries is the `openai` package's own, and the server shortens it by a
header that the package obeys, so that a test takes milliseconds.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from eve_vlm.eval.asking import Reply, row_of
from eve_vlm.eval.benchmarks import build_benchmark, judge_or_none
from eve_vlm.eval.benchmarks.frames import spread, video_frames
from eve_vlm.eval.benchmarks.judge import Judge, JudgeError, JudgeSettings
from eve_vlm.eval.benchmarks.judged import MathVista, MmVet
from eve_vlm.eval.benchmarks.video import VideoBenchmark
from eve_vlm.eval.runner import summary
from eve_vlm.eval.task import MissingDataError, Sample

pytest.importorskip("openai", reason="judges are asked through openai")


class Server(ThreadingHTTPServer):
    """Answers chat completions from a list: words, or the number of an HTTP error."""

    def __init__(self, *replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.asked, self.keys = list(replies), [], []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def judge(self, **settings):
        return Judge(
            JudgeSettings(
                api_key="k3y",
                base_url=f"http://127.0.0.1:{self.server_address[1]}/v1",
                model="referee",
                **settings,
            )
        )


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append(body)
        server.keys.append(self.headers["Authorization"])
        reply = server.replies.pop(0) if server.replies else "yes"
        status = reply if isinstance(reply, int) else 200
        content = (
            {"error": {"message": "not now", "type": "error"}}
            if status != 200
            else {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": reply},
                    }
                ],
            }
        )
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def sample(question="What is x?", answer="-1<AND>-5", **more):
    return Sample(id="1", question=question, images=list, answers=(answer,), **more)


def mmvet(judge):
    return build_benchmark("mmvet", judge=judge)


# --- verdicts -------------------------------------------------------------------------------------


def test_a_verdict_is_read_and_asked_for_greedily():
    with Server("0.5") as server:
        assert mmvet(server.judge()).mark(sample(), "x is -1") == {"score": 0.5}
    [asked] = server.asked
    assert asked["model"] == "referee" and asked["temperature"] == 0
    assert server.keys == ["Bearer k3y"]
    [message] = asked["messages"]
    assert (
        "Question: What is x?\nRight answer: -1 <AND> -5\nAnswer: x is -1\n" in message["content"]
    )


def test_braces_in_answers_do_no_harm():
    with Server("1") as server:
        assert mmvet(server.judge()).mark(sample(), "x = {question}") == {"score": 1.0}
    assert "Answer: x = {question}\n" in server.asked[0]["messages"][0]["content"]


def test_rate_limits_and_broken_servers_are_tried_again():
    with Server(429, 503, 429, "1.0") as server:
        assert mmvet(server.judge()).mark(sample(), "both") == {"score": 1.0}
    assert len(server.asked) == 4


def test_nonsense_is_asked_again_and_then_a_failure_with_its_reason():
    """The row is wrong and says why; it is not a silent 0."""
    with Server("The answer is fine.", "0.4 or 0.5", "great", "0.9") as server:
        row = row_of(mmvet(server.judge()), sample(), Reply("x is -1"))
    assert len(server.asked) == 3
    assert [one["role"] for one in server.asked[2]["messages"]] == [
        *("user", "assistant", "user", "assistant", "user")
    ]
    assert row.marks == {"score": 0.0}
    assert row.failed == (
        "The judge referee gave no verdict that can be read in 3 tries, 'great' last; evaluate "
        "again, or take another judge."
    )
    whole = summary(mmvet(None), [row])
    assert whole["failed"] == {row.failed: 1} and whole["empty"] == 0


def test_a_second_try_that_can_be_read_counts():
    with Server("Well.", "0.7") as server:
        assert mmvet(server.judge()).mark(sample(), "x is -1") == {"score": 0.7}


def test_a_wrong_key_shows_before_a_model_works(tmp_path):
    """Before any data is opened, and without the key in the sentence."""
    with Server(401) as server:
        task = build_benchmark("mmvet", data_root=tmp_path, judge=server.judge())
        with pytest.raises(
            JudgeError, match=r"does not answer .*401.*check OPENAI_API_KEY"
        ) as error:
            task.samples()
        assert "k3y" not in str(error.value) + repr(server.judge().settings)
        with pytest.raises(MissingDataError):  # now it says yes
            task.samples()
        with pytest.raises(MissingDataError):
            task.samples()
    assert len(server.asked) == 2  # not again once it has said something


def test_a_judge_that_is_not_there():
    judge = Judge(JudgeSettings(api_key="k", base_url="http://127.0.0.1:9/v1", max_retries=0))
    with pytest.raises(JudgeError, match="does not answer"):
        judge.check()


def test_results_name_the_judge_and_never_the_key():
    with Server() as server:
        settings = mmvet(server.judge()).settings()
    assert settings["judge"] == {
        "base_url": f"http://127.0.0.1:{server.server_address[1]}/v1",
        "model": "referee",
        "temperature": 0,
    }
    assert settings["rubric"]["version"] == 1 and "<AND>" in settings["rubric"]["words"]
    assert "k3y" not in json.dumps(settings)


def test_without_a_key_there_is_no_judge():
    assert judge_or_none(environment={}) is None
    assert judge_or_none(environment={"OPENAI_API_KEY": ""}) is None
    named = judge_or_none(environment={"OPENAI_API_KEY": "k"}).settings
    assert (named.base_url, named.model) == ("https://api.openai.com/v1", "gpt-4o-2024-11-20")
    own = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://here/v1"}
    assert judge_or_none(environment=own).settings.base_url == "http://here/v1"
    local = judge_or_none(base_url="http://there/v1", model="m", environment={}).settings
    assert (local.base_url, local.model, local.api_key) == ("http://there/v1", "m", "none")


def test_a_task_without_a_judge_marks_nothing():
    assert mmvet(None).mark(sample(), "") == {"score": 0.0}
    with pytest.raises(ValueError, match="mmvet is marked by a language model and none is named"):
        mmvet(None).mark(sample(), "x")


# --- how verdicts are read ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("0.5", 0.5),
        ("0", 0.0),
        ("1.0", 1.0),
        ("1", 1.0),
        ("Score: 0.3.", 0.3),
        *((said, None) for said in ("", "good", "1.5", "0.5 of 1.0", "10", "0.4/1", "-", "01.2")),
    ],
)
def test_shares(said, read):
    assert MmVet.rubric.read(said) == read


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("yes 4", (True, 4)),
        ("No, 0.", (False, 0)),
        ("yes\n5", (True, 5)),
        *((said, None) for said in ("yes", "4", "yes 6", "yes 4 no 1", "yes 4.5", "maybe 3")),
    ],
)
def test_yes_and_a_number(said, read):
    assert VideoBenchmark.rubric.read(said) == read


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("Final answer: 14", "14"),
        ("He adds.\nFinal answer: (B) 7 cm\n", "(B) 7 cm"),
        ("final answer:none", "none"),
        ("14", "14"),
        ("Final answer:", "Final answer:"),  # a line alone; no number and no option comes of it
        *((said, None) for said in ("", "He adds.\nThen he stops.")),
    ],
)
def test_final_answers(said, read):
    assert MathVista.rubric.read(said) == read


# --- MathVista ------------------------------------------------------------------------------------


def problem(answer, question_type, answer_type, options=(), precision=0):
    facts = {"question_type": question_type, "answer_type": answer_type, "precision": precision}
    return sample("How long?", answer, options=options, facts=facts)


CHOICE = problem("7 cm", "multi_choice", "text", ("5 cm", "7 cm"))
WHOLE = problem("14", "free_form", "integer")
DECIMAL = problem("1.20", "free_form", "float", precision=2)
LIST = problem("[1, 2]", "free_form", "list")


@pytest.mark.parametrize(
    ("question", "answer", "mark"),
    [
        (CHOICE, "B", 1.0),
        (CHOICE, "(a)", 0.0),
        (CHOICE, "7 cm", 1.0),
        (WHOLE, "14", 1.0),
        (WHOLE, "14.9", 1.0),  # int(), as the benchmark's programme has it
        (WHOLE, "15", 0.0),
        (LIST, "[1, 2]", 1.0),
        (LIST, "[1,2]", 0.0),
        # round(1.2, 2) is 1.2, and "1.2" is not "1.20": the programme's oddity too.
        (DECIMAL, "1.20", 0.0),
    ],
)
def test_plain_final_answers_need_no_judge(question, answer, mark):
    assert build_benchmark("mathvista").mark(question, answer) == {"accuracy": mark}


@pytest.mark.parametrize(
    ("question", "said", "mark"),
    [
        (CHOICE, "Final answer: B", 1.0),
        (CHOICE, "Final answer: 7cm", 1.0),  # the nearest option by letters
        (CHOICE, "Final answer: none", 0.0),
        (WHOLE, "Final answer: 14", 1.0),
        (WHOLE, "Final answer: fourteen", 0.0),
        (LIST, "Final answer: [1, 2]", 1.0),
    ],
)
def test_other_answers_are_read_by_the_judge(question, said, mark):
    with Server(said) as server:
        task = build_benchmark("mathvista", judge=server.judge())
        assert task.mark(question, "Let me see, it is about that.") == {"accuracy": mark}
    assert "Let me see" in server.asked[0]["messages"][0]["content"]


# --- videos ---------------------------------------------------------------------------------------


def test_video_verdicts():
    with Server("yes 4", "no 1") as server:
        task = build_benchmark("msvd_qa", judge=server.judge())
        rows = [row_of(task, sample("Who?", "man"), Reply(text)) for text in ("a guy", "a dog")]
    scores = summary(task, rows, resamples=2)["scores"]
    assert scores["accuracy"]["value"] == 50  # one of two
    assert scores["nearness"]["value"] == 2.5  # (4 + 1) / 2, of 5


@pytest.mark.parametrize("total", [1, 2, 7, 8, 9, 250])
def test_frames_are_spread_from_the_first_to_the_last(total):
    places = spread(total, 8)
    assert len(places) == len(set(places)) == min(8, total)
    assert places == sorted(places) and places[0] == 0
    assert places[-1] == (total - 1 if total > 1 else 0)
    gaps = np.diff(places)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1  # even, but for rounding


def test_frames_of_a_folder(tmp_path):
    for n in range(12):
        Image.new("RGB", (16, 16), (n * 10,) * 3).save(tmp_path / f"frame{n:02}.png")
    (tmp_path / "readme.txt").write_text("no frame", "utf-8")
    frames = video_frames(tmp_path, 4)
    assert [frame.getpixel((0, 0))[0] for frame in frames] == [0, 30, 70, 110]


def test_frames_of_a_folder_without_any(tmp_path):
    with pytest.raises(ValueError, match="has no pictures; put the video's frames there"):
        video_frames(tmp_path, 4)


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_frames_of_a_file(tmp_path, suffix):
    """Gray rises by 20 from frame to frame; lossy video keeps it to a few."""
    av = pytest.importorskip("av", reason="videos are decoded by av")
    path = tmp_path / f"one{suffix}"
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for n in range(10):
            picture = Image.new("RGB", (64, 64), (n * 20 + 20,) * 3)
            video.mux(stream.encode(av.VideoFrame.from_image(picture)))
        video.mux(stream.encode())
    frames = video_frames(path, 4)
    seen = [frame.convert("RGB").getpixel((32, 32))[0] for frame in frames]
    assert seen == pytest.approx([20, 80, 140, 200], abs=4)
    assert len(video_frames(path, 100)) == 10
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be decoded|has no frames"):
        video_frames(path, 4)


def test_a_file_without_the_decoder(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match=r'pip install "eve-vlm\[video\]"'):
        video_frames(tmp_path / "one.mp4", 4)


@pytest.mark.parametrize("name", ["MSVD_Zero_Shot_QA", "MSRVTT_Zero_Shot_QA"])
def test_videos_that_are_not_there(tmp_path, name):
    task = build_benchmark(name.split("_")[0].lower() + "_qa", data_root=tmp_path)
    folder = tmp_path / name
    folder.mkdir()
    with pytest.raises(MissingDataError, match=r"test_q\.json is not there"):
        task.samples()
    entry = {"video_name": "clip", "question": "who?", "question_id": "0"}
    (folder / "test_q.json").write_text(json.dumps([entry]), "utf-8")
    (folder / "test_a.json").write_text('[{"question_id": "1", "answer": "man"}]', "utf-8")
    with pytest.raises(ValueError, match="has no answer to question 0"):
        task.samples()
    (folder / "test_a.json").write_text('[{"question_id": "0"}]', "utf-8")
    with pytest.raises(ValueError, match="no list of entries with question_id, answer"):
        task.samples()
    (folder / "test_a.json").write_text('[{"question_id": "0", "answer": "man"}]', "utf-8")
    with pytest.raises(MissingDataError, match="lacks 1 of 1 videos, 'clip' first"):
        task.samples()
