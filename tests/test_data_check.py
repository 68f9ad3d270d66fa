"""`eve data check`: one record of every problem against a list written by hand, and what is drawn.

Counts, ids, lengths and labels are exact.  A reader would get wrong that records which repeat
others are reported where they come again, never where they came first.
"""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import tiny
from eve_vlm.cli import app, main
from eve_vlm.data.check import KINDS, Numbered, Streamed, check_data_sets, view_of
from eve_vlm.data.check.histograms import drawn_in_text, of_lengths
from eve_vlm.data.check.repeats import repeats_of
from eve_vlm.data.check.tally import BAD
from eve_vlm.data.check.view import harmless, printed
from eve_vlm.data.encode import IGNORED, Encoder
from eve_vlm.data.records import Record
from eve_vlm.data.sources import build_mixture, build_source, read_quarantine
from eve_vlm.data.sources.streams import build_stream
from eve_vlm.train.build import build_processor, build_records
from eve_vlm.train.data import build_encoder
from eve_vlm.train.recipe import load_recipe
from eve_vlm.train.run import train

MAX_LENGTH, MAX_PATCHES = 256, 256


def turns(*texts):
    return [
        {"from": "gpt" if number % 2 else "human", "value": text}
        for number, text in enumerate(texts)
    ]


def png(width, height, *, seed):
    buffer = io.BytesIO()
    tiny.picture(height, width, seed=seed).save(buffer, format="PNG")
    return buffer.getvalue()


