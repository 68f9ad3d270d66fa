"""Cut a full folder of golden numbers down to the subset that a fresh clone carries.

Run as `python tests/goldens/make_subset.py FULL_FOLDER tests/goldens/published`. The cut keeps every
group, all pictures and all text, and of the heavy groups the smallest model with a picture prompt,
a text prompt and one training case. One thing a reader would get wrong: what is kept is byte for
byte or tensor for tensor the original; nothing is computed or rounded here.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

LIMIT_BYTES = 3_000_000
MARKER = "subset.json"
# What only repeats what is kept elsewhere: the second copy of the teacher, the list of weight names,
# activations that the prompts of the same model cover, the teacher's pixels (their features are
# kept), parts of a sequence that is kept whole, and the largest inputs of the patch embedding.
TEACHER_COPY = "model.vision_clip."
REPEATED = ("inputs_embeds", "hidden_mid_sample0", "hidden_last_sample0", "images_clip")
PARTS = ("local_attention", "class_token")
NAME_LIST = "state_dict_keys.json"
LARGEST_PICTURE_TOKENS = 40


def size_of(path: Path) -> int:
    """Bytes of a file or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def smallest(folders: list[Path]) -> Path:
    """The folder or file with the fewest bytes; the name breaks a tie."""
    return min(folders, key=lambda path: (size_of(path), path.name))


def copy(source: Path, target: Path) -> None:
    """Copy one file, making the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def copy_tensors(source: Path, target: Path, keep: list[str]) -> None:
    """Copy some tensors of a file, unchanged."""
    stored = load_file(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: stored[name] for name in keep}, target, metadata={"format": "pt"})


def names_in(path: Path) -> list[str]:
    """Tensor names of a file."""
    return sorted(load_file(path))


def copy_light(full: Path, out: Path) -> None:
    """Tokenizer, processors, teachers, pictures, text and optimizer groups: all of them."""
    for group in ("tokenizer", "openai", "preprocess", "text", "train"):
        for file in sorted((full / group).rglob("*")):
            inputs = group == "preprocess" and file.suffix == ".safetensors"
            if file.is_file() and file.suffix != ".md" and not inputs:
                copy(file, out / file.relative_to(full))


def copy_embedding(full: Path, out: Path) -> None:
    """The smaller patch embedding folder, without its largest inputs, and one odd box."""
    folder = smallest([path.parent for path in (full / "pel").glob("*/info.json")])
    target = out / folder.relative_to(full)
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    copy(folder / "info.json", target / "info.json")
    copy(folder / "weights.safetensors", target / "weights.safetensors")
    extra = full / "pel" / "extra_inputs.safetensors"
    odd = [
        name
        for name in names_in(extra)
        if any(side % 2 for side in info.get(name, {"crop_patches": [0]})["crop_patches"])
    ]
    kept_odd = max(odd, key=lambda name: (sum(s % 2 for s in info[name]["crop_patches"]), name))
    copy_tensors(extra, out / "pel" / extra.name, [kept_odd])
    wanted = {
        name
        for name, entry in info.items()
        if not name.startswith("_")
        and entry["tokens"] <= LARGEST_PICTURE_TOKENS
        and (name not in names_in(extra) or name == kept_odd)
    }
    outputs = folder / "outputs.safetensors"
    stored = [name.rsplit(".", 1) for name in names_in(outputs)]
    keep = [f"{name}.{part}" for name, part in stored if name in wanted and part not in PARTS]
    copy_tensors(outputs, target / outputs.name, keep)


def copy_model(full: Path, out: Path) -> Path:
    """The smallest model with its smallest picture prompt and its smallest text prompt."""
    folder = smallest([path for path in (full / "model").glob("*/model.safetensors")]).parent
    target = out / folder.relative_to(full)
    for file in sorted(folder.glob("*.json")):
        if file.name != NAME_LIST:
            copy(file, target / file.name)
    copy(folder / "model.safetensors", target / "model.safetensors")
    training = folder / "training_only.safetensors"
    keep = [name for name in names_in(training) if not name.startswith(TEACHER_COPY)]
    copy_tensors(training, target / training.name, keep)
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))["prompts"]
    for pictured in (True, False):
        files = [
            folder / f"{name}.safetensors"
            for name, entry in prompts.items()
            if bool(entry["images"]) == pictured
        ]
        copy(smallest(files), target / smallest(files).name)
    return folder


def copy_training(full: Path, out: Path, model: str) -> None:
    """One training case of the kept model, the smallest of those that also have optimizer steps."""
    copy(full / "pal" / "cases.json", out / "pal" / "cases.json")
    listings = []
    for path in sorted((full / "pal" / model).glob("*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        if any(value for key, value in entry.items() if key.startswith("adamw")):
            listings.append(path)
    case = smallest(listings)
    target = out / case.relative_to(full)
    copy(case, target)
    tensors = case.with_suffix(".safetensors")
    keep = [name for name in names_in(tensors) if name not in REPEATED]
    copy_tensors(tensors, target.with_suffix(".safetensors"), keep)


def make_subset(full: Path, out: Path) -> int:
    """Write the subset and give its size in bytes."""
    if not (full / "preprocess" / "preprocess.json").is_file():
        raise ValueError(
            f"{full} is no full folder of golden numbers; name one that holds all groups"
        )
    for old in sorted(out.glob("*")):
        if old.is_dir():
            shutil.rmtree(old)
    copy_light(full, out)
    copy_embedding(full, out)
    model = copy_model(full, out)
    copy_training(full, out, model.name)
    marker = {
        "made_by": "tests/goldens/make_subset.py",
        "left_out": "files and tensors that the listings name and that are not here",
    }
    (out / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    size = size_of(out)
    if size > LIMIT_BYTES:
        raise ValueError(f"the subset has {size} bytes, more than {LIMIT_BYTES}; leave out more")
    return size


def main() -> None:
    """Read the two folders from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("full", type=Path, help="a full folder of golden numbers")
    parser.add_argument("out", type=Path, help="where the subset goes; its folders are replaced")
    arguments = parser.parse_args()
    size = make_subset(arguments.full, arguments.out)
    parser.exit(0, f"{size} bytes in {arguments.out}\n")


if __name__ == "__main__":
    main()
