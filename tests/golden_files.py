"""Find and read the folder of golden numbers that the published programme produced.

The tests take every name, size, prompt and seed from this folder, so that another set of the same
format (other model folders, picture sizes, teachers) runs through them unchanged. One thing a
reader would get wrong: only a folder that says so itself (`subset.json`) may lack parts. In any
other folder a file that a listing names and that is not there is a failure, never a skip.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

VARIABLE = "EVE_GOLDENS"
GROUPS = ("tokenizer", "openai", "preprocess", "pel", "model", "pal", "text", "train")
TESTS = Path(__file__).resolve().parent


# --- where ----------------------------------------------------------------------------------------


def find_folder(environment: dict[str, str] | None = None) -> Path:
    """The named folder, else the one beside the repository, else the subset that we ship."""
    named = (os.environ if environment is None else environment).get(VARIABLE)
    if named is not None:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"{VARIABLE}={named!r} is not a folder; name a folder of golden numbers or unset it"
            )
        if not any((folder / group).is_dir() for group in GROUPS):
            raise ValueError(
                f"{VARIABLE}={named!r} holds none of {', '.join(GROUPS)}; name a folder of golden "
                "numbers or unset it"
            )
        return folder.resolve()
    beside = TESTS.parent.parent / "shared" / "goldens"
    return beside if (beside / "preprocess").is_dir() else TESTS / "goldens" / "published"


FOLDER = find_folder()
"""The folder of this run; read at import, so that a bad name stops the collection at once."""


def is_subset() -> bool:
    """Whether the folder says that parts of a full set were left out."""
    return (FOLDER / "subset.json").is_file()


def kept(path: Path) -> bool:
    """Whether a listed file takes part: always in a full set, if it is there in a subset."""
    return path.is_file() or not is_subset()


def read_json(path: Path) -> Any:
    """One JSON file of the set."""
    return json.loads(path.read_text(encoding="utf-8"))


def folders(group: str, listing: str) -> list[Path]:
    """Folders of a group that hold the listing file, by name."""
    return sorted(path.parent for path in (FOLDER / group).glob(f"*/{listing}"))


@functools.cache
def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file; shared between tests, so nobody may write into them."""
    return load_file(path)


# --- pictures and processors ----------------------------------------------------------------------


@functools.cache
def preprocess() -> dict[str, Any]:
    """The listing of pictures and what every processor makes of them."""
    return read_json(FOLDER / "preprocess" / "preprocess.json")


def picture_path(name: str) -> Path:
    """The file of a picture, given its name with or without the ending."""
    stem = name.rsplit(".", 1)[0]
    return FOLDER / "preprocess" / preprocess()["images"][stem]["file"]


@functools.cache
def processors() -> dict[str, dict[str, Any]]:
    """Published picture processors by folder relative to the set, e.g. `openai/...`."""
    found = {}
    for path in sorted((FOLDER / "openai").glob("*/preprocessor_config.json")):
        settings = read_json(path)
        if "image_size_clip" in settings:
            found[path.parent.relative_to(FOLDER).as_posix()] = settings
    return found


def processor_for(variant: dict[str, Any]) -> dict[str, Any]:
    """The processor whose two sizes are those of this entry of the listing."""
    for settings in processors().values():
        if all(settings[key] == variant[key] for key in ("image_size", "image_size_clip")):
            return settings
    raise ValueError(f"no processor folder has the sizes of {variant['image_size']}")


class Picture(NamedTuple):
    """One picture as one processor sees it."""

    name: str
    variant: str
    expected: dict[str, Any]
    settings: dict[str, Any]

    @property
    def path(self) -> Path:
        """The picture file."""
        return picture_path(self.name)


@functools.cache
def pictures() -> list[Picture]:
    """All pairs of picture and processor."""
    return [
        Picture(name, key, expected, processor_for(expected))
        for name, entry in sorted(preprocess()["images"].items())
        for key, expected in entry["variants"].items()
    ]


@functools.cache
def picture_by_hash() -> dict[str, Picture]:
    """Pictures by the checksum of their published float tensor."""
    return {picture.expected["sha256_float32_chw"]: picture for picture in pictures()}


@functools.cache
def stored_pixels() -> dict[str, tuple[Path, str]]:
    """Where each stored float tensor lies, by checksum."""
    found = {}
    extra = FOLDER / "pel" / "extra_inputs.safetensors"
    for path in [*sorted((FOLDER / "preprocess").glob("*.safetensors")), extra]:
        if path.is_file():
            found.update({sha256(value): (path, key) for key, value in tensors(path).items()})
    return found


