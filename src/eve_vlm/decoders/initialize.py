"""Makes an encoder-free vision-language model from a language model: `eve init`.

Everything that can be refused is refused before the weights are read, and nothing is written before
the new model has given the decoder's own logits for a text.  Easy to get wrong: a budget of picture
tokens alone allows very long pictures, so the longest edge behind it is thousands of pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from eve_vlm.configuration_eve import EveConfig, EveVisionConfig
from eve_vlm.decoders.joining import end_ids, pad_with_something, put_decoder, settle_generation
from eve_vlm.decoders.loading import load_decoder, load_decoder_tokenizer, read_decoder_config
from eve_vlm.decoders.text import Placeholder, add_placeholder, chat_template_of
from eve_vlm.image_processing_eve import EveImageProcessor, longest_edge_of_budget, num_image_tokens
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.output_folder import new_folder, require_new
from eve_vlm.processing_eve import EveProcessor

LONGEST_EDGE = 672  # pixels, the published start (paper section 4.1)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Initialized:
    """What `initialize` wrote."""

    folder: Path
    """The new model."""
    kind: str
    """The decoder's type, as transformers names it."""
    parameters: dict[str, int]
    """By part; tied weights once."""
    placeholder: Placeholder
    """The id that stands for a token of a picture."""
    square: tuple[int, int, int]
    """Pixels along a side, cells along a side and tokens of a large square picture."""
    notes: tuple[str, ...]
    """Sentences on what is not as it was."""
    next_step: str
    """A command line."""


def initialize(
    llm: str | Path,
    out: str | Path,
    *,
    vision: EveVisionConfig | None = None,
    projector_depth: int = 2,
    longest_edge: int | None = None,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
    chat_template: str | None = None,
) -> Initialized:
    """Writes a new encoder-free model: a decoder as it is, and a fresh patch embedding layer.

    Args:
        llm: a decoder's Hub id, folder or GGUF file.
        out: a new folder.
        vision: sizes of the patch embedding layer; the published ones if None.
        longest_edge, min_image_tokens, max_image_tokens: sizes of pictures (`eve_grid`).
        dtype: of all weights; None keeps the decoder's, and float32 for GGUF.
        seed: of the new weights.
        chat_template: see `chat_template_of`.

    Raises:
        ValueError: in one sentence, for whatever cannot be used or written.
    """
    out = require_new(out)
    vision = vision or EveVisionConfig()
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is unknown; give one of {', '.join(DTYPES)}.")
    pictures = picture_processor(
        vision,
        longest_edge=longest_edge,
        min_image_tokens=min_image_tokens,
        max_image_tokens=max_image_tokens,
    )
    with _progress("reading settings") as bar:
        text_config = read_decoder_config(llm)
        EveConfig(text_config=text_config, projector_depth=projector_depth)  # refuses now
        square = check_room_for_pictures(pictures, text_config, name=str(llm))
        tokenizer = load_decoder_tokenizer(llm, config=text_config)
        # Before the weights are read: a template that is missing is found at once.
        chat_template_of(tokenizer, name=str(llm), given=chat_template, image_token="<image>")
        _step(bar, "reading weights")
        decoder, surplus = load_decoder(
            llm, config=text_config, dtype=getattr(torch, dtype) if dtype else None
        )
        _step(bar, "building")
        processor, placeholder, notes = make_processor(
            tokenizer, pictures, decoder, name=str(llm), chat_template=chat_template
        )
        model = put_decoder(
            decoder, processor, vision=vision, projector_depth=projector_depth, seed=seed
        )
        notes += settle_generation(model, processor)
        if chat_template == "chatml":
            _end_answers_at(model, tokenizer.convert_tokens_to_ids("<|im_end|>"))
        if surplus:
            notes += (
                f"{len(surplus)} weights of the files belong to no decoder: {surplus[0]}, ...",
            )
        _step(bar, "writing")
        with new_folder(out, needed=sum(w.nbytes for w in model.parameters())) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        _step(bar, "done")
    return Initialized(
        folder=out,
        kind=model.config.text_config.model_type,
        parameters=parameters_by_part(model),
        placeholder=placeholder,
        square=square,
        notes=notes,
        next_step=_next_step(out, model.config, longest_edge or square[0]),
    )


def _progress(text: str) -> tqdm:
    """Four steps; on a terminal only (`disable=None`), and gone at the end."""
    return tqdm(total=4, desc=text, leave=False, bar_format="{l_bar}{bar}|", disable=None)


def _step(bar: tqdm, text: str) -> None:
    bar.update()
    bar.set_description(text)


