"""Make the numbers that `eve doctor` compares a machine with, by the slow float64 loops.

Run as `python tests/goldens/make_self_test.py src/eve_vlm/doctor/self_test.json`. Nothing here imports
`eve_vlm`: geometry, pixels, patch embedding, aligner and decoder are those of `tests/oracle`, and
the formula of the weights is written out a second time. One thing a reader would get wrong: the
weights are whole numbers over powers of two with at most eight significant bits, so they are the
same in bfloat16, and a difference is the machine's arithmetic and not a rounded weight.
"""

from __future__ import annotations

import base64
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from oracle import alignment, decoder, geometry, patch_embedding, preprocess, sequence

LIMIT_BYTES = 50_000
PATCH, EDGE, MULTIPLE = 4, 32, 8  # pixels
IMAGE = 3  # the placeholder's id
VISION_WIDTH, TEACHER_WIDTH, TAP_EVERY = 16, 16, 2
TEXT = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # flex attention is wrong on CPUs below, and refused on GPUs below 16
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
MEAN, STD = [0.5, 0.4375, 0.375], [0.25, 0.28125, 0.3125]
SIZES = [(40, 64), (30, 9)]  # height, width; one wide and one tall picture
WORDS = [([22, 4, 38], [35, 26, 25, 36, 21]), ([18, 8], [14, 33, 41, 41])]  # around each picture
ANSWER = 3  # the last words behind a picture are the answer, all before them the question
NEW_TOKENS = 4
# Best and second best next token are at least this far apart, in parts of the largest logit, so
# that even bfloat16 must choose alike.
MARGIN = 0.25
ADAMW = {"lr": 0.0625, "eps": 0.125, "weight_decay": 0.25}
GRADIENTS = {  # our name: take every n-th number
    "model.vision_tower.patch_projection.weight": 7,
    "model.vision_tower.class_embedding": 1,
    "model.vision_tower.row_end_embedding": 1,
    "model.vision_tower.merge_attention.key_value.weight": 5,
    "model.vision_tower.class_attention.query.weight": 3,
    "model.multi_modal_projector.linear_1.weight": 5,
    "model.language_model.embed_tokens.weight": 13,
    "model.language_model.layers.0.self_attn.q_proj.weight": 11,
    "model.language_model.layers.3.mlp.down_proj.weight": 13,
    "lm_head.weight": 13,
    "aligner.maps.0.weight": 5,
    "aligner.output.bias": 1,
}
EVERY_LOGIT, EVERY_TOKEN = 5, 3
STEPPED = list(GRADIENTS)[:4]


# --- inputs by formula ----------------------------------------------------------------------------


