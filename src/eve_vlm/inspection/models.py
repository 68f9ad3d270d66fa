"""Reads a model folder, a Hub id or a configuration file into facts, ours or a published EVE one.

Configuration and processor come from the package's own loading, weights from the headers of their
files.  Easy to get wrong: a Hub id is never downloaded for its weights; where they are not on this
machine, counts are by the configuration, which a note says.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME, cached_file

from eve_vlm.checkpoint_files import FILES, WeightEntry, list_weights
from eve_vlm.configuration_eve import EveConfig
from eve_vlm.errors import first_line
from eve_vlm.image_processing_eve import EveImageProcessor
from eve_vlm.inspection.facts import (
    DECODER_SHAPE,
    SPECIAL_IDS,
    ModelFacts,
    TokensFact,
    build_on_meta,
    check_weights,
    context_of,
    flattened,
    part_facts,
    tensor_facts,
    tied_names,
    tokens_facts,
)
from eve_vlm.loading import load_config, load_processor
from eve_vlm.lora_folder import is_lora
from eve_vlm.published_eve import (
    find_preprocessor,
    image_settings,
    is_published,
    published_config_of,
    rename_weight,
)

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# What the library writes into configurations about itself.
BOOKKEEPING = (
    *("_name_or_path", "name_or_path", "architectures", "transformers_version", "loss_type"),
    *("image_processor_type", "processor_class", "return_dict", "output_hidden_states"),
    *("output_attentions", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("id2label", "label2id"),
)


def config_facts(file: Path, sizes: Sequence[tuple[int, int]]) -> ModelFacts:
    """A configuration file alone; the image settings beside it are used where there are any.

    Raises:
        ValueError: if it is no configuration of an EVE model.
    """
    # By its folder where it has its usual name: a published one needs its neighbours.
    config, notes = load_config(file.parent if file.name == CONFIG_NAME else file), []
    settings = json.loads(file.read_text(encoding="utf-8"))
    published, pictures = is_published(settings), None
    if published:
        pictures = EveImageProcessor(**image_settings(find_preprocessor(settings, file.parent)))
    elif any((file.parent / name).is_file() for name in PROCESSOR_FILES):
        pictures = EveImageProcessor.from_pretrained(file.parent)
    else:
        notes.append("No image settings lie beside it, so there are no tokens to count.")
    return _facts_of(
        str(file),
        kind="published configuration" if published else "configuration",
        config=config,
        pictures=pictures,
        sizes=sizes,
        notes=notes,
    )


def model_facts(name: str, sizes: Sequence[tuple[int, int]]) -> ModelFacts:
    """A model folder or Hub id: configuration, processor, headers of the weights that are here.

    Raises:
        ValueError: if there is no such model, or its weight files are damaged.
    """
    config, notes = load_config(name), []
    entries, dropped = read_model_weights(name)
    if is_lora(Path(name).expanduser()):
        notes.append("It holds LoRA adapters; shown is the model that they make of their base.")
    elif entries is None:
        notes.append("Its weights are not on this machine; counts are by its configuration.")
    elif not any(weight.startswith("aligner.") for weight in entries):
        config.alignment_config = None  # settings of a training that this copy left behind
    pictures, template = None, None
    try:
        processor = load_processor(name)
        pictures, template = processor.image_processor, processor.chat_template
    except ValueError as error:
        notes.append(first_line(error) + ".")
    return _facts_of(
        name,
        kind="model" if published_config_of(_folder_of(name)) is None else "published checkpoint",
        config=config,
        pictures=pictures,
        template=template,
        entries=entries,
        dropped=dropped,
        sizes=sizes,
        notes=notes,
    )


def _folder_of(name: str) -> Path:
    """A folder as it is, or that of a Hub id which was looked at before."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    return Path(cached_file(name, CONFIG_NAME, local_files_only=True)).parent


def read_model_weights(name: str) -> tuple[dict[str, WeightEntry] | None, list[str]]:
    """Stored weights by our names, and the names that stay behind; None without weight files.

    Of a Hub id only what was downloaded before is looked at.
    """
    folder = _folder_of(name)
    if not any((folder / file).is_file() for pair in FILES for file in pair):
        return None, []
    published = published_config_of(folder) is not None
    entries, dropped = {}, []
    for stored, entry in list_weights(folder).items():
        ours = rename_weight(stored) if published else stored
        if ours is None:
            dropped.append(stored)
        else:
            entries[ours] = entry
    return entries, dropped


def _facts_of(
    source: str,
    *,
    kind: str,
    config: EveConfig,
    pictures: EveImageProcessor | None,
    sizes: Sequence[tuple[int, int]],
    notes: Sequence[str],
    template: str | None = None,
    entries: dict[str, WeightEntry] | None = None,
    dropped: Sequence[str] = (),
) -> ModelFacts:
    model = build_on_meta(config)
    text = config.text_config.to_dict()
    dtype = config.dtype or config.text_config.dtype or torch.float32
    tensors = tensor_facts(model, dtype=dtype, entries=entries)
    seen: tuple[TokensFact, ...] = ()
    if pictures is not None:
        context = context_of(config)
        seen = tokens_facts(sizes, pictures=pictures, settings=source, context=context)
    alignment = config.alignment_config
    special = {name: text.get(name) for name in SPECIAL_IDS}
    return ModelFacts(
        source=source,
        kind=kind,
        decoder={"model_type": config.text_config.model_type}
        | {key: text[key] for key in DECODER_SHAPE if text.get(key) is not None},
        vision=_own_settings(config.vision_config.to_dict()),
        alignment=None if alignment is None else _own_settings(alignment.to_dict()),
        parts=part_facts(model, tensors),
        tied=tied_names(model),
        tensors=tensors,
        weights=None if entries is None else check_weights(model, entries, left_out=dropped),
        special_ids={"image_token_id": config.image_token_id, **special},
        chat_template=template,
        images=None if pictures is None else _own_settings(pictures.to_dict()),
        tokens=seen,
        settings=flattened(_own_settings(config.to_dict())),
        notes=tuple(notes),
    )


def _own_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Without bookkeeping at any level."""
    return {
        key: _own_settings(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in BOOKKEEPING
    }


__all__ = ["config_facts", "model_facts", "read_model_weights"]
