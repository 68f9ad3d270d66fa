"""What answering costs: pictures made ready, put into tokens, the first token, each further one.

The engine that users ask does the work (`EveEngine`, `RunningBatch`), and its replies are watched.
Easy to get wrong: rows of a batch may begin one after another, so a token's time is taken between
the moment at which the last row has begun and the end, when all rows make tokens together.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from eve_vlm.flops import Part, Work, flops_of, sliding_window, terms_of, work_of
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.pictures import read_picture
from eve_vlm.serve.engine import EveEngine, user_message
from eve_vlm.serve.messages import Prompt
from eve_vlm.serve.reply import Reply
from eve_vlm.serve.sampling import Sampling

from .measuring import Case, Clock, Need, timed, weight_bytes
from .words import MIXED, QUESTION, SQUARE, grids_of, mixed, patches_of, picture, tokens_of

PHOTOGRAPHS = ((640, 480), (1920, 1080), (4000, 3000))
JPEG_QUALITY = 90
PREFILL = ("prefill", "vision", "decoder")  # the whole and its parts
SEEING: tuple[Part, ...] = ("patch embedding", "projector")


class WatchedReply(Reply):
    """A reply that notes when each of its tokens came."""

    def __init__(self, *args: Any, clock: Clock, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.clock, self.times = clock, list[float]()

    def take(self, token_id: int) -> None:
        """The next token of the answer."""
        super().take(token_id)
        self.times.append(self.clock.now())  # the token is here, so the device was waited for


def square_cases(engine: EveEngine, edge: int) -> list[Case]:
    """One square made ready, put into tokens and read: what encoder-based models stand beside."""
    square = picture(SQUARE)
    return [
        _preprocessing(engine, edge, "one square", [square]),
        embedding_case(engine, edge, [square], "one square"),
        forward_case(engine, edge),
    ]


def preprocessing_cases(engine: EveEngine, edge: int, *, quick: bool) -> list[Case]:
    """Pictures to patches: photographs of several sizes, one from its file, and a mixed batch."""
    sizes = PHOTOGRAPHS[:1] if quick else PHOTOGRAPHS
    cases = [
        _preprocessing(engine, edge, f"{width} x {height}", [picture((width, height))])
        for width, height in sizes
    ]
    cases.append(_preprocessing(engine, edge, f"{len(MIXED)} mixed", mixed(len(MIXED))))
    file = io.BytesIO()
    width, height = sizes[-1]
    # Noise would be the hardest JPEG there is; a smooth picture is nearer to a photograph.
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(
        file, "JPEG", quality=JPEG_QUALITY
    )
    name = f"{width} x {height} from a JPEG file"
    cases.append(_preprocessing(engine, edge, name, [], file=file.getvalue()))
    return cases


def _preprocessing(
    engine: EveEngine,
    edge: int,
    name: str,
    pictures: list[Image.Image],
    *,
    file: bytes | None = None,
) -> Case:
    """The floor is memory alone: pixels read once, patches written once."""
    processor = engine.processor.image_processor

    def make() -> Any:
        given = pictures if file is None else [read_picture(file, name="picture")]
        return processor(images=given, return_tensors="pt")

    made = make()
    opened = pictures if file is None else [read_picture(file, name="picture")]
    read = sum(3 * one.width * one.height for one in opened) if file is None else len(file)
    return Case(
        section="preprocessing",
        model="eve",
        name=f"{edge} px: {name}",
        run=lambda clock: {"seconds": timed(clock, make)},
        needs={"seconds": Need(0, read + made["pixel_values"].nbytes)},
        tokens={"seconds": tokens_of(grids_of(engine.processor, opened))},
        facts={"longest_edge": edge, "pictures": len(opened)},
    )


def embedding_case(
    engine: EveEngine, edge: int, pictures: Sequence[Image.Image], name: str
) -> Case:
    """Patches to tokens of the decoder: patch embedding layer and projector."""
    model, processor = engine.model, engine.processor
    inputs = processor.image_processor(images=list(pictures), return_tensors="pt")
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    grids = grids_of(processor, pictures)
    tokens = tokens_of(grids)

    @torch.inference_mode()
    def embed() -> Any:
        return model.get_image_features(**inputs)

    made = tokens * model.config.text_config.hidden_size * model.dtype.itemsize
    parts = [model.model.vision_tower, model.model.multi_modal_projector]
    work = _work(model, processor, [], pictures, heads=0)
    need = Need(
        sum(flops_of(terms_of(model), work, part=part).forward for part in SEEING),
        weight_bytes(parts) + inputs["pixel_values"].nbytes + made,
    )
    return Case(
        section="embedding",
        model="eve",
        name=f"{edge} px: {name}",
        run=lambda clock: {"seconds": timed(clock, embed)},
        needs={"seconds": need},
        tokens={"seconds": tokens},
        facts={"longest_edge": edge, "pictures": len(pictures)},
        modules=parts,
    )


def embedding_cases(engine: EveEngine, edge: int, batches: Sequence[int]) -> list[Case]:
    """Batches of mixed pictures; one square is measured beside the encoder-based models."""
    return [
        embedding_case(engine, edge, mixed(count), f"{count} mixed")
        for count in batches
        if count > 1
    ]


def forward_case(engine: EveEngine, edge: int) -> Case:
    """One square and a question through the model, up to what decides the first token."""
    model, one = engine.model, picture(SQUARE)
    prompt = engine.encode(user_message(QUESTION, [one]))
    given = {name: part.to(model.device) for name, part in prompt.pictures_from(0).items()}
    ids = prompt.input_ids[None].to(model.device)

    need = prefill_need(engine, [prompt], [one])

    @torch.inference_mode()
    def read() -> Any:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)

    return Case(
        section="prefill",
        model="eve",
        name=f"{edge} px: one square",
        run=lambda clock: in_parts(clock, read, model.model),
        needs=parts_needed(need, embedding_case(engine, edge, [one], "").needs["seconds"]),
        tokens=dict.fromkeys(PREFILL, len(prompt)) | {"vision": prompt.image_tokens},
        facts={"longest_edge": edge, "batch": 1, "image_tokens": prompt.image_tokens},
        modules=[model],
    )


def in_parts(clock: Clock, read: Callable[[], Any], model: Any) -> dict[str, float]:
    """Seconds of a prefill and of its parts, within one and the same pass.

    Args:
        model: with `vision_tower` and `multi_modal_projector`, as EVE and LLaVA call them.
    """
    moments: list[float] = []
    hooks = [
        model.vision_tower.register_forward_pre_hook(lambda *_: moments.append(clock())),
        model.multi_modal_projector.register_forward_hook(lambda *_: moments.append(clock())),
    ]
    try:
        whole = timed(clock, read)
    finally:
        for hook in hooks:
            hook.remove()
    vision = moments[-1] - moments[0]
    return dict(zip(PREFILL, (whole, vision, whole - vision), strict=True))


def parts_needed(whole: Need, vision: Need) -> dict[str, Need]:
    """What a prefill and its parts cannot do without."""
    decoder = Need(whole.flops - vision.flops, max(whole.bytes - vision.bytes, 0))
    return dict(zip(PREFILL, (whole, vision, decoder), strict=True))


def answer_case(
    engine: EveEngine,
    edge: int,
    pictures: Sequence[Image.Image],
    name: str,
    *,
    new_tokens: int,
    section: str = "prefill",
) -> Case:
    """Questions about a picture each, asked together: the first token of all, and further ones.

    Args:
        new_tokens: of each answer; 1 leaves further ones out.
    """
    asked = [user_message(QUESTION, [one]) for one in pictures]
    prompts = [engine.encode(messages) for messages in asked]
    sampling = Sampling(max_new_tokens=new_tokens)

    def run(clock: Clock) -> dict[str, float]:
        started = clock()
        replies = [
            WatchedReply(
                engine.encode(messages, sampling),
                sampling,
                engine.tokenizer,
                device=engine.model.device,
                clock=clock,
            )
            for messages in asked
        ]
        batch = engine.batch(len(replies))
        batch.add(replies)
        batch.run()
        return _figures(replies, started)

    needs = {"first token": prefill_need(engine, prompts, pictures)}
    tokens = {"first token": sum(map(len, prompts))}
    if new_tokens > 1:
        needs["token"] = decode_need(engine, [len(one) + new_tokens // 2 for one in prompts])
        tokens["token"] = len(prompts)
    return Case(
        section=section,
        model="eve",
        name=f"{edge} px: {name}",
        run=run,
        needs=needs,
        tokens=tokens,
        facts={
            "longest_edge": edge,
            "batch": len(prompts),
            "image_tokens": sum(one.image_tokens for one in prompts),
            "new_tokens": new_tokens,
        },
        modules=[engine.model],
    )


def _figures(replies: Sequence[WatchedReply], started: float) -> dict[str, float]:
    """Seconds to the first token of the last row, and seconds of a token of all rows together."""
    begun = max(reply.times[0] for reply in replies)
    figures = {"first token": begun - started}
    later = [moment for reply in replies for moment in reply.times if moment > begun]
    if later:
        figures["token"] = (max(later) - begun) / (len(later) / len(replies))
    return figures


def _work(
    model: EveForConditionalGeneration,
    processor: Any,
    prompts: Sequence[int],
    pictures: Sequence[Image.Image],
    *,
    heads: int,
) -> Work:
    merge = model.config.vision_config.merge_size
    grids = patches_of(grids_of(processor, pictures), merge)
    return work_of(prompts, grids, labels=heads, config=model.config)


def prefill_need(
    engine: EveEngine, prompts: Sequence[Prompt], pictures: Sequence[Image.Image]
) -> Need:
    """All of a prompt read, the head run once; weights read, keys and values written."""
    model = engine.model
    lengths = [len(prompt) for prompt in prompts]
    work = _work(model, engine.processor, lengths, pictures, heads=len(prompts))
    written = sum(lengths) * cache_bytes(model)
    return Need(flops_of(terms_of(model), work).forward, weight_bytes([model]) + written)


def decode_need(engine: EveEngine, lengths: Sequence[int]) -> Need:
    """One token for each row of these lengths: decoder and head read, and all keys and values."""
    model = engine.model
    window = sliding_window(model.config)
    seen = [length if window is None else min(length, window) for length in lengths]
    work = Work(
        passes=0,
        tokens=len(lengths),
        pairs=sum(lengths),
        window_pairs=sum(seen),
        labels=len(lengths),
    )
    used = [model.model.language_model, model.lm_head]
    words = model.get_input_embeddings().weight
    table = 0 if words is model.lm_head.weight else words.nbytes  # only a few rows are read
    moved = weight_bytes(used) - table + sum(seen) * cache_bytes(model)
    return Need(flops_of(terms_of(model), work).forward, moved)


def cache_bytes(model: EveForConditionalGeneration) -> int:
    """Bytes of keys and values of one position in all layers."""
    text = model.config.text_config
    size = text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads
    heads = text.to_dict().get("num_key_value_heads") or text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size * model.dtype.itemsize


__all__ = [
    "PREFILL",
    "WatchedReply",
    "answer_case",
    "cache_bytes",
    "decode_need",
    "embedding_case",
    "embedding_cases",
    "forward_case",
    "in_parts",
    "parts_needed",
    "prefill_need",
    "preprocessing_cases",
    "square_cases",
]
