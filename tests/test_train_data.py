"""What runs read: packed rows, streams, several data sets, label weights, records that are bad.

Independent side: the records of the file, and the model called by hand on them (1e-5: float32 sums
in another order); counts and ids are exact.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import Encoder
from eve_vlm.data.sources import build_mixture
from eve_vlm.loading import load
from eve_vlm.train import data as data_module
from eve_vlm.train.run import train

SAME = 1e-5
NAMES = {f"r{number}" for number in range(20)}


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """Twenty conversations; every fourth is text only."""
    return tiny.llava_file(tmp_path_factory.mktemp("data"), records=20)


@pytest.fixture
def make(tmp_path, data_file):
    def made(*overrides, name="run", sources=None, init_from=None):
        keys = tiny.recipe_data(data_file, tmp_path / name, init_from=init_from)
        if sources is not None:
            keys["data"]["sources"] = sources
        return tiny.recipe(tmp_path / f"{name}.yaml", keys, *overrides)

    return made


@pytest.fixture
def batches(monkeypatch):
    """Every batch that a run makes."""
    seen = []

    class Watched(EveCollator):
        def __call__(self, rows):
            seen.append(super().__call__(rows))
            return dict(seen[-1])

    monkeypatch.setattr(data_module, "EveCollator", Watched)
    return seen


def of_epochs(*overrides):
    return ("training.max_steps=-1", "training.num_train_epochs=2.0", *overrides)


PACKED = "data.packing={tokens: 320, patches: 300, window: 8}"


def test_two_epochs_of_packed_rows_read_every_record_twice(make, batches):
    result = train(make(*of_epochs(PACKED)))
    ids = [one for batch in batches for row in batch["record_ids"] for one in row]
    last = len(ids) - sum(map(len, batches[-1]["record_ids"]))
    counts = {name: ids.count(name) for name in NAMES}
    # The last step is filled from the third epoch.
    assert set(counts.values()) <= {2, 3} and last < 40 <= len(ids)
    assert result.steps == len(batches) and result.records >= 40
    for batch in batches:
        assert batch["input_ids"].shape[1] <= 320 and "attention_mask" not in batch
        assert len(batch.get("pixel_values", ())) <= 2 * 300
    used = [entry["utilisation"] for entry in result.losses]
    assert all(0 < share <= 1 for share in used) and max(used) > 0.8
    assert all(0 <= entry["data_wait"] < 1 for entry in result.losses)
    assert [entry["epoch"] for entry in result.losses][-1] >= 2


def test_a_packed_run_learns(make):
    losses = [
        entry["loss_lm"]
        for entry in train(
            make(PACKED, "training.max_steps=40", "stage.learning_rates={'*': 3.0e-3}")
        ).losses
    ]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("packing", [(), (PACKED,)])
def test_losses_by_data_set_make_up_the_loss(make, data_file, packing, batches):
    """By the number of labels of each; the names are the recipe's."""
    sources = [
        {"kind": "llava", "path": str(data_file), "name": "first", "split": "[:50%]"},
        {"kind": "llava", "path": str(data_file), "name": "second", "split": "[50%:]"},
    ]
    result = train(make("training.max_steps=5", *packing, sources=sources))
    for entry, batch in zip(result.losses, batches, strict=True):
        assert {name for row in batch["source_names"] for name in row} <= {"first", "second"}
        learnt = batch["labels"][:, 1:] != -100
        groups = batch["label_groups"][:, 1:]
        counts = [int((learnt & (groups == number)).sum()) for number in range(2)]
        parts = [
            entry[f"loss_of/{name}"] * count
            for name, count in zip(("first", "second"), counts, strict=True)
            if count
        ]
        assert sum(parts) / sum(counts) == pytest.approx(entry["loss_lm"], abs=SAME)


