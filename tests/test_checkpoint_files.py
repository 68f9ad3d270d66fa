"""Weight files: what is in them is read from headers, and every way of being broken is named. Exact.

Files are spoilt as downloads, disks and attackers spoil them. One thing a reader would get wrong:
a pickle that wants to run code must not have run it when the error comes.
"""

import json
import os
import pickle
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

import tiny
from eve_vlm.checkpoint_files import WeightReader, list_weights, weight_files
from eve_vlm.loading import load_model

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
refused = partial(tiny.refused, end=".")


def write(folder, kind, *, shards=1, weights=WEIGHTS):
    """Weights of either kind, in one file or in shards with an index."""
    stem, end, save = {
        "bin": ("pytorch_model", "bin", torch.save),
        "safetensors": ("model", "safetensors", partial(save_file, metadata={"format": "pt"})),
    }[kind]
    if shards == 1:
        save(weights, folder / f"{stem}.{end}")
        return folder
    index = {}
    for shard, name in enumerate(weights):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{end}"
        save({name: weights[name]}, folder / file)
        index[name] = file
    (folder / f"{stem}.{end}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return folder


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("shards", [1, 2])
def test_what_is_in_them(tmp_path, kind, shards):
    write(tmp_path, kind, shards=shards)
    assert len(weight_files(tmp_path)) == shards
    entries = list_weights(tmp_path)
    assert {name: (entry.shape, entry.dtype) for name, entry in entries.items()} == {
        "a": ((2, 3), torch.float32),
        "b": ((4,), torch.bfloat16),
    }
    with WeightReader(tmp_path) as reader:
        for name, weight in WEIGHTS.items():
            assert torch.equal(reader.read(name), weight)


def test_safetensors_come_first(tmp_path):
    write(tmp_path, "bin", weights={"old": torch.ones(1)})
    write(tmp_path, "safetensors")
    assert set(list_weights(tmp_path)) == {"a", "b"}


def test_the_old_pickle_format_is_read_too(tmp_path):
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert set(list_weights(tmp_path)) == {"a", "b"}


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_file_that_is_cut_off(tmp_path, kind, kept):
    write(tmp_path, kind)
    (file,) = weight_files(tmp_path)
    file.write_bytes(file.read_bytes()[:kept])
    text = refused(lambda: list_weights(tmp_path))
    assert str(file) in text and "again" in text


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_shard_that_is_not_there(tmp_path, kind):
    write(tmp_path, kind, shards=2)
    gone = weight_files(tmp_path)[1]
    gone.unlink()
    text = refused(lambda: list_weights(tmp_path))
    assert gone.name in text and "lacks 1 of 2 shards" in text and "not finished" in text


def test_a_header_that_lies(tmp_path):
    """Corrupt in the middle of the header, of the right length."""
    write(tmp_path, "safetensors")
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:20] = b"x" * 12
    file.write_bytes(content)
    assert "corrupt" in refused(lambda: list_weights(tmp_path))


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_a_pickle_that_wants_to_run_code(tmp_path, form):
    sign = tmp_path / "it-ran"
    attack, file = Attack(f"touch {sign}"), tmp_path / "pytorch_model.bin"
    if form == "bare":
        file.write_bytes(pickle.dumps(attack))
    else:
        torch.save({"a": attack}, file, _use_new_zipfile_serialization=form == "zip")
    text = refused(lambda: list_weights(tmp_path))
    assert str(file) in text and "code" in text and "not read" in text
    assert form == "bare" or f"({os.system.__module__}.system)" in text
    assert not sign.exists()


def test_the_attack_works_where_nobody_looks(tmp_path):
    """The same pickle does run without the guard, so the test above can fail."""
    sign = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Attack(f"touch {sign}")))
    assert sign.exists()


@pytest.mark.parametrize(
    "content", [b"hello" * 9, b"<html>" * 20, b"\x80\x02}q\x00(X\x01", b"\x00"]
)
def test_garbage(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert "again" in refused(lambda: list_weights(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pointer_of_git_lfs(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refused(lambda: list_weights(tmp_path))


@pytest.mark.parametrize("what", [[1, 2], {"a": [torch.ones(1)]}, torch.ones(2)])
def test_a_pickle_of_something_else(tmp_path, what):
    torch.save(what, tmp_path / "pytorch_model.bin")
    assert "something else than weights" in refused(lambda: list_weights(tmp_path))


@pytest.mark.parametrize(
    "index",
    [
        *("{", "[]", "{}", '{"weight_map": {"a": "x.safetensors"}}'),
        '{"metadata": {}, "weight_map": []}',
        '{"metadata": {}, "weight_map": {"a": "../x.safetensors"}}',
    ],
)
def test_an_index_that_is_none(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert "no index of weights" in refused(lambda: list_weights(tmp_path))


def test_an_index_of_another_download(tmp_path):
    write(tmp_path, "safetensors", shards=2)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= {"a": index["weight_map"]["b"], "c": index["weight_map"]["a"]}
    file.write_text(json.dumps(index))
    assert "disagree about 2 weights" in refused(lambda: list_weights(tmp_path))


def test_no_weights(tmp_path):
    text = refused(lambda: list_weights(tmp_path))
    assert "model.safetensors" in text and "pytorch_model.bin.index.json" in text


def test_loading_a_model_looks_first(tmp_path, model, processor):
    """`load_model` says the same, before the library tries."""
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    processor.save_pretrained(tmp_path)
    shard = weight_files(tmp_path)[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    assert shard.name in refused(lambda: load_model(tmp_path))
    shard.unlink()
    assert "lacks 1 of" in refused(lambda: load_model(tmp_path))
    shard.write_bytes(content)
    load_model(tmp_path)
