"""The command line: helps, dry runs, answers, and every mistake as one sentence and exit code 2.

Most calls happen in this process, because importing torch takes seconds; two are real processes.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from eve_vlm import __version__, cli
from eve_vlm.last_quickstart import POINTER
from eve_vlm.quickstart import STAGES
from eve_vlm.train.recipe import recipes_folder, stage_recipes
from test_pictures import png_claiming

SHIPPED = list(stage_recipes())


@pytest.fixture
def eve(monkeypatch, capsys, tmp_path):
    """Calls `eve` with arguments, in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["eve", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def refused(eve):
    """Calls `eve`, which must refuse: exit code 2, no answer, one sentence; returns the sentence."""

    def call(*arguments):
        code, out, err = eve(*arguments)
        assert code == 2 and out == "" and "Traceback" not in err
        lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("eve: ")]
        assert len(lines) == 1 and err.endswith(lines[0] + "\n")
        return lines[0]

    return call


@pytest.fixture
def cat(tmp_path):
    path = tmp_path / "cat.png"
    tiny.picture(20, 32).save(path)
    return path


def ask(saved_model, *words):
    return ("ask", *words, "--model", saved_model, "--max-new-tokens", 3)


# --- help -----------------------------------------------------------------------------------------


def test_help(eve):
    code, out, _ = eve("--help")
    assert code == 0
    for command in ("train", "quickstart", "ask"):
        assert command in out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ("RECIPE", "KEY=VALUE", "--dry-run", "--resume", "tiny/1_prealign")),
        ("quickstart", ("--output", "--seed", "report.html", "runs/quickstart")),
        ("ask", ("PICTURE... QUESTION", "--model", "--max-new-tokens")),
    ],
)
def test_help_of_a_command(eve, command, words):
    code, out, _ = eve(command, "--help")
    assert code == 0
    for word in words:
        assert word.lower() in out.lower()


def test_version(eve):
    assert eve("--version")[:2] == (0, f"eve-vlm {__version__}\n")


@pytest.mark.parametrize("arguments", [("tain",), ("train",), ("ask",), ("ask", "--modle", "x")])
def test_wrong_usage(eve, arguments):
    code, out, err = eve(*arguments)
    assert code == 2 and out == "" and "--help" in err and "Traceback" not in err


# --- train ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_dry_run_of_every_shipped_recipe(eve, name):
    """Offline, in seconds, the 7B ones without memory for weights; nothing is written."""
    overrides = []
    if name.startswith("tiny/") and not name.endswith(STAGES[0]):
        # The stage before has not run here; its shape is that of the first.
        first = yaml.safe_load((recipes_folder() / "tiny" / f"{STAGES[0]}.yaml").read_text())
        overrides = ["model.init_from=null", f"model.text_config={first['model']['text_config']}"]
    code, out, err = eve("train", name, *overrides, "--dry-run")
    assert code == 0, err
    for word in ("learning_rates", "parameters:", "trained", "sequences per device", "tokens"):
        assert word in out
    if name.startswith("eve_7b/"):
        frozen, aligner = (6_768_398_336 - 29_982_720), 43_067_392
        total = 6_768_398_336 + aligner
        trained = total - frozen if "prealign" in name else total
        assert f"{total:,} parameters: {trained:,} trained" in out
    assert not any(path.name != "cache" for path in Path.cwd().iterdir())


@pytest.fixture
def mine(tmp_path, tmp_path_factory):
    """A recipe file of one's own that trains in seconds."""
    data = tiny.llava_file(tmp_path_factory.mktemp("data"))
    file = tmp_path / "mine.yaml"
    keys = tiny.recipe_data(data, tmp_path / "run")
    keys["training"]["max_steps"] = 1
    file.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return file


def test_train_then_ask(eve, mine, cat):
    code, out, err = eve("train", mine, "training.max_steps=2")
    assert code == 0 and "run is trained (4 records" in out, err
    code, out, _ = eve("ask", cat, "What is this?", "--model", "run", "--max-new-tokens", "3")
    assert code == 0 and out.endswith("\n")


