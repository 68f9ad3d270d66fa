"""The page of a run: what is in it, that it is made of whatever is there, and a real Chromium.

Independent sides: the browser's own geometry of the curves, its console and its list of requests;
the log file itself for the points of a curve.
"""

import json
import math
import shutil
import sys
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import tiny
from eve_vlm import html_report
from eve_vlm.cli import app
from eve_vlm.json_lines import append_lines, read_lines
from eve_vlm.train.progress import shown_figures
from eve_vlm.train.run import train
from eve_vlm.train.run_log import LOG_FILE
from eve_vlm.train.run_report import (
    PLOTS,
    answers_of,
    bad_records,
    curves_of,
    status_of,
    write_run_report,
)

QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run")
WORDS = "<script>alert('no')</script> & $x_1$"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with two data sets, answers, a record that was left out, checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    keys = tiny.recipe_data(
        tiny.llava_file(folder / "one"),
        folder / "out",
        teacher=tiny.teacher_folder(folder / "teacher"),
    )
    other = tiny.llava_file(folder / "two")
    samples = json.loads(other.read_text())
    samples[0]["image"], samples[1]["conversations"][0]["value"] = "lost.png", WORDS
    del samples[1]["image"]
    other.write_text(json.dumps(samples))
    keys["data"]["sources"][0]["name"] = "first"
    keys["data"]["sources"].append({"kind": "llava", "path": str(other), "name": "<second>"})
    keys["data"]["max_bad_share"] = 0.5
    keys["samples"] = {"every": 4, "number": 24, "max_new_tokens": 4}
    keys["training"] |= {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    keys["name"] = "a <b>run</b>"
    recipe = tiny.recipe(folder / "recipe.yaml", keys)
    train(recipe)
    return folder / "out"


@pytest.fixture(scope="module")
def chromium():
    """A browser without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs chromium or google-chrome, and neither is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, run):
    """The page opened from the disk; at the end nothing was asked for and nothing went wrong."""
    context = chromium.new_context()
    made, wanted, errors = context.new_page(), [], []
    context.on("request", lambda request: wanted.append(request.url))
    made.on("console", lambda one: errors.append(one.text))
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("dialog", lambda dialog: errors.append(dialog.message))
    address = (run / "report.html").as_uri()
    made.goto(address)
    yield made
    context.close()
    assert [url for url in wanted if not url.startswith("data:")] == [address] and not errors


# --- in a browser ---------------------------------------------------------------------------------


def test_curves_are_drawn(page, run):
    """Every line that the log has is a path of some length, at a place that can be seen."""
    log = read_lines(run / LOG_FILE)
    expected = {f"{plot.name}-{label}" for plot in PLOTS for label in curves_of(plot, log)}
    for line in ("loss-lm", "loss-alignment", "rate-all", "norm-projector", "shares-data wait"):
        assert line in expected
    seen = page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll("svg g[id*='-']")].map(
            (group) => [group.id, group.querySelector("path")]).filter(([, path]) => path).map(
            ([id, path]) => [id, [path.getTotalLength(), path.getBoundingClientRect().width]]))"""
    )
    for name in expected:
        length, width = seen[name]
        assert length > 100 and width > 100, name  # pixels; the drawings are 380 wide
    assert page.locator(".plots svg").count() == len({name.split("-")[0] for name in expected})


def test_a_curve_has_the_logged_values(page, run):
    """Heights of the path are the values, by the one straight line that takes one to the other."""
    log = [entry for entry in read_lines(run / LOG_FILE) if "loss_lm" in entry]
    heights = page.evaluate(
        """() => document.getElementById("loss-lm").querySelector("path").getAttribute("d")
            .split(/[ML]/).slice(1).map((point) => point.trim().split(/ +/).map(Number))"""
    )
    assert len(heights) >= len(log)
    values = [entry["loss_lm"] for entry in log]
    ys = [y for _, y in heights[: len(log)]]
    scale = (ys[-1] - ys[0]) / (values[-1] - values[0])
    assert scale < 0  # SVG counts downwards
    # Points of the path have six digits; it may be 1e-3 off at the end of a slope.
    assert ys == pytest.approx([ys[0] + scale * (value - values[0]) for value in values], abs=0.01)


def test_answers_and_tables(page, run):
    asked = page.locator(".asked")
    # Twenty-three of twenty-four records can be asked; ids of both files are the same.
    assert asked.count() == 23
    widths = page.evaluate(
        "() => [...document.querySelectorAll('.asked img')].map((one) => one.naturalWidth)"
    )
    assert widths and all(width > 0 for width in widths)
    text = page.locator("body").inner_text()
    assert WORDS in text and "a <b>run</b>" in text
    for words in ("Finished: 12 steps", "lost.png", "step 4", "step 12", "wanted", "<second>"):
        assert words in text
    for words in ("model.vision_tower", "trained", "torch", "2.1"):  # parameters and environment
        assert words in text
    page.get_by_text("recipe.resolved.yaml").click()
    assert page.get_by_text("per_device_train_batch_size").is_visible()


# --- from the files -------------------------------------------------------------------------------


