"""The tiny model of the self-test: weights and pictures by an integer formula, inputs, results.

The formula gives the same numbers on every machine and every device, and each of them is exact in
bfloat16, so that a difference is the machine's arithmetic.  `self_test.json` holds sizes and
expected numbers; a script among the tests (`tests/goldens/make_self_test.py`) made them by slow
float64 loops, without this package.

Easy to get wrong: the model is built by the library's own random rule first, and only then filled;
a weight that the formula forgot would be random, so the formula goes over all of them by name.

Legend: `B` texts, `T` positions, `V` vocabulary.
"""

import json
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eve_vlm.alignment_eve import EveForPreTraining
from eve_vlm.cache_name_eve import CACHE
from eve_vlm.configuration_eve import EveAlignmentConfig, EveConfig, EveVisionConfig
from eve_vlm.image_processing_eve import EveImageProcessor

NUMBERS = Path(__file__).with_name("self_test.json")
PAD, IGNORED = 0, -100


def formula_numbers(name: str, count: int) -> np.ndarray:
    """(count,) whole numbers below 2**32 from a name and a running index.

    crc32 of the name plus the index times 0x9E3779B1, mixed by shifts and multiplications modulo
    2**32.  Integers only, so every machine and every device gets the same; torch's random numbers
    differ between CPU and GPU.

    >>> formula_numbers("lm_head.weight", 2).tolist()
    [1921544081, 4032519890]
    """
    mask = np.uint64(0xFFFFFFFF)
    index = np.arange(count, dtype=np.uint64)
    x = (np.uint64(zlib.crc32(name.encode())) + index * np.uint64(0x9E3779B1)) & mask
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & mask
    x = ((x ^ (x >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & mask
    return x ^ (x >> np.uint64(16))


def formula_weight(name: str, shape: Sequence[int]) -> torch.Tensor:
    """A weight of this name and shape, float32 on the CPU, exact in bfloat16 too.

    Norm scales are k / 128 from 64 / 128 to 191 / 128; other vectors and the word embedding k / 128
    and matrices k / 512, k from -127 to 127.
    """
    numbers = formula_numbers(name, int(np.prod(shape))).astype(np.int64)
    if len(shape) == 1 and name.endswith(".weight"):
        values = (numbers % 128 + 64) / 128
    else:
        values = (numbers % 255 - 127) / (128 if len(shape) == 1 or "embed_tokens" in name else 512)
    return torch.from_numpy(values.astype(np.float32)).reshape(tuple(shape))


class Bench:
    """The tiny model on one device in one dtype, its inputs and the expected numbers.

    `samples` has one unpadded text with its picture per entry, as (ids, labels, patches, grid).
    """

    def __init__(self, device: str, dtype: torch.dtype):
        read = json.loads(NUMBERS.read_text(encoding="utf-8"))
        self.case, self.expected = read["case"], read["expected"]
        self.device, self.dtype = torch.device(device), dtype
        self.model = self.build()
        image = self.case["image"]
        self.processor = EveImageProcessor(
            size={"longest_edge": image["longest_edge"]},
            size_multiple=image["size_multiple"],
            patch_size=self.case["vision"]["patch_size"],
            merge_size=self.case["vision"]["merge_size"],
            image_mean=image["mean"],
            image_std=image["std"],
        )
        self.pictures = [
            Image.fromarray(
                (formula_numbers(f"picture {index}", height * width * 3) % 256)
                .astype(np.uint8)
                .reshape(height, width, 3)
            )
            for index, (height, width) in enumerate(self.case["sizes"])
        ]

    def build(self, kernel: str = "sdpa") -> EveForPreTraining:
        """The model with all weights by formula, through this attention kernel of the library."""
        text = dict(self.case["text"])
        rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
        config = EveConfig(
            text_config={"model_type": "llama", "rope_parameters": rope, **text},
            vision_config=EveVisionConfig(**self.case["vision"]),
            alignment_config=EveAlignmentConfig(**self.case["aligner"]),
            image_token_id=self.case["image_token_id"],
        )
        model = EveForPreTraining._from_config(config, attn_implementation=kernel)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(formula_weight(name, weight.shape))
        return model.to(self.device, self.dtype).eval()

    @cached_property
    def grids(self) -> torch.Tensor:
        """(pictures, 3) patch grids."""
        return self.processor(self.pictures, return_tensors="pt")["image_grid_thw"].to(self.device)

    @cached_property
    def patches(self) -> tuple[torch.Tensor, ...]:
        """Packed patches of each picture, float32: the patch embedding takes them so."""
        made = self.processor(self.pictures, return_tensors="pt")["pixel_values"].to(self.device)
        return made.split(self.grids.prod(-1).tolist())

    def ids(self, index: int, *, answer: bool = True) -> list[int]:
        """Words, image placeholders, words; without the answer it is a question to be answered."""
        before, behind = self.case["words"][index]
        words = behind if answer else behind[: -self.case["answer"]]
        placeholders = [self.case["image_token_id"]] * self.expected["tokens"][index]
        return [*before, *placeholders, *words]

    def labels(self, index: int) -> list[int]:
        """The answer's ids, nothing to learn elsewhere."""
        ids, answer = self.ids(index), self.case["answer"]
        return [IGNORED] * (len(ids) - answer) + ids[-answer:]

    def single(self, index: int) -> dict[str, Any]:
        """One text and its picture."""
        return {
            "input_ids": torch.tensor([self.ids(index)], device=self.device),
            "pixel_values": self.patches[index],
            "image_grid_thw": self.grids[index : index + 1],
        }

    def batch(self, side: str = "left", extra: int = 0) -> dict[str, Any]:
        """Both texts, padded to the longer one and `extra` positions more, with labels."""
        texts = [(self.ids(index), self.labels(index)) for index in range(len(self.pictures))]
        longest = max(len(ids) for ids, _ in texts) + extra
        rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for ids, labels in texts:
            gap = longest - len(ids)
            for name, values, filler in (
                ("input_ids", ids, PAD),
                ("labels", labels, IGNORED),
                ("attention_mask", [1] * len(ids), 0),
            ):
                padding = [filler] * gap
                rows[name].append(padding + values if side == "left" else values + padding)
        tensors = {name: torch.tensor(row, device=self.device) for name, row in rows.items()}
        pixels = {"pixel_values": torch.cat(self.patches), "image_grid_thw": self.grids}
        return tensors | pixels

    @cached_property
    def logits(self) -> torch.Tensor:
        """(positions of both texts, V), each text run alone; what other ways are held against."""
        with torch.no_grad():
            rows = [self.model(**self.single(i)).logits[0] for i in range(len(self.pictures))]
        return torch.cat(rows)

    @cached_property
    def trained(self) -> dict[str, Any]:
        """Losses and gradients of both samples, and the weights after one AdamW step."""
        names = dict(self.model.named_parameters())
        before = {name: weight.detach().clone() for name, weight in names.items()}
        teacher = [
            formula_weight(
                f"teacher {index}", (rows * cols, self.case["aligner"]["teacher_hidden_size"])
            )
            for index, (rows, cols) in enumerate(self.expected["grids"])
        ]
        output = self.model(
            **self.batch("right"), teacher_features=torch.cat(teacher).to(self.device)
        )
        output.loss.backward()
        gradients = {name: weight.grad.clone() for name, weight in names.items()}
        optimizer = torch.optim.AdamW(names.values(), **self.case["adamw"])
        optimizer.step()
        stepped = {name: weight.detach().clone() for name, weight in names.items()}
        with torch.no_grad():
            for name, weight in names.items():
                weight.copy_(before[name])
                weight.grad = None
        terms = [output.loss_terms["lm"], output.loss_terms["alignment"]]
        return {"loss": torch.stack(terms), "gradients": gradients, "stepped": stepped}

    def answers(self, *, cache: bool) -> list[list[int]]:
        """Greedy next tokens behind each question, with the cache or all computed anew."""
        found = []
        for index, expected in enumerate(self.expected["answers"]):
            ids, new = self.ids(index, answer=False), []
            inputs, past = self.single(index), None
            for _ in expected:
                step = ids if past is None else ids[-1:]
                inputs["input_ids"] = torch.tensor([step], device=self.device)
                if past is not None:
                    inputs = {"input_ids": inputs["input_ids"], "cache": past}
                with torch.no_grad():
                    output = self.model(**inputs, use_cache=cache, logits_to_keep=1)
                past = output[CACHE] if cache else None
                new.append(int(output.logits[0, -1].argmax()))
                ids.append(new[-1])
            found.append(new)
        return found


__all__ = ["Bench", "formula_numbers", "formula_weight"]
