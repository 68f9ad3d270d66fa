"""The sections of a curation recipe: one frozen data class each; the string below a field says all.

The command reads YAML into these classes, as strictly as recipes of training, and `checked` looks
at the values.  Easy to get wrong: only what changes a stage's *results* belongs to its identity
(`stages.py`); how many workers it has, or how long it waits for an answer, may change between a
run and its resumption.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSection:
    """Where pictures come from."""

    name: str
    """What it is called in ids, tables and the manifest; short, without spaces."""
    kind: Literal["folder", "tar", "urls", "parquet"]
    """A folder of picture files, tars, lists of URLs (.txt, .csv, .tsv, .parquet) or Parquet files
    that hold pictures."""
    path: str
    """A folder, a file, or a pattern with * of files; `asset:NAME/FOLDER` lies in what `eve assets`
    has fetched, `package:NAME/FOLDER` in an installed Python package."""
    licence: str
    """The licence of its pictures; goes into every record."""
    columns: dict[str, str] = field(default_factory=dict)
    """What `image`, `url`, `id`, `text`, `licence`, `width` and `height` are called in lists and
    tables; in folders and tars `text` is the ending of a file beside the picture, such as txt
    (its first line)."""
    limit: int | None = None
    """At most so many pictures of each of its files (of the whole folder); null takes all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchSection:
    """How URLs are fetched."""

    threads: int = 32
    """Connections of each worker."""
    timeout: float = 20.0
    """Seconds without a byte after which a try has failed."""
    tries: int = 2
    """Tries for each URL, with pauses of 1, 2, 4, ... seconds."""
    most_megabytes: float = 50.0
    """Longer files are left."""
    most_failed: float = 0.8
    """Share of a block that may fail; with more the run stops, since the network may be away."""
    networks: list[str] = field(default_factory=list)
    """Networks that may be fetched from though they are not public, such as 10.0.0.0/8."""
    ports: list[int] = field(default_factory=list)
    """Ports beside 80 and 443 that may be fetched from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSection:
    """How pictures are opened."""

    most_pixels: int = 64_000_000
    """Larger pictures are refused from their header; this many take a worker about 1 GB."""
    svg_size: int = 512
    """Longer side in pixels to which drawings (.svg) are rendered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterSection:
    """Which pictures are kept, by what decoding measured; null switches a rule off."""

    shorter_side_above: int | None = 448
    """Pixels; the paper keeps what is larger than 448 x 448."""
    most_aspect: float | None = 3.0
    """Longer side over shorter side."""
    least_contrast: float | None = 4.0
    """Standard deviation of grey values (0 to 255); a blank picture has 0."""
    least_detail: float | None = 1.0
    """Mean step between grey neighbours, on a copy of 128 pixels."""
    most_text: float | None = 0.4
    """Share of the picture that looks like lines of text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSection:
    """One score by a model that sorts pictures into classes, such as NSFW or watermark."""

    name: str
    """What it scores; pictures above are dropped as `NAME score`."""
    model: str
    """A Hugging Face image classification model, folder or name."""
    label: str
    """The class whose probability is the score."""
    most: float
    """Pictures with a higher score are dropped."""
    batch_size: int = 32
    """Pictures that the model sees at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DuplicatesSection:
    """What counts as the same picture twice; of each group the largest is kept."""

    near: bool = True
    """Whether alike pictures count, or only equal files (SHA-256)."""
    distance: int = 3
    """Most bits of 64 in which perceptual hashes of alike pictures differ."""
    fine_distance: int = 24
    """The same for the finer hash of 256 bits, which confirms a pair."""
    colour_distance: float = 16.0
    """Most mean difference of colours (0 to 255) on a grid of 4 x 4, which confirms it too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpreadSection:
    """Keeps pictures evenly over what there is to see: the nearest to each of many centres."""

    model: str = "efficientnet-lite0"
    """The vision model whose features are clustered: this one, or any of Hugging Face."""
    layer: int = -1
    """Hidden state whose patches are averaged; of efficientnet-lite0, -1 is stride 32."""
    image_size: int = 224
    """Pixels of the square that the model is shown."""
    batch_size: int = 32
    """Pictures that the model sees at once."""
    centres: int = 50_000
    """K of k-means; published."""
    nearest: int | None = 300
    """Pictures kept of each centre; published (15M of 50,000 centres); null keeps all."""
    rounds: int = 20
    """Iterations of k-means."""
    sample: int = 64
    """Pictures for each centre that k-means is trained on, at most."""
    duplicate_cosine: float | None = None
    """Pictures of one centre whose features are more alike than this are duplicates; null: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CostSection:
    """What captions cost, for the estimate before and the bill after."""

    currency: str = "USD"
    """A word for the tables."""
    per_million_prompt_tokens: float = 0.0
    """Price of tokens that are read, those of the picture too."""
    per_million_caption_tokens: float = 0.0
    """Price of tokens that are written."""
    per_hour: float = 0.0
    """Price of an hour of the machines that answer, instead of tokens or beside them."""
    prompt_tokens: int = 700
    """Tokens of a prompt with its picture, estimated."""
    caption_tokens: int = 120
    """Tokens of a caption, estimated."""
    captions_per_second: float | None = None
    """Of all workers, estimated; needed for `per_hour`."""
    most: float | None = None
    """The stage does not begin if the estimate is above this; null begins anyway."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecaptionSection:
    """Who writes captions, how it is asked, and what happens when it fails."""

    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server: http://gpu:8000/v1; null for a local `model`."""
    model: str
    """Its name there, or the folder or Hub name of a local image-text-to-text model."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable with the endpoint's key, which never stands in a file."""
    prompt: str = "Describe this image in detail."
    """The question beside every picture."""
    system: str | None = None
    """A system message; null sends none."""
    sampling: dict[str, Any] = field(default_factory=lambda: {"max_tokens": 256, "temperature": 0})
    """Fields of the request, such as temperature, top_p, max_tokens, seed; a local model takes
    max_tokens, temperature, top_p, top_k, seed."""
    longest_edge: int | None = 1024
    """Pictures are made smaller than this before they are sent; null sends files as they are."""
    parallel: int = 16
    """Questions that each worker has open at once; of a local model, its batch."""
    requests_per_minute: float | None = None
    """Most requests of all workers together; null sets no limit."""
    timeout: float = 120.0
    """Seconds for an answer."""
    tries: int = 6
    """Tries for each picture before it counts as failed."""
    first_pause: float = 1.0
    """Seconds before the second try; each further pause is twice as long, 60 s at most."""
    most_failed: float = 0.02
    """Share of a block's pictures that may fail for good; with more the run stops."""
    cost: CostSection = field(default_factory=CostSection)
    """What captions cost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionsSection:
    """Which captions are kept; null or false switches a rule off."""

    least_words: int = 3
    """Shorter ones are dropped."""
    most_words: int | None = 400
    """Longer ones are dropped."""
    most_repeated: float | None = 0.2
    """Share of groups of four words that occurred before in the caption."""
    finished: bool = True
    """The last sentence must end with a full stop or the like."""
    refusals: bool = True
    """Answers such as "I'm sorry, I cannot ..." are dropped."""
    languages: list[str] | None = field(default_factory=lambda: ["en"])
    """Two-letter codes of languages that are kept (needs py3langid); null keeps all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteSection:
    """How the set is written."""

    form: Literal["webdataset", "parquet"] = "webdataset"
    """Tars with picture, .txt and .json for each record, or Parquet with picture bytes."""
    pictures: int = 10_000
    """Pictures of each shard; the last one has what is left."""
    longest_edge: int | None = None
    """Longer pictures are made smaller and stored as JPEG; null keeps the files as they are."""
    quality: int = 92
    """Of those JPEG files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSection:
    """What one worker of a stage takes."""

    cpus: float = 1.0
    """Cores."""
    gpus: float = 0.0
    """GPUs; for features, scores and local captions."""
    most: int | None = None
    """Workers at once at most; null as many as fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurateRecipe:
    """A whole curation: what is read, what happens to it, where it goes."""

    name: str
    """What the set is called."""
    output_dir: str
    """Folder for everything; on a cluster, one that every node sees under the same name."""
    seed: int = 0
    """Of k-means."""
    block: int = 1000
    """Pictures in a unit of work: what a crash can cost at most, for each worker."""
    sources: list[SourceSection]
    """Where pictures come from."""
    fetch: FetchSection = field(default_factory=FetchSection)
    """How URLs are fetched."""
    decode: DecodeSection = field(default_factory=DecodeSection)
    """How pictures are opened."""
    filter: FilterSection = field(default_factory=FilterSection)
    """Which pictures are kept."""
    scores: list[ScoreSection] = field(default_factory=list)
    """Scores by models."""
    duplicates: DuplicatesSection | None = field(default_factory=DuplicatesSection)
    """What counts as the same picture twice; null keeps all."""
    spread: SpreadSection | None = None
    """Keeps pictures evenly over what there is to see; null keeps all."""
    recaption: RecaptionSection | None = None
    """Who writes captions; null keeps the words that the source has."""
    captions: CaptionsSection = field(default_factory=CaptionsSection)
    """Which captions are kept."""
    write: WriteSection = field(default_factory=WriteSection)
    """How the set is written."""
    workers: dict[str, WorkerSection] = field(default_factory=dict)
    """By stage, or by one of its steps such as spread.features: what a worker takes."""

    def worker(self, step: str) -> WorkerSection:
        """What a worker of a step takes: its own section, its stage's, or one core."""
        stage = step.partition(".")[0]
        return self.workers.get(step) or self.workers.get(stage) or WorkerSection()


