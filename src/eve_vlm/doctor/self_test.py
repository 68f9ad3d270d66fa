"""The arithmetic of EVE on this machine, against numbers that slow float64 loops made elsewhere.

A tiny model goes through everything: resize, patch embedding, decoder, losses, gradients, an
optimizer step, greedy answers; then the same things done another way (cache, batch, padding,
packing, attention kernel).  A few seconds on a slow CPU.

Easy to get wrong: differences are counted per unit of the largest expected number where that is
above one, and the tolerances follow from the number of bits of the dtype, stated in every line;
they are not what happened to pass.
"""

import base64
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from eve_vlm.doctor.self_test_model import Bench
from eve_vlm.image_processing_eve import num_image_tokens, resize_picture, to_rgb

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}  # of the significand
# What an unfit kernel, driver or package may raise; each becomes a failed line of the table.
BREAKS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(MemoryError, OSError, RuntimeError, TypeError, ValueError),
)
# Roundings one behind the other, counted in the code. The first is of sums in float32, whatever the
# dtype; the others are roundings to the chosen dtype, whose sums are kept in float32 meanwhile.
EMBEDDING = 300  # sums of 48, then six products of 16 to 32, norms, softmax, GELU
DECODER = 4 * 12  # four layers: two norms, four products each, rotation, softmax, gate, two sums
BACKWARD = 3 * DECODER  # back through what was kept, then the products with it
LONGEST_SUM = 64  # in float32 every number of a sum rounds, and the longest sums have so many


class Row(NamedTuple):
    """One line of the table.

    difference: the largest one, per unit of the largest expected number above one; None if the
        check could not run (`why` then has the error).
    """

    what: str
    difference: float | None
    tolerance: float
    why: str

    @property
    def passed(self) -> bool:
        """Whether it ran and is within its tolerance; a difference that is no number is not."""
        return self.difference is not None and self.difference <= self.tolerance


def tolerance(dtype: torch.dtype, in_float32: int, in_dtype: int) -> tuple[float, str]:
    """What so many roundings, one behind the other, may add up to, and the reason in words.

    One rounding moves a number by at most half its last bit: u = 2**-8 of it in bfloat16 (8 bits),
    2**-11 in float16, 2**-24 in float32.  n of them add up like a random walk, sqrt(n) u; four
    times that is what the largest of some thousand numbers reaches.
    """
    bits, roundings = BITS[dtype], in_dtype
    if dtype == torch.float32 and in_dtype > 1:
        roundings *= LONGEST_SUM
    allowed = 4 * (in_float32**0.5 * 2.0 ** -BITS[torch.float32] + roundings**0.5 * 2.0**-bits)
    if not in_float32 + in_dtype:
        return 0.0, "whole numbers"
    if not in_dtype:
        return allowed, f"24 bits in every dtype, {in_float32} roundings"
    return allowed, f"{bits} bits, {roundings} rounding{'s' * (roundings > 1)}"