@pytest.mark.parametrize("kind", ["token", "sample", "sqrt"])
def test_label_weights_reach_the_loss(make, tmp_path, data_file, kind):
    """The first step of a run against every record alone: mean losses, weighted by hand."""
    recipe = make(
        *(f"stage.label_weight={kind}", "training.max_steps=1"),
        *("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=3"),
        # So slow that the saved model is the one that the step began with.
        "stage.learning_rates={'*': 1.0e-30}",
    )
    result = train(recipe)
    loaded = load(tmp_path / "run")
    encoder = Encoder(loaded.processor, format="chat", max_length=256)
    records = build_mixture(recipe.data.sources, seed=recipe.seed)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(recipe.seed))[:6]
    total, weights = 0.0, 0.0
    for number in order.tolist():
        batch = EveCollator(0)([[encoder(records[number])]])
        inputs = {
            name: value
            for name, value in batch.items()
            if isinstance(value, torch.Tensor) and name != "teacher_pixel_values"
        }
        with torch.no_grad():
            mean = float(loaded.model(**inputs).loss)
        labels = int((batch["labels"][:, 1:] != -100).sum())
        weight = {"token": labels, "sample": 1, "sqrt": labels**0.5}[kind]
        total, weights = total + mean * weight, weights + weight
    assert result.losses[0]["loss_lm"] == pytest.approx(total / weights, abs=SAME)


def test_a_stream_trains_packed_too(make, tmp_path, data_file, batches):
    start = tmp_path / "start"
    tiny.model().save_pretrained(start)
    tiny.processor().save_pretrained(start)
    lines = tmp_path / "lines.jsonl"
    records = json.loads(data_file.read_text())
    for record in records:
        if "image" in record:
            record["image"] = str(data_file.parent / record["image"])
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = [{"kind": "llava", "path": str(lines), "streaming": True, "image_folder": "/"}]
    overrides = (PACKED, "training.max_steps=6")
    result = train(make(*overrides, sources=sources, init_from=start, name="stream"))
    ids = [one for batch in batches for row in batch["record_ids"] for one in row]
    assert set(ids) == NAMES and result.records == len(ids)
    endless = make(*of_epochs(), sources=sources, init_from=start, name="endless")
    assert "set training.max_steps" in tiny.refused(lambda: train(endless))
    new = make(sources=sources, name="new")
    assert "give model.tokenizer" in tiny.refused(lambda: train(new))


def test_what_is_left_out_can_be_put_into_quarantine(make, tmp_path, data_file, batches):
    """The list that a run leaves is the list that the next one reads."""
    folder = tmp_path / "copy"
    folder.mkdir()
    records = json.loads(data_file.read_text())
    for record in records:
        if "image" in record:
            record["image"] = str(data_file.parent / record["image"])
    records[4]["image"] = "nowhere.png"
    records[7]["conversations"][-1]["value"] = " "
    spoilt = folder / "spoilt.json"
    spoilt.write_text(json.dumps(records))
    sources = [{"kind": "llava", "path": str(spoilt), "image_folder": "/"}]
    train(make(*of_epochs("data.max_bad_share=0.5"), sources=sources))
    file = tmp_path / "run" / "bad_records.jsonl"
    listed = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(one["source"], one["id"]) for one in listed} == {("spoilt", "r4"), ("spoilt", "r7")}
    assert len(listed) == 2  # once each, though they were met in both epochs
    assert any("nowhere.png" in one["reason"] for one in listed)
    batches.clear()
    overrides = of_epochs("data.max_bad_share=0.0", f"data.quarantine={file}")
    train(make(*overrides, sources=sources, name="clean"))
    ids = {one for batch in batches for row in batch["record_ids"] for one in row}
    assert ids == NAMES - {"r4", "r7"}
    assert not (tmp_path / "clean" / "bad_records.jsonl").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.packing={tokens: 200}", "has no row; make it at least that"),
        ("data.packing={tokens: 300, window: 0}", "data.packing.window must be above 0"),
        ("data.packing={tokens: 300, patches: 0}", "data.packing.patches must be above 0"),
        ("data.packing={token: 300}", "data.packing"),
    ],
)
def test_packing_that_cannot_be(make, override, words):
    assert words in tiny.refused(lambda: make(override))


def test_flash_attention_packs_one_row(make):
    text = tiny.refused(lambda: make(PACKED, "model.attn_implementation=flash_attention_2"))
    assert "reads packed records from one row" in text


@pytest.mark.slow
def test_compiled_layers_give_the_same_run(make, tmp_path):
    """1e-4: a compiler orders sums in its own way."""
    plain = train(make("training.max_steps=3"))
    compiled = train(make("training.max_steps=3", "model.compile_layers=true", name="compiled"))
    for ours, theirs in zip(compiled.losses, plain.losses, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("run", "compiled")
    )
    assert set(first) == set(second)
