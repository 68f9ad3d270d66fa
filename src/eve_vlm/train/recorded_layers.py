"""Decoder layers recorded as CUDA graphs, forward and backward, for steps that the host slows down.

A small decoder computes faster than Python can ask for it.  So each layer is recorded once, before
the first step, and played for every row; what stays of it is one call a layer and direction.

Easy to get wrong: a recording belongs to a shape and to places in memory.  So a row is filled up to
its full length with records that nobody looks at, positions and bounds lie where they did when it
was recorded, and so do gradients and what the way back needs: they are used up before the next
pass, which is why steps cannot be accumulated.  Both are checked, for nothing else would tell.
Whatever does not fit goes through the layers as usual, and is counted.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import ParallelMode

from eve_vlm.errors import first_line
from eve_vlm.layer_taps_eve import layers_of
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.record_attention import Records
from eve_vlm.train.sections import Recipe

LONGEST = 1024  # positions of a record at most; a row with a longer one is not played
SHORTEST = 16  # positions of a record on average at least; nor is a row with more records
FILLING = 256  # positions of the records that fill a row
# What layers may be given; places are in the turning already, and in `Records`.
KNOWN = {"attention_mask", "position_embeddings", "position_ids", "cache_position"}
Turning = tuple[torch.Tensor, torch.Tensor]
Recorder = Callable[[tuple[nn.Module, ...], tuple[tuple[torch.Tensor, ...], ...]], Any]


def layers_for(
    recipe: Recipe, model: EveForConditionalGeneration, arguments: TrainingArguments
) -> AbstractContextManager["RecordedLayers | None"]:
    """The recordings of a run where its recipe wants them; entered before batches are loaded.

    Once they are, a thread that pins memory would spoil what is being recorded.

    Raises:
        ValueError: if there is no GPU, or more than one, or a launcher for several processes.
    """
    if not recipe.model.record_layers:
        return nullcontext()
    alone = arguments.parallel_mode is ParallelMode.NOT_PARALLEL
    if arguments.device.type != "cuda" or not alone:
        raise ValueError(
            "model.record_layers is for one GPU and one process without torchrun, but this run has "
            f"{arguments.n_gpu} GPUs in each of {arguments.world_size} processes; set it to "
            "false, or let the process see one (CUDA_VISIBLE_DEVICES=0)."
        )
    assert recipe.data.packing is not None  # recipe.py sees to it
    half = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    decoder = cast(PreTrainedModel, model.model.language_model)
    compiled: dict[str, Any] | None = {"dynamic": False} if recipe.model.compile_layers else None
    return recorded_layers(decoder, recipe.data.packing.tokens, half=half, compiled=compiled)


@contextmanager
def recorded_layers(
    decoder: PreTrainedModel,
    positions: int,
    *,
    half: torch.dtype | None = None,
    compiled: dict[str, Any] | None = None,
    record: Recorder | None = None,
) -> Iterator["RecordedLayers"]:
    """Plays recordings of a decoder's layers in training, and afterwards leaves it as it was.

    Args:
        decoder: of the library, on its device, with adapters in place.
        positions: of a packed row; batches of one row, at most so long, are played.
        half: what autocast computes in; None where weights have that type.
        compiled: settings of `torch.compile` for what is recorded; None leaves layers as they are.
        record: `torch.cuda.make_graphed_callables`, or what does the same without a GPU.

    Raises:
        ValueError: if the decoder's layers are given something else than packed rows and turning,
            or cannot be recorded; in a step, if weights were replaced since, or gradients not used.
    """
    recorded = RecordedLayers(decoder, positions, compiled=compiled)
    recorded.record(half, record or torch.cuda.make_graphed_callables)
    # Leaves belong to the stream of the recordings, and torch would say so at length once.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    with ExitStack() as stack:
        stack.callback(torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch, True)
        stack.callback(recorded.forget)
        for module, forward in recorded.forwards():
            stack.callback(_put_back, module, vars(module).get("forward"))
            module.forward = forward
        yield recorded


def _put_back(module: nn.Module, forward: Any) -> None:
    del module.forward
    if forward is not None:
        module.forward = forward


class TensorLayer(nn.Module):
    """A decoder layer as a function of tensors alone, as recording wants it."""

    def __init__(self, layer: nn.Module, run: Callable[..., Any]):
        super().__init__()
        self.layer, self._run = layer, run
        # Only the longest is read, for the kernel's size; where records end is in `bounds`.
        self.lengths: tuple[int, ...] = (LONGEST,)

    def forward(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bounds: torch.Tensor
    ) -> torch.Tensor:
        """(1, T, D) to (1, T, D); turning (1, T, head width), bounds as those of `Records`."""
        return self._run(self.layer, hidden, Records(self.lengths, bounds), (cos, sin))


def _run_layer(layer: nn.Module, hidden: torch.Tensor, records: Records, turning: Turning) -> Any:
    return type(layer).forward(layer, hidden, attention_mask=records, position_embeddings=turning)


class RecordedLayers:
    """The recordings, and the way round them.

    Attributes:
        played: steps that went through recordings alone.
        passed: steps that did not fit, or of which a layer did not.
    """

    def __init__(
        self, decoder: PreTrainedModel, positions: int, *, compiled: dict[str, Any] | None = None
    ):
        self.decoder, self.positions = decoder, positions
        # One function for all layers, so that it is compiled once.
        run = _run_layer if compiled is None else torch.compile(_run_layer, **compiled)
        self.layers = [TensorLayer(layer, run) for layer in layers_of(decoder)]
        self.most = positions // SHORTEST
        self.played = self.passed = 0
        self.dtype = next(decoder.parameters()).dtype
        self._calls: Sequence[Callable[..., torch.Tensor]] = ()
        self._turning: Turning = torch.empty(0), torch.empty(0)
        self._bounds = torch.empty(0)
        self._weights: list[nn.Parameter] = []
        self._memory: list[int] = []  # where they are
        # Of the pass that runs: whether it may be played, what of it lies in place, and whether all
        # of its layers were played.
        self._plays = self._whole = False
        self._placed: tuple[Records, Turning] | None = None
        self._rows = self._awaited = 0  # rows so far, and the one whose way back comes next

    def record(self, half: torch.dtype | None, record: Recorder) -> None:
        """Records all layers over a row of short records."""
        device, training = next(self.decoder.parameters()).device, self.decoder.training
        size = (1, self.positions, self.decoder.config.hidden_size)  # (1, T, D)
        hidden = torch.zeros(size, dtype=self.dtype, device=device)
        self.decoder.train()
        # Halved weights are part of a recording, so none may come out of autocast's cache.
        with torch.autocast(device.type, half, enabled=half is not None, cache_enabled=False):
            records, turning = self._given(hidden)
            self._turning = turning[0].clone(), turning[1].clone()
            self._bounds = records.bounds.new_empty(self.most + 1)
            self._place(records, turning)
            sample = [
                (hidden.clone().requires_grad_(), *self._turning, self._bounds) for _ in self.layers
            ]
            try:
                self._calls = record(tuple(self.layers), tuple(sample))
            except (RuntimeError, TypeError, AttributeError) as error:
                raise self._refusal(first_line(error)) from error
        self.decoder.train(training)
        self._weights = self._weights_now()
        self._memory = [weight.data_ptr() for weight in self._weights]

    def forget(self) -> None:
        """Lets go of the recordings and their memory, which hold each other."""
        self._calls = ()
        for one in self.layers:
            vars(one).pop("forward", None)  # torch puts it there

    def _weights_now(self) -> list[nn.Parameter]:
        return [weight for one in self.layers for weight in one.parameters()]

    @torch.no_grad()
    def _given(self, hidden: torch.Tensor) -> tuple[Records, Turning]:
        """What the decoder hands to its layers for a row: to all of them the same."""
        found: list[dict[str, Any]] = []

        def look(
            forward: Callable[..., Any], states: torch.Tensor, *args: Any, **given: Any
        ) -> Any:
            made = forward(states, *args, **given)
            others = [
                name for name, value in given.items() if value is not None and value is not False
            ]
            plain = isinstance(made, torch.Tensor) and not args and KNOWN.issuperset(others)
            found.append(given if plain else {})
            return made

        with ExitStack() as stack:
            for one in self.layers:
                stack.callback(_put_back, one.layer, vars(one.layer).get("forward"))
                one.layer.forward = partial(look, one.layer.forward)
            places = torch.arange(self.positions, device=hidden.device)[None] % FILLING
            self.decoder(inputs_embeds=hidden, position_ids=places, use_cache=False)
        pairs = [pair for given in found if (pair := _records_and_turning(given))]
        if len(pairs) < len(self.layers) or not all(_same(pairs[0], pair) for pair in pairs):
            raise self._refusal(
                "it is for decoders with one rotary embedding and plain causal attention, with "
                "attn_implementation sdpa"
            )
        return pairs[0]

    def _refusal(self, why: str) -> ValueError:
        name = type(self.layers[0].layer).__name__
        return ValueError(f"model.record_layers cannot record a {name} ({why}); set it to false.")

    def forwards(self) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """The modules that change, each with its new forward."""
        yield self.decoder, partial(self._decode, self.decoder.forward)
        for index, one in enumerate(self.layers):
            yield one.layer, partial(self._run, index, one.layer.forward)

    def _decode(self, forward: Callable[..., Any], **given: Any) -> Any:
        """The decoder, its row filled up to full length and cut again."""
        self._plays, self._placed = False, None
        if not (torch.is_grad_enabled() and self.decoder.training):
            return forward(**given)
        embeds, length = given.get("inputs_embeds"), 0
        self._plays = self._whole = self._is_row(**given)
        if self._plays:
            assert embeds is not None
            length = embeds.shape[1]
            given |= self._filled(embeds, given["position_ids"])
        made = forward(**given)
        self.played += self._whole
        self.passed += not self._whole
        if self._plays:
            made.last_hidden_state = made.last_hidden_state[:, :length]
        self._plays = False
        return made

    def _is_row(
        self,
        *,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **others: Any,
    ) -> bool:
        """Whether it is a packed row, and nothing is asked for but its last states."""
        if inputs_embeds is None or position_ids is None or inputs_embeds.dtype != self.dtype:
            return False
        rows, length = inputs_embeds.shape[:2]
        alone = all(value is None or value is False for value in others.values())
        return alone and rows == 1 and length <= self.positions

    def _filled(self, embeds: torch.Tensor, places: torch.Tensor) -> dict[str, torch.Tensor]:
        """A row of full length, with records behind its own."""
        lacking = self.positions - embeds.shape[1]
        filling = torch.arange(lacking, device=places.device)[None] % FILLING
        return {
            "inputs_embeds": F.pad(embeds, (0, 0, 0, lacking)),  # (1, T, D)
            "position_ids": torch.cat([places, filling], 1),  # (1, T)
        }

    def _run(
        self,
        index: int,
        forward: Callable[..., Any],
        hidden: torch.Tensor,
        *args: Any,
        **given: Any,
    ) -> Any:
        """A layer: its recording where the row fits, else itself."""
        pair = _records_and_turning(given) if self._plays else None
        if pair is None or not self._fits(*pair):
            self._whole = False
            return forward(hidden, *args, **given)
        if not hidden.requires_grad:  # a row of words alone, and recordings have a way back
            hidden = hidden.detach().requires_grad_()
        if self._placed is not None:
            return self._calls[index](hidden, *self._turning, self._bounds)
        self._check()
        self._placed = pair
        self._place(*pair)
        self._rows += 1
        self._awaited = self._rows
        made = self._calls[index](hidden, *self._turning, self._bounds)
        made.register_hook(partial(self._come_back, self._rows))
        return made

    def _fits(self, records: Records, turning: Turning) -> bool:
        if self._placed is not None:
            return _same(self._placed, (records, turning))
        return len(records.lengths) <= self.most and max(records.lengths) <= LONGEST

    def _place(self, records: Records, turning: Turning) -> None:
        """Puts what all layers read where the recordings look for it."""
        for place, one in zip(self._turning, turning, strict=True):
            place.copy_(one)
        self._bounds.fill_(self.positions)  # behind the last record come empty ones
        self._bounds[: len(records.bounds)] = records.bounds

    def _check(self) -> None:
        """What recordings read and write is what the model has, as far as it can change."""
        if not self._rows:  # checkpoints are loaded and models wrapped before the first row
            now = self._weights_now()
            kept = len(now) == len(self._weights) and all(map(operator.is_, now, self._weights))
            if not kept or [weight.data_ptr() for weight in now] != self._memory:
                raise ValueError(
                    "Weights of the decoder were replaced or moved after its layers were recorded, "
                    "which would go on with the old ones; set model.record_layers to false."
                )
        if any(weight.grad is not None for weight in self._weights):
            raise ValueError(
                "Gradients of the step before are still there, in the memory of the next; "
                "clear them with zero_grad(set_to_none=True) before each pass, or set "
                "model.record_layers to false."
            )

    def _come_back(self, row: int, gradient: torch.Tensor) -> None:
        """Another row has been played since, or this one has gone back before: memory is its."""
        if row != self._awaited:
            raise ValueError(
                "Recorded layers keep one row at a time, and another pass came before the way back "
                "of this one; go back once behind each pass, or set model.record_layers to false."
            )
        self._awaited = 0


def _records_and_turning(given: dict[str, Any]) -> tuple[Records, Turning] | None:
    """Those of a layer's arguments; None where it is given others."""
    records, turning = given.get("attention_mask"), given.get("position_embeddings")
    if isinstance(records, Records) and isinstance(turning, tuple) and len(turning) == 2:
        return records, (turning[0], turning[1])
    return None


def _same(one: tuple[Records, Turning], other: tuple[Records, Turning]) -> bool:
    """Whether two layers are given the same, without a look at the device."""
    return one[0].lengths == other[0].lengths and one[1][0] is other[1][0]


__all__ = ["LONGEST", "RecordedLayers", "TensorLayer", "layers_for", "recorded_layers"]
