"""Stages of a curation that ask models: scores, features, spread; compared with other code.

k-means and search of FAISS are compared with numpy; a score with the model called directly.  One
thing a reader would get wrong: features are kept in float16, so cosines agree to three digits.
"""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import tiny
from curating import folder_of, recipe, task, waves
from eve_vlm.curate import (
    captions,
    duplicates,
    features,
    fetching,
    filters,
    looking,
    scores,
    spread,
)
from eve_vlm.curate.blocks import gather, write_unit
from eve_vlm.curate.ledger import unit_file
from eve_vlm.curate.places import row_schema
from eve_vlm.curate.recaption import recaption
from eve_vlm.curate.recipe import RecaptionSection, ScoreSection, SpreadSection

faiss = pytest.importorskip("faiss", reason="needs the extra curate")


def rows_of(folder, count):
    ids = folder_of(folder, count)
    rows = [{"id": id, "path": str(folder / id)} for id in ids]
    return pa.Table.from_pylist(rows, schema=row_schema())


# --- scores ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A random ViT with two classes, and itself."""
    folder = tmp_path_factory.mktemp("classifier")
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**settings, intermediate_size=16, image_size=16, patch_size=8,
                       id2label={0: "fine", 1: "nsfw"}, label2id={"fine": 0, "nsfw": 1},
                       initializer_range=1.0)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16},
                "do_rescale": True, "do_normalize": True, "do_resize": True, "resample": 2,
                "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder, model


def test_scores_are_those_of_the_model_and_high_ones_are_dropped(classifier, tmp_path):
    folder, model = classifier
    rows = rows_of(tmp_path / "in", 12)
    pixels = [
        np.asarray(waves(number).resize((16, 16), 2), np.float32) / 255 for number in range(12)
    ]
    inputs = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) * 2 - 1
    with torch.inference_mode():
        expected = model(pixel_values=inputs).logits.softmax(-1)[:, 1].numpy()
    limit = float(np.median(expected))
    section = ScoreSection(name="nsfw", model=str(folder), label="nsfw", most=limit, batch_size=5)
    made = scores.drop_high_scores(rows, task(recipe("", tmp_path, scores=[section])))
    found = made["score_nsfw"].to_numpy()
    assert np.allclose(found, expected, atol=1e-4)  # float32 in other batches
    assert [why == "nsfw score" for why in made["why"].to_pylist()] == (found > limit).tolist()
    assert 0 < made["why"].null_count < 12


def test_a_label_that_the_model_lacks_is_refused(classifier, tmp_path):
    section = ScoreSection(name="nsfw", model=str(classifier[0]), label="NSFW", most=0.5)
    rows = rows_of(tmp_path / "in", 1)
    of = recipe("", tmp_path, scores=[section])
    assert "fine, nsfw" in tiny.refused(lambda: scores.drop_high_scores(rows, task(of)))


# --- features -------------------------------------------------------------------------------------


def test_features_are_means_over_patches_of_any_vision_model(tmp_path):
    """Of a tiny CLIP, by the library's own class; float16 has three digits."""
    from transformers import CLIPVisionModel

    folder = tiny.teacher_folder(tmp_path / "clip")
    section = SpreadSection(model=str(folder), layer=-2, image_size=20, batch_size=3)
    rows = rows_of(tmp_path / "in", 5)
    made = features.make_features(rows, task(recipe("", tmp_path, spread=section)))
    pixels = [
        np.asarray(waves(number).resize((20, 20), 3), np.float32) / 255 for number in range(5)
    ]
    inputs = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28]))
    model = CLIPVisionModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        states = model((inputs - mean) / std, output_hidden_states=True).hidden_states[-2]
    expected = torch.nn.functional.normalize(states[:, 1:].mean(1), dim=-1).numpy()
    assert np.allclose(features.vectors_of(made), expected, atol=2e-3)
    assert made["id"].to_pylist() == rows["id"].to_pylist()


