"""Facts about anything a user may point at: a model, a configuration, a recipe, a picture, a size.

`inspect` decides what is meant and returns facts as plain data; `text.py` puts them into
words, `differences` compares two of them.  Nothing is loaded: models are built on torch's meta
device and of weight files only the headers are read.  Easy to get wrong: `tiny/1_prealign` looks
like a Hub id and is a shipped recipe, which wins; a file or folder of any name wins over both.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from PIL import ExifTags, Image
from transformers.utils import CONFIG_NAME

from eve_vlm.image_processing_eve import EveImageProcessor
from eve_vlm.inspection.facts import (
    COMMON_SIZES,
    ModelFacts,
    TokensFact,
    context_of,
    flattened,
    tokens_facts,
)
from eve_vlm.inspection.models import config_facts, model_facts
from eve_vlm.loading import load_config, load_processor
from eve_vlm.pictures import open_picture
from eve_vlm.published_eve import PRESETS, image_settings

if TYPE_CHECKING:
    from eve_vlm.train.sections import Recipe

Kind = Literal["model", "config", "recipe", "picture", "size"]

SIZE = re.compile(r"(\d+)[xX](\d+)")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PICTURE_ENDINGS = tuple(Image.registered_extensions())
RECIPE_ENDINGS = (".yaml", ".yml")
SHIPPED_SETTINGS = ("672", "1344")
PUBLISHED_CONTEXT = 4096  # tokens; max_position_embeddings of every published checkpoint
# What EXIF's orientation asks for, as the standard numbers it.
ORIENTATIONS = {
    1: "upright",
    2: "mirrored",
    3: "turned by 180 degrees",
    4: "mirrored, turned by 180 degrees",
    5: "mirrored, turned by 90 degrees",
    6: "turned by 90 degrees",
    7: "mirrored, turned by 270 degrees",
    8: "turned by 270 degrees",
}


class PictureSettings(NamedTuple):
    """How one model sees pictures."""

    name: str
    pictures: EveImageProcessor
    context: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureFacts:
    """A picture file and what becomes of it."""

    source: str
    format: str
    mode: str
    """Pillow's name of the pixel type, such as `RGB` or `P`."""
    stored_width: int
    stored_height: int
    orientation: str
    """As EXIF says it must be turned before it is looked at."""
    width: int
    """Upright, as a model sees it."""
    height: int
    bytes: int
    animated: bool
    """Only the first frame is looked at."""
    tokens: tuple[TokensFact, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeFacts:
    """What becomes of any picture of one size."""

    source: str
    width: int
    height: int
    tokens: tuple[TokensFact, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFact:
    """Parameters that the optimizer treats alike."""

    tensors: int
    parameters: int
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeFacts:
    """A training stage."""

    source: str
    name: str
    stage: str
    start: str
    parameters: int
    trained: int
    groups: tuple[GroupFact, ...]
    table: str = field(repr=False)
    """The parameters by part, as `eve train --dry-run` prints them."""
    sequences: int
    """Per device and step."""
    max_length: int
    tokens: tuple[TokensFact, ...]
    """Shares of a sequence are of `max_length`."""
    settings: dict[str, Any] = field(repr=False)
    """The whole recipe, with dotted keys and every default."""


Facts = ModelFacts | PictureFacts | SizeFacts | RecipeFacts


def kind_of(what: str) -> Kind:
    """What the user points at: by what is there, then by how it is written.

    Raises:
        ValueError: if it is none of the kinds.
    """
    path = Path(what)
    if path.is_dir():
        if not (path / CONFIG_NAME).is_file():
            raise ValueError(
                f"{what} is a folder without {CONFIG_NAME}, so it holds no model; name a model "
                "folder, or a file in this one."
            )
        return "model"
    if path.is_file():
        if path.suffix.lower() in RECIPE_ENDINGS:
            return "recipe"
        if path.suffix.lower() == ".json":
            return "config"
        if path.suffix.lower() in (".safetensors", ".bin", ".pt"):
            raise ValueError(f"{what} is a file of weights; name the folder that it lies in.")
        return "picture"
    if SIZE.fullmatch(what):
        return "size"
    if path.suffix.lower() in PICTURE_ENDINGS:
        return "picture"
    from eve_vlm.train.recipe import find_recipe

    try:
        find_recipe(what)
    except ValueError:
        if path.suffix.lower() in RECIPE_ENDINGS or path.parts[:1] == ("recipes",):
            raise
    else:
        return "recipe"
    if HUB_ID.fullmatch(what) and not what.startswith("."):
        return "model"
    raise ValueError(
        f"{what} is not here, and is neither a shipped recipe, a Hub id such as "
        "BAAI/EVE-7B-v1.0, nor a size such as 640x480; check the name."
    )


def inspect(what: str, *, sizes: Iterable[str] = (), models: Sequence[str] = ()) -> Facts:
    """The facts about one thing.

    Args:
        what: a model folder or Hub id, a configuration file, a recipe, a picture, or a size.
        sizes: further picture sizes, such as `800x600`, for the token table of a model or recipe.
        models: whose settings a picture or size is seen with, by folder or Hub id; `672` and `1344`
            are the published ones, and both the default.

    Raises:
        ValueError: if it is nothing of these, or cannot be read.
    """
    kind = kind_of(what)
    asked = [parse_size(size) for size in sizes]
    if models and kind not in ("picture", "size"):
        raise ValueError(
            f"--model says how a picture is seen, but {what} is a {kind}; leave it out."
        )
    if asked and kind in ("picture", "size"):
        raise ValueError(f"--size is for models and recipes, but {what} is a {kind}; leave it out.")
    all_sizes = tuple(dict.fromkeys([*COMMON_SIZES, *asked]))
    if kind == "model":
        return model_facts(what, all_sizes)
    if kind == "config":
        return config_facts(Path(what), all_sizes)
    if kind == "recipe":
        return _recipe_facts(what, all_sizes)
    settings = [picture_settings(name) for name in models or SHIPPED_SETTINGS]
    if kind == "picture":
        return _picture_facts(Path(what), settings)
    width, height = parse_size(what)
    return SizeFacts(
        source=what, width=width, height=height, tokens=_seen_by((width, height), settings)
    )


def parse_size(text: str) -> tuple[int, int]:
    """Width and height.

    >>> parse_size("640x480")
    (640, 480)

    Raises:
        ValueError: if it is no size, or has no pixels.
    """
    found = SIZE.fullmatch(text)
    if not found or 0 in (sides := (int(found[1]), int(found[2]))):
        raise ValueError(f"{text!r} is no picture size; write width x height, such as 640x480.")
    return sides


def picture_settings(name: str) -> PictureSettings:
    """How a model sees pictures; `672` and `1344` are the published settings.

    Raises:
        ValueError: if there is no such model, or no processor in it.
    """
    if name in SHIPPED_SETTINGS:
        pictures = EveImageProcessor(**image_settings(PRESETS[f"eve-patch14-anypixel-{name}"]))
        return PictureSettings(f"published {name}", pictures, PUBLISHED_CONTEXT)
    config = load_config(name)
    return PictureSettings(name, load_processor(name).image_processor, context_of(config))


def _seen_by(size: tuple[int, int], settings: Iterable[PictureSettings]) -> tuple[TokensFact, ...]:
    return tuple(
        fact
        for name, pictures, context in settings
        for fact in tokens_facts([size], pictures=pictures, settings=name, context=context)
    )


# --- pictures -------------------------------------------------------------------------------------


def _picture_facts(file: Path, settings: Iterable[PictureSettings]) -> PictureFacts:
    upright = open_picture(file)  # refuses whatever is wrong with it
    # It was just found to be of a size that we take, so Pillow's own, lower limit is of no use.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(file) as image:
            stored, mode, kind = image.size, image.mode, image.format or "unknown"
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            try:
                image.seek(1)
                animated = True
            except EOFError:
                animated = False
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return PictureFacts(
        source=str(file),
        format=kind,
        mode=mode,
        stored_width=stored[0],
        stored_height=stored[1],
        orientation=ORIENTATIONS.get(orientation, "upright"),
        width=upright.width,
        height=upright.height,
        bytes=file.stat().st_size,
        animated=animated,
        tokens=_seen_by(upright.size, settings),
    )


# --- recipes --------------------------------------------------------------------------------------


def _recipe_facts(name: str, sizes: Sequence[tuple[int, int]]) -> RecipeFacts:
    from eve_vlm.train.build import picture_settings as recipe_pictures
    from eve_vlm.train.lora import make_trainable
    from eve_vlm.train.parameters import optimizer_groups, parameter_table
    from eve_vlm.train.recipe import load_recipe
    from eve_vlm.train.run import model_on_meta

    recipe: Recipe = load_recipe(name)
    model = model_on_meta(recipe)
    make_trainable(model, recipe)
    groups = tuple(
        GroupFact(
            tensors=len(group["params"]),
            parameters=sum(parameter.numel() for parameter in group["params"]),
            learning_rate=group["lr"],
            weight_decay=group["weight_decay"],
        )
        for group in optimizer_groups(model, recipe.stage)
    )
    training, section = recipe.training, recipe.model
    return RecipeFacts(
        source=name,
        name=recipe.name,
        stage=recipe.stage.name,
        start=section.init_from or section.decoder or "a new decoder",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(group.parameters for group in groups),
        groups=groups,
        table=parameter_table(model, recipe.stage),
        sequences=training["per_device_train_batch_size"]
        * training.get("gradient_accumulation_steps", 1),
        max_length=recipe.data.max_length,
        tokens=tokens_facts(
            sizes,
            pictures=EveImageProcessor(**recipe_pictures(recipe)),
            settings=name,
            context=recipe.data.max_length,
        ),
        settings=flattened(asdict(recipe)),
    )


__all__ = [
    "Facts",
    "GroupFact",
    "PictureFacts",
    "PictureSettings",
    "RecipeFacts",
    "SizeFacts",
    "inspect",
    "kind_of",
    "parse_size",
    "picture_settings",
]
