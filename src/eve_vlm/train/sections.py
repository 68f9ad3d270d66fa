"""The sections of a recipe: one frozen data class each, and the string below a field is its help.

What a key means is said here and nowhere else; `recipe.py` reads files into these classes and
checks values.  Easy to get wrong: the order of `stage.learning_rates` counts (the first glob that
matches a parameter decides).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSection:
    """The patch embedding layer."""

    patch_size: int
    """Side of a patch in pixels."""
    merge_size: int
    """Patches per side that are merged into one token."""
    hidden_size: int
    """Width of the patch embedding layer before the projector."""
    num_attention_heads: int
    """Heads of its two attentions."""
    merge_attention: bool = True
    """Attention from a cell to its patches; false takes their mean, for comparisons."""
    class_attention: bool = True
    """Attention from the class token to all cells; false makes it a constant, for comparisons."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSection:
    """How pictures are sized."""

    longest_edge: int
    """The longer side of every picture after resizing, in pixels."""
    size_multiple: int
    """Both sides become multiples of this many pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSection:
    """The frozen encoder of an encoder-based twin."""

    name: str
    """`efficientnet-lite0`, or a Hugging Face vision model, folder or name."""
    layer: int = -2
    """Hidden state that is taken; -2 is the last but one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """What the stage starts from: `init_from` or `decoder`; a new decoder with neither."""

    init_from: str | None = None
    """Folder that an earlier stage saved; weights, tokenizer and settings come from it."""
    decoder: str | None = None
    """A Hugging Face decoder, folder or name, that gets a new patch embedding layer."""
    text_config: dict[str, Any] | None = None
    """The decoder's settings; alone it is made from nothing, else the start must agree."""
    tokenizer: str | None = None
    """Folder or name of a tokenizer; null takes the one that comes with the start."""
    vision: VisionSection
    """The patch embedding layer."""
    encoder: EncoderSection | None = None
    """A frozen encoder in place of the patch embedding layer, for comparisons; null is EVE."""
    image: ImageSection
    """How pictures are sized; may differ from the stage before (HD)."""
    dtype: Literal["float32", "bfloat16"]
    """Type of the weights in memory."""
    attn_implementation: str = "sdpa"
    """Attention of the decoder, as transformers names it."""
    loss_implementation: Literal["auto", "chunked", "torch", "liger", "cut"] = "auto"
    """Who computes the cross-entropy; `auto` takes the fastest that runs here."""
    compile_layers: bool = False
    """Compile each decoder layer with torch.compile; packed rows still go record by record."""
    record_layers: bool = False
    """Record each decoder layer as CUDA graphs; for a small decoder, packed rows and one GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSection:
    """One row of the mixture table: records of one data set, and how often they are used."""

    kind: Literal[
        "llava",
        "messages",
        "captions",
        "text",
        "scenes",
        "emoji",
        "collages",
        "rendered",
        "picture_set",
    ]
    """Form of the records: `llava` (conversations of from and value), `messages` (role and
    content), `captions` (a picture and its text), `text` (words alone). The others are made here
    and have no path: composed `scenes`, `emoji` in four styles, `collages` of them, `rendered`
    words, documents and charts, and the fetched sets of pictures (`picture_set`)."""
    name: str | None = None
    """Name in logs and losses; null takes the file's."""
    path: str | None = None
    """File, pattern or URL: .json, .jsonl, .parquet, .tar or .txt, or hf:NAME for a Hugging Face
    data set; `#500` behind it takes 500 records, drawn by the seed."""
    image_folder: str | None = None
    """Folder, tar or URL that picture names start from; null means the folder of the file."""
    split: str | None = None
    """Part of it: a split of a Hugging Face data set, a slice such as [:95%], or train[:95%]."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Our name to theirs where fields are called otherwise, e.g. {image: jpg, caption: txt}."""
    repeat: float = 1.0
    """Times that every record is used in an epoch; 0.5 uses every other one."""
    weight: float | None = None
    """Share of the mixture instead of `repeat`; all sources have one or none has."""
    streaming: bool = False
    """Read in the order of the files, without counting them first; needs training.max_steps."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further settings of the kinds that are made here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingSection:
    """Several records in one row, each blind to the others, so that no position is padding."""

    tokens: int
    """Positions of a row."""
    patches: int | None = None
    """Patches of all pictures of a row; null sets no limit."""
    window: int = 1024
    """Records among which rows are planned; more fill rows better, and shuffle a little less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """What the stage learns from."""

    sources: list[SourceSection]
    """Where records come from."""
    format: Literal["plain", "chat"]
    """`plain`: picture then caption, all of it learnt; `chat`: only the answers are learnt."""
    max_length: int
    """Longest sequence in tokens, counted after every picture took its place."""
    too_long: Literal["reject", "shrink"] = "reject"
    """Records above max_length: `reject` counts them as bad, `shrink` makes pictures smaller."""
    max_bad_share: float = 0.01
    """Training stops when more than this share of the records cannot be used."""
    quarantine: str | None = None
    """List of records to leave out, as `eve data check` writes it."""
    packing: PackingSection | None = None
    """Packed rows; null pads every record to the longest of its batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentSection:
    """The patch aligning layer and its teacher."""

    teacher: str
    """`efficientnet-lite0`, or a Hugging Face vision model, folder or name."""
    layer: int = -2
    """Hidden state of the teacher to align with; -2 is the last but one."""
    tap_every: int | None = 4
    """The aligner reads every so many-th layer of the decoder, counted from the last; null reads
    the last one alone."""
    weight: float = 1.0
    """Factor of the alignment loss beside the language loss."""
    cache: Literal["memory", "disk"] | None = None
    """Keep the teacher's features of each picture, in float16: in `memory` for this run, or on
    `disk` for later ones too (teacher_features in the cache folder); null asks it each time, which
    is best for pictures that do not come again."""
    cache_gb: float = 4.0
    """Most that kept features may take, in GB; what goes beyond is asked each time, and said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSection:
    """Which parameters learn, and how fast."""

    name: Literal["language", "prealign", "pretrain", "finetune"]
    """The stage."""
    trainable: list[str]
    """Globs of parameter names; everything else is frozen and every glob must match."""
    learning_rates: dict[str, float]
    """Glob to peak learning rate; the first that matches decides and none may be idle."""
    weight_decay: float
    """Decay of every trainable parameter but biases and norm weights."""
    no_decay: list[str] = dataclasses.field(default_factory=list)
    """Globs of further parameters without decay."""
    muon: list[str] = dataclasses.field(default_factory=list)
    """Globs of matrices that Muon moves, not training.optim; for a decoder made from nothing."""
    label_weight: Literal["token", "sample", "sqrt"] = "token"
    """What counts equally: every learnt token, every record, or the square root of its tokens."""
    alignment: AlignmentSection | None
    """The patch aligning layer and its teacher; null trains on language alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSection:
    """Low-rank adapters on the decoder; what `stage.trainable` names trains in full beside them."""

    rank: int
    """Rank of every adapter."""
    alpha: float
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout before every adapter."""
    target_modules: list[str] | None = None
    """Linear layers of the decoder by their last name, e.g. q_proj; null takes all of them."""
    quantize: Literal["int8", "nf4"] | None = None
    """Frozen decoder weights in 8 or 4 bits (QLoRA); null keeps them as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DevicesSection:
    """How a model is spread over several devices."""

    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = "ddp"
    """`ddp` copies the model, `zero2` shards optimizer and gradients, `zero3` and `fsdp2` all."""
    cpu_offload: bool = False
    """Keep what is sharded in the memory of the host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardsSection:
    """What is watched in every step, and what happens then."""

    bad_step: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is no number, or a spike: end the run, or go on without the step."""
    max_skipped: int = 10
    """With `skip`, the run ends when more steps than this had to be skipped."""
    spike: float | None = None
    """A loss this many times its running mean is a spike; null looks for none."""
    collapse: Literal["warn", "stop", "ignore"] = "warn"
    """What to do when the loss jumps and stays up (paper, figure 5)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesSection:
    """Answers of the model to a few records of its own data while it learns."""

    every: int
    """Steps between two looks."""
    number: int = 4
    """Records that are asked."""
    max_new_tokens: int = 48
    """Longest answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSection:
    """Scores of tasks while the model learns."""

    tasks: list[str]
    """Tasks, or sets of them such as `offline`; `eve eval tasks` lists both."""
    every: int
    """Steps between two evaluations; there is one at the last step too."""
    limit: int | None = 100
    """Samples of each task, always the same ones; null takes all."""
    batch_size: int = 16
    """Questions that are answered together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One training stage."""

    name: str
    """Name of the run in logs."""
    output_dir: str
    """Folder for checkpoints, logs and the final model."""
    seed: int = 0
    """Seed of the order of records, of new weights and of everything else."""
    model: ModelSection
    """What the stage starts from."""
    data: DataSection
    """What it learns from."""
    stage: StageSection
    """Which parameters learn, and how fast."""
    training: dict[str, Any]
    """Keys of transformers.TrainingArguments, save those that the recipe sets itself."""
    lora: LoraSection | None = None
    """Low-rank adapters instead of full training of the decoder; null trains what `stage` says."""
    devices: DevicesSection = dataclasses.field(default_factory=DevicesSection)
    """How the model is spread over several devices."""
    guards: GuardsSection = dataclasses.field(default_factory=GuardsSection)
    """What is watched in every step."""
    samples: SamplesSection | None = None
    """Answers shown while it learns; null asks nothing."""
    evaluation: EvaluationSection | None = None
    """Tasks scored while it learns; null scores nothing."""


__all__ = [
    "AlignmentSection",
    "DataSection",
    "DevicesSection",
    "EncoderSection",
    "EvaluationSection",
    "GuardsSection",
    "ImageSection",
    "LoraSection",
    "ModelSection",
    "PackingSection",
    "Recipe",
    "SamplesSection",
    "SourceSection",
    "StageSection",
    "VisionSection",
]