# --- spread ---------------------------------------------------------------------------------------


def spread_out(of, vectors, *, blocks):
    """Runs the steps of the stage on given features; {id: (reason, cause) or None}."""
    names = tuple(f"b{number}" for number in range(blocks))
    settings = {"blocks": names, "rows": len(vectors)}
    parts = np.array_split(np.arange(len(vectors)), blocks)
    ids = {name: [f"{at:04d}" for at in part] for name, part in zip(names, parts, strict=True)}
    for name, part in zip(names, parts, strict=True):
        flat = pa.array(vectors[part].astype(np.float16).ravel())
        column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        table = pa.table({"id": ids[name], "vector": column})
        write_unit(unit_file(tmp := task(of).folder, features.FEATURES, name), table, {})
    made = spread.find_centres(pa.table({}), task(of, unit="all", **settings))
    write_unit(unit_file(tmp, spread.CENTRES, "all"), made, {})
    for name in names:
        table = gather_all(unit_file(tmp, features.FEATURES, name))
        write_unit(
            unit_file(tmp, spread.PLACES, name),
            spread.place_pictures(table, task(of, unit=name, **settings)),
            {},
        )
    first = task(of, **settings)
    for bucket, unit in enumerate(first.layout.bucket_names):
        given = gather(first.files(spread.PLACES, "blocks"), bucket)
        write_unit(unit_file(tmp, spread.NEAREST, unit), spread.keep_nearest(given, first), {})
    fates = {}
    for name in names:
        table = spread.drop_far(pa.table({"id": ids[name]}), task(of, unit=name, **settings))
        for row in table.to_pylist():
            fates[row["id"]] = row["why"] and (row["why"], row["because"])
    return fates, features.vectors_of(made), first.counts


def gather_all(file):
    import pyarrow.parquet as pq

    return pq.read_table(file)


def clouds(sizes, *, width=8, noise=0.05):
    """Vectors of length 1 around directions far apart, and the cloud of each."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(width, width)))[0][: len(sizes)]
    owners = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    vectors = directions[owners] + noise * rng.normal(size=(len(owners), width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), owners


def test_the_nearest_of_each_centre_are_kept_and_no_others(tmp_path, monkeypatch):
    """Clouds of 5 to 80 pictures, 20 kept of each; numpy's own assignment and sorting agree."""
    monkeypatch.setattr("eve_vlm.curate.tasks.BUCKET_ROWS", 50)
    sizes = (5, 15, 20, 30, 80)
    vectors, owners = clouds(sizes)
    section = SpreadSection(centres=5, nearest=20, rounds=20, sample=1000)
    of = recipe("", tmp_path, spread=section, seed=3)
    fates, centres, counts = spread_out(of, vectors, blocks=4)
    assert np.allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-5)
    half = vectors.astype(np.float16).astype(np.float32)
    cosines = half @ centres.T
    place = cosines.argmax(1)
    # Each cloud has a centre of its own (found by k-means from this seed).
    assert all(len(set(place[owners == cloud])) == 1 for cloud in range(5))
    expected = set()
    for centre in range(5):
        members = np.flatnonzero(place == centre)
        expected |= set(members[np.argsort(-cosines[members, centre], kind="stable")][:20].tolist())
    assert {int(id) for id, fate in fates.items() if fate is None} == expected
    assert len(expected) == 5 + 15 + 20 + 20 + 20 and len(fates) == sum(sizes)
    assert {fate[0] for fate in fates.values() if fate} == {"centre is full"}
    assert sum(counts["pictures of a centre"].values()) == 5
    assert dict(counts["pictures kept of a centre"]) == {"5 to 9": 1, "10 to 19": 1, "20 to 49": 3}


