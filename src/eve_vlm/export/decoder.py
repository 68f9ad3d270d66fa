"""The decoder alone: as an ordinary language model folder, and as GGUF for llama.cpp.

llama.cpp's own converter makes the decoder's file; it knows what each decoder needs.  The patch
embedding goes into a second GGUF file with every setting that computing it takes.  Easy to get
wrong: the image placeholder may have a token but no row in the embedding; such a token is left out
of the decoder's tokenizer, because a converter refuses ids beyond the vocabulary.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from eve_vlm.configuration_eve import EveConfig, EveVisionConfig
from eve_vlm.image_processing_eve import EveImageProcessorKwargs
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.processing_eve import EveProcessor

CONVERTER = "convert_hf_to_gguf.py"
ENVIRONMENT = "LLAMA_CPP"
# The name of the side file's architecture: no program knows it, so none takes it for a vision
# encoder and divides by its number of layers (JamePeng/llama-cpp-python#135).
ARCHITECTURE = "eve-patch-embedding"
OUTTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def require_converter(llama_cpp: str | Path | None) -> Path:
    """The converter's file in a llama.cpp folder; without one, in that of `LLAMA_CPP`.

    Raises:
        ValueError: if it is not there.
    """
    folder = llama_cpp or os.environ.get(ENVIRONMENT)
    if not folder:
        raise ValueError(
            f"GGUF needs llama.cpp's {CONVERTER}; name a llama.cpp folder with --llama-cpp or in "
            f"{ENVIRONMENT}."
        )
    file = Path(folder) / CONVERTER
    if not file.is_file():
        raise ValueError(f"{folder} holds no {CONVERTER}; name a folder with llama.cpp's source.")
    return file.resolve()


def decoder_of(model: EveForConditionalGeneration) -> PreTrainedModel:
    """The decoder with its head as a causal language model that shares the model's weights."""
    settings = copy.deepcopy(model.config.text_config)
    settings.dtype = model.dtype
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(settings)
    decoder.base_model.load_state_dict(model.model.language_model.state_dict(), assign=True)
    decoder.get_output_embeddings().load_state_dict(model.lm_head.state_dict(), assign=True)
    decoder.tie_weights()
    decoder.generation_config = copy.deepcopy(model.generation_config)
    return decoder


def write_decoder(
    model: EveForConditionalGeneration,
    processor: EveProcessor,
    folder: Path,
    *,
    shard_size: str = "4GB",
) -> list[str]:
    """Writes the decoder, its tokenizer and the chat template as a language model folder.

    Every row of the embedding stays, that of the image placeholder too, so that all ids mean what
    they meant; tokens without a row are taken out of the tokenizer.

    Returns:
        A sentence for each token taken out.
    """
    decoder_of(model).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(folder)
    return _cut_tokens(folder, model.config.text_config.vocab_size)


def _cut_tokens(folder: Path, rows: int) -> list[str]:
    """Takes added tokens with an id of `rows` or more out of a saved tokenizer."""
    file = folder / "tokenizer.json"
    if not file.is_file():  # a tokenizer of another kind, which names no ids here
        return []
    saved = json.loads(file.read_text(encoding="utf-8"))
    cut = [token["content"] for token in saved["added_tokens"] if token["id"] >= rows]
    if not cut:
        return []
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["id"] < rows]
    file.write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(_without(saved, cut), indent=2, ensure_ascii=False), "utf-8")
    return [f"The token {token} has no row in the embedding and was left out." for token in cut]


def _without(setting: Any, cut: list[str]) -> Any:
    """A tokenizer's settings without those whose value is one of the tokens."""
    if isinstance(setting, dict):
        return {
            name: _without(value, cut)
            for name, value in setting.items()
            if not (isinstance(value, str) and value in cut)
            and not (isinstance(value, dict) and value.get("content") in cut)
        }
    if isinstance(setting, list):
        return [_without(value, cut) for value in setting if value not in cut]
    return setting


