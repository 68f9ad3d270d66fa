"""What a trained model is beside its decoder, in one file small enough to be shipped.

The patch embedding and the projector are there whole, in float16.  Of each decoder matrix there is
its change alone, as the product of two thin matrices: the singular vectors of (trained - base),
in 8-bit integers with one scale for each of them.  Which are kept is decided over all matrices at
once, those first that say most for their bytes, until the file is full.  Easy to get wrong: the
file means nothing without the very decoder that it was made against, so it carries a fingerprint
of it, and another one is refused.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eve_vlm.checkpoint_files import WeightReader
from eve_vlm.errors import first_line, listed
from eve_vlm.output_folder import written_whole

FORMAT = "1"
LIMIT = 40_000_000  # bytes of the file
HEADER = 200_000  # bytes of it that are kept free for names and notes
DECODER, PICTURES = "model.language_model.", ("model.vision_tower.", "model.multi_modal_projector.")
LEFT_OUT = ("aligner.", "lm_head.")  # of training alone; shared with the words
WHOLE, LEFT, RIGHT, SCALE = "whole.", ".left", ".right", ".scale"
STEPS = 127  # of an 8-bit integer, each way
SAMPLES = 64  # values of each weight that the fingerprint is made of
SMALLEST = 1e-6  # of the largest singular value; below it is float32's rounding


class Difference(NamedTuple):
    """A file that was made."""

    file: Path
    bytes: int
    sha256: str
    ranks: dict[str, int]
    """Singular vectors that are kept of each matrix."""
    kept: float
    """Share of the change of all matrices, as a sum of squares, that is in the file."""


class _Part(NamedTuple):
    """Singular vectors of one matrix, each scaled by the root of its singular value."""

    left: torch.Tensor
    """(outputs, rank) float32."""
    right: torch.Tensor
    """(rank, inputs) float32."""
    squares: torch.Tensor
    """(rank,) float32, what each adds to the sum of squares."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch compute with one thread; works as a decorator too.

    These matrices are small. On two cores that others use too, two threads that wait for each other
    took 131 s of computing to pack 210 of them, and one took 19.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def make_difference(
    trained: str | Path,
    base: str | Path,
    file: str | Path,
    *,
    notes: Mapping[str, str] | None = None,
    limit: int = LIMIT,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Difference:
    """Writes what `trained` has beyond the decoder of `base`.

    Args:
        trained: a plain model folder, such as `eve merge` leaves.
        base: the folder of the model that training began with; only its decoder is looked at.
        file: to write; it appears whole or not at all.
        notes: texts for the header, such as the commit and the recipes.
        limit: most bytes of the file.
        progress: wraps the names of the decoder's weights, for a bar.

    Raises:
        ValueError: if the two have other decoders, or what is whole leaves no room.
    """
    whole: dict[str, torch.Tensor] = {}
    parts: dict[str, _Part] = {}
    with WeightReader(trained) as new, WeightReader(base) as old:
        names = [name for name in new.entries if not name.startswith(LEFT_OUT)]
        _require_same_decoder(trained, base, new, old)
        for name in (name for name in names if name.startswith(PICTURES)):
            whole[WHOLE + name] = new.read(name).half()
        for name in progress([name for name in names if name.startswith(DECODER)]):
            before, after = old.read(name).float(), new.read(name).float()
            if torch.equal(before, after):
                continue
            if before.dim() == 2:
                parts[name] = _part(after - before)
            else:
                whole[WHOLE + name] = after
        fingerprint = decoder_fingerprint(
            (name, old.read(name)) for name in sorted(old.entries) if name.startswith(DECODER)
        )
    room = limit - HEADER - sum(weight.nbytes for weight in whole.values())
    if room < 0:
        raise ValueError(
            f"What pictures are made into tokens with takes {(limit - room) / 1e6:.1f} MB of the "
            f"{limit / 1e6:.1f} MB that the file may have; give it more, or train a narrower one."
        )
    ranks = _ranks(parts, room)
    tensors = dict(whole)
    for name, rank in ranks.items():
        tensors |= _quantized(name, parts[name], rank)
    all_of_it = sum(float(part.squares.sum()) for part in parts.values())
    in_it = sum(float(parts[name].squares[:rank].sum()) for name, rank in ranks.items())
    kept = in_it / all_of_it if all_of_it else 1.0
    header = {
        **(notes or {}),
        "format": FORMAT,
        "base": fingerprint,
        "kept": f"{kept:.6f}",
        "ranks": ",".join(str(rank) for rank in ranks.values()),
    }
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as part_file:
        save_file({n: t.contiguous() for n, t in tensors.items()}, part_file, metadata=header)
        _sort_notes(part_file)
        part_file.chmod(0o644)  # safetensors writes 0600, which others cannot read
        if (size := part_file.stat().st_size) > limit:
            raise ValueError(
                f"The file has {size:,} bytes, but {limit:,} are allowed; give shorter notes."
            )
    return Difference(file, size, sha256_of(file), ranks, kept)


def apply_difference(weights: Mapping[str, torch.Tensor], file: str | Path) -> None:
    """Changes the weights of a model around the decoder into those of the trained one, in place.

    Args:
        weights: a model's `state_dict()`, float32.
        file: what `make_difference` wrote.

    Raises:
        ValueError: if the decoder is another one, or the file is damaged or of another shape.
    """
    notes = read_notes(file)
    found = decoder_fingerprint(
        (name, weights[name]) for name in sorted(weights) if name.startswith(DECODER)
    )
    if found != notes["base"]:
        raise ValueError(
            f"{file} was made against another decoder (fingerprint {notes['base'][:12]}, this one "
            f"has {found[:12]}); run `eve assets fetch smollm2` to have the right one."
        )
    with _opened(file) as tensors, torch.no_grad():
        names = set(tensors.keys())
        pictures = {name for name in weights if name.startswith(PICTURES)}
        if lacking := sorted(name for name in pictures if WHOLE + name not in names):
            raise ValueError(f"{file} lacks {listed(lacking)}; install the package again.")
        for name in sorted(names):
            if name.startswith(WHOLE):
                _put(weights, name.removeprefix(WHOLE), tensors.get_tensor(name).float(), file)
            elif name.endswith(LEFT):
                matrix = name.removesuffix(LEFT)
                left, right = (
                    _restored(tensors.get_tensor(matrix + side), tensors, matrix + side)
                    for side in (LEFT, RIGHT)
                )
                _put(weights, matrix, weights[matrix] + left.T @ right, file)


def read_notes(file: str | Path) -> dict[str, str]:
    """The header of a file.

    Raises:
        ValueError: if it is damaged, or of another form.
    """
    with _opened(file) as tensors:
        notes: dict[str, str] = tensors.metadata() or {}
    if notes.get("format") != FORMAT:
        raise ValueError(
            f"{file} is no difference of the form {FORMAT}, which this version reads; install the "
            "package again."
        )
    return notes


def decoder_fingerprint(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Name, shape and some values of every weight, as one text; see `lora_folder.fingerprint`.

    Values are rounded to bfloat16, because versions of the reader of GGUF files may differ in the
    last bit.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        flat = weight.detach().flatten()
        some = flat[:: max(len(flat) // SAMPLES, 1)][:SAMPLES].to(torch.bfloat16)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def sha256_of(file: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require_same_decoder(
    trained: str | Path, base: str | Path, new: WeightReader, old: WeightReader
) -> None:
    shapes = [
        {name: entry.shape for name, entry in reader.entries.items() if name.startswith(DECODER)}
        for reader in (new, old)
    ]
    if shapes[0] != shapes[1] or not shapes[0]:
        other = sorted(
            name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)
        )
        raise ValueError(
            f"{trained} was not trained from {base}: their decoders differ in "
            f"{listed(other) or 'everything'}; name the model that training began with."
        )


def _part(change: torch.Tensor) -> _Part:
    """All that float32 can tell of a change, largest first."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    rank = int((s > SMALLEST * s[0]).sum())
    root = s[:rank].sqrt()
    return _Part(u[:, :rank] * root, root[:, None] * v[:rank], s[:rank] ** 2)


def _ranks(parts: Mapping[str, _Part], room: int) -> dict[str, int]:
    """How many singular vectors each matrix keeps, so that all of them fit into `room` bytes.

    Taken in the order of what they add for their bytes; within a matrix that is the order in which
    they stand, so what is kept is always the first ones.
    """
    offers = [
        (float(square) / cost, cost, name)
        for name, part in parts.items()
        for cost in [sum(part.left.shape[:1]) + part.right.shape[1] + 8]  # two float32 scales
        for square in part.squares
    ]
    ranks = dict.fromkeys(parts, 0)
    for _, cost, name in sorted(offers, key=lambda offer: -offer[0]):
        if cost > room:
            break
        room -= cost
        ranks[name] += 1
    return {name: rank for name, rank in ranks.items() if rank}


def _quantized(name: str, part: _Part, rank: int) -> dict[str, torch.Tensor]:
    """Both sides in 8 bits, a row for each singular vector.

    Scales are float32: those of the last vectors are too small for float16.
    """
    tensors = {}
    for side, rows in ((LEFT, part.left.T[:rank]), (RIGHT, part.right[:rank])):
        scale = rows.abs().amax(1) / STEPS
        tensors[name + side] = (rows / scale[:, None]).round().to(torch.int8)
        tensors[name + side + SCALE] = scale
    return tensors


def _restored(numbers: torch.Tensor, tensors: safe_open, name: str) -> torch.Tensor:
    scale: torch.Tensor = tensors.get_tensor(name + SCALE)
    return numbers.float() * scale[:, None]


def _put(
    weights: Mapping[str, torch.Tensor], name: str, value: torch.Tensor, file: str | Path
) -> None:
    if name not in weights or weights[name].shape != value.shape:
        raise ValueError(f"{file} has {name}, which the model has no place for; install it again.")
    weights[name].copy_(value)


def _sort_notes(file: Path) -> None:
    """Sorts the notes in a header, so that packing the same model again gives the same SHA-256.

    safetensors writes them in an order that differs from call to call.
    """
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # weights begin at a multiple of 8 bytes
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def _opened(file: str | Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or not there ({first_line(error)}); install the package again."
        ) from None


__all__ = [
    "LIMIT",
    "Difference",
    "apply_difference",
    "decoder_fingerprint",
    "make_difference",
    "one_thread",
    "read_notes",
    "sha256_of",
]