def picture_processor(
    vision: EveVisionConfig,
    *,
    longest_edge: int | None = None,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = None,
) -> EveImageProcessor:
    """The image processor of a patch embedding, for a longest side or a budget of tokens.

    Raises:
        ValueError: if the sizes do not fit each other.
    """
    cell = vision.patch_size * vision.merge_size
    if longest_edge is None and max_image_tokens is not None:
        longest_edge = longest_edge_of_budget(max_image_tokens, size_multiple=cell, cell=cell)
    elif longest_edge is None:
        longest_edge = max(LONGEST_EDGE // cell, 1) * cell
    elif longest_edge < cell or longest_edge % cell:
        below, above = longest_edge // cell * cell or cell, (longest_edge // cell + 1) * cell
        raise ValueError(
            f"--longest-edge {longest_edge} is not a multiple of the {cell} pixels of one token "
            f"(patch size {vision.patch_size} x merge size {vision.merge_size}); "
            f"{' or '.join(str(edge) for edge in sorted({below, above}))} would do."
        )
    budget = {"min_image_tokens": min_image_tokens, "max_image_tokens": max_image_tokens}
    return EveImageProcessor(
        size={"longest_edge": longest_edge},
        size_multiple=cell,
        patch_size=vision.patch_size,
        merge_size=vision.merge_size,
        **{name: value for name, value in budget.items() if value is not None},
    )


def check_room_for_pictures(
    pictures: EveImageProcessor, text_config: PreTrainedConfig, *, name: str
) -> tuple[int, int, int]:
    """Pixels, cells and tokens of the largest square picture, which must fit into a text.

    Raises:
        ValueError: if the decoder does not take as many tokens, or does not say how many it takes.
    """
    grid = pictures.square_grid()
    tokens = num_image_tokens(grid.rows, grid.cols)
    try:
        limit = text_config.max_position_embeddings
    except AttributeError:
        raise ValueError(
            f"{name} does not say how long a text it takes (max_position_embeddings); take another "
            "decoder."
        ) from None
    most = max(tokens, pictures.max_image_tokens or 0)
    if most >= limit:
        raise ValueError(
            f"A picture takes up to {most} tokens but {name} takes {limit} in all; give "
            f"--max-image-tokens {limit // 2} or a smaller --longest-edge."
        )
    return grid.height, grid.rows, tokens


def make_processor(
    tokenizer: PreTrainedTokenizerBase,
    pictures: EveImageProcessor,
    decoder: PreTrainedModel,
    *,
    name: str,
    chat_template: str | None,
) -> tuple[EveProcessor, Placeholder, tuple[str, ...]]:
    """The processor around a decoder's own tokenizer, its placeholder, and what was changed."""
    words = decoder.get_input_embeddings().weight
    taken = end_ids(decoder.generation_config)
    placeholder = add_placeholder(tokenizer, rows=len(words), embedding=words, taken=taken)
    notes = pad_with_something(tokenizer)
    if isinstance(tokenizer.chat_template, dict) and chat_template is None:
        others = sorted(set(tokenizer.chat_template) - {"default"})
        notes += (f"Of its chat templates the default one is kept, without {', '.join(others)}.",)
    template = chat_template_of(
        tokenizer, name=name, given=chat_template, image_token=placeholder.token
    )
    # Read by the tokenizer alone too, which so takes pictures as the processor does.
    tokenizer.chat_template = template
    processor = EveProcessor(
        pictures, tokenizer, chat_template=template, image_token=placeholder.token
    )
    return processor, placeholder, notes


def _end_answers_at(model: EveForConditionalGeneration, id: int) -> None:
    ends = [*end_ids(model.generation_config), id]
    model.generation_config.eos_token_id = list(dict.fromkeys(ends))


def parameters_by_part(model: EveForConditionalGeneration) -> dict[str, int]:
    """Number of parameters by part; a head that is tied to the words counts with the decoder."""
    parts = {
        "patch embedding": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "decoder": model.model.language_model,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return counts | {"language head": model.num_parameters() - sum(counts.values())}


def _next_step(out: Path, config: EveConfig, longest_edge: int) -> str:
    """The first stage on the new model, by the published recipe.

    A budget alone allows very long pictures; on the teacher's square canvas they would cost too
    much, so the recipe's limit is then the side of a large square picture.
    """
    vision, layers = config.vision_config, config.text_config.num_hidden_layers
    sizes = ("patch_size", "merge_size", "hidden_size", "num_attention_heads")
    settings = [
        f"model.init_from={out}",
        "model.decoder=null",
        "model.text_config=null",
        *(f"model.vision.{name}={getattr(vision, name)}" for name in sizes),
        f"model.image.longest_edge={longest_edge}",
        f"model.image.size_multiple={vision.patch_size * vision.merge_size}",
        *(["stage.alignment.tap_every=1"] if layers < 4 else []),  # the recipe's 4 needs 4 layers
    ]
    return "eve train eve_7b/1_prealign " + " ".join(settings)


__all__ = [
    "Initialized",
    "check_room_for_pictures",
    "initialize",
    "make_processor",
    "parameters_by_part",
    "picture_processor",
]