AT_LEAST_ONE = {
    "block",
    *("threads", "tries", "svg_size", "most_pixels", "batch_size", "image_size", "centres"),
    *("nearest", "rounds", "sample", "parallel", "pictures", "limit", "longest_edge"),
}
COLUMNS = {
    "folder": {"text"},
    "tar": {"text"},
    "urls": {"url", "id", "text", "licence", "width", "height"},
    "parquet": {"image", "id", "text", "licence"},
}
"""What a source of each kind takes names for."""
ABOVE_ZERO = {"timeout", "first_pause", "requests_per_minute", "captions_per_second", "cpus"}


def checked(recipe: CurateRecipe) -> CurateRecipe:
    """The recipe, with its values looked at.

    Raises:
        ValueError: one sentence with the dotted key, what is wrong and how to mend it.
    """
    _check_numbers(recipe, "")
    if not recipe.sources:
        raise ValueError("sources is an empty list; add where pictures come from.")
    names = [source.name for source in recipe.sources]
    for number, name in enumerate(names):
        if name in names[:number] or not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(
                f"sources.{number}.name is {name!r}; give each source a name of its own, of "
                "letters, digits, - and _."
            )
    for number, source in enumerate(recipe.sources):
        unknown = sorted(set(source.columns) - COLUMNS[source.kind])
        if unknown:
            raise ValueError(
                f"sources.{number}.columns has {', '.join(unknown)}, which a source of kind "
                f"{source.kind} does not take; use {', '.join(sorted(COLUMNS[source.kind]))}."
            )
    for code in recipe.captions.languages or ():
        if len(code) != 2 or not code.islower():
            raise ValueError(
                f"captions.languages has {code!r}, which no caption would ever be; give codes of "
                "two small letters, such as en."
            )
    if recipe.duplicates is not None and not 0 <= recipe.duplicates.distance <= 8:
        raise ValueError(
            f"duplicates.distance is {recipe.duplicates.distance}; give 0 to 8 of the 64 bits, "
            "beyond which other pictures look alike."
        )
    if recipe.recaption is not None:
        _check_recaption(recipe.recaption, recipe.worker("recaption"))
    return recipe