def one_of_every(folder):
    """A file with one record of every problem that `chat` with `reject` can have, and fine ones.

    Returns it with what has to be found: (kind, number, id).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(9):
        (folder / f"{number}.png").write_bytes(png(32, 32, seed=number))
    (folder / "tiny.png").write_bytes(png(4, 4, seed=20))
    (folder / "strip.png").write_bytes(png(200, 9, seed=21))
    whole = png(32, 32, seed=22)
    (folder / "cut.png").write_bytes(whole[: len(whole) * 3 // 4])  # its header is whole
    samples, expected = [], []

    def add(id, conversations, image=None, *, found=()):
        sample = {"id": id, "conversations": conversations}
        samples.append(sample | ({} if image is None else {"image": image}))
        expected.extend((kind, len(samples) - 1, id) for kind in found)

    add("fine", turns("<image>\nWhat?", "a square"), "0.png")
    add("words", turns("Say more.", "there is a ball"))
    add("malformed", None, found=["malformed"])
    del samples[-1]["conversations"]
    robot = [{"from": "robot", "value": "Hello"}]
    add("robot", robot, found=["unknown-role"])
    add("gone", turns("<image>\nWhere?", "left"), "none.png", found=["picture-missing"])
    add("out", turns("<image>\nOut?", "no"), "../0.png", found=["picture-missing"])
    add("cut", turns("<image>\nHow?", "so"), "cut.png", found=["picture-damaged"])
    add("marks", turns("<image><image>\nBoth?", "one"), "1.png", found=["marks"])
    add("literal", turns("What is <image>?", "a mark"), found=["marks"])
    add("silent", turns("<image>\nWell?", " "), "2.png", found=["empty-answer"])
    add("asks", turns("<image>\nNobody there?"), "3.png", found=["no-answer"])
    add("long", turns("Tell.", "ball " * 300), found=["too-long"])
    five = [f"{number}.png" for number in range(5)]
    add("five", turns("<image>" * 5 + "\nAll?", "yes"), five, found=["too-many-patches"])
    add("twin", turns("<image>\nFirst twin?", "yes"), "4.png")
    add("twin", turns("<image>\nSecond twin?", "yes"), "5.png", found=["same-id"])
    add("copy", turns("<image>\nWhat?", "a square"), "0.png", found=["same-record"])
    add("words2", turns("<image>\nWhat?", "a square"), "6.png", found=["same-text"])
    add("speck", turns("<image>\nA speck?", "yes"), "tiny.png", found=["tiny-picture"])
    add("strip", turns("<image>\nA strip?", "yes"), "strip.png", found=["extreme-shape"])
    add(
        "two",
        turns("<image><image>\nWorse?", "no"),
        ["cut.png", "strip.png"],
        found=["picture-damaged", "extreme-shape"],
    )
    add("last", turns("<image>\nThe end?", "yes"), "7.png")
    file = folder / "every.json"
    file.write_text(json.dumps(samples), encoding="utf-8")
    return file, expected


def recipe_file(folder, data, **data_keys):
    """A recipe with a start that is there, so that tokenizer and template are given."""
    start = folder / "start"
    if not start.exists():
        tiny.model().save_pretrained(start)
        tiny.processor().save_pretrained(start)
    keys = tiny.recipe_data(data, folder / "run", init_from=start)
    keys["data"] |= {"max_length": MAX_LENGTH, "packing": {"tokens": 512, "patches": MAX_PATCHES}}
    keys["data"] |= data_keys
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    return file


def encoder_of(file):
    recipe = load_recipe(file)
    return build_encoder(recipe.data, build_processor(recipe, build_records(recipe)))


def found_in(result):
    """(kind, number, id) of all that was found; every kind here has fewer records than are named."""
    named = [
        (problem.kind, problem.number, problem.id)
        for check in result.data_sets
        for kind in check.examples.values()
        for problem in kind
    ]
    assert sum(check.counts.total() for check in result.data_sets) == len(named)
    return sorted(named)


def run(*words):
    done = CliRunner().invoke(app, ["data", "check", *map(str, words)])
    if not isinstance(done.exception, ValueError | SystemExit | None):
        raise done.exception
    return done


# --- every problem --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_every_problem_is_found_once_by_kind_number_and_id(tmp_path, workers):
    file, expected = one_of_every(tmp_path / "data")
    encoder = encoder_of(recipe_file(tmp_path, file))
    source = build_source("llava", path=str(file), seed=0)
    result = check_data_sets([Numbered(source)], encoder, workers=workers)
    assert found_in(result) == sorted(expected)
    errors = {number for kind, number, _ in expected if KINDS[kind].error}
    (check,) = result.data_sets
    assert set(np.flatnonzero(check.columns.states == BAD)) == errors
    assert (result.bad, result.ok, result.records) == (len(errors), False, len(source))


def test_what_is_refused_is_what_the_encoder_refuses_and_lengths_are_its_own(tmp_path):
    file, _ = one_of_every(tmp_path / "data")
    encoder = encoder_of(recipe_file(tmp_path, file))
    source = build_source("llava", path=str(file), seed=0)
    (check,) = check_data_sets([Numbered(source)], encoder).data_sets
    columns, whole = check.columns, 0
    for number in range(len(source)):
        try:
            encoded = encoder(source[number])
        except ValueError:
            assert columns.states[number] == BAD
            continue
        whole += 1
        assert columns.states[number] != BAD
        assert columns.lengths[number] == len(encoded.input_ids)
        assert columns.patches[number] == len(encoded.pixel_values)
        assert columns.learnt[number] == (encoded.labels != IGNORED).sum()
    assert whole == 9


def test_too_long_says_the_needed_length(tmp_path):
    file, expected = one_of_every(tmp_path / "data")
    encoder = encoder_of(recipe_file(tmp_path, file))
    source = build_source("llava", path=str(file), seed=0)
    (check,) = check_data_sets([Numbered(source)], encoder).data_sets
    number = next(number for kind, number, _ in expected if kind == "too-long")
    ids, _ = encoder.encode_text(source[number].messages)
    assert f"needs {len(ids)} tokens" in check.examples["too-long"][0].message


def test_fast_reads_headers_and_says_what_it_did_not_see(tmp_path):
    """Damage behind a header is not seen; a picture that is none or not there still is."""
    file, expected = one_of_every(tmp_path / "data")
    encoder = encoder_of(recipe_file(tmp_path, file))
    source = build_source("llava", path=str(file), seed=0)
    result = check_data_sets([Numbered(source)], encoder, fast=True)
    assert found_in(result) == sorted(one for one in expected if one[0] != "picture-damaged")
    (tmp_path / "data" / "7.png").write_bytes(b"no picture")
    (check,) = check_data_sets([Numbered(source)], encoder, fast=True).data_sets
    assert [one.id for one in check.examples["picture-damaged"]] == ["last"]
    assert "--fast" in run(file, "--fast", "--workers", 0).output


def test_pictures_that_need_shrinking_are_counted_with_their_sizes(tmp_path):
    """Where the encoder itself makes pictures smaller, and to what it makes them."""
    file, _ = one_of_every(tmp_path / "data")
    encoder = encoder_of(recipe_file(tmp_path, file, too_long="shrink"))
    source = build_source("llava", path=str(file), seed=0)
    result = check_data_sets([Numbered(source)], encoder)
    (check,) = result.data_sets
    assert [(one.kind, one.id) for one in check.examples["shrunk"]] == [("shrunk", "five")]
    number = check.examples["shrunk"][0].number
    encoded = encoder(source[number])
    longest = int(encoded.image_grid_thw.max()) * tiny.PATCH  # pictures are square
    assert check.edges == {longest: 1} and longest < tiny.EDGE
    assert check.columns.lengths[number] == len(encoded.input_ids)
    assert check.columns.patches[number] == len(encoded.pixel_values) <= MAX_PATCHES
    assert "too-many-patches" not in check.counts


def test_conversations_that_do_not_fit_format_or_template(tmp_path, processor):
    file = tmp_path / "data.jsonl"
    lines = [{"id": "c", "conversations": turns("Say.", "so", "More?", "no")}]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    source = build_source("llava", path=str(file), seed=0)
    plain = Encoder(processor, format="plain", max_length=MAX_LENGTH)
    expected = [("not-rendered", 0, "c")]
    assert found_in(check_data_sets([Numbered(source)], plain)) == expected
    strict = tiny.processor(chat_template="{{ raise_exception('roles must alternate') }}")
    chat = Encoder(strict, format="chat", max_length=MAX_LENGTH)
    result = check_data_sets([Numbered(source)], chat)
    assert found_in(result) == expected
    assert "roles must alternate" in result.data_sets[0].examples["not-rendered"][0].message


def test_without_a_tokenizer_letters_are_counted_and_that_is_said(tmp_path):
    file, expected = one_of_every(tmp_path / "data")
    source = build_source("llava", path=str(file), seed=0)
    result = check_data_sets([Numbered(source)], None)
    needs_tokens = {"too-long", "too-many-patches"}
    assert found_in(result) == sorted(one for one in expected if one[0] not in needs_tokens)
    assert result.data_sets[0].columns.lengths[1] == len("Say more.") + len("there is a ball")
    output = run(file, "--workers", 0).output
    assert "lengths are letters" in output and "give --model or a recipe" in output


# --- forms and files ------------------------------------------------------------------------------


def tar_of(file, members):
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def as_messages(question, answer):
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def write_form(folder, form):
    """Three records: fine, one with a cut picture (or, for words, none), one without an answer."""
    whole, cut = png(16, 16, seed=1), png(16, 16, seed=2)[:-30]
    (folder / "a.png").write_bytes(whole)
    (folder / "b.png").write_bytes(cut)
    rows = [
        ("r0", "a.png", "What?", "a"),
        ("r1", "b.png", "Where?", "b"),
        ("r2", "a.png", "Ha", ""),
    ]
    kind, _, ending = form.partition(".")
    file = folder / f"data.{ending}"
    if kind == "llava":
        samples = [
            {"id": i, "image": name, "conversations": turns(f"<image>{q}", a)}
            for i, name, q, a in rows
        ]
    elif kind == "messages":
        samples = [{"id": i, "images": [n], "messages": as_messages(q, a)} for i, n, q, a in rows]
    else:
        samples = [{"id": i, "image": name, "caption": a} for i, name, _, a in rows]
    if ending == "json":
        file.write_text(json.dumps(samples), encoding="utf-8")
    elif ending == "jsonl":
        file.write_text("\n".join(map(json.dumps, samples)), encoding="utf-8")
    elif ending == "tar":
        members = [
            member
            for i, name, _, a in rows
            for member in (
                (f"{i}.png", whole if name == "a.png" else cut),
                (f"{i}.txt", a.encode()),
            )
        ]
        tar_of(file, members)
    else:
        arrow = pytest.importorskip("pyarrow", reason="needs the extra data")
        from pyarrow import parquet

        for sample in samples:
            name = sample["image"]
            sample["image"] = {"bytes": whole if name == "a.png" else cut, "path": name}
        parquet.write_table(arrow.Table.from_pylist(samples), file)
    return kind, file


FORMS = ("llava.json", "llava.jsonl", "messages.jsonl", "captions.tar", "captions.parquet")


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_and_files(tmp_path, processor, form):
    kind, file = write_form(tmp_path, form)
    source = build_source(kind, path=str(file), seed=0)
    encoder = Encoder(
        processor, format="plain" if kind == "captions" else "chat", max_length=MAX_LENGTH
    )
    result = check_data_sets([Numbered(source)], encoder)
    assert found_in(result) == [("empty-answer", 2, "r2"), ("picture-damaged", 1, "r1")]


def test_words_alone(tmp_path, processor):
    file = tmp_path / "words.txt"
    file.write_text("a red square\n\nwhat is <image> then\na red square\n", encoding="utf-8")
    source = build_source("text", path=str(file), seed=0)
    encoder = Encoder(processor, format="chat", max_length=MAX_LENGTH)
    result = check_data_sets([Numbered(source)], encoder)
    assert found_in(result) == [("marks", 1, "1"), ("same-record", 2, "2")]


def test_damaged_lines_and_a_picture_that_a_tar_lacks(tmp_path):
    tar_of(tmp_path / "pictures.tar", [("a.png", png(16, 16, seed=1))])
    fine = {"id": "a", "image": "a.png", "conversations": turns("<image>A?", "yes")}
    lines = [json.dumps(fine), "{not json", json.dumps(fine | {"id": "b", "image": "b.png"})]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = build_source(
        "llava",
        path=str(tmp_path / "data.jsonl"),
        image_folder=str(tmp_path / "pictures.tar"),
        seed=0,
    )
    result = check_data_sets([Numbered(source)], None)
    assert found_in(result) == [("malformed", 1, "1"), ("picture-missing", 2, "b")]
    assert "line 2" in result.data_sets[0].examples["malformed"][0].message


def test_problems_are_numbered_as_split_and_cap_left_them(tmp_path):
    file, _ = one_of_every(tmp_path / "data")
    source = build_source("llava", path=f"{file}#12", split="[2:]", seed=5)
    result = check_data_sets([Numbered(source)], None)
    for check in result.data_sets:
        for kind, problems in check.examples.items():
            for problem in problems:
                if kind in ("malformed", "unknown-role") or problem.id == "out":
                    with pytest.raises(ValueError):
                        source[problem.number]
                else:
                    assert source[problem.number].id == problem.id


def test_a_stream_is_checked_as_the_same_file_by_number(tmp_path):
    file, _ = one_of_every(tmp_path / "data")
    lines = tmp_path / "data" / "every.jsonl"
    samples = json.loads(file.read_text(encoding="utf-8"))
    lines.write_text("\n".join(map(json.dumps, samples)), encoding="utf-8")
    keys = tiny.recipe_data(lines, tmp_path / "run")
    keys["data"]["sources"][0]["streaming"] = True
    recipe = tiny.recipe(tmp_path / "r.yaml", keys, "model.text_config.vocab_size=300")
    stream = build_stream(recipe.data.sources, endless=False).streams[0]
    source = build_source("llava", path=str(lines), seed=0)
    by_number = check_data_sets([Numbered(source)], None)
    for workers in (0, 2):
        in_order = check_data_sets([Streamed(stream)], None, workers=workers)
        # What cannot be read at all has no id in a stream, and no kind of its own.
        unread = {2: "2", 3: "3", 5: "5"}
        expected = sorted(
            ("malformed", number, unread[number]) if number in unread else (kind, number, id)
            for kind, number, id in found_in(by_number)
        )
        assert found_in(in_order) == expected


def test_a_stream_that_breaks_off_is_shown_and_ends_with_2(tmp_path):
    """What was read is reported; the rest is neither fine nor bad."""
    file, _ = one_of_every(tmp_path / "data")
    samples = json.loads(file.read_text(encoding="utf-8"))
    whole = gzip.compress("\n".join(map(json.dumps, samples * 40)).encode())
    (tmp_path / "data" / "cut.jsonl.gz").write_bytes(whole[:-200])
    recipe = recipe_file(tmp_path, tmp_path / "data" / "cut.jsonl.gz")
    keys = yaml.safe_load(recipe.read_text("utf-8"))
    keys["data"]["sources"][0]["streaming"] = True
    recipe.write_text(yaml.safe_dump(keys), encoding="utf-8")
    done = run(recipe, "--workers", 0)
    assert done.exit_code == 2 and "cut short or damaged" in done.stdout
    read = int(re.search(r"cut: (\d+) records", done.stdout)[1])
    assert 0 < read < len(samples) * 40


# --- duplicates -----------------------------------------------------------------------------------


def test_repeats_against_a_dict():
    """Exact, on digests of few values, some of them zero."""
    digests = np.random.default_rng(0).integers(0, 6, (400, 2)).astype(np.uint64)
    first, expected = {}, []
    for number, pair in enumerate(map(tuple, digests.tolist())):
        if pair == (0, 0):
            continue
        if pair in first:
            expected.append([number, first[pair]])
        first.setdefault(pair, number)
    assert repeats_of(digests).tolist() == expected
    assert repeats_of(np.zeros((3, 2), np.uint64)).tolist() == []


def test_the_same_picture_under_another_name_and_in_another_data_set(tmp_path):
    """Contents count, over all data sets; ids only inside one."""
    picture = png(16, 16, seed=1)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture)
    for file, name in (("one.json", "a.png"), ("two.json", "b.png")):
        sample = {"id": "x", "image": name, "conversations": turns("<image>A?", "yes")}
        (tmp_path / file).write_text(json.dumps([sample]), encoding="utf-8")
    sources = [
        Numbered(build_source("llava", path=str(tmp_path / name), seed=0))
        for name in ("one.json", "two.json")
    ]
    first, second = check_data_sets(sources, None).data_sets
    assert not first.examples
    (problem,) = second.examples["same-record"]
    assert problem.message == "The same as record 0 of one."
    # Without decoding only names tell, so it is the text alone that is the same.
    assert found_in(check_data_sets(sources, None, fast=True)) == [("same-text", 0, "x")]


def test_a_picture_of_many_records_is_fine(tmp_path):
    (tmp_path / "a.png").write_bytes(png(16, 16, seed=1))
    samples = [
        {"id": f"{n}", "image": "a.png", "conversations": turns(f"<image>{n}?", "yes")}
        for n in range(50)
    ]
    (tmp_path / "data.json").write_text(json.dumps(samples), encoding="utf-8")
    source = build_source("llava", path=str(tmp_path / "data.json"), seed=0)
    result = check_data_sets([Numbered(source)], None)
    assert result.ok and not found_in(result)


def test_memory_grows_by_few_bytes_a_record(tmp_path):
    """Far below a record: 61 bytes are kept, twice for a moment or with as much to sort digests.

    The bound of 200 is three times what is kept; a record here has 1,100 letters.
    """

    def peak(records):
        file = tmp_path / f"{records}.txt"
        file.write_text("".join(f"{n} {'word ' * 220}\n" for n in range(records)), encoding="utf-8")
        source = build_source("text", path=str(file), seed=0)
        tracemalloc.start()
        check_data_sets([Numbered(source)], None)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(200)  # what is imported and remembered on the first use
    assert (peak(9000) - peak(3000)) / 6000 < 200


# --- the command ----------------------------------------------------------------------------------


def test_workers_change_nothing(tmp_path):
    file, _ = one_of_every(tmp_path / "data")
    recipe = recipe_file(tmp_path, file)
    seen = []
    for workers in (0, 2):
        page, listed = tmp_path / f"{workers}.html", tmp_path / f"{workers}.jsonl"
        words = ["--report", page, "--quarantine", listed, "--workers", workers]
        done = run(recipe, *words)
        assert done.exit_code == 1, done.output
        output = re.sub(r".*(checking|planning).*\n?", "", done.stdout)
        output = output.replace(str(tmp_path / str(workers)), "FILE")
        seen.append((output, page.read_text("utf-8"), listed.read_text("utf-8")))
    assert seen[0] == seen[1]


def test_a_quarantine_list_leaves_out_exactly_the_bad_records_in_training(tmp_path):
    file, expected = one_of_every(tmp_path / "data")
    recipe = recipe_file(tmp_path, file, packing=None, max_bad_share=0.0)
    listed = tmp_path / "bad.jsonl"
    done = run(recipe, "--quarantine", listed, "--workers", 0)
    assert done.exit_code == 1
    # Without packing nothing has too many patches.
    bad = {n for kind, n, _ in expected if KINDS[kind].error and kind != "too-many-patches"}
    assert sorted(entry.index for entry in read_quarantine(listed).entries) == sorted(bad)
    entry = json.loads(listed.read_text("utf-8").splitlines()[0])
    assert entry["reason"] == KINDS["malformed"].title and "lacks" in entry["detail"]

    keys = yaml.safe_load(recipe.read_text("utf-8"))
    keys["data"]["quarantine"] = str(listed)
    keys["training"] |= {"num_train_epochs": 1, "per_device_train_batch_size": 1}
    del keys["training"]["max_steps"]
    loaded = tiny.recipe(recipe, keys)
    mixture = build_mixture(loaded.data.sources, seed=0, quarantine=listed)
    ids = [mixture[number].id for number in range(len(mixture))]
    samples = json.loads(file.read_text("utf-8"))
    assert ids == [sample["id"] for n, sample in enumerate(samples) if n not in bad]
    result = train(loaded)  # stops at the first bad record, since none is allowed
    assert result.records == len(samples) - len(bad)

    again = run(recipe, "--quarantine", tmp_path / "again.jsonl", "--workers", 0)
    assert again.exit_code == 0, again.output
    assert f"{len(bad)} more are in the quarantine list" in again.output
    assert (tmp_path / "again.jsonl").read_bytes() == listed.read_bytes()


def test_a_list_of_other_data_is_not_used_and_that_is_said(tmp_path):
    """Or it would hide records that happen to have the same numbers."""
    file, _ = one_of_every(tmp_path / "data")
    listed = tmp_path / "bad.jsonl"
    entry = {"source": "every", "id": "another", "index": 0, "reason": "a picture is missing"}
    listed.write_text(json.dumps(entry), encoding="utf-8")
    done = run(recipe_file(tmp_path, file, quarantine=str(listed)), "--workers", 0)
    assert "'another' as record 0" in done.stderr and "Here the list is not used" in done.stderr
    assert done.exit_code == 1 and "every: 21 records, 12 bad" in done.stdout


def test_a_recipe_that_makes_its_own_tokenizer(tmp_path):
    """Bad records take no part in it; with a list of them it is the one that training makes."""
    file, _ = one_of_every(tmp_path / "data")
    keys = tiny.recipe_data(file, tmp_path / "run")
    keys["model"]["text_config"]["vocab_size"] = 300
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(keys), encoding="utf-8")
    listed = tmp_path / "bad.jsonl"
    assert run(recipe, "--quarantine", listed, "--workers", 0).exit_code == 1
    keys["data"]["quarantine"] = str(listed)
    loaded = tiny.recipe(recipe, keys)
    done = run(recipe, "--workers", 0)
    assert done.exit_code == 0, done.output
    records = build_records(loaded)
    encoder = encoder_of(recipe)
    tokens = sum(len(encoder(records[number]).input_ids) for number in range(len(records)))
    assert f" {tokens:,} tokens, of which" in done.output


def test_a_warning_can_be_made_an_error(tmp_path):
    file, expected = one_of_every(tmp_path / "data")
    listed = tmp_path / "bad.jsonl"
    wanted = ["same-record", "same-id", "tiny-picture"]
    words = [word for kind in wanted for word in ("--error", kind)]
    assert run(file, *words, "--quarantine", listed, "--workers", 0).exit_code == 1
    indices = [entry.index for entry in read_quarantine(listed).entries]
    bad = {n for kind, n, _ in expected if KINDS[kind].error or kind in wanted}
    bad -= {n for kind, n, _ in expected if kind in ("too-long", "too-many-patches")}
    assert sorted(indices) == sorted(bad)


def test_exit_code_0_with_warnings_alone(tmp_path):
    file = tiny.llava_file(tmp_path, records=6)
    done = run(file, "--workers", 0)
    assert done.exit_code == 0 and "6 records, 0 bad, 2 with warnings" in done.output


def test_the_plan_of_a_recipe_is_what_training_walks(tmp_path):
    """Rows and steps against the trainer's own count, tokens against the encoder's arrays."""
    one = tiny.llava_file(tmp_path / "one", records=40)
    two = tiny.llava_file(tmp_path / "two", records=30)
    recipe = recipe_file(tmp_path, one)
    keys = yaml.safe_load(recipe.read_text("utf-8"))
    keys["data"]["sources"] = [
        {"kind": "llava", "path": str(one), "name": "one", "repeat": 0.5},
        {"kind": "llava", "path": str(two), "name": "two", "repeat": 2.0},
    ]
    keys["training"]["num_train_epochs"] = 1
    del keys["training"]["max_steps"]
    loaded = tiny.recipe(recipe, keys)
    done = run(recipe, "--workers", 0)
    assert done.exit_code == 0, done.output
    steps = train(loaded).steps
    mixture = build_records(loaded)
    encoder = encoder_of(recipe)
    encoded = [encoder(mixture[number]) for number in range(len(mixture))]
    tokens = sum(len(one.input_ids) for one in encoded)
    learnt = sum(int((one.labels != IGNORED).sum()) for one in encoded)
    found = re.search(
        r"An epoch: ([\d,]+) rows, ([\d,]+) steps of one process, ([\d,]+)", done.output
    )
    rows, planned, counted = (int(text.replace(",", "")) for text in found.groups())
    assert (planned, counted) == (steps, tokens)
    assert f"of which {learnt / tokens:.1%} are learnt" in done.output
    assert f"filled to {tokens / (rows * 512):.1%}" in done.output
    table = {line.split()[0]: line.split()[1:4] for line in done.output.splitlines() if line}
    assert table["one"] == ["40", "20", "25.0%"] and table["two"] == ["30", "60", "75.0%"]


class Tags(HTMLParser):
    """Tags with their attributes, and marked texts."""

    def __init__(self):
        super().__init__()
        self.tags, self.marked, self._open = [], [], False

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag == "mark"

    def handle_endtag(self, tag):
        self._open = self._open and tag != "mark"

    def handle_data(self, data):
        if self._open:
            self.marked.append(data)


def test_the_page_points_nowhere_and_shows_what_was_found(tmp_path):
    file, expected = one_of_every(tmp_path / "data")
    page = tmp_path / "check.html"
    run(recipe_file(tmp_path, file), "--report", page, "--workers", 0)
    text = page.read_text("utf-8")
    parser = Tags()
    parser.feed(text)
    links = [
        value for _, attrs in parser.tags for name in ("src", "href") if (value := attrs.get(name))
    ]
    assert links and all(link.startswith("data:image/png;base64,") for link in links)
    assert sum(tag == "svg" for tag, _ in parser.tags) == 4
    assert " a square</s>" in parser.marked  # an answer with its end token
    for kind, _, id in expected:
        assert KINDS[kind].title in text and f"<b>{id}</b>" in text
    assert "picture 1: 21 tokens, 32 x 32" in text


def test_hostile_text_stays_text(tmp_path):
    evil = "<script>alert(1)</script>\x1b[31mred\u202e"
    (tmp_path / "data.json").write_text(
        json.dumps([{"id": evil, "conversations": turns("What?", evil), "image": "gone.png"}]),
        encoding="utf-8",
    )
    page = tmp_path / "check.html"
    done = run(tmp_path / "data.json", "--report", page, "--workers", 0)
    assert "\x1b" not in done.output and "\u202e" not in done.output
    assert "<script" not in page.read_text("utf-8")
    assert harmless(evil) == "<script>alert(1)</script>\\x1b[31mred\\u202e"
    assert "\x1b" not in run(tmp_path / "data.json", "--show", 0).output


# --- the view -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["chat", "plain"])
@pytest.mark.parametrize("marked", [True, False])
def test_the_view_marks_exactly_the_labels(processor, format, marked):
    """Token by token against the arrays of the encoder, with and without a template that marks."""
    if marked:
        template = (
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
            "{{ m.content[0].text }}{{ eos_token }}{% endgeneration %}{% else %}{% for p in m.content "
            "%}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}{% endfor %}"
        )
        processor = tiny.processor(chat_template=template)
    encoder = Encoder(processor, format=format, max_length=512)
    for pictures in range(3):
        images = [tiny.picture(16 + 8 * n, 40, seed=n) for n in range(pictures)]
        messages = tiny.conversation("Where is it, ça va?", "top left — oui", pictures=pictures)
        if format == "chat":
            messages += tiny.conversation("Say more.", "é 漢字", pictures=0)
        record = Record(id="r", messages=messages, images=images)
        encoded, segments = encoder(record), view_of(record, encoder)
        learnt = [one.learnt for one in segments for _ in range(one.tokens)]
        assert learnt == (encoded.labels != IGNORED).tolist()
        assert [one.picture for one in segments if one.picture is not None] == [*range(pictures)]
        whole = processor.tokenizer.decode(encoder.encode_text(messages)[0])
        said = "".join("<image>" if one.picture is not None else one.text for one in segments)
        assert said == whole
        assert all(one.tokens == 0 or one.picture is None or not one.learnt for one in segments)


def test_a_record_is_shown_by_number_and_by_id(tmp_path):
    file, _ = one_of_every(tmp_path / "data")
    recipe = recipe_file(tmp_path, file)
    by_number = run(recipe, "--show", 0).stdout
    assert by_number == run(recipe, "--show", "fine").stdout
    assert by_number == run(recipe, "--show", "every:fine").stdout
    assert "{+ a square</s>+}" in by_number and "[picture 1: 21 tokens, 32 x 32]" in by_number
    assert "\x1b" not in by_number
    assert "picture-damaged" in run(recipe, "--show", "cut").stdout
    assert "{+ball" in run(file, "--show", "long").stdout.replace("assistant: ", "")
    for words in (["--show", 99], ["--show", "nobody"], ["--show", "every:2"]):
        assert isinstance(run(recipe, *words).exception, ValueError)


def test_colours(processor):
    record = Record(id="r", messages=tiny.conversation("Hi?", "two", pictures=0), images=[])
    segments = view_of(record, Encoder(processor, format="chat", max_length=64))
    text = printed(segments, colours=True)
    learnt = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", text))
    assert learnt.strip() == "two</s>"
    plain = printed(segments, colours=False)
    assert re.sub(r"\x1b\[\d+m", "", text) == plain.replace("{+", "").replace("+}", "")


def test_histograms_count_everything():
    lengths = np.random.default_rng(0).geometric(0.002, 5000)
    drawn = of_lengths("Tokens", lengths, limit=1000)
    assert sum(drawn.counts) == 5000
    bounds = [int(label.split()[0].replace(",", "")) for label in drawn.labels]
    for low, high, count in zip(bounds, [*bounds[1:], 10**9], drawn.counts, strict=True):
        assert count == ((lengths >= low) & (lengths < high)).sum()
    assert bounds[drawn.beyond] > 1000 >= bounds[drawn.beyond - 1]
    lines = drawn_in_text(drawn, blocks=False).splitlines()
    assert max(line.count("#") for line in lines) == 40 and len(lines) == len(bounds) + 1


# --- what goes wrong ------------------------------------------------------------------------------


def test_what_cannot_be_checked_is_said_in_a_sentence(tmp_path):
    file = tiny.llava_file(tmp_path / "data", records=2)
    (tmp_path / "empty.json").write_text("[]", encoding="utf-8")
    start = tmp_path / "start"
    tiny.model().save_pretrained(start)
    processor = tiny.processor()
    processor.chat_template = processor.tokenizer.chat_template = None
    processor.save_pretrained(start)
    recipe = recipe_file(tmp_path / "start", file)
    lost = yaml.safe_load(recipe.read_text("utf-8"))
    lost["model"]["init_from"] = str(tmp_path / "nowhere")
    (tmp_path / "lost.yaml").write_text(yaml.safe_dump(lost), encoding="utf-8")
    (tmp_path / "bad.yaml").write_text("name: x\n", encoding="utf-8")
    for words, says in (
        (["nowhere.json"], "nowhere.json"),
        ([tmp_path / "empty.json"], "no records"),
        ([tmp_path / "bad.yaml"], "bad.yaml"),
        (["no/such/recipe.yaml"], "no such recipe"),
        ([tmp_path / "lost.yaml"], "--model"),
        ([recipe, file], "give it alone"),
        ([file, "--model", tmp_path], str(tmp_path)),
        ([file, "--model", start], "chat template"),
        ([file, "--model", start, "--format", "poem"], "use chat or plain"),
        ([file, "--max-length", 9], "--model"),
        ([recipe, "--format", "chat"], "recipe"),
        ([file, "--kind", "poems"], "--kind"),
        ([file, "--error", "typos"], "same-record"),
        ([file, "--report", tmp_path / "no" / "x.html"], "folder"),
        ([file, file, "--quarantine", tmp_path / "q.jsonl"], "a name of its own"),
    ):
        done = run(*words)
        assert isinstance(done.exception, ValueError), (words, done.output)
        message = str(done.exception)
        assert says in message and "\n" not in message, (words, message)


def test_exit_code_2_where_it_cannot_be_checked(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eve", "data", "check", "nowhere.json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("eve: nowhere.json")


def test_ctrl_c_ends_in_one_line_and_writes_nothing(tmp_path):
    """The real command with workers, stopped as a terminal does it: the whole group is signalled."""
    buffer = io.BytesIO()
    Image.new("RGB", (1500, 1500)).save(buffer, format="PNG")  # 20 ms to decode, 7 kB
    url = "data:image/png;base64," + __import__("base64").b64encode(buffer.getvalue()).decode()
    with (tmp_path / "data.jsonl").open("w", encoding="utf-8") as file:
        for number in range(4000):
            sample = {
                "id": str(number),
                "image": url,
                "conversations": turns("<image>?", f"{number}"),
            }
            file.write(json.dumps(sample) + "\n")
    command = [sys.executable, "-m", "eve_vlm.cli", "data", "check", str(tmp_path / "data.jsonl")]
    command += ["--workers", "2", "--quarantine", str(tmp_path / "bad.jsonl")]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"TQDM_MININTERVAL": "0"},
    ) as process:
        seen = b""
        os.set_blocking(process.stderr.fileno(), False)
        until = time.monotonic() + 240  # seconds; libraries take ten to import on a busy machine
        while not re.search(rb"[1-9]\d*%|[1-9]\S*/4\.00k", seen) and time.monotonic() < until:
            assert process.poll() is None, seen
            seen += process.stderr.read() or b""
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        os.set_blocking(process.stderr.fileno(), True)
        out, rest = process.communicate(timeout=60)
    error = (seen + rest).decode()
    assert process.returncode == 130, error
    assert "Traceback" not in error and "Stopped after" in error and not out
    assert sorted(os.listdir(tmp_path)) == ["data.jsonl"]


def test_showing_and_checking_are_two_things(tmp_path):
    """A list that was asked for and not written would pass for a clean one."""
    file, _ = one_of_every(tmp_path / "data")
    done = run(recipe_file(tmp_path, file), "--show", 0, "--quarantine", tmp_path / "bad.jsonl")
    assert "--show only shows records" in str(done.exception)
    assert not (tmp_path / "bad.jsonl").exists()
