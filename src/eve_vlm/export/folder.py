"""Exports a model: a folder that others can use, with or without this package.

Three formats: the whole model as a transformers folder that brings its own code, the decoder alone
as an ordinary language model, and the decoder as GGUF with the patch embedding as a side file
(`decoder.py`).  Easy to get wrong: the library notes a class's code in a folder by a mark on
the class, so the marks are taken off again, or every later `save_pretrained` would copy code too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from eve_vlm.configuration_eve import EveConfig
from eve_vlm.encoder_twin_eve import EveEncoderConfig
from eve_vlm.export.decoder import require_converter, write_decoder, write_gguf
from eve_vlm.export.merge_lora import merge_lora
from eve_vlm.image_processing_eve import EveImageProcessor
from eve_vlm.loading import find_model, load_config, load_model, load_processor
from eve_vlm.lora_folder import check_base, require_adapter
from eve_vlm.modeling_eve import EveForConditionalGeneration, EveModel
from eve_vlm.output_folder import new_folder, require_new
from eve_vlm.processing_eve import EveProcessor

FORMATS = ("transformers", "decoder", "gguf")
DTYPES = ("float32", "bfloat16", "float16")
# Which class each Auto class finds in the folder's code.
AUTO_CLASSES: dict[str, type] = {
    "AutoConfig": EveConfig,
    "AutoModel": EveModel,
    "AutoModelForImageTextToText": EveForConditionalGeneration,
    "AutoProcessor": EveProcessor,
    "AutoImageProcessor": EveImageProcessor,
}


class Exported(NamedTuple):
    """What an export wrote."""

    folder: Path
    parameters: int
    bytes: int
    notes: tuple[str, ...]
    """Sentences: what the adapter brought, what stayed behind."""


def export(
    name_or_folder: str | Path,
    out: str | Path,
    *,
    format: str = "transformers",
    lora: str | Path | None = None,
    any_base: bool = False,
    dtype: str | None = None,
    shard_size: str = "4GB",
    llama_cpp: str | Path | None = None,
) -> Exported:
    """Writes a model for others.

    Args:
        name_or_folder: a model folder, or a checkpoint that `eve_vlm.load` knows by name.
        out: a new folder; it appears when everything is in it.
        format: one of `FORMATS`.
        lora: a PEFT LoRA adapter folder to merge.
        any_base: merge it although it names another model.
        dtype: one of `DTYPES` for the weights written; None keeps the model's own.
        shard_size: largest weight file, such as "4GB".
        llama_cpp: for "gguf", a folder with llama.cpp's `convert_hf_to_gguf.py`.

    Raises:
        ValueError: for anything that a user can mend; nothing is left behind then.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; choose one of {', '.join(FORMATS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    _check_size(shard_size)
    # All that can be refused is refused before a large model is read.
    require_new(out)
    converter = require_converter(llama_cpp) if format == "gguf" else None
    if lora is not None:
        require_adapter(lora)
        if not any_base:
            check_base(lora, name_or_folder)
    folder = find_model(name_or_folder)
    if format != "decoder" and isinstance(load_config(folder).vision_config, EveEncoderConfig):
        raise ValueError(
            f"{name_or_folder} is an encoder-based twin, whose encoder the format {format} does "
            "not hold; its folder loads wherever eve-vlm is installed, or take the format decoder."
        )
    processor = load_processor(folder)
    model = load_model(folder)
    notes = []
    if model.config.alignment_config is not None:
        model.config.alignment_config = None
        notes.append("The aligner, which only training needs, stays behind.")
    if lora is not None:
        model, said = merge_lora(model, lora, base=name_or_folder, any_base=any_base)
        notes += said
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    _forget_places(model)
    name = Path(name_or_folder).absolute().name
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    # GGUF needs the decoder twice for a while: as the converter's input and as its output.
    with new_folder(out, needed=2 * size if format == "gguf" else size) as place:
        if format == "transformers":
            write_transformers(model, processor, place, shard_size=shard_size)
        elif format == "decoder":
            notes += write_decoder(model, processor, place, shard_size=shard_size)
        else:
            assert converter is not None
            notes += write_gguf(
                model, processor, place, converter=converter, source=folder, name=name
            )
        _write_card(place, name, model, processor, format)
    files = [file for file in Path(out).rglob("*") if file.is_file()]
    return Exported(
        Path(out), model.num_parameters(), sum(f.stat().st_size for f in files), tuple(notes)
    )


def write_transformers(
    model: EveForConditionalGeneration,
    processor: EveProcessor,
    folder: Path,
    *,
    shard_size: str = "4GB",
) -> None:
    """Writes weights, settings, processor and code into a folder.

    It loads without remote code where this package is installed, and with `trust_remote_code=True`
    where it is not.  The code is copied by the library, which follows the files' own imports.
    """
    model.config.auto_map = {
        auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"
        for auto, cls in AUTO_CLASSES.items()
    }
    with _bring_code():
        # In our own layout: a published checkpoint would be written back as it was read.
        model.save_pretrained(folder, max_shard_size=shard_size, save_original_format=False)
        processor.save_pretrained(folder)


def _forget_places(model: EveForConditionalGeneration) -> None:
    """Takes out where the parts were read from: folders of one machine mean nothing elsewhere."""
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._name_or_path = ""


@contextmanager
def _bring_code() -> Iterator[None]:
    """While it lasts, `save_pretrained` copies the files of the model's classes."""
    marked = {auto: cls for auto, cls in AUTO_CLASSES.items() if auto != "AutoModel"}
    for auto, cls in marked.items():
        cls.register_for_auto_class(auto)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for cls in marked.values():
            del cls._auto_class  # type: ignore[attr-defined]  # the library's None is below


def _check_size(text: str) -> None:
    number = text.upper().removesuffix("B").rstrip("KMGI")
    if not number.isdigit() or int(number) == 0 or text.upper()[-1] != "B":
        raise ValueError(f"shard size {text!r} is no size; write it like 500MB or 4GB.")


CARD = """\
---
# license: say which; the licence of the language model and of the training data count too
library_name: transformers
pipeline_tag: {pipeline}
tags: [eve, encoder-free]
---

# {name}

{what}

| | |
|---|---|
{rows}

{how}
"""
WHAT = {
    "transformers": "A vision-language model without a vision encoder "
    "([EVE](https://arxiv.org/abs/2406.11832)).",
    "decoder": "The language model inside an encoder-free vision-language model "
    "([EVE](https://arxiv.org/abs/2406.11832)). It reads text only.",
    "gguf": "`decoder.gguf` is the language model inside an encoder-free vision-language model "
    "([EVE](https://arxiv.org/abs/2406.11832)), for llama.cpp: text only. `patch_embedding.gguf` "
    "holds the weights that turn pictures into its tokens, and every setting needed to compute "
    "them; a runtime for pictures must read it.",
}
HOW = {
    "transformers": """\
```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="{name}", trust_remote_code=True)
```

The Python files in this folder are those of eve-vlm {version} (Apache-2.0). Where eve-vlm is
installed and imported they are not needed, and neither is `trust_remote_code`.""",
    "decoder": """\
```python
from transformers import pipeline

pipe = pipeline("text-generation", model="{name}")
```""",
    "gguf": "Written by eve-vlm {version} with llama.cpp's `convert_hf_to_gguf.py`.",
}


def _write_card(
    folder: Path,
    source: str,
    model: EveForConditionalGeneration,
    processor: EveProcessor,
    format: str,
) -> None:
    """A README of facts; the licence is the user's to say."""
    from eve_vlm import __version__

    config, pictures = model.config, processor.image_processor
    text, vision = config.text_config, config.vision_config
    facts = {
        "made from": source,
        "parameters": f"{model.num_parameters():,}",
        "weights": str(model.dtype).removeprefix("torch."),
        "language model": f"{text.model_type}, {text.num_hidden_layers} layers, width "
        f"{text.hidden_size}, {text.vocab_size:,} words",
        "pictures": f"patches of {vision.patch_size} pixels, {vision.merge_size} x "
        f"{vision.merge_size} of them one token of width {vision.hidden_size}; settings of the "
        f"picture size {dict(pictures.size)}",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    pipeline = "image-text-to-text" if format == "transformers" else "text-generation"
    how = HOW[format].format(name=source, version=__version__)
    card = CARD.format(pipeline=pipeline, name=source, what=WHAT[format], rows=rows, how=how)
    (folder / "README.md").write_text(card, encoding="utf-8")


__all__ = ["DTYPES", "FORMATS", "Exported", "export", "write_transformers"]
