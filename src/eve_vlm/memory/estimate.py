"""How much memory answering or training takes, by part, before anything is loaded.

Weights, gradients, moments of the optimizer and what sharding leaves of them are formulas over the
model's own parameters, built on the `meta` device. Activations are counted by running the model's
own code without memory (`trace.py`). Each formula says where it comes from, and
`benchmarks/measure_memory.py` compares the sums with measured peaks (`docs/fits.md`).

Easy to get wrong: a run has several phases, and not everything is held in each of them. The
optimizer's own temporaries come when activations are gone, so the peak is the largest phase, not
the sum of all parts.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers import DynamicCache

from eve_vlm.alignment_eve import EveForPreTraining
from eve_vlm.configuration_eve import EveConfig
from eve_vlm.memory.formulas import (
    LOGIT_COPIES,
    SAFETY_MARGIN,
    TEMPORARIES,
    USUAL_SHARD,
    Sizes,
    Workload,
    bytes_of,
    check,
    framework_of,
    layers_of,
    parts_of,
    sizes_of,
)
from eve_vlm.memory.formulas import held as held_by
from eve_vlm.memory.trace import (
    BACKWARD,
    CACHE,
    GRADIENTS,
    INPUTS,
    LOSS,
    TEACHER,
    LiveBytes,
    Peak,
    rehearsal,
)
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.parameter_names import matches_any, names_of


class Teacher(Protocol):
    """What a rehearsal needs of `eve_vlm.train.teacher.FrozenTeacher`, its model on `meta`."""

    model: nn.Module
    hidden_size: int
    view: Any

    def features(
        self, teacher_pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, *, side: int
    ) -> torch.Tensor:
        """(Z, W) features of the cells that hold pictures."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by phase and part on each device, and what the host needs beside a GPU."""

    phases: dict[str, dict[str, int]]
    framework: int
    host: int = 0

    @property
    def peak_phase(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def model_peak(self) -> int:
        """Bytes at the peak, without the framework."""
        return sum(self.phases[self.peak_phase].values())

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return self.model_peak + self.framework

    @property
    def wanted(self) -> int:
        """The peak and the safety margin: what the device should have."""
        return int(self.peak * (1 + SAFETY_MARGIN))


class _LoraLinear(nn.Module):
    """A frozen linear layer with LoRA beside it, as PEFT does it: B(A(x)) x scale, in float32."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        result = self.base(x)
        return (result + self.up(self.down(x.to(self.down.weight.dtype))) * 2.0).to(result.dtype)


class MemoryModel:
    """A model on `meta`, asked what it would take.

    Args:
        config: the model's configuration; `alignment_config` is used by aligned training only.
        teacher: the frozen teacher of aligned training, its model on `meta`.
        largest_shard: bytes of the checkpoint's largest file; None where there is none yet.
        mapped: type in which its weights are used as they lie in their files (safetensors), so that
            loading copies nothing (measured: 4 MiB for a model of 450 MiB).
    """

    def __init__(
        self,
        config: EveConfig,
        *,
        teacher: Teacher | None = None,
        largest_shard: int | None = None,
        mapped: torch.dtype | None = None,
    ):
        self.config, self.teacher = config, teacher
        self.largest_shard, self.mapped = largest_shard, mapped
        self._runs: dict[Workload, tuple[Sizes, dict[str, Peak]]] = {}
        self._sizes: dict[tuple, Sizes] = {}

    def estimate(self, work: Workload) -> Estimate:
        """Memory of a workload, by phase and part.

        Raises:
            ValueError: if the workload cannot be (too long, no room for its pictures, ...).
        """
        check(self.config, work)
        return self._training(work) if work.training else self._answering(work)

    def at_least(self, work: Workload) -> int:
        """A quick lower bound in bytes, without activations."""
        sizes = self.sizes(work)
        parts = held_by(sizes, work) if work.training else sizes.weights
        return sum(parts.values()) + framework_of(work)

    def sizes(self, work: Workload) -> Sizes:
        """The model's bytes for this workload."""
        key = (work.training, work.aligned, work.dtype, work.trainable, work.lora, work.muon)
        if key not in self._sizes:
            self._sizes[key] = sizes_of(self.build(work), muon=work.muon)
        return self._sizes[key]

    def build(self, work: Workload) -> EveForConditionalGeneration:
        """The model on `meta`, with what does not learn frozen, and LoRA in place."""
        config = EveConfig.from_dict(self.config.to_dict())
        if not (work.training and work.aligned):
            config.alignment_config = None
        cls = EveForConditionalGeneration if config.alignment_config is None else EveForPreTraining
        with torch.device("meta"):
            model = cls._from_config(config, attn_implementation=work.attention).to(work.dtype)
            if not work.training:
                return model.eval().requires_grad_(False)
            for parameter, names in names_of(model).items():
                parameter.requires_grad_(matches_any(names, work.trainable))
            if work.lora:
                _add_lora(model, work.lora)
        if work.gradient_checkpointing:
            with warnings.catch_warnings():  # renamed in 5.23, and 5.17 has only the old name
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def _run(self, work: Workload) -> tuple[Sizes, dict[str, Peak]]:
        """What the activations of a workload take; devices and optimizer do not matter to them."""
        key = replace(work, gpus=1, sharding="none", optimizer="adamw", device="cpu")
        if key not in self._runs:
            model = self.build(work)
            run = self._rehearse_training if work.training else self._rehearse_answer
            self._runs[key] = sizes_of(model, muon=work.muon), run(model, work)
        return self._runs[key]

    def _training(self, work: Workload) -> Estimate:
        sizes, peaks = self._run(work)
        held = held_by(sizes, work)
        gradients = held.pop(GRADIENTS)
        waiting = held.pop(TEMPORARIES)
        if self.teacher is not None and work.aligned:
            held["weights: teacher"] = bytes_of(self.teacher.model.parameters())
        sharded = work.sharding in ("zero2", "zero3", "fsdp")
        peak = peaks["without gradients" if sharded else "step"]
        back = held | _named_parts(peak)
        if sharded:
            back[GRADIENTS] = gradients
        if work.device == "cpu":
            # accelerate reads one batch ahead; Trainer holds all batches of a step.
            inputs = peaks["step"].parts.get(INPUTS, 0)
            back["inputs of the other batches"] = inputs * work.accumulation
        phases = {
            "forward and backward": back,
            "optimizer step": held | {GRADIENTS: gradients, TEMPORARIES: waiting},
        }
        if peaks["teacher"].bytes:
            kept = {GRADIENTS: gradients} if work.accumulation > 1 else {}
            phases["asking the teacher"] = held | kept | _named_parts(peaks["teacher"])
        host = 0 if work.device == "cpu" else sum(sizes.weights.values())
        return Estimate(phases, framework_of(work), host)

    def _answering(self, work: Workload) -> Estimate:
        sizes, peaks = self._run(work)
        held = {f"weights: {part}": size for part, size in sizes.weights.items()}
        total = sum(held.values())
        shard = USUAL_SHARD if self.largest_shard is None else self.largest_shard
        if work.dtype == self.mapped:
            shard = 0
        logits = 4 * work.batch * self.config.text_config.vocab_size
        inputs = {INPUTS: peaks["question"].parts.get(INPUTS, 0)}
        cache = {CACHE: peaks["kept"].parts.get(CACHE, 0)}
        phases = {
            "loading": held | {"a shard being read": min(shard, total)},
            "reading the question": held | _named_parts(peaks["question"]),
            "writing the answer": held | _named_parts(peaks["last word"]) | inputs,
            "choosing a word": held | cache | inputs | {LOSS: LOGIT_COPIES * logits},
        }
        host = 0
        if work.device == "cuda":  # the engine loads into host memory, then moves
            host = sum(phases.pop("loading").values())
        return Estimate(phases, framework_of(work), host)

    def _rehearse_training(
        self, model: EveForConditionalGeneration, work: Workload
    ) -> dict[str, Peak]:
        """The teacher's peak, and that of the last forward and backward pass before a step."""
        given = _Inputs(self.config, work)
        with rehearsal(model, parts_of(model)) as teaching:
            features = self._teach(teaching, given, work)
        with rehearsal(model, parts_of(model)) as counter:
            inputs = given.make(counter, self.config) | features
            for value in features.values():
                counter.file_under(value, TEACHER)
            for _ in range(min(work.accumulation, 2)):  # the second finds gradients in place
                counter.restart()
                counter.part = LOSS
                loss = model(**inputs, labels=given.labels).loss
                counter.part = BACKWARD
                loss.backward()
                del loss
        return {
            "teacher": teaching.peak,
            "step": counter.peak,
            "without gradients": counter.peak_without_gradients,
        }

    def _teach(self, counter: LiveBytes, given: "_Inputs", work: Workload) -> dict:
        if self.teacher is None or not work.aligned:
            return {}
        vision, alignment = self.config.vision_config, self.config.alignment_config
        counter.ignore(self.teacher.model)
        counter.part = TEACHER
        size = self.teacher.view.size
        views = torch.empty(len(given.grids), size, size, 3, dtype=torch.uint8, device="meta")
        side = vision.merge_size * alignment.pool_size
        return {"teacher_features": self.teacher.features(views, given.grids, side=side)}

    def _rehearse_answer(
        self, model: EveForConditionalGeneration, work: Workload
    ) -> dict[str, Peak]:
        """The peaks of the first pass over the question and of the answer's last word."""
        given = _Inputs(self.config, replace(work, length=work.length - work.new_tokens))
        with torch.no_grad(), rehearsal(model, parts_of(model)) as counter:
            inputs = given.make(counter, self.config)
            with _cache(self.config, model, counter) as cache:
                model(**inputs, cache=cache, use_cache=True, logits_to_keep=1)
            question = counter.peak
        words = torch.full((work.batch, work.length - 1), _word(self.config))
        with (
            torch.no_grad(),
            rehearsal(model, parts_of(model)) as counter,
            _cache(self.config, model, counter) as cache,
        ):
            model(input_ids=words, cache=cache, use_cache=True, logits_to_keep=1)
            counter.restart()
            model(input_ids=words[:, :1], cache=cache, use_cache=True)
            kept = Peak(counter.total, dict(counter.live))
        return {"question": question, "last word": counter.peak, "kept": kept}


class _Inputs:
    """A batch of one workload: ids, labels and grids real, pixels and mask without contents."""

    def __init__(self, config: EveConfig, work: Workload):
        merge, placeholder = config.vision_config.merge_size, config.image_token_id
        self.work = work
        self.ids = torch.full((work.batch, work.length), _word(config))
        self.ids[:, : work.picture_tokens] = placeholder
        # Every word is learnt: an upper bound, the prompts of conversations are not.
        self.labels = self.ids.masked_fill(self.ids == placeholder, -100)
        grid = (1, merge * work.rows, merge * work.cols)
        self.grids = torch.tensor([grid] * (work.batch * work.pictures)).view(-1, 3)

    def make(self, counter: LiveBytes, config: EveConfig) -> dict[str, torch.Tensor]:
        """The arguments of the model's forward pass, but for labels."""
        counter.part = INPUTS
        vision, work = config.vision_config, self.work
        inputs = {"input_ids": self.ids}
        if len(self.grids):
            inputs["pixel_values"] = torch.empty(
                int(self.grids.prod(-1).sum()),
                vision.num_channels * vision.patch_size**2,
                device="meta",
            )
            inputs["image_grid_thw"] = self.grids
        if work.padded:
            kind = torch.bool if work.attention == "sdpa" else work.dtype
            shape = (work.batch, 1, work.length, work.length)
            inputs["attention_mask"] = torch.empty(shape, dtype=kind, device="meta")
        return inputs


def _named_parts(peak: Peak) -> dict[str, int]:
    """The parts of a peak as lines of a table."""
    plain = (GRADIENTS, CACHE, INPUTS, TEACHER, LOSS, BACKWARD)
    return {
        part if part in plain else f"activations: {part}": size
        for part, size in peak.parts.items()
        if size
    }


@contextmanager
def _cache(
    config: EveConfig, model: EveForConditionalGeneration, counter: LiveBytes
) -> Iterator[DynamicCache]:
    """The library's cache, sliding windows and all; each layer's part is filed as it comes."""
    cache = DynamicCache(config=config.text_config)

    def file(module: nn.Module, args: tuple, output: Any) -> None:
        for layer in cache.layers:
            if layer.is_initialized:
                counter.file_under(layer.keys, CACHE)
                counter.file_under(layer.values, CACHE)

    handles = [layer.register_forward_hook(file) for layer in layers_of(model)]
    yield cache
    for handle in handles:
        handle.remove()


def _add_lora(model: EveForConditionalGeneration, rank: int) -> None:
    """Freezes the decoder and puts LoRA beside every linear layer of its blocks."""
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    for layer in layers_of(model):
        linear = [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]
        for name, module in linear:
            layer.set_submodule(name, _LoraLinear(module, rank))


def _word(config: EveConfig) -> int:
    """An id that stands for no picture."""
    return 1 if config.image_token_id == 0 else 0


__all__ = ["Estimate", "MemoryModel", "Teacher"]