def test_another_run_in_the_folder(eve, refused, mine):
    assert eve("train", mine)[0] == 0
    text = refused("train", mine, "seed=9")
    assert "different run" in text and "choose another output_dir" in text
    assert "already holds this run, finished" in refused("train", mine)
    assert "already holds this run, finished" in refused("train", mine, "--resume")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("train", "tiny/1_prealing"), ("tiny/1_prealing", "tiny/1_prealign")),
        (("train", "mine.yaml", "trainig.max_steps=3"), ("trainig", "training")),
        (("train", "mine.yaml", "training.max_steps=many"), ("max_steps", "int", "'many'")),
        (("train", "mine.yaml", "max_steps"), ("not an override", "key.path=value")),
        (("train", "mine.yaml", "stage.trainable=[nothing.*]"), ("nothing.*", "matches no")),
        (
            ("train", "mine.yaml", "model.init_from=x", "model.text_config=null"),
            ("x holds no model",),
        ),
        (("train", "mine.yaml", "data.sources.0.path=no.json"), ("no.json is not a file",)),
        (("train", "mine.yaml", "data.max_length=5"), ("max_length is 5",)),
        (("train", "mine.yaml", "model.tokenizer=nowhere"), ("nowhere is no folder",)),
        (
            ("train", "mine.yaml", "stage.alignment={teacher: nowhere}"),
            ("The teacher 'nowhere' cannot be loaded",),
        ),
    ],
)
def test_bad_recipes(refused, mine, arguments, parts):
    text = refused(*arguments)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("surprise: 1", ("mine.yaml", "surprise", "not a key")),
        ("seed: 4e-4", ("mine.yaml", "seed", "int", "4e-4")),
        ("stage: [", ("mine.yaml", "line")),
    ],
)
def test_bad_recipe_files(refused, mine, line, parts):
    text = mine.read_text(encoding="utf-8")
    text = re.sub(rf"^{line.split(':')[0]}:.*\n", "", text, flags=re.M)
    mine.write_text(text + line + "\n", encoding="utf-8")
    message = refused("train", mine)
    for part in parts:
        assert part in message


# --- ask ------------------------------------------------------------------------------------------


def test_ask_about_several_pictures_or_none(eve, saved_model, cat, tmp_path):
    tiny.picture(9, 30, seed=4).save(tmp_path / "dog.jpg")
    for words in (
        (cat, "What is this?"),
        (cat, tmp_path / "dog.jpg", "Are these alike?"),
        (cat, tmp_path / "dog.jpg", "Is <image> like <image>?"),
        ("What is red?",),
        (cat, "word " * 60),
    ):
        code, out, err = eve(*ask(saved_model, *words))
        assert code == 0 and out.endswith("\n"), err


def test_ask_takes_the_last_quickstart_run(eve, refused, saved_model, cat, tmp_path, monkeypatch):
    """In a version without eve-small; with it: tests/test_default_model.py."""
    monkeypatch.setattr("eve_vlm.default_model.assembling.is_shipped", lambda: False)
    assert "run `eve quickstart` first" in refused("ask", cat, "What?")
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / POINTER).write_text(str(saved_model), encoding="utf-8")
    assert eve("ask", cat, "What?", "--max-new-tokens", "2")[0] == 0
    (tmp_path / "cache" / POINTER).write_text(str(tmp_path / "gone"), encoding="utf-8")
    assert "run `eve quickstart` first" in refused("ask", cat, "What?")


@pytest.mark.parametrize("kind", ["animated", "cmyk", "sixteen bits", "palette", "turned", "grey"])
def test_odd_but_good_pictures(eve, saved_model, tmp_path, kind):
    picture, path = tiny.picture(20, 32), tmp_path / "odd.png"
    if kind == "animated":
        path = tmp_path / "odd.gif"
        picture.save(path, save_all=True, append_images=[tiny.picture(20, 32, seed=1)])
    elif kind == "cmyk":
        path = tmp_path / "odd.jpg"
        picture.convert("CMYK").save(path)
    elif kind == "sixteen bits":
        Image.frombytes("I;16", (32, 20), bytes(range(256)) * 5).save(path)
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(path, exif=exif)
    else:
        picture.convert("P" if kind == "palette" else "L").save(path)
    assert eve(*ask(saved_model, path, "What?"))[0] == 0