def whole_numbers(name: str, count: int) -> list[int]:
    """32-bit numbers from a name and a running index: a multiply-and-shift mixer, all integers."""
    start, out = zlib.crc32(name.encode()), []
    for index in range(count):
        x = (start + index * 0x9E3779B1) % 2**32
        x ^= x >> 16
        x = x * 0x85EBCA6B % 2**32
        x ^= x >> 13
        x = x * 0xC2B2AE35 % 2**32
        out.append(x ^ (x >> 16))
    return out


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Norm scales around one, matrices within a quarter, biases and embeddings within one."""
    numbers = torch.tensor(whole_numbers(name, int(np.prod(shape)))).double()
    if len(shape) == 1 and name.endswith(".weight"):
        values = (numbers % 128 + 64) / 128
    else:
        values = (numbers % 255 - 127) / (128 if len(shape) == 1 or "embed_tokens" in name else 512)
    return values.reshape(shape)


def picture(index: int) -> Image.Image:
    """Noise: what a resize gets wrong shows most there."""
    height, width = SIZES[index]
    numbers = np.array(whole_numbers(f"picture {index}", height * width * 3)) % 256
    return Image.fromarray(numbers.reshape(height, width, 3).astype(np.uint8))


def shapes() -> dict[str, tuple[int, ...]]:
    """Our names of all weights."""
    c, d, w, inner = VISION_WIDTH, TEXT["hidden_size"], TEACHER_WIDTH, TEXT["intermediate_size"]
    q, kv = (TEXT[f"num_{kind}_heads"] * TEXT["head_dim"] for kind in ("attention", "key_value"))
    tower, projector = "model.vision_tower", "model.multi_modal_projector"
    found: dict[str, tuple[int, ...]] = {
        f"{tower}.class_embedding": (c,),
        f"{tower}.row_end_embedding": (c,),
        f"{tower}.patch_projection.weight": (c, 3, PATCH, PATCH),
        f"{projector}.linear_1.weight": (d, c),
        f"{projector}.linear_1.bias": (d,),
        f"{projector}.linear_2.weight": (d, d),
        f"{projector}.linear_2.bias": (d,),
        "model.language_model.embed_tokens.weight": (TEXT["vocab_size"], d),
        "model.language_model.norm.weight": (d,),
        "lm_head.weight": (TEXT["vocab_size"], d),
        "aligner.input.weight": (w, d),
        "aligner.input.bias": (w,),
        "aligner.output.weight": (w, w),
        "aligner.output.bias": (w,),
    }
    for name in (f"{tower}.merge_attention", f"{tower}.class_attention"):
        for norm in ("query_norm", "key_value_norm"):
            found |= {f"{name}.{norm}.weight": (c,), f"{name}.{norm}.bias": (c,)}
        found |= {f"{name}.query.weight": (c, c), f"{name}.key_value.weight": (2 * c, c)}
        found |= {f"{name}.output.weight": (c, c), f"{name}.output.bias": (c,)}
    for layer in range(TEXT["num_hidden_layers"]):
        name = f"model.language_model.layers.{layer}"
        for part, size in (("q", q), ("k", kv), ("v", kv)):
            found[f"{name}.self_attn.{part}_proj.weight"] = (size, d)
        found[f"{name}.self_attn.o_proj.weight"] = (d, q)
        found |= {f"{name}.mlp.{part}_proj.weight": (inner, d) for part in ("gate", "up")}
        found[f"{name}.mlp.down_proj.weight"] = (d, inner)
        found[f"{name}.input_layernorm.weight"] = (d,)
        found[f"{name}.post_attention_layernorm.weight"] = (d,)
    for tap in range(len(alignment.tap_indices(TEXT["num_hidden_layers"], TAP_EVERY))):
        found |= {f"aligner.norms.{tap}.weight": (d,), f"aligner.norms.{tap}.bias": (d,)}
        found[f"aligner.maps.{tap}.weight"] = (w, d)
    return found


PUBLISHED = {
    "language_model.": "",
    "multi_modal_projector.linear_1": "mm_projector.0",
    "multi_modal_projector.linear_2": "mm_projector.2",
    "patch_projection": "patch_embedding",
    "row_end_embedding": "split_embedding",
    "merge_attention": "local_attention",
    "class_attention": "global_attention",
    "query_norm": "q.0",
    "key_value_norm": "kv.0",
    ".query.": ".q.1.",
    ".key_value.": ".kv.1.",
    "attention.output": "attention.proj",
    "aligner.input": "aligner.input_layer",
    "aligner.output": "aligner.output_layer",
}


def published(name: str) -> str:
    """The oracle's name of one of our weights."""
    if name.startswith(("aligner.norms.", "aligner.maps.")):
        _, kind, tap, leaf = name.split(".")
        return f"aligner.norm_layer.{tap}.{ {'norms': 0, 'maps': 1}[kind] }.{leaf}"
    for ours, theirs in PUBLISHED.items():
        name = name.replace(ours, theirs)
    return name


# --- the slow way ---------------------------------------------------------------------------------