def write_gguf(
    model: EveForConditionalGeneration,
    processor: EveProcessor,
    folder: Path,
    *,
    converter: Path,
    source: Path,
    name: str,
) -> list[str]:
    """Writes `decoder.gguf` by llama.cpp's converter, and `patch_embedding.gguf`.

    Args:
        source: the model's folder; its `tokenizer.model`, where there is one, is what the converter
            reads for Llama tokenizers.
        name: what the file says that it is.

    Raises:
        ValueError: if the converter refuses, with the last line that it wrote.
    """
    write_patch_embedding(model, processor, folder / "patch_embedding.gguf")
    plain = folder / ".decoder" / name  # the converter takes names from its folder's
    plain.mkdir(parents=True)
    notes = write_decoder(model, processor, plain)
    if (source / "tokenizer.model").is_file():
        shutil.copyfile(source / "tokenizer.model", plain / "tokenizer.model")
    _convert(converter, plain, folder / "decoder.gguf", OUTTYPES[model.dtype])
    shutil.rmtree(folder / ".decoder")
    return [
        *notes,
        "decoder.gguf answers text in llama.cpp; no program reads patch_embedding.gguf yet.",
    ]


def _convert(converter: Path, plain: Path, out: Path, outtype: str) -> None:
    """Runs the converter with this Python, and shows its tensors as they pass."""
    command = [sys.executable, str(converter), str(plain), "--outfile", str(out)]
    layers = json.loads((plain / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    said: list[str] = []
    with (
        subprocess.Popen(
            [*command, "--outtype", outtype],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
        tqdm(desc="converting the decoder", unit="layer", total=layers) as bar,
    ):
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip():
                said.append(line.strip())
            bar.update("attn_output.weight" in line)
    if process.returncode or not out.is_file():
        last = said[-1] if said else f"exit code {process.returncode}"
        raise ValueError(
            f"llama.cpp's converter did not take the decoder ({last.rstrip('.')}); the plain "
            "decoder folder is --format decoder."
        )


def write_patch_embedding(
    model: EveForConditionalGeneration, processor: EveProcessor, file: Path
) -> None:
    """Writes patch embedding and projector as GGUF, always in float32.

    GGUF rather than safetensors, because it carries typed settings beside the weights, and because
    whoever reads the decoder's file can read this one.  Half precision would overflow here
    (ggml-org/llama.cpp#24146).  Weights have our names without `model.`; `docs/export.md` has the
    settings.
    """
    import gguf

    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    for name, value in patch_embedding_settings(model, processor):
        _add(writer, name, value)
    parts = {
        "vision_tower": model.model.vision_tower,
        "multi_modal_projector": model.model.multi_modal_projector,
    }
    for part, module in parts.items():
        for name, weight in module.state_dict().items():
            # A copy, because the writer holds on to the array until it writes.
            writer.add_tensor(f"{part}.{name}", weight.detach().cpu().float().numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def patch_embedding_settings(
    model: EveForConditionalGeneration, processor: EveProcessor
) -> Iterator[tuple[str, Any]]:
    """Names and values that computing picture tokens takes, beside the weights.

    The names are our own settings' names, so that a new setting is carried along.
    """
    from eve_vlm import __version__

    yield "general.name", f"EVE patch embedding, written by eve-vlm {__version__}"
    yield "eve.image_token", processor.image_token
    for name in EveConfig.__annotations__:  # the placeholder's id, and how deep the projector is
        if not name.endswith("_config"):
            yield f"eve.{name}", model.config.to_dict()[name]
    yield "eve.decoder.hidden_size", model.config.text_config.hidden_size
    for name in EveVisionConfig.__annotations__:
        yield f"eve.vision.{name}", model.config.vision_config.to_dict().get(name)
    pictures = processor.image_processor.to_dict()
    for name in EveImageProcessorKwargs.__annotations__:  # the library's settings and ours
        value = pictures.get(name)
        if isinstance(value, dict):
            for part, number in value.items():
                yield f"eve.picture.{name}.{part}", number
        else:
            yield f"eve.picture.{name}", value


def _add(writer: Any, name: str, value: Any) -> None:
    """Adds a setting in its own type; numbers with a point as float64, which is what they are."""
    import gguf

    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_int32(name, int(value))
    elif isinstance(value, float):
        writer.add_float64(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        # `add_array` would round numbers with a point to float32.
        kinds = {float: gguf.GGUFValueType.FLOAT64, int: gguf.GGUFValueType.INT32}
        kind = kinds[type(value[0])]
        writer.add_key_value(name, list(value), gguf.GGUFValueType.ARRAY, sub_type=kind)


__all__ = [
    "decoder_of",
    "patch_embedding_settings",
    "require_converter",
    "write_decoder",
    "write_gguf",
    "write_patch_embedding",
]