def test_pictures_with_the_same_features_go_before_the_nearest_are_counted(tmp_path):
    vectors, _ = clouds((10, 10))
    vectors[5:8] = vectors[4]
    section = SpreadSection(centres=2, nearest=None, duplicate_cosine=0.9995, sample=100)
    fates, _, _ = spread_out(recipe("", tmp_path, spread=section), vectors, blocks=2)
    lost = {int(id): fate for id, fate in fates.items() if fate}
    half = vectors.astype(np.float16).astype(np.float32)
    pairs = {frozenset((a, b)) for a in range(20) for b in range(a) if half[a] @ half[b] > 0.9995}
    assert pairs == {frozenset((a, b)) for a in range(4, 8) for b in range(4, a)}
    assert set(lost) == {5, 6, 7} and {fate for fate in lost.values()} == {
        ("same features", "0004")
    }


def test_more_centres_than_pictures_are_refused(tmp_path):
    vectors, _ = clouds((4,))
    of = recipe("", tmp_path, spread=SpreadSection(centres=5))
    text = tiny.refused(lambda: spread_out(of, vectors, blocks=1))
    assert "5" in text and "only 4 pictures" in text


def test_a_block_of_which_nothing_is_left_passes_through_every_stage(tmp_path):
    """No row is lost or invented, and what comes out has the columns that the next stage asks for."""
    pytest.importorskip("openai", reason="needs the extra curate")
    of = recipe("", tmp_path, spread=SpreadSection(centres=1, duplicate_cosine=0.9),
                recaption=RecaptionSection(model="m", endpoint="http://127.0.0.1:9/v1"))  # fmt: skip
    one = task(of)

    def kept(rows):
        return rows.drop_columns(["why", "because"])

    rows = row_schema().empty_table()
    for stage in (fetching.fetch, looking.look, filters.keep_good):
        rows = kept(stage(rows, one))
    keys = duplicates.file_keys(rows, one)
    write_unit(unit_file(tmp_path, duplicates.KEYS, "b0"), keys, {})
    found = gather([unit_file(tmp_path, duplicates.KEYS, "b0")], 0)
    pairs = duplicates.find_pairs(found, one)
    write_unit(unit_file(tmp_path, duplicates.PAIRS, "00000"), pairs, {})
    rows = kept(duplicates.drop_duplicates(rows, one))
    rows = kept(scores.drop_high_scores(rows, one))
    vectors = features.make_features(rows, one)
    write_unit(unit_file(tmp_path, spread.CENTRES, "all"),
               pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array([1.0, 0.0], pa.float32()), 2)}), {})  # fmt: skip
    places = spread.place_pictures(vectors, one)
    write_unit(unit_file(tmp_path, spread.PLACES, "b0"), places, {})
    found = gather([unit_file(tmp_path, spread.PLACES, "b0")], 0)
    write_unit(unit_file(tmp_path, spread.NEAREST, "00000"), spread.keep_nearest(found, one), {})
    for stage in (spread.drop_far, recaption, captions.keep_good_captions):
        rows = kept(stage(rows, one))
    assert len(rows) == 0
    assert {"id", "sha256", "caption", "captioner", "format", "text"} <= set(rows.column_names)


def test_the_sample_for_centres_does_not_grow_with_the_pictures(tmp_path):
    """Four times the pictures, the same sample, up to one picture of each block."""
    counts = []
    for number, size in enumerate((400, 1600)):
        folder = tmp_path / str(number)
        section = SpreadSection(centres=4, sample=10)
        of = dataclasses.replace(recipe("", folder, spread=section))
        vectors, _ = clouds((size // 4,) * 4)
        names = tuple(f"b{place}" for place in range(8))
        for name, part in zip(names, np.split(vectors, 8), strict=True):
            flat = pa.array(part.astype(np.float16).ravel())
            table = pa.table({"vector": pa.FixedSizeListArray.from_arrays(flat, 8)})
            write_unit(unit_file(folder, features.FEATURES, name), table, {})
        counts.append(len(spread._sample(section, task(of, blocks=names, rows=size))))
    assert counts == [40, 40]