def sha256(value: torch.Tensor | np.ndarray) -> str:
    """Checksum of the bytes, as the set records it."""
    array = value.numpy() if isinstance(value, torch.Tensor) else value
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def zero_mask_pixels(shape: list[int]) -> torch.Tensor:
    """The one input that is a formula: colours from residues, and a mask of zeros."""
    channels, height, width = shape
    c, y, x = np.meshgrid(np.arange(3), np.arange(height), np.arange(width), indexing="ij")
    residue = (7919 * c + 104729 * y + 1299709 * x + 31 * x * y) % 1009
    canvas = np.zeros((channels, height, width), dtype=np.float32)
    canvas[:3] = (4 * residue.astype(np.float64) / 1009 - 2).astype(np.float32)
    return torch.from_numpy(canvas)


# --- patch embedding ------------------------------------------------------------------------------


class Embedding(NamedTuple):
    """One input of one set of patch embedding weights."""

    folder: Path
    name: str
    info: dict[str, Any]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Official names."""
        return tensors(self.folder / "weights.safetensors")

    def expected(self, part: str) -> torch.Tensor | None:
        """A stored output, or None where the set never stores it (large inputs)."""
        return tensors(self.folder / "outputs.safetensors").get(f"{self.name}.{part}")


@functools.cache
def embeddings() -> list[Embedding]:
    """All inputs of all patch embedding folders whose outputs are there."""
    found = []
    for path in folders("pel", "info.json"):
        outputs = path / "outputs.safetensors"
        if not kept(outputs):
            continue
        with safe_open(outputs, "pt") as stored:
            names = {key.rsplit(".", 1)[0] for key in stored.keys()}  # noqa: SIM118
        for name, info in read_json(path / "info.json").items():
            if not name.startswith("_") and (name in names or not is_subset()):
                found.append(Embedding(path, name, info))
    return found


# --- whole model and training ---------------------------------------------------------------------


class Prompt(NamedTuple):
    """One prompt of one model."""

    folder: Path
    name: str
    listing: dict[str, Any]

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """Ids, embeddings, hidden states, logits and greedy tokens."""
        return tensors(self.folder / f"{self.name}.safetensors")

    @property
    def images(self) -> list[str]:
        """Names of the pictures that the prompt shows; the published dummy is not one."""
        return [name for name in self.listing["images"] or [] if not name.startswith("<")]


@functools.cache
def prompts() -> list[Prompt]:
    """All prompts of all models."""
    return [
        Prompt(path, name, listing)
        for path in folders("model", "prompts.json")
        for name, listing in read_json(path / "prompts.json")["prompts"].items()
        if kept(path / f"{name}.safetensors")
    ]


class Training(NamedTuple):
    """One training case of one model."""

    path: Path
    name: str

    @property
    def info(self) -> dict[str, Any]:
        """Losses, norms and settings."""
        return read_json(self.path)

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """The batch, activations and gradients."""
        return tensors(self.path.with_suffix(".safetensors"))

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The conversations."""
        return self.case["samples"]

    @property
    def case(self) -> dict[str, Any]:
        """Template, sizes and conversations."""
        return read_json(FOLDER / "pal" / "cases.json")[self.name]

    @property
    def model(self) -> Path:
        """The model folder."""
        return FOLDER / Path(self.info["model"].split(" ")[0]).parent


@functools.cache
def trainings() -> list[Training]:
    """All training cases of all models."""
    return [
        Training(path, path.stem)
        for path in sorted((FOLDER / "pal").glob("*/*.json"))
        if kept(path.with_suffix(".safetensors"))
    ]


@functools.cache
def model_folders() -> list[Path]:
    """Model folders whose weights are there."""
    return [path for path in folders("model", "config.json") if kept(path / "model.safetensors")]


def published_weights(path: Path, *, training: bool = False) -> dict[str, torch.Tensor]:
    """A model's weights under official names; with the aligning head and teacher for training."""
    weights = dict(tensors(path / "model.safetensors"))
    if training:
        weights.update(tensors(path / "training_only.safetensors"))
    return weights


# --- text -----------------------------------------------------------------------------------------


@functools.cache
def text() -> dict[str, Any]:
    """Ids and labels of the conversations, by template."""
    return read_json(FOLDER / "text" / "text.json")


@functools.cache
def conversations() -> dict[str, dict[str, Any]]:
    """Conversations in LLaVA form by id."""
    listed = read_json(FOLDER / "text" / "conversations.json")
    return {sample["id"]: sample for sample in listed}
