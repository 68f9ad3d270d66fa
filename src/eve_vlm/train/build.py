"""What a run is made of: records, processor, model, teacher; `run.py` puts them to work.

Easy to get wrong: where a stage starts from a saved model, that model's own settings count, and
what the recipe says of it must agree.
"""

import logging
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from eve_vlm import record_attention
from eve_vlm.alignment_eve import EveForPreTraining
from eve_vlm.configuration_eve import EveAlignmentConfig, EveConfig, EveVisionConfig
from eve_vlm.data.records import Record, parts_of
from eve_vlm.data.sources import Mixture, build_mixture, read_quarantine
from eve_vlm.data.sources.streams import StreamMixture, build_stream
from eve_vlm.data.tokenizer import train_tokenizer
from eve_vlm.decoders.joining import pad_with_something, put_decoder, settle_generation
from eve_vlm.decoders.loading import load_decoder, load_decoder_tokenizer, read_decoder_config
from eve_vlm.decoders.text import add_placeholder, chat_template_of
from eve_vlm.encoder_twin_eve import EveEncoderConfig, encoder_config, put_encoder
from eve_vlm.image_processing_eve import EveImageProcessor
from eve_vlm.layer_taps_eve import layers_of
from eve_vlm.loading import load_config, load_model, load_processor, require_model_folder
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.processing_eve import EveProcessor
from eve_vlm.train.lora import base_settings
from eve_vlm.train.sections import Recipe
from eve_vlm.train.teacher import FrozenTeacher

logger = logging.getLogger(__name__)

MOST_CELLS = 128  # along the teacher's canvas: 16,384 cells; published are 24
TOKENIZER_SAMPLE = 4096  # records whose words a new tokenizer is learnt from


