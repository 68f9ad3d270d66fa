"""The real lmms-eval, run as a program on its own tasks, unchanged, over data that lie here.

It runs where this interpreter can import lmms-eval, or with the one that `EVE_LMMS_PYTHON` names
(docs/lmms_eval.md says how to make it), and takes about a minute for each start. A tiny model is
taught the form of the answers first, some of them wrong, so that every score is between its ends.
Scores are compared within 1e-9, and losses, which were computed in batches of other shapes, within
1e-3.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys

import pytest
import torch

import tiny
from eve_vlm.eval.metrics import relaxed_accuracy
from eve_vlm.serve.engine import EveEngine, user_message
from eve_vlm.serve.scoring import continuation_ids

pytest.importorskip("datasets", reason="needs the extra data")
import lmms_data

PYTHON = sys.executable if importlib.util.find_spec("lmms_eval") else os.getenv("EVE_LMMS_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="lmms-eval is not installed; EVE_LMMS_PYTHON may name a Python with it"
    ),
]
GENERATED = ("pope", "mme", "scienceqa_img", "chartqa")
WORD = "\nAnswer the question using a single word or phrase."
CHOICES = "\nAnswer with the option's letter from the given choices directly."


def options(row):
    return "".join(f"\n{letter}. {one}" for letter, one in zip("ABCD", row["choices"], strict=True))


PLAIN = {  # the words and the right answer of a row, as the tasks have them
    "pope": lambda row: (row["question"] + WORD, row["answer"]),
    "mme": lambda row: (
        row["question"].removesuffix(" Please answer yes or no.") + WORD,
        row["answer"],
    ),
    "scienceqa_img": lambda row: (row["question"] + options(row) + CHOICES, "ABCD"[row["answer"]]),
    "chartqa": lambda row: (
        row["question"] + "\nAnswer the question with a single word.",
        row["answer"],
    ),
}


def items():
    """Eight pictures of noise with made-up names and numbers."""
    rng, made = random.Random(0), []
    for number in range(8):
        choices = rng.sample(["2", "30", "4.5", "7", "9"], 4)
        picture = tiny.picture(24 + 4 * number, 40, seed=number)
        names = rng.sample(["box", "ball", "square", "circle"], 2)
        made.append(
            lmms_data.Item(picture, *names, f"How many at {number}?", rng.choice(choices), choices)
        )
    return made


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder where the harness runs: repositories and the model; their rows."""
    folder = tmp_path_factory.mktemp("lmms")
    # Every row of POPE but the last one can be read.
    rows = {
        task: lmms_data.make(folder, task, items(), damaged=15 if task == "pope" else None)
        for task in lmms_data.TASKS
    }
    model = tiny.model()
    engine, rng = EveEngine(model, tiny.processor()), random.Random(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    pairs = []
    for task in GENERATED:
        for number, row in enumerate(rows[task]):
            words, answer = PLAIN[task](row)
            if answer.lower() in ("yes", "no"):  # says yes to two of the names
                answer = "yes" if "box" in words or "circle" in words else "no"
            elif number % 3 == 0:
                answer = PLAIN[task](rows[task][number - 1])[1]
            pairs.append((user_message(words, [row["image"]]), answer))
    for _ in range(20):
        rng.shuffle(pairs)
        for messages, answer in pairs:
            prompt = engine.encode(messages)
            ids = torch.tensor(continuation_ids(engine, messages, answer, ends=True))
            labels = torch.cat([torch.full_like(prompt.input_ids, -100), ids])
            loss = model(
                input_ids=torch.cat([prompt.input_ids, ids])[None],
                labels=labels[None],
                **prompt.pictures_from(0),
            ).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder / "model")
    engine.processor.save_pretrained(folder / "model")
    return folder, rows


@pytest.fixture(scope="module")
def engine(work):
    return EveEngine.from_pretrained(work[0] / "model", device="cpu")


def harness(folder, *options, launch=("-m", "lmms_eval"), output="out"):
    """Runs the program; its results, its samples by task, and what it printed."""
    arguments = ["--model", "eve", "--model_args", "pretrained=model", "--batch_size", "4"]
    arguments += ["--device", "cpu", "--log_samples", "--output_path", output]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(
        [PYTHON, *launch, *arguments, *options],
        cwd=folder,
        env=os.environ | offline | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,  # seconds; it takes one minute
    )
    assert done.returncode == 0, done.stdout[-4000:]
    [file] = (folder / output).rglob("*_results.json")
    samples = {}
    for one in (folder / output).rglob("*_samples_*.jsonl"):
        lines = [json.loads(line) for line in one.read_text(encoding="utf-8").splitlines()]
        task = one.stem.split("_samples_")[1]
        samples[task] = sorted(lines, key=lambda line: line["doc_id"])
    return json.loads(file.read_text(encoding="utf-8")), samples, done.stdout


def said(sample):
    """The answer as it was marked; the file has it without the list around it."""
    return sample["filtered_resps"].strip()


@pytest.fixture(scope="module")
def generated(work):
    return harness(work[0], "--tasks", ",".join(GENERATED))