def gap(made: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference per unit of the largest expected number above one; nan stays nan."""
    made, expected = made.detach().cpu().double(), expected.detach().cpu().double()
    if made.shape != expected.shape:
        raise ValueError(f"{tuple(made.shape)} numbers came, {tuple(expected.shape)} were expected")
    return float((made - expected).abs().max()) / max(1.0, float(expected.abs().max()))


# --- against the expected numbers -----------------------------------------------------------------


def pixels(bench: Bench) -> float:
    """Resized pictures, in grey levels of 255; must be equal."""
    worst = 0.0
    for picture, (rows, cols), stored in zip(
        bench.pictures, bench.expected["grids"], bench.expected["pixels"], strict=True
    ):
        side = bench.case["image"]["size_multiple"]
        made = resize_picture(to_rgb(picture), rows * side, cols * side)
        expected = np.frombuffer(base64.b64decode(stored), np.uint8).reshape(made.shape)
        worst = max(worst, float(np.abs(made.astype(int) - expected.astype(int)).max()))
    return worst


def grids(bench: Bench) -> float:
    """Rows, columns and tokens of the pictures, as whole numbers; must be equal."""
    merge = bench.case["vision"]["merge_size"]
    cells = (bench.grids[:, 1:] // merge).cpu()
    made = torch.cat([cells, num_image_tokens(cells[:, 0], cells[:, 1])[:, None]], 1)
    tokens = torch.tensor(bench.expected["tokens"])[:, None]
    return gap(made, torch.cat([torch.tensor(bench.expected["grids"]), tokens], 1))


@torch.no_grad()
def patch_embedding(bench: Bench) -> float:
    """Patch embedding of both pictures in one pass, (N, C)."""
    made = bench.model.model.vision_tower(torch.cat(bench.patches), bench.grids)
    return gap(made.flatten(), torch.tensor(bench.expected["patch_embedding"]))


@torch.no_grad()
def embeddings(bench: Bench) -> float:
    """Words with the pictures among them, as the decoder gets them."""
    made = []
    for index in range(len(bench.pictures)):
        output = bench.model.model(**bench.single(index), output_hidden_states=True)
        made.append(output.hidden_states[0][0])
    flat = torch.cat(made).flatten()[:: bench.case["every_token"]]
    return gap(flat, torch.tensor(bench.expected["embeddings"]))


def logits(bench: Bench) -> float:
    """Behind four decoder layers and the language head, each text alone."""
    flat = bench.logits.flatten()[:: bench.case["every_logit"]]
    return gap(flat, torch.tensor(bench.expected["logits"]))


def language_loss(bench: Bench) -> float:
    """Mean cross-entropy over the answers of both texts."""
    return gap(bench.trained["loss"][0], torch.tensor(bench.expected["loss"][0]))


def aligner_loss(bench: Bench) -> float:
    """Mean over pictures of 1 - cosine with the teacher's cells."""
    return gap(bench.trained["loss"][1], torch.tensor(bench.expected["loss"][1]))


def gradients(bench: Bench) -> float:
    """Of twelve weights from the patches to the aligner, each per unit of its own largest."""
    worst = []
    for name, stored in bench.expected["gradients"].items():
        made = bench.trained["gradients"][name].flatten()[:: stored["every"]]
        expected = torch.tensor(stored["values"])
        largest = expected.abs().max().to(made.device)
        worst.append(gap(made / largest, expected / largest.cpu()))
    return float(np.max(worst))  # of nan and a number, nan


def optimizer_step(bench: Bench) -> float:
    """Weights after one step of torch's AdamW."""
    worst = []
    for name, stored in bench.expected["stepped"].items():
        made = bench.trained["stepped"][name].flatten()[:: stored["every"]]
        worst.append(gap(made, torch.tensor(stored["values"])))
    return float(np.max(worst))


def answers(bench: Bench) -> float:
    """Greedy tokens with a cache that are not the expected ones, counted."""
    return _different(bench.answers(cache=True), bench.expected["answers"])


# --- done another way -----------------------------------------------------------------------------


def without_cache(bench: Bench) -> float:
    """Greedy tokens, all computed anew each time, that differ from those with a cache."""
    return _different(bench.answers(cache=False), bench.answers(cache=True))


def _different(made: list[list[int]], expected: list[list[int]]) -> float:
    pairs = [pair for rows in zip(made, expected, strict=True) for pair in zip(*rows, strict=True)]
    return float(sum(one != other for one, other in pairs))


def _batch(bench: Bench, side: str, extra: int, kernel: str = "sdpa") -> float:
    batch = bench.batch(side, extra)
    batch.pop("labels")
    model = bench.model if kernel == "sdpa" else bench.build(kernel)
    with torch.no_grad():
        return gap(model(**batch).logits[batch["attention_mask"].bool()], bench.logits)


def batch_right(bench: Bench) -> float:
    """Both texts in one batch, padded on the right, against each alone."""
    return _batch(bench, "right", 0)


def batch_left(bench: Bench) -> float:
    """Both texts in one batch, padded on the left to a length beyond 32, against each alone."""
    return _batch(bench, "left", 9)


@torch.no_grad()
def packed(bench: Bench) -> float:
    """Both texts behind each other in one row with restarting positions, against each alone."""
    rows = [bench.ids(index) for index in range(len(bench.pictures))]
    inputs = {
        "input_ids": torch.tensor([[*itertools.chain(*rows)]], device=bench.device),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None].to(bench.device),
        "pixel_values": torch.cat(bench.patches),
        "image_grid_thw": bench.grids,
    }
    return gap(bench.model(**inputs, use_cache=False).logits[0], bench.logits)


def attention(kernel: str) -> Callable[[Bench], float]:
    """A check that both texts in one batch through another attention kernel equal each alone."""
    return lambda bench: _batch(bench, "left", 0, kernel)


# (what, check, roundings in float32, roundings in the chosen dtype)
CHECKS: tuple[tuple[str, Callable[[Bench], float], int, int], ...] = (
    ("resized pictures, grey levels", pixels, 0, 0),
    ("grids and token counts", grids, 0, 0),
    ("patch embedding", patch_embedding, EMBEDDING, 0),
    ("words and pictures", embeddings, EMBEDDING, 1),
    ("logits", logits, EMBEDDING, DECODER),
    ("language loss", language_loss, EMBEDDING, DECODER),
    ("aligner loss", aligner_loss, EMBEDDING, DECODER),
    ("gradients of 12 weights", gradients, EMBEDDING, BACKWARD),
    ("weights after an AdamW step", optimizer_step, EMBEDDING, BACKWARD),
    ("greedy tokens that differ", answers, 0, 0),
    ("without cache == with cache", without_cache, 0, 0),
    ("batch == single, right padding", batch_right, 0, DECODER),
    ("batch == single, left padding", batch_left, 0, DECODER),
    ("packed == separate", packed, 0, DECODER),
)


def run_self_test(
    device: str, dtype: str, *, kernels: Sequence[str] = ("eager",), progress: bool = True
) -> list[Row]:
    """Runs every check on one device in one dtype.

    Args:
        device: as torch names it, such as "cpu" or "cuda:1".
        dtype: one of `DTYPES`.
        kernels: attention kernels of the library that are held against sdpa.
        progress: whether a bar is drawn.
    """
    checks = [
        *CHECKS,
        *((f"{kernel} == sdpa", attention(kernel), 0, DECODER) for kernel in kernels),
    ]
    bench: Bench | None = None
    rows = []
    for what, check, in_float32, in_dtype in tqdm(
        checks, desc=f"self-test {device} {dtype}", leave=False, disable=not progress
    ):
        allowed, why = tolerance(DTYPES[dtype], in_float32, in_dtype)
        try:
            bench = bench or Bench(device, DTYPES[dtype])
            rows.append(Row(what, check(bench), allowed, why))
        except BREAKS as error:
            text = str(error).strip().splitlines() or [""]
            rows.append(Row(what, None, allowed, f"{type(error).__name__}: {text[0]}"))
    return rows


__all__ = ["DTYPES", "Row", "run_self_test", "tolerance"]
