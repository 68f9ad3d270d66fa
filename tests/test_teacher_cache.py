"""Kept features of the teacher: the same losses and gradients, asked once, whole or made again.

Tolerances. `HALF` 2**-11 is what rounding to float16 changes a number by, relative to it; so it
turns a cell's feature vector by at most as much, and no cosine changes by more: the alignment loss
with and without a cache differs by `HALF` at most.  Its gradient at the student's unit vector turns
by twice that, relative to the largest that it can be.  Compared with a teacher whose features are
rounded as it gives them, nothing is left but `SAME` 1e-5, float32 sums in another order.
"""

import copy
import logging
import multiprocessing
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

import tiny
from eve_vlm.cli import app
from eve_vlm.data import feature_table
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import Encoder
from eve_vlm.data.feature_table import PAGE, FeatureTable
from eve_vlm.data.sources import LlavaSource
from eve_vlm.train.run import train
from eve_vlm.train.teacher import FrozenTeacher
from eve_vlm.train.teacher_cache import TeacherFeatures, fingerprint_of, open_table

HALF, SAME = 2.0**-11, 1e-5
CELLS = tiny.EDGE // tiny.MULTIPLE
WIDTH = tiny.TEACHER_WIDTH
TRAINED = ("loss", "loss_lm", "loss_alignment")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder for every test; no report is drawn, which takes a second a run."""
    monkeypatch.setenv("EVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    return tmp_path / "cache" / "teacher_features"


@pytest.fixture
def data(tmp_path):
    return tiny.llava_file(tmp_path / "data", records=12)


@pytest.fixture
def teacher(teacher_folder):
    return FrozenTeacher.from_pretrained(str(teacher_folder), cells=CELLS)


def table(path=None, *, limit=10**6, fingerprint="one", width=WIDTH):
    return FeatureTable(
        path, fingerprint=fingerprint, width=width, most_cells=CELLS**2, limit=limit
    )


def some(number, cells=6, *, seed=0):
    """Keys and features."""
    rng = np.random.default_rng(seed)
    keys = [rng.bytes(16) for _ in range(number)]
    return keys, [rng.standard_normal((cells, WIDTH)).astype(np.float16) for _ in keys]


def recipe(tmp_path, data, teacher_folder, *overrides, name="run"):
    made = tiny.recipe_data(data, tmp_path / name, teacher=teacher_folder)
    return tiny.recipe(tmp_path / f"{name}.yaml", made, *overrides)


class Asked:
    """Counts the pictures that teachers are asked about."""

    def __init__(self, monkeypatch):
        self.pictures = 0
        plain = FrozenTeacher.features_of_cells

        def counted(teacher, views, cells):
            self.pictures += len(views)
            return plain(teacher, views, cells)

        monkeypatch.setattr(FrozenTeacher, "features_of_cells", counted)


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("disk", [False, True])
def test_what_is_kept_is_found(tmp_path, disk):
    """Bit for bit, by its key and number of cells only; a dict is the oracle."""
    kept = table(tmp_path / "t" if disk else None)
    keys, features = some(100)
    assert kept.put(keys, features) == 100 and kept.put(keys[:3], features[:3]) == 0
    for key, value in zip(keys, features, strict=True):
        assert np.array_equal(kept.get(key, 6), value)
        assert kept.get(key, 5) is None
    assert kept.get(bytes(range(16)), 6) is None
    assert kept.counts == (100, 100 * PAGE)


def test_keys_that_meet_stand_side_by_side(tmp_path):
    """Seven of eight places taken by keys that all want the same one."""
    kept = table(limit=4 * PAGE)
    assert kept.places == 8
    keys, features = some(4)
    keys = [bytes(8) + key[8:] for key in keys]
    kept.put(keys, features)
    assert all(
        np.array_equal(kept.get(*pair), value)
        for pair, value in zip([(key, 6) for key in keys], features, strict=True)
    )


def test_a_full_table_says_so_once_and_keeps_what_it_has(tmp_path, caplog):
    kept = table(tmp_path / "t", limit=3 * PAGE)
    keys, features = some(5)
    with caplog.at_level(logging.WARNING):
        assert kept.put(keys, features) == 3
    assert kept.full and len(caplog.records) == 1
    assert "3 pictures are kept" in caplog.text and "cache_gb" in caplog.text
    assert [kept.get(key, 6) is not None for key in keys] == [True] * 3 + [False] * 2


def test_a_damaged_record_is_made_again(tmp_path):
    file = tmp_path / "t"
    keys, features = some(20)
    table(file).put(keys, features)
    content = bytearray(file.read_bytes())
    at = content.find(features[7].tobytes())
    content[at + 5] ^= 4
    file.write_bytes(content)
    kept = table(file)
    assert [kept.get(key, 6) is None for key in keys] == [index == 7 for index in range(20)]
    assert kept.put(keys, features) == 1 and kept.counts[0] == 20
    assert np.array_equal(kept.get(keys[7], 6), features[7])


@pytest.mark.parametrize("damage", ["beginning", "end"])
def test_a_damaged_file_is_made_again(tmp_path, caplog, damage):
    file = tmp_path / "t"
    keys, features = some(3)
    table(file).put(keys, features)
    with file.open("r+b") as stream:
        if damage == "beginning":
            stream.write(b"something else")
        else:
            stream.truncate(PAGE + 100)
    kept = table(file)
    assert "damaged" in caplog.text and kept.counts == (0, 0)
    assert kept.put(keys, features) == 3 and np.array_equal(kept.get(keys[0], 6), features[0])


def test_tables_of_others_are_refused(tmp_path):
    table(tmp_path / "t")
    said = tiny.refused(lambda: table(tmp_path / "t", fingerprint="two"))
    assert "another teacher, layer or canvas" in said
    said = tiny.refused(lambda: table(tmp_path / "t", limit=2 * 10**6))
    assert "cache_gb 0.001" in said and "0.002" in said


def test_too_little_room_is_said_at_the_start(tmp_path, monkeypatch):
    assert "cache_gb" in tiny.refused(lambda: table(limit=10))
    assert "memory left" in tiny.refused(lambda: table(limit=10**15))
    assert "smaller stage.alignment.cache_gb" in tiny.refused(
        lambda: table(tmp_path / "t", limit=10**15)
    )


def test_a_disk_that_gets_full_is_said_and_ends_nothing(tmp_path, caplog, monkeypatch):
    kept = table(tmp_path / "t")
    keys, features = some(4)
    kept.put(keys[:2], features[:2])

    def full(*args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(feature_table._Writer, "__call__", full)
    assert kept.put(keys, features) == 0
    assert kept.full and "No space left" in caplog.text
    assert [kept.get(key, 6) is not None for key in keys] == [True, True, False, False]


def test_infinite_features_are_refused():
    keys, features = some(1)
    features[0][0, 0] = np.inf
    assert "null" in tiny.refused(lambda: table().put(keys, features))


def write_some(path, seed):
    keys, features = some(50, seed=seed)
    both, shared = some(20, seed=99)
    kept = table(path)
    for part in range(0, 50, 5):
        kept.put(keys[part : part + 5], features[part : part + 5])
        kept.put(both, shared)


def test_processes_write_at_once(tmp_path):
    """Each its own 50 and all the same 20; nothing is lost, torn or kept twice."""
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=write_some, args=(tmp_path / "t", seed)) for seed in (1, 2)]
    reader = table(tmp_path / "t")  # opened before anything is there
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    for number, seed in ((50, 1), (50, 2), (20, 99)):
        for key, value in zip(*some(number, seed=seed), strict=True):
            assert np.array_equal(reader.get(key, 6), value)
    assert reader.counts == (120, 120 * PAGE)


# --- what it is of --------------------------------------------------------------------------------


def test_the_fingerprint_is_of_what_is_computed(teacher, teacher_folder, tmp_path):
    """Weights, layer and canvas change it; a copy under another name does not."""
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1e-3
    moved = FrozenTeacher.from_pretrained(str(tiny.teacher_folder(tmp_path)), cells=CELLS)
    layer = FrozenTeacher.from_pretrained(str(teacher_folder), cells=CELLS, layer=-1)
    canvas = FrozenTeacher.from_pretrained(str(teacher_folder), cells=CELLS + 1)
    assert fingerprint_of(moved) == fingerprint_of(teacher)
    prints = [fingerprint_of(one) for one in (teacher, other, layer, canvas)]
    assert len(set(prints)) == 4


def test_layers_are_kept_apart(tmp_path, data, teacher_folder, cache):
    tables = []
    for layer in (-2, -1):
        teacher = FrozenTeacher.from_pretrained(str(teacher_folder), cells=CELLS, layer=layer)
        settings = ("stage.alignment.cache=disk", "stage.alignment.cache_gb=0.001")
        tables.append(open_table(recipe(tmp_path, data, teacher_folder, *settings), teacher))
    tables[0].put(*some(1))
    assert tables[0].path != tables[1].path and tables[1].counts == (0, 0)


def test_a_picture_is_known_by_its_content(data, teacher, tmp_path):
    """By a file, its copy and its pixels, at one size; not by its name, and not at another size."""
    kept = table()
    encoder = Encoder(
        tiny.processor(),
        format="chat",
        max_length=256,
        teacher_view=teacher.view,
        teacher_table=kept,
    )
    one, changed = tiny.picture(20, 30), tiny.picture(20, 30).copy()
    changed.putpixel((3, 3), (1, 2, 3))
    for name, picture in (("a", one), ("b", one), ("c", changed)):
        picture.save(tmp_path / f"{name}.png")

    def key(image):
        record = LlavaSource(data)[0]
        (found,) = encoder(
            type(record)(id="r", messages=record.messages, images=[image])
        ).teacher_keys
        return found

    files = [key(tmp_path / f"{name}.png") for name in "abc"]
    assert files[0] == files[1] != files[2]
    assert key(one) == key(one.copy()) != key(changed)
    smaller = Encoder(
        tiny.processor(edge=16), format="chat", max_length=256, teacher_view=teacher.view
    )
    smaller.teacher_table, wide = kept, encoder
    encoder = smaller
    assert key(one) not in (files[0], None)
    encoder = wide
    assert key(Image.open(tmp_path / "a.png")) == key(one)


# --- losses ---------------------------------------------------------------------------------------


def batch_of(data, teacher, kept=None):
    encoder = Encoder(
        tiny.processor(),
        format="chat",
        max_length=256,
        teacher_view=teacher.view,
        teacher_table=kept,
    )
    source = LlavaSource(data)
    return EveCollator(0)([[encoder(source[index])] for index in range(5)])


def loss_and_gradients(model, batch, ask):
    batch = tiny.for_model(batch)
    ask.prepare(batch)
    features = ask(batch)
    model.zero_grad()
    out = model.train()(**batch, teacher_features=features)
    out.loss.backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters()}
    return out.loss_terms, gradients, features


@pytest.mark.parametrize("known", ["none", "some", "all"])
def test_losses_and_gradients_are_those_without_a_cache(data, teacher, known):
    model, kept = tiny.model(tiny.config(aligned=True)), table()
    plain = TeacherFeatures(teacher, side=tiny.MERGE)
    terms, gradients, exact = loss_and_gradients(model, batch_of(data, teacher), plain)

    rounded = copy.copy(teacher)
    rounded.features_of_cells = lambda *given: teacher.features_of_cells(*given).half().float()
    _, expected, half = loss_and_gradients(
        model, batch_of(data, teacher), TeacherFeatures(rounded, side=tiny.MERGE)
    )
    ask = TeacherFeatures(teacher, side=tiny.MERGE, table=kept)
    if known != "none":
        loss_and_gradients(model, batch_of(data, teacher, kept), ask)
        ask.keep()
        assert kept.counts[0] == 4  # of five records, one of which is text only
    if known == "some":  # one record is damaged, so its picture is asked about again
        at = next(
            at for at in range(PAGE, len(kept._map), PAGE) if kept._map[at : at + 16].strip(b"\0")
        )
        kept._map[at + 40] ^= 1
    batch = batch_of(data, teacher, kept)
    assert len(batch["teacher_pixel_values"]) == {"none": 4, "some": 1, "all": 0}[known]
    made, found, features = loss_and_gradients(model, batch, ask)

    # Other batches of the teacher may change the last bit of float32, so of float16 now and then.
    assert (features - half).abs().max() <= 2 * HALF * exact.abs().max()
    assert abs(float(made["alignment"] - terms["alignment"])) <= HALF + SAME
    assert abs(float(made["lm"] - terms["lm"])) <= SAME
    for name, gradient in expected.items():
        # Each is linear in the student's gradients; rounding may differ by one place (above).
        scale = float(gradients[name].norm()) + SAME
        assert float((found[name] - gradient).norm()) <= 4 * HALF * scale, name
        assert float((found[name] - gradients[name]).norm()) <= 8 * HALF * scale, name


def test_the_bound_on_the_loss_is_what_rounding_does():
    """The tolerance is no accident: over a million cells no cosine moves further, many half as far."""
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(100_000, 8, generator=generator, dtype=torch.float64) for _ in "ab")
    moved = F.cosine_similarity(one, two) - F.cosine_similarity(one, two.half().double())
    assert HALF / 4 < float(moved.abs().max()) <= HALF


# --- whole runs -----------------------------------------------------------------------------------


def terms(result):
    return {name: [entry[name] for entry in result.losses] for name in TRAINED}


RUN = ("training.max_steps=12", "stage.alignment.cache_gb=0.001")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, teacher_folder):
    """Two epochs without a cache."""
    folder = tmp_path_factory.mktemp("plain")
    data = tiny.llava_file(folder / "data", records=12)
    return train(recipe(folder, data, teacher_folder, *RUN), report=False)


@pytest.mark.parametrize(
    "where, workers",
    [("disk", 0), pytest.param("disk", 2, marks=pytest.mark.slow), ("memory", 2)],
)
def test_a_run_asks_once_for_each_picture(
    tmp_path, data, teacher_folder, monkeypatch, plain, where, workers
):
    """Two epochs; the losses are those of a run without a cache, as far as two steps of it go.

    Rounding moves each loss by `HALF` at most, and the gradient by as much of itself, which twelve
    steps of 1e-3 add to; features of other pictures change the first loss by more (asserted).
    """
    settings = (*RUN, f"training.dataloader_num_workers={workers}")
    asked = Asked(monkeypatch)
    cached = train(
        recipe(
            tmp_path,
            data,
            teacher_folder,
            *settings,
            f"stage.alignment.cache={where}",
            name="cached",
        )
    )
    assert asked.pictures == 9  # of twelve records three are text only; six steps are an epoch
    for name, values in terms(plain).items():
        assert terms(cached)[name] == pytest.approx(values, abs=10 * HALF), name
    if (where, workers) != ("disk", 0):
        return
    plain_get = FeatureTable.get
    monkeypatch.setattr(FeatureTable, "get", lambda *given: swapped(plain_get(*given)))
    again = recipe(
        *(tmp_path, data, teacher_folder, *settings),
        *("stage.alignment.cache=disk", "training.max_steps=1"),
        name="x",
    )
    moved = terms(train(again))["loss_alignment"][0] - terms(plain)["loss_alignment"][0]
    assert abs(moved) > 10 * HALF


def swapped(features):
    """Cells in another order."""
    return None if features is None else features[::-1].copy()


def test_a_later_run_asks_about_nothing(tmp_path, data, teacher_folder, monkeypatch):
    """And with a table that is full it asks about the rest each time."""
    settings = ("training.max_steps=6", "stage.alignment.cache=disk")
    small = ("stage.alignment.cache_gb=0.001",)
    first = train(recipe(tmp_path, data, teacher_folder, *settings, *small, name="first"))
    asked = Asked(monkeypatch)
    second = train(recipe(tmp_path, data, teacher_folder, *settings, *small, name="second"))
    assert asked.pictures == 0
    for name, values in terms(first).items():
        assert terms(second)[name] == pytest.approx(values, abs=SAME), name


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, data, teacher_folder, cache, monkeypatch):
    """Within `SAME`: kept features are the bits that were computed, in batches of the same records."""
    settings = (
        *("training.max_steps=6", "training.save_strategy=steps", "training.save_steps=2"),
        *("stage.alignment.cache=disk", "stage.alignment.cache_gb=0.001"),
    )
    whole = train(recipe(tmp_path, data, teacher_folder, *settings, name="whole"))
    for file in cache.iterdir():
        file.unlink()
    from eve_vlm.train.trainer import EveTrainer

    class Killed(Exception):
        pass

    plain = EveTrainer.training_step

    def killed(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise Killed
        return plain(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(EveTrainer, "training_step", killed)
        with pytest.raises(Killed):
            train(recipe(tmp_path, data, teacher_folder, *settings, name="killed"))
    again = train(recipe(tmp_path, data, teacher_folder, *settings, name="killed"))
    for name, values in terms(whole).items():
        assert terms(again)[name] == pytest.approx(values, abs=SAME), name


def test_filled_ahead_nothing_is_left_to_ask(tmp_path, data, teacher_folder, monkeypatch):
    """`eve data features` in two workers, then a training; and the command a second time."""
    settings = ("stage.alignment.cache=disk", "stage.alignment.cache_gb=0.001")
    recipe(tmp_path, data, teacher_folder, name="run")
    command = ["data", "features", str(tmp_path / "run.yaml"), *settings]
    asked = Asked(monkeypatch)
    said = CliRunner().invoke(app, [*command, "--workers", "2", "--batch", "3", "--device", "cpu"])
    assert said.exit_code == 0, said.output
    assert "9 pictures in 12 records: 9 asked about now, 0 kept before." in said.output
    said = CliRunner().invoke(app, [*command, "--workers", "0"])
    assert "0 asked about now, 9 kept before. 9 pictures take" in said.output
    assert asked.pictures == 9
    train(recipe(tmp_path, data, teacher_folder, *settings, "training.max_steps=6"))
    assert asked.pictures == 9


def test_filling_says_what_it_cannot_do(tmp_path, data, teacher_folder):
    recipe(tmp_path, data, teacher_folder, name="run")

    def refused(*settings):
        done = CliRunner().invoke(app, ["data", "features", str(tmp_path / "run.yaml"), *settings])
        assert isinstance(done.exception, ValueError)
        return str(done.exception)

    assert "cache=disk" in refused()
    disk = "stage.alignment.cache=disk"
    assert "--device" in refused(disk, "--device", "toaster")
    small = f"stage.alignment.cache_gb={3 * PAGE / 1e9:.9f}"
    said = refused(disk, small, "--workers", "0", "--device", "cpu")
    assert "of 3 pictures are kept and no more fit" in said