def test_it_is_written_at_checkpoints(run, tmp_path, monkeypatch):
    """A run that ends half-way has a page with what was there at its last checkpoint."""
    recipe = tiny.recipe(
        tmp_path / "recipe.yaml",
        tiny.recipe_data(tiny.llava_file(tmp_path / "data"), tmp_path / "out"),
        *("training.save_strategy=steps", "training.save_steps=2"),
    )

    class Stopped(BaseException):
        pass

    from eve_vlm.train.trainer import EveTrainer

    plain = EveTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Stopped
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(EveTrainer, "training_step", training_step)
    with pytest.raises(Stopped):
        train(recipe)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Not finished: step 2 of 4" in text and "<svg" in text
    # After the crash the command makes it again, with the third step.
    done = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
    assert done.exit_code == 0 and "report.html is written" in done.output
    assert "Not finished: step 3 of 4" in (tmp_path / "out" / "report.html").read_text()


def test_a_folder_without_a_run(tmp_path):
    message = tiny.refused(lambda: write_run_report(tmp_path), end=".")
    assert "holds no run" in message


def test_a_run_that_has_just_begun(run, tmp_path):
    """The recipe alone will do."""
    shutil.copy(run / "recipe.resolved.yaml", tmp_path)
    text = write_run_report(tmp_path).read_text(encoding="utf-8")
    assert text.count("Nothing was logged yet.") == 2 and "<svg" not in text
    assert [file.name for file in tmp_path.glob("*.part*")] == []


def test_without_matplotlib_it_says_so(run, tmp_path, monkeypatch):
    """The rest of the page is there, and the run does not end for it."""
    for name in ("recipe.resolved.yaml", LOG_FILE, "run.json"):
        shutil.copy(run / name, tmp_path)
    monkeypatch.setattr(html_report, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = write_run_report(tmp_path).read_text(encoding="utf-8")
    assert "pip install &#39;eve-vlm[train]&#39;" in text and "<svg" not in text
    assert "loss_lm" in text and "Finished: 12 steps" in text


def test_numbers_that_are_none_are_gaps(tmp_path):
    """A NaN in the log is written, read and drawn around."""
    file = tmp_path / LOG_FILE
    entries = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 1.0}]
    append_lines(file, entries)
    loss = next(plot for plot in PLOTS if plot.name == "loss")
    [points] = curves_of(loss, read_lines(file)).values()
    assert [step for step, _ in points] == [1, 2, 3] and math.isnan(points[1][1])
    svg = html_report.line_plot("loss", {"loss": points}, log=True)
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")


def test_every_logged_figure_has_a_place(run):
    """Nothing that the trainer logs is left out of the drawings, and nothing is drawn twice."""
    log = [entry for entry in read_lines(run / LOG_FILE) if "loss" in entry]
    keys = {key for entry in log for key in entry} - {"step", "time", "epoch"}
    drawn = [key for plot in PLOTS for key in keys if curves_of(plot, [{"step": 1, key: 1.0}])]
    assert sorted(drawn) == sorted(keys)
    assert shown_figures(log[0])


def test_curves_by_data_set(tmp_path):
    """A line for each, called as the recipe calls it, whatever is in the name."""
    log = [
        {"step": step, "loss_of/a&b $x_{$": 2.0, "loss_of/c": 1.0, "loss": 3.0} for step in (1, 2)
    ]
    loss, source = PLOTS[:2]
    assert list(curves_of(source, log)) == ["a&b $x {$", "c"] and list(curves_of(loss, log)) == [
        "loss"
    ]
    svg = html_report.line_plot(source.name, curves_of(source, log))
    names = [one.get("id") for one in ElementTree.fromstring(svg).iter() if one.get("id")]
    assert "source-a&b $x {$" in names and "source-c" in names


def test_statuses(tmp_path):
    begun = {"step": 0, "time": 10.0, "max_steps": 9}
    log = [
        begun,
        {"step": 4, "time": 100.0, "loss": 1.0},
        {"step": 4, "time": 200.0, "max_steps": 9},
    ]
    said = status_of(tmp_path, [*log, {"step": 5, "time": 250.0, "loss": 1.0}])
    assert (
        said == "Not finished: step 5 of 9 was logged 4 min 0 s after the start, resumed 1 times."
    )
    (tmp_path / "run.json").write_text(json.dumps({"steps": 9, "records": 1800, "seconds": 61}))
    assert status_of(tmp_path, log) == "Finished: 9 steps, 1,800 records, 1 min 1 s."


def test_many_answers_are_thinned_out(tmp_path):
    """The first and the last stay, and some between."""
    append_lines(
        tmp_path / "samples.jsonl",
        [
            {
                "step": step,
                "source": "s",
                "id": "a",
                "question": "q",
                "answer": str(step),
                "wanted": "w",
                "pictures": ["none.png"],
            }
            for step in range(1, 101)
        ],
    )
    [record] = answers_of(tmp_path)
    steps = [step for step, _ in record["said"]]
    assert len(steps) == 8 and (steps[0], steps[-1]) == (1, 100) and record["pictures"] == []


def test_bad_records_are_counted_by_reason(tmp_path):
    """Reasons name their record in front, which would make every one a reason of its own."""
    append_lines(
        tmp_path / "bad_records.jsonl",
        [
            {"reason": f"Record {name!r}: its text is empty.", "id": name, "source": "s"}
            for name in "abcde"
        ]
        + [{"reason": "it is malformed", "id": "", "source": "s"}],
    )
    first, second = bad_records(tmp_path)
    assert first == ("its text is empty.", 5, "a, b, c") and second[:2] == ("it is malformed", 1)