class Slow:
    """Everything of one set of weights, by loops."""

    def __init__(self) -> None:
        self.ours = {name: weight(name, shape).requires_grad_() for name, shape in shapes().items()}
        self.weights = {published(name): value for name, value in self.ours.items()}
        self.pixels, self.grids, self.tokens = [], [], []
        for index, size in enumerate(SIZES):
            box = geometry.box(*size, settings())
            rows, cols = geometry.grid(*size, settings())
            resized = preprocess.draw(picture(index), box, EDGE, (0, 0, 0))
            self.pixels.append(resized[box.top : box.bottom, box.left : box.right])
            self.grids.append((rows, cols))
        vision = patch_embedding.select(self.weights, "model.vision_tower.")
        projector = patch_embedding.select(self.weights, "model.mm_projector.")
        for pixels in self.pixels:
            scaled = (torch.tensor(pixels).double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
            self.tokens.append(patch_embedding.embed(scaled.permute(2, 0, 1), vision).sequence)
        self.features = [patch_embedding.project(tokens, projector) for tokens in self.tokens]

    def prompt(self, index: int, words: tuple[list[int], list[int]]) -> list[int]:
        """Words, a picture, words."""
        return [*words[0], sequence.PLACEHOLDER, *words[1]]

    def decode(self, index: int, ids: list[int]) -> tuple[Tensor, decoder.Decoded]:
        """Embeddings and what the decoder makes of them."""
        table = self.weights["model.embed_tokens.weight"]
        embeds = sequence.merge(ids, table, [self.features[index]])
        return embeds, decoder.decode(embeds, TEXT, self.weights)

    @torch.no_grad()
    def greedy(self, index: int) -> list[int]:
        """The likeliest next tokens behind the question, all computed anew each time."""
        before, behind = WORDS[index]
        ids = self.prompt(index, (before, behind[:-ANSWER]))
        found = []
        for _ in range(NEW_TOKENS):
            logits = self.decode(index, ids)[1].logits[-1]
            best, second = logits.topk(2).values
            if best - second < MARGIN * logits.abs().max() or int(logits.argmax()) == IMAGE:
                raise SystemExit(f"picture {index}: two next tokens are too close; change WORDS")
            found.append(int(logits.argmax()))
            ids.append(found[-1])
        return found


def settings() -> dict[str, Any]:
    """The published preprocessor settings for these sizes."""
    return {
        "image_size": EDGE,
        "image_size_clip": EDGE,
        "patch_stride": PATCH,
        "patch_stride_clip": MULTIPLE,
        "conv_stride": 2,
    }


def take(values: Tensor, every: int) -> list[float]:
    """Every n-th number in nine digits; the steps are prime to the widths, so no row is left out."""
    return [float(f"{value:.9g}") for value in values.detach().flatten()[::every].tolist()]


def training(slow: Slow) -> dict[str, Any]:
    """Losses, gradients and one AdamW step of both samples together."""
    logits, labels, embeds, losses = [], [], [], []
    for index, (before, behind) in enumerate(WORDS):
        made, decoded = slow.decode(index, slow.prompt(index, (before, behind)))
        embeds.append(made)
        logits.append(decoded.logits)
        ignored = len(before) + len(slow.features[index]) + len(behind) - ANSWER
        labels.append([sequence.IGNORED] * ignored + behind[-ANSWER:])
        rows, cols = slow.grids[index]
        taps = [
            alignment.cells(decoded.hidden[tap][len(before) :], rows, cols, 1)
            for tap in alignment.tap_indices(TEXT["num_hidden_layers"], TAP_EVERY)
        ]
        student = alignment.align(taps, patch_embedding.select(slow.weights, "aligner."))
        teacher = weight(f"teacher {index}", (rows * cols, TEACHER_WIDTH))
        losses.append(alignment.cosine_loss(student, teacher))
    language = sequence.language_loss(logits, labels)
    aligned = sum(losses) / len(losses)
    (language + aligned).backward()
    return {
        "embeddings": take(torch.cat(embeds), EVERY_TOKEN),
        "logits": take(torch.cat(logits), EVERY_LOGIT),
        "loss": [language.item(), aligned.item()],
        "gradients": {
            name: {"every": every, "values": take(slow.ours[name].grad, every)}
            for name, every in GRADIENTS.items()
        },
        "stepped": {
            name: {
                "every": every,
                "values": take(decoder.adamw(slow.ours[name], slow.ours[name].grad, ADAMW), every),
            }
            for name, every in GRADIENTS.items()
            if name in STEPPED
        },
    }


def make() -> dict[str, Any]:
    """The whole file."""
    slow = Slow()
    return {
        "about": "Numbers of tests/goldens/make_self_test.py; float64 by slow loops.",
        "case": {
            "text": TEXT,
            "vision": {"patch_size": PATCH, "merge_size": 2, "hidden_size": VISION_WIDTH},
            "aligner": {"teacher_hidden_size": TEACHER_WIDTH, "tap_every": TAP_EVERY},
            "image": {"longest_edge": EDGE, "size_multiple": MULTIPLE, "mean": MEAN, "std": STD},
            "image_token_id": IMAGE,
            "sizes": SIZES,
            "words": WORDS,
            "answer": ANSWER,
            "adamw": ADAMW,
            "every_token": EVERY_TOKEN,
            "every_logit": EVERY_LOGIT,
        },
        "expected": {
            "pixels": [base64.b64encode(pixels.tobytes()).decode() for pixels in slow.pixels],
            "grids": slow.grids,
            "tokens": [geometry.count_tokens(*grid) for grid in slow.grids],
            "patch_embedding": take(torch.cat(slow.tokens), 1),
            "answers": [slow.greedy(index) for index in range(len(SIZES))],
            **training(slow),
        },
    }


if __name__ == "__main__":
    text = json.dumps(make(), separators=(",", ":")) + "\n"
    if len(text) > LIMIT_BYTES:
        sys.exit(f"{len(text)} bytes are more than {LIMIT_BYTES}; take fewer numbers")
    Path(sys.argv[1]).write_text(text, encoding="utf-8")