def truncated(path):
    tiny.picture(100, 100).save(path)
    path.write_bytes(path.read_bytes()[:9000])


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (truncated, "damaged or cut short"),
        (lambda path: path.write_text("hello"), "not a picture"),
        (lambda path: path.write_bytes(b""), "not a picture"),
        (lambda path: path.write_bytes(png_claiming(0, 5)), "bad.png"),
        (lambda path: path.write_bytes(png_claiming(60_000, 60_000)), "60000 x 60000 pixels"),
        (lambda path: None, "is neither a file nor a folder"),
        (lambda path: path.mkdir(), "has no pictures"),
    ],
    ids=["truncated", "text", "empty", "no pixels", "huge", "missing", "folder"],
)
def test_bad_pictures(refused, saved_model, tmp_path, spoil, part):
    path = tmp_path / "bad.png"
    spoil(path)
    text = refused(*ask(saved_model, path, "What?"))
    assert part in text and str(path) in text


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("cat.png", ""), "question is empty"),
        (("cat.png", "  "), "question is empty"),
        (("cat.png", "<image>"), "question is empty"),
        (("cat.png",), "no question behind cat.png"),
        (("cat.png", "cat.png"), "no question behind cat.png"),
        (("cat.png", "Is <image> like <image>?"), "2 <image> marks but 1 pictures"),
        (("cat.png", "cat.png", "What is <image>?"), "1 <image> marks but 2 pictures"),
        (("What is <image>?",), "1 <image> marks but 0 pictures"),
        (("cat.png", "What", "is", "this?"), "What is neither a file nor a folder"),
        (("cat.png", "word " * 600), "shorten the question"),
    ],
)
def test_bad_questions(refused, saved_model, cat, words, part):
    assert part in refused(*ask(saved_model, *words))


def test_too_long_names_a_picture_size_that_fits(refused, tmp_path, cat):
    tiny.model(tiny.config(max_position_embeddings=40)).save_pretrained(tmp_path / "m")
    tiny.processor(edge=64).save_pretrained(tmp_path / "m")
    text = refused(*ask(tmp_path / "m", cat, "What?"))
    assert re.search(r"takes \d+ tokens, \d+ of them for pictures", text)
    assert "the model takes 40" in text and re.search(r"longest_edge \d+ .* would fit", text)


@pytest.fixture
def spoilt(tmp_path, model, processor):
    folder = tmp_path / "spoilt"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_missing_and_surplus_weights(refused, spoilt, cat):
    file = spoilt / "model.safetensors"
    weights = load_file(file)
    save_file(
        weights | {"more": weights["lm_head.weight"].clone()}, file, metadata={"format": "pt"}
    )
    assert "has surplus 1 weights (more)" in refused(*ask(spoilt, cat, "What?"))
    weights.pop("model.vision_tower.row_end_embedding")
    save_file(weights, file, metadata={"format": "pt"})
    text = refused(*ask(spoilt, cat, "What?"))
    assert "lacks 1 weights (model.vision_tower.row_end_embedding)" in text


def test_models_that_are_none(refused, spoilt, cat, tmp_path):
    assert "nowhere is no folder" in refused(*ask(tmp_path / "nowhere", cat, "What?"))
    assert "holds no model" in refused(*ask(tmp_path, cat, "What?"))
    (spoilt / "model.safetensors").write_bytes(b"123")
    assert "model.safetensors is cut off or corrupt" in refused(*ask(spoilt, cat, "What?"))
    (spoilt / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(*ask(spoilt, cat, "What?"))


def test_debugging_shows_the_traceback(eve, cat, monkeypatch, tmp_path):
    monkeypatch.setenv("EVE_DEBUG", "1")
    with pytest.raises(ValueError, match="nowhere is no folder"):
        eve("ask", cat, "What?", "--model", str(tmp_path / "nowhere"))


# --- quickstart -----------------------------------------------------------------------------------


def test_quickstart_passes_its_options_on(eve, monkeypatch):
    seen = {}

    def run_quickstart(output, **settings):
        seen.update(settings, output=output)
        return "All done."

    monkeypatch.setattr("eve_vlm.quickstart.run_quickstart", run_quickstart)
    monkeypatch.setattr("eve_vlm.default_model.assembling.is_shipped", lambda: False)
    assert eve("quickstart", "--seed", "5", "--output", "here")[:2] == (0, "All done.\n")
    assert seen == {"output": Path("here"), "seed": 5}


# --- real processes -------------------------------------------------------------------------------


def process(folder, *arguments):
    environment = os.environ | {"EVE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "eve_vlm.cli", *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,  # seconds; far above the ten that a busy machine takes
    )


def test_a_real_process_refuses_in_one_sentence(spoilt, tmp_path):
    """All that is written, by us or by a library, is a bar and our sentence."""
    truncated(tmp_path / "bad.png")
    done = process(tmp_path, *ask(spoilt, tmp_path / "bad.png", "What?"))
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.strip().replace("\r", "\n").splitlines()
    lines = [line for line in lines if line and not line.startswith("Loading weights")]
    assert len(lines) == 1 and lines[0].startswith("eve: ") and "cut short" in lines[0]


def test_a_real_process_answers(spoilt, tmp_path, cat):
    done = process(tmp_path, *ask(spoilt, cat, "What?"))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 1 or done.stdout == "\n"