def build_processor(recipe: Recipe, records: Mixture | StreamMixture) -> EveProcessor:
    """The processor of the start, with the recipe's picture sizes; or a new one."""
    image = recipe.model.image
    if recipe.model.init_from is not None:
        folder = require_model_folder(recipe.model.init_from)
        return load_processor(
            folder, longest_edge=image.longest_edge, size_multiple=image.size_multiple
        )
    name = recipe.model.tokenizer or recipe.model.decoder
    if name is not None:
        # A tokenizer of the recipe's own may be made for more words than the decoder has.
        of = recipe.model.decoder
        rows = None if of is None else read_decoder_config(of).vocab_size
        tokenizer = load_decoder_tokenizer(name)
        image_token = add_placeholder(tokenizer, rows=rows).token
        pad_with_something(tokenizer)
        given = None if tokenizer.chat_template else "vicuna"
        template = chat_template_of(tokenizer, name=name, given=given, image_token=image_token)
    else:
        if isinstance(records, StreamMixture):
            raise ValueError(
                "A new tokenizer is learnt from counted records, but data.sources are streams; "
                "give model.tokenizer."
            )
        step = max(len(records) // TOKENIZER_SAMPLE, 1)
        words = (_words(records[index]) for index in range(0, len(records), step))
        vocab_size = (recipe.model.text_config or {}).get("vocab_size", 2048)
        tokenizer = train_tokenizer(words, vocab_size=vocab_size)
        template, image_token = tokenizer.chat_template, "<image>"
    pictures = EveImageProcessor(**picture_settings(recipe))
    return EveProcessor(pictures, tokenizer, chat_template=template, image_token=image_token)


def build_model(
    recipe: Recipe, processor: EveProcessor, teacher_width: int | None
) -> EveForConditionalGeneration:
    """The model of an earlier stage, a decoder with a new patch embedding, or a new one."""
    section = recipe.model
    dtype = getattr(torch, section.dtype)
    encoded = False
    if section.init_from is not None:
        config = load_config(section.init_from)
        decoder_config(recipe)  # says if the recipe's text_config does not agree
        _check_vision(recipe, config)
        encoded = isinstance(config.vision_config, EveEncoderConfig)
        config.alignment_config = _alignment_config(recipe, teacher_width)
        model = load_model(
            section.init_from,
            config=config,
            dtype=dtype,
            attn_implementation=attention_of(recipe),
            new=[r"aligner\."],
            **base_settings(recipe),
        )
    elif section.decoder is not None:
        decoder_config(recipe)  # says if the recipe's text_config does not agree
        model = put_decoder(
            load_decoder(
                section.decoder, dtype=dtype, attn_implementation=attention_of(recipe)
            ).model,
            processor,
            vision=EveVisionConfig(**asdict(section.vision)),
            alignment=_alignment_config(recipe, teacher_width),
            # The recipe states the decoder's shape, and the published models keep it too.
            grow=False,
        )
        for note in settle_generation(model, processor):
            logger.warning("%s: %s", section.decoder, note)
    else:
        text_config = decoder_config(recipe)
        text_config.setdefault("vocab_size", len(processor.tokenizer))
        model = new_model(
            recipe,
            text_config,
            image_token_id=processor.image_token_id,
            teacher_width=teacher_width,
        ).to(dtype)
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    if isinstance(model, EveForPreTraining) and recipe.stage.alignment is not None:
        model.alignment_weight = recipe.stage.alignment.weight
    if section.encoder is not None and not encoded:
        if recipe.lora is not None:
            raise ValueError(
                f"lora adapts a saved model, but {section.init_from} has no encoder yet; train a "
                "stage with model.encoder and without lora first, and start from that."
            )
        pictures = processor.image_processor
        colours = {"image_mean": tuple(pictures.image_mean), "image_std": tuple(pictures.image_std)}
        put_encoder(
            model, section.encoder.name, section.encoder.layer, **_packed(recipe), **colours
        )
    model.loss_implementation = section.loss_implementation
    if section.compile_layers and not section.record_layers:  # which compiles what it records
        for layer in layers_of(model.model.language_model):
            layer.compile(dynamic=True)  # in place, so names of weights stay; rows differ in length
    return model


def attention_of(recipe: Recipe) -> str:
    """The decoder's attention: the recipe's, but `sdpa` goes record by record in packed rows."""
    named = recipe.model.attn_implementation
    packed = recipe.data.packing is not None
    return record_attention.NAME if packed and named == "sdpa" else named


def new_model(
    recipe: Recipe, text_config: dict, *, image_token_id: int, teacher_width: int | None
) -> EveForConditionalGeneration:
    """A model with new weights, an encoder's too; of the training class where the stage aligns."""
    encoder = recipe.model.encoder
    vision: PreTrainedConfig = EveVisionConfig(**asdict(recipe.model.vision))
    if encoder is not None:
        vision = encoder_config(encoder.name, encoder.layer, **_packed(recipe))
    config = EveConfig(
        text_config=text_config,
        vision_config=vision,
        alignment_config=_alignment_config(recipe, teacher_width),
        image_token_id=image_token_id,
        projector_depth=_projector_depth(recipe),
    )
    cls = EveForConditionalGeneration if config.alignment_config is None else EveForPreTraining
    return cls._from_config(config, attn_implementation=attention_of(recipe))


def _projector_depth(recipe: Recipe) -> int:
    """That of the start where there is one, else the published one."""
    start = recipe.model.init_from
    if start is None or not (Path(start) / "config.json").is_file():
        return EveConfig.projector_depth
    return load_config(start).projector_depth


def decoder_config(recipe: Recipe, *, start: bool = True) -> dict:
    """Settings of the decoder: those of the start, which `model.text_config` must agree with.

    Without a readable start (`start=False`, for a dry run) `model.text_config` alone is taken.
    """
    section = recipe.model
    expected = dict(section.text_config or {})
    found: dict = {}
    if start and section.decoder is not None:
        found = read_decoder_config(section.decoder).to_dict()
    elif start and section.init_from is not None:
        folder = require_model_folder(section.init_from)
        found = load_config(folder).text_config.to_dict()
    elif not expected:
        raise ValueError(
            f"{section.init_from or section.decoder} is not at hand and model.text_config does not "
            "say its shape; run the stage before first, or add model.text_config."
        )
    for name, value in expected.items():
        if name in found and found[name] != value:
            raise ValueError(
                f"model.text_config.{name} is {value} in the recipe but {found[name]} in "
                f"{section.init_from or section.decoder}; make the two agree."
            )
    return expected | found


def _alignment_config(recipe: Recipe, teacher_width: int | None) -> EveAlignmentConfig | None:
    if recipe.stage.alignment is None:
        return None
    vision, image = recipe.model.vision, recipe.model.image
    return EveAlignmentConfig(
        teacher_hidden_size=teacher_width,
        tap_every=recipe.stage.alignment.tap_every,
        num_attention_heads=vision.num_attention_heads,
        pool_size=image.size_multiple // (vision.patch_size * vision.merge_size),
    )


def _packed(recipe: Recipe) -> dict:
    """The part of `model.vision` that says how patches are packed, which an encoder shares."""
    vision = recipe.model.vision
    return {"patch_size": vision.patch_size, "merge_size": vision.merge_size}


def _check_vision(recipe: Recipe, config: EveConfig) -> None:
    vision, encoder = config.vision_config, recipe.model.encoder
    sizes = asdict(recipe.model.vision)
    if isinstance(vision, EveEncoderConfig):
        sizes = _packed(recipe)
        if encoder is None or (encoder.name, encoder.layer) != (vision.encoder_name, vision.layer):
            said = "null" if encoder is None else f"{encoder.name}, layer {encoder.layer}"
            raise ValueError(
                f"model.encoder is {said} in the recipe but {vision.encoder_name}, layer "
                f"{vision.layer}, in {recipe.model.init_from}; "
                "make the recipe agree with the model that it starts from."
            )
    for name, wanted in sizes.items():
        found = getattr(vision, name)
        if wanted != found:
            raise ValueError(
                f"model.vision.{name} is {wanted} in the recipe but {found} in "
                f"{recipe.model.init_from}; "
                "make the recipe agree with the model that it starts from."
            )


def build_records(recipe: Recipe) -> Mixture | StreamMixture:
    """All sources of the recipe as one; streams where any is one."""
    data = recipe.data
    if any(source.streaming for source in data.sources):
        listed = None if data.quarantine is None else read_quarantine(data.quarantine)
        return build_stream(data.sources, quarantine=listed)
    return build_mixture(recipe.data.sources, seed=recipe.seed, quarantine=recipe.data.quarantine)


def build_teacher(recipe: Recipe) -> FrozenTeacher | None:
    """The frozen teacher, or None where the stage does not align."""
    alignment = recipe.stage.alignment
    if alignment is None:
        return None
    cells = _cells(recipe)
    if cells > MOST_CELLS:
        raise ValueError(
            f"The teacher would look at {cells} x {cells} cells (model.image.longest_edge / "
            f"size_multiple), which is beyond {MOST_CELLS}; give a smaller longest_edge."
        )
    return FrozenTeacher.from_pretrained(alignment.teacher, cells=cells, layer=alignment.layer)


def teacher_width_or_usual(recipe: Recipe) -> int | None:
    """The teacher's width for a dry run; CLIP-L's 1024 where the teacher cannot be read."""
    try:
        teacher = build_teacher(recipe)
    except ValueError as error:
        logger.warning("%s Its width is taken to be 1024.", error)
        return 1024
    return None if teacher is None else teacher.hidden_size


def _cells(recipe: Recipe) -> int:
    return recipe.model.image.longest_edge // recipe.model.image.size_multiple


def picture_settings(recipe: Recipe) -> dict:
    """What the recipe says to the image processor."""
    vision, image = recipe.model.vision, recipe.model.image
    return {
        "size": {"longest_edge": image.longest_edge},
        "size_multiple": image.size_multiple,
        "patch_size": vision.patch_size,
        "merge_size": vision.merge_size,
    }


def _words(record: Record) -> str:
    """All that is said in a record, in one line: every word with the blank that it will have."""
    texts = [
        part["text"]
        for message in record.messages
        for part in parts_of(message)
        if part["type"] == "text"
    ]
    return " ".join(texts)


__all__ = [
    "build_model",
    "build_processor",
    "build_records",
    "build_teacher",
    "decoder_config",
    "new_model",
    "picture_settings",
    "teacher_width_or_usual",
]