LOCAL_SAMPLING = {"max_tokens", "temperature", "top_p", "top_k", "seed"}


def _check_recaption(section: RecaptionSection, worker: WorkerSection) -> None:
    if section.cost.per_hour and section.cost.captions_per_second is None:
        raise ValueError(
            "recaption.cost.per_hour has no captions_per_second beside it, so an hour buys an "
            "unknown number of captions; give both."
        )
    if section.requests_per_minute is not None and worker.most is None:
        raise ValueError(
            "recaption.requests_per_minute is a limit of all workers together, so their number "
            "must be known; give workers.recaption.most."
        )
    unknown = sorted(set(section.sampling) - LOCAL_SAMPLING)
    if section.endpoint is None and unknown:
        raise ValueError(
            f"recaption.sampling has {', '.join(unknown)}, which a local model does not take; use "
            f"{', '.join(sorted(LOCAL_SAMPLING))}, or name an endpoint."
        )


def _check_numbers(section: Any, key: str) -> None:
    for one in fields(section):
        value, name = getattr(section, one.name), key + one.name
        parts = [value] if not isinstance(value, list | dict) else value
        for place, part in parts.items() if isinstance(parts, dict) else enumerate(parts):
            if is_dataclass(part):
                inner = f"{name}.{place}." if part is not value else f"{name}."
                _check_numbers(part, inner)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if one.name in AT_LEAST_ONE and value < 1:
            raise ValueError(f"{name} is {value}; give at least 1.")
        if one.name in ABOVE_ZERO and value <= 0:
            raise ValueError(f"{name} is {value}; give a number above 0.")
        if value < 0 and one.name != "layer":
            raise ValueError(f"{name} is {value}; give 0 or more.")


__all__ = [
    "CaptionsSection",
    "CostSection",
    "CurateRecipe",
    "DecodeSection",
    "DuplicatesSection",
    "FetchSection",
    "FilterSection",
    "RecaptionSection",
    "ScoreSection",
    "SourceSection",
    "SpreadSection",
    "WorkerSection",
    "WriteSection",
    "checked",
]
