"""What lmms-eval asks, in our words: its messages as conversations, its `gen_kwargs` as settings.

The tasks of lmms-eval were written for many models, and each ignores what it does not know.  Here
every setting is honoured or refused in a sentence that says how to override it.  Easy to get wrong:
`do_sample: false` beside a temperature means the likeliest token, and such tasks exist; its own
models draw tokens there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from eve_vlm.serve.engine import Messages, Sampling, user_message

from .benchmarks.frames import video_frames

AUDIO = (".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus")
PICTURE = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
# What says nothing to a model that keeps the shape of a picture and draws from all tokens.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "image_aspect_ratio": (None, "original"),
    "repetition_penalty": (None, 1),
    "length_penalty": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "skip_special_tokens": (None, True),
    "use_cache": (None, True),
}
WINDOW = ("start_time", "end_time", "video_start", "video_end")  # seconds of a video
DTYPES = ("auto", "float32", "bfloat16", "float16")
STOPS = ("until", "stop", "stop_sequences")


class Settings(NamedTuple):
    """How a request is answered."""

    sampling: Sampling
    num_beams: int = 1


class UnsupportedError(ValueError):
    """A task asks for what this model cannot do at all; no request of it can be answered."""


def check_arguments(
    pretrained: str, dtype: str, batch_size: str, unknown: Mapping[str, Any]
) -> None:
    """Looks at the arguments of the model.

    Raises:
        ValueError: for one that is not known or not possible.
    """
    if unknown:
        raise ValueError(
            f"The model argument {next(iter(unknown))} is not known; known are pretrained, device, "
            "dtype, batch_size, max_image_tokens, quantize, attn_implementation, max_frames and "
            "max_new_tokens."
        )
    if not pretrained:
        raise ValueError(
            "No model is named; give a folder or Hub id with --model_args pretrained=NAME."
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    if not batch_size.isdecimal() or int(batch_size) < 1:
        raise ValueError(f"batch_size is {batch_size!r}; give a number of at least 1.")


def settings_of(
    given: Mapping[str, Any], *, max_new_tokens: int, max_image_tokens: int | None
) -> Settings:
    """Settings from the `gen_kwargs` of a task.

    Args:
        max_new_tokens: where the task says nothing.

    Raises:
        ValueError: for a setting that is not known, not possible, or out of its range.
    """
    left = dict(given)
    for name, values in NEUTRAL.items():
        if (value := left.pop(name, None)) not in values:
            raise ValueError(
                f"The setting {name} is {value!r}, which this model does not do; run with "
                f"--gen_kwargs {name}={values[-1]} to leave it out."
            )
    stops = [stop for name in STOPS for stop in _texts(left.pop(name, None))]
    temperature, do_sample = left.pop("temperature", None), left.pop("do_sample", None)
    if do_sample is None:
        do_sample = bool(temperature)
    if do_sample and temperature == 0:
        raise ValueError(
            "The setting do_sample is true but temperature is 0; run with --gen_kwargs "
            "do_sample=False, or a temperature above 0."
        )
    num_beams = left.pop("num_beams", None) or 1
    if num_beams > 1 and do_sample:
        raise ValueError(
            f"The setting num_beams is {num_beams} but tokens are drawn; run with --gen_kwargs "
            "num_beams=1, or do_sample=False."
        )
    top_p, top_k = left.pop("top_p", None), left.pop("top_k", None)
    longest, seed = left.pop("max_new_tokens", None), left.pop("seed", None)
    if left:
        raise ValueError(
            f"The setting {next(iter(left))} is not known here; known are max_new_tokens, "
            f"temperature, do_sample, top_p, top_k, num_beams, seed, {', '.join(STOPS)}."
        )
    if do_sample:
        drawing = {
            "temperature": 1.0 if temperature is None else float(temperature),
            # 0 leaves the likeliest token alone, as a share too small for a second one does.
            "top_p": 1.0 if top_p is None else max(float(top_p), 1e-6),
            "top_k": int(top_k or 0),
            "seed": seed,
        }
    else:
        drawing = {}  # there is nothing to draw from
    sampling = Sampling(
        max_new_tokens=max_new_tokens if longest is None else int(longest),
        max_image_tokens=max_image_tokens,
        stop=tuple(dict.fromkeys(stops)),
        **drawing,
    )
    return Settings(sampling, num_beams)


def _texts(given: str | Sequence[str] | None) -> list[str]:
    """Stop texts; an empty one stops nothing."""
    texts = [given] if isinstance(given, str) else list(given or ())
    return [text for text in texts if text]


def conversation_of(messages: Sequence[Mapping[str, Any]], *, max_frames: int) -> Messages:
    """The harness's messages as Hugging Face's; videos become pictures.

    Raises:
        UnsupportedError: for a part that is neither text, picture nor video.
        ValueError: if a video cannot be read.
    """
    conversation: Messages = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts = [part for one in content for part in _parts(one, max_frames)]
        words = [part["text"] for part in parts if part["type"] == "text"]
        if message["role"] == "user" and len(words) == 1 and "<image>" in words[0]:
            # Marks in the words say where the pictures go.
            pictures = [part["image"] for part in parts if part["type"] == "image"]
            conversation += user_message(words[0], pictures)
        else:
            conversation.append({"role": message["role"], "content": parts})
    return conversation


def turn_of(visuals: Sequence[Any] | None, text: str) -> list[dict[str, Any]]:
    """One user turn in the harness's form: what there is to see, then the words."""
    parts = [_as_part(one) for one in visuals or ()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _as_part(visual: Any) -> dict[str, Any]:
    """A thing to see, as tasks name it: a picture, a file, or a file with its kind."""
    if isinstance(visual, Image.Image):
        return {"type": "image", "url": visual}
    if isinstance(visual, Mapping):
        return {"type": visual.get("type", "video"), "url": visual}
    ending = Path(str(visual)).suffix.lower()
    kind = "image" if ending in PICTURE else "audio" if ending in AUDIO else "video"
    return {"type": kind, "url": visual}


def _parts(part: Mapping[str, Any], max_frames: int) -> list[dict[str, Any]]:
    """Our parts for one of theirs."""
    kind = part["type"]
    if kind == "text":
        return [{"type": "text", "text": part["text"]}]
    given = part.get("url", part.get(kind))
    more: Mapping[str, Any] = given if isinstance(given, Mapping) else {"url": given}
    source, more = more.get("url") or more.get("path"), {**part, **more}
    if kind == "image" and isinstance(source, (Image.Image, str, Path)):
        return [{"type": "image", "image": source}]
    if kind == "video" and isinstance(source, (str, Path)):
        if any(more.get(name) is not None for name in WINDOW):
            raise UnsupportedError(
                f"A question is about a part of the video {source}; this model sees whole videos, "
                "so choose another task."
            )
        return [{"type": "image", "image": one} for one in video_frames(Path(source), max_frames)]
    raise UnsupportedError(
        f"A question has a part of type {kind!r} ({type(source).__name__}); this model takes text, "
        "pictures, and videos that are files, so choose another task."
    )


__all__ = [
    "Settings",
    "UnsupportedError",
    "check_arguments",
    "conversation_of",
    "settings_of",
    "turn_of",
]