@pytest.mark.parametrize("task", GENERATED)
def test_answers_are_the_engines(work, engine, generated, task):
    """To the words that the harness logged about the pictures that we wrote."""
    _, samples, _ = generated
    rows = work[1][task]
    assert [one["doc_id"] for one in samples[task]] == list(range(len(rows)))
    whole = rows[:-1] if task == "pope" else rows
    asked = [
        user_message(sample["input"], [row["image"]])
        for sample, row in zip(samples[task], whole, strict=False)
    ]
    longest = 128 if task == "pope" else 16
    answers = engine.generate(asked, max_new_tokens=longest)
    assert [said(one) for one in samples[task]][: len(whole)] == answers
    assert len(set(answers)) > 1


def yes_no(answer):
    return answer.lower().strip()


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_scores_are_those_of_the_logged_answers(work, generated):
    """Computed again: POPE's F1, MME's sum over pairs, ChartQA by our own metric."""
    results, samples, _ = generated
    rows, scores = work[1], results["results"]

    def score(task, name):
        return pytest.approx(scores[task][f"{name},none"], abs=1e-9)

    both = [
        (yes_no(said(s)), r["answer"]) for s, r in zip(samples["pope"], rows["pope"], strict=True)
    ]
    right = [one == other for one, other in both]
    assert mean(right) == score("pope", "pope_accuracy") and 0 < mean(right) < 1
    hits = sum(one == other == "yes" for one, other in both)
    # Its recall misses only a `no`.
    precision = hits / sum(one == "yes" for one, _ in both)
    recall = hits / (hits + sum(one == "no" and other == "yes" for one, other in both))
    f1 = 2 * precision * recall / (precision + recall)
    assert f1 == score("pope", "pope_f1_score")

    parts = {"mme_perception_score": 0.0, "mme_cognition_score": 0.0}
    categories = {row["category"] for row in rows["mme"]}
    marks = [
        yes_no(said(s)).startswith(r["answer"].lower())
        for s, r in zip(samples["mme"], rows["mme"], strict=True)
    ]
    for category in categories:
        places = [n for n, row in enumerate(rows["mme"]) if row["category"] == category]
        pairs = [marks[one] and marks[one + 1] for one in places[::2]]
        name = "mme_cognition_score" if "reasoning" in category else "mme_perception_score"
        parts[name] += 100 * (mean(marks[one] for one in places) + mean(pairs))
    for name, total in parts.items():
        assert total == score("mme", name)
    assert 0 < parts["mme_perception_score"] < 400

    letters = [
        said(s) == "ABCD"[r["answer"]]
        for s, r in zip(samples["scienceqa_img"], rows["scienceqa_img"], strict=True)
    ]
    assert mean(letters) == score("scienceqa_img", "exact_match")
    charts = [
        relaxed_accuracy(said(s), r["answer"])
        for s, r in zip(samples["chartqa"], rows["chartqa"], strict=True)
    ]
    assert mean(charts) == score("chartqa", "relaxed_overall")
    assert mean(charts[::2]) == score("chartqa", "relaxed_human_split")
    assert 0 < mean(letters) + mean(charts) < 2


def test_a_picture_that_cannot_be_read_is_named_and_counted(generated):
    results, samples, printed = generated
    assert said(samples["pope"][-1]) == ""
    assert "pope, doc 15 has no answer" in printed
    assert "1 of 48 requests have no answer and score as empty ones: pope 15." in printed
    assert results["throughput"]["avg_failed_requests"] == 1


def test_options_are_ranked_by_likelihood(work, engine):
    """SEED-Bench with `--force_simple`: the harness's accuracy is that of the likeliest option."""
    folder, rows = work
    results, samples, _ = harness(
        folder, "--force_simple", "--tasks", "seedbench_ppl", output="ranked"
    )
    right = []
    for sample, row in zip(samples["seedbench_ppl"], rows["seedbench_ppl"], strict=True):
        options = [row[f"choice_{letter}"] for letter in "abcd"]
        asked = [user_message(sample["input"], row["image"])] * 4
        scores = [one.total for one in engine.log_likelihood(asked, options)]
        losses = [float(loss) for loss, _ in sample["filtered_resps"]]
        assert losses == pytest.approx([-one for one in scores], abs=1e-3)
        right.append("ABCD"[scores.index(max(scores))] == row["answer"])
    assert mean(right) == pytest.approx(results["results"]["seedbench_ppl"]["acc,none"], abs=1e-9)


def test_two_processes_give_what_one_gives(work, generated):
    """Started by accelerate; documents 0, 2, ... go to one and 1, 3, ... to the other."""
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    results, samples, _ = harness(
        work[0], "--tasks", "mme,chartqa", launch=(*launch, "-m", "lmms_eval"), output="two"
    )
    for task in ("mme", "chartqa"):
        assert [said(one) for one in samples[task]] == [said(one) for one in generated[1][task]]
        for name, value in generated[0]["results"][task].items():
            if isinstance(value, float):
                assert results["results"][task][name] == pytest.approx(value, abs=1e-9), name
