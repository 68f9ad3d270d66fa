"""Decoder layers recorded as CUDA graphs, forward and backward, for steps that the host slows down.

A small decoder computes faster than Python can ask for it.  So each layer is recorded once, before
the first step, and played for every row; what stays of it is one call a layer and direction.

Easy to get wrong: a recording belongs to a shape and to places in memory.  So a row is filled up to
its full length with records that nobody looks at, positions and bounds lie where they did when it
was recorded, and so do gradients: they are used up before the next pass, which is why steps cannot
be accumulated.  Whatever does not fit goes through the layers as usual, and is counted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from eve_vlm.layer_taps_eve import layers_of
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.record_attention import Records
from eve_vlm.train.sections import Recipe

LONGEST = 1024  # positions of a record at most; a row with a longer one is not played
SHORTEST = 16  # positions of a record on average at least; nor is a row with more records
FILLING = 256  # positions of the records that fill a row
Turning = tuple[torch.Tensor, torch.Tensor]
Recorder = Callable[[tuple[nn.Module, ...], tuple[tuple[torch.Tensor, ...], ...]], Any]


def layers_for(
    recipe: Recipe, model: EveForConditionalGeneration, arguments: TrainingArguments
) -> AbstractContextManager["RecordedLayers | None"]:
    """The recordings of a run where its recipe wants them; entered before batches are loaded.

    Once they are, a thread that pins memory would spoil what is being recorded.

    Raises:
        ValueError: if there is no GPU, or more processes than one.
    """
    if not recipe.model.record_layers:
        return nullcontext()
    if arguments.device.type != "cuda" or arguments.world_size > 1:
        raise ValueError(
            f"model.record_layers is for one process on one GPU, but this run has "
            f"{arguments.world_size} on {arguments.device.type}; set it to false."
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
        ValueError: if the decoder's layers are given something else than packed rows and turning.
    """
    recorded = RecordedLayers(decoder, positions, compiled=compiled)
    recorded.record(half, record or torch.cuda.make_graphed_callables)
    with ExitStack() as stack:
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
        made = self._run(self.layer, hidden, Records(self.lengths, bounds), (cos, sin))
        return made[0] if isinstance(made, tuple) else made


def _run_layer(layer: nn.Module, hidden: torch.Tensor, records: Records, turning: Turning) -> Any:
    return type(layer).forward(layer, hidden, attention_mask=records, position_embeddings=turning)


class RecordedLayers:
    """The recordings, and the way round them.

    Attributes:
        played: steps that went through recordings.
        passed: steps that did not fit.
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
        self._calls: Sequence[Callable[..., torch.Tensor]] = ()
        self._turning: Turning = torch.empty(0), torch.empty(0)
        self._bounds = torch.empty(0)

    def record(self, half: torch.dtype | None, record: Recorder) -> None:
        """Records all layers over a row of short records."""
        weight = next(self.decoder.parameters())
        hidden = torch.zeros(
            (1, self.positions, self.decoder.config.hidden_size),  # (1, T, D)
            dtype=weight.dtype,
            device=weight.device,
        )
        kind, training = weight.device.type, self.decoder.training
        self.decoder.train()
        # Halved weights are part of a recording, so none may come out of autocast's cache.
        with torch.autocast(kind, half, enabled=half is not None, cache_enabled=False):
            records, turning = self._given(hidden)
            self._turning = turning[0].clone(), turning[1].clone()
            self._bounds = records.bounds.new_empty(self.most + 1)
            self._place(records, turning)
            sample = [
                (hidden.clone().requires_grad_(), *self._turning, self._bounds) for _ in self.layers
            ]
            self._calls = record(tuple(self.layers), tuple(sample))
        self.decoder.train(training)

    @torch.no_grad()
    def _given(self, hidden: torch.Tensor) -> tuple[Records, Turning]:
        """What the decoder hands to its layers for a row, asked of the first one."""
        first, found = self.layers[0].layer, _FoundError()

        def look(states: torch.Tensor, *args: Any, **given: Any) -> Any:
            found.given = given
            raise found

        before = vars(first).get("forward")
        first.forward = look
        try:
            places = torch.arange(self.positions, device=hidden.device)[None] % FILLING
            self.decoder(inputs_embeds=hidden, position_ids=places, use_cache=False)
        except _FoundError:
            pass
        finally:
            _put_back(first, before)
        records = found.given.get("attention_mask")
        turning = found.given.get("position_embeddings")
        if not isinstance(records, Records) or not isinstance(turning, tuple) or len(turning) != 2:
            raise ValueError(
                f"model.record_layers cannot record a {type(first).__name__}: it is for decoders "
                "with one rotary embedding and plain causal attention, with attn_implementation "
                "sdpa; set it to false."
            )
        return records, (turning[0], turning[1])

    def forwards(self) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """The modules that change, each with its new forward."""
        yield self.decoder, partial(self._decode, self.decoder.forward)
        for index, one in enumerate(self.layers):
            yield one.layer, partial(self._run, index, one.layer.forward)

    def _decode(self, forward: Callable[..., Any], **given: Any) -> Any:
        """The decoder, its row filled up to full length and cut again."""
        embeds, places = given.get("inputs_embeds"), given.get("position_ids")
        if embeds is None or places is None or not self._is_step(embeds):
            return forward(**given)
        length = embeds.shape[1]
        lacking = self.positions - length
        filling = torch.arange(lacking, device=places.device)[None] % FILLING
        given["inputs_embeds"] = F.pad(embeds, (0, 0, 0, lacking))  # (1, T, D)
        given["position_ids"] = torch.cat([places, filling], 1)  # (1, T)
        made = forward(**given)
        made.last_hidden_state = made.last_hidden_state[:, :length]
        return made

    def _is_step(self, states: torch.Tensor) -> bool:
        rows, length = states.shape[:2]
        learns = torch.is_grad_enabled() and self.decoder.training
        return learns and rows == 1 and length <= self.positions

    def _run(
        self,
        index: int,
        forward: Callable[..., Any],
        hidden: torch.Tensor,
        *args: Any,
        **given: Any,
    ) -> Any:
        """A layer: its recording where the row fits, else itself."""
        records = given.get("attention_mask")
        if not self._fits(hidden, records):
            self.passed += index == 0 and torch.is_grad_enabled() and self.decoder.training
            return forward(hidden, *args, **given)
        if index == 0:
            self._place(given["attention_mask"], given["position_embeddings"])
            self.played += 1
        if not hidden.requires_grad:  # a row of words alone, and recordings have a way back
            hidden = hidden.detach().requires_grad_()
        return self._calls[index](hidden, *self._turning, self._bounds)

    def _fits(self, hidden: torch.Tensor, records: Any) -> bool:
        return (
            self._is_step(hidden)
            and hidden.shape[1] == self.positions
            and isinstance(records, Records)
            and len(records.lengths) <= self.most
            and max(records.lengths) <= LONGEST
        )

    def _place(self, records: Records, turning: Turning) -> None:
        """Puts what all layers read where the recordings look for it."""
        for place, one in zip(self._turning, turning, strict=True):
            place.copy_(one)
        self._bounds.fill_(self.positions)  # behind the last record come empty ones
        self._bounds[: len(records.bounds)] = records.bounds


class _FoundError(Exception):
    """Ends a pass in which only the first layer's arguments were wanted."""

    given: dict[str, Any]


__all__ = ["LONGEST", "RecordedLayers", "TensorLayer", "layers_for", "recorded_layers"]
