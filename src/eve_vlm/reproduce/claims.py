"""The claims of the paper: what is compared, what the paper found, and what the figures show.

A finding is a difference that is positive where the paper is right.  Published scores are those of
EVE-7B on GQA and SEED, in points; those of figures 5, 7 and 8 were read off the plots (within 0.1
point, and 0.05 of a loss).  Easy to get wrong: the paper gives no seeds and no intervals, so a
published difference may be chance too; its tap intervals differ by 0.2 points.
"""

from dataclasses import dataclass, field

# Label of a line to its points: what stands below, and a variant or a published value.
Lines = dict[str, tuple[tuple[str, str], ...]]
PublishedLines = dict[str, tuple[tuple[str, float], ...]]
Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A difference that the paper found."""

    text: str
    """What the paper says, in words."""
    terms: tuple[tuple[int, str], ...]
    """Factors and variants, whose sum is positive if it is so."""
    metric: str = "score"
    """Figure of each run, see `verdicts.measure`."""
    published: float | None = None
    """The same sum in the paper; GQA points where it is a score."""
    main: bool = False
    """Whether the verdict of the claim depends on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A claim of the paper."""

    name: str
    """Names it on the command line."""
    title: str
    """The claim, in a sentence."""
    where: str
    """Its place in the paper."""
    note: str
    """How it is tested here, and what differs."""
    findings: tuple[Finding, ...]
    """What is judged."""
    lines: Lines
    """Scores that are drawn."""
    published: dict[str, PublishedLines] = field(default_factory=dict)
    """Benchmark to published scores that are drawn beside them."""
    curves: dict[str, str] = field(default_factory=dict)
    """Label to the variant whose loss in the pretrain stage is drawn."""
    published_curves: dict[str, Curve] = field(default_factory=dict)
    """Label to the published loss; thousands of steps."""

    @property
    def variants(self) -> tuple[str, ...]:
        """All that must be trained for it."""
        named = [name for finding in self.findings for _, name in finding.terms]
        drawn = [name for line in self.lines.values() for _, name in line]
        return tuple(dict.fromkeys([*named, *drawn, *self.curves.values()]))


def _amounts(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple(zip(("1/4", "1", "2"), names, strict=True))


def _published(labels: str, *values: float) -> tuple[tuple[str, float], ...]:
    return tuple(zip(labels.split(), values, strict=True))


_PREALIGN = Claim(
    name="prealign",
    title="Stage 1 prevents collapse and speeds up convergence.",
    where="figure 5, table 5",
    note="The decoder of each seed learnt its language from words first. The loss curves are those "
    "of stage 2 with twice the data; `from scratch` has a decoder that learnt nothing. Alignment "
    "is on in all of them, as in the paper.",
    findings=(
        Finding(
            text="without stage 1 the loss of stage 2 collapses, and with it it does not",
            terms=((1, "none_long"), (-1, "long")),
            metric="collapsed",
            published=1.0,
            main=True,
        ),
        Finding(
            text="stage 1 lowers the loss of the first quarter of stage 2",
            terms=((1, "none"), (-1, "base")),
            metric="early_loss",
            main=True,
        ),
        Finding(
            text="stage 1 raises the scores after stages 2 and 3",
            terms=((1, "base"), (-1, "none")),
            published=2.4,
            main=True,
        ),
        Finding(
            text="with twice the data it still does",
            terms=((1, "long"), (-1, "none_long")),
            published=16.4,
        ),
        Finding(
            text="without stage 1, twice the data in stage 2 does harm",
            terms=((1, "none"), (-1, "none_long")),
            published=11.6,
        ),
        Finding(
            text="stage 2 adds to stage 1 alone", terms=((1, "base"), (-1, "only")), published=5.5
        ),
        Finding(
            text="with stage 1, twice the data in stage 2 helps",
            terms=((1, "long"), (-1, "base")),
            published=2.4,
        ),
    ),
    lines={
        "no stage 1": (("1", "none"), ("2", "none_long")),
        "stage 1": (("0", "only"), ("1", "base"), ("2", "long")),
    },
    published={
        "GQA": {
            "no stage 1": _published("4M 8M", 54.1, 42.5),
            "stage 1": _published("0 4M 8M", 51.0, 56.5, 58.9),
        },
        "SEED": {
            "no stage 1": _published("4M 8M", 45.4, 36.2),
            "stage 1": _published("0 4M 8M", 39.7, 48.7, 50.3),
        },
    },
    curves={"no stage 1": "none_long", "stage 1": "long", "from scratch": "scratch"},
    published_curves={
        "no stage 1": (
            *((0.0, 4.7), (0.4, 1.1), (5.0, 0.75), (8.0, 0.65), (10.8, 0.55), (10.85, 1.1)),
            *((11.5, 0.8), (16.0, 0.8)),
        ),
        "stage 1": (
            *((0.0, 1.2), (2.0, 0.83), (5.0, 0.70), (8.0, 0.57), (11.0, 0.52), (16.0, 0.47)),
        ),
        "from scratch": (
            *((0.0, 7.1), (3.0, 1.4), (3.45, 6.2), (3.9, 4.1), (5.0, 2.4), (11.9, 2.4)),
            *((12.0, 4.0), (12.5, 7.3), (13.5, 4.5), (16.0, 4.5)),
        ),
    },
)

_ALIGNMENT = Claim(
    name="alignment",
    title="Patch alignment helps most with little data, and less with more.",
    where="table 4, figure 8",
    note="Data is the number of samples of stage 2. Published amounts are 0.5M, 4M and 8M; in the "
    "paper the gap is 0.5 points of GQA at 33M.",
    findings=(
        Finding(
            text="alignment raises the scores with a quarter of the data",
            terms=((1, "few"), (-1, "few_no_alignment")),
            published=2.3,
            main=True,
        ),
        Finding(
            text="alignment raises the scores with all data",
            terms=((1, "base"), (-1, "no_alignment")),
            published=1.2,
        ),
        Finding(
            text="alignment raises the scores with twice the data",
            terms=((1, "long"), (-1, "long_no_alignment")),
            published=1.6,
        ),
        Finding(
            text="it raises them by more with a quarter of the data than with twice the data",
            terms=(
                *((1, "few"), (-1, "few_no_alignment")),
                *((-1, "long"), (1, "long_no_alignment")),
            ),
            published=0.7,
            main=True,
        ),
    ),
    lines={
        "alignment": _amounts("few", "base", "long"),
        "none": _amounts("few_no_alignment", "no_alignment", "long_no_alignment"),
    },
    published={
        "GQA": {
            "alignment": _published("0.5M 4M 8M 24M 33M", 49.8, 56.5, 58.9, 60.3, 60.8),
            "none": _published("0.5M 4M 8M 24M 33M", 47.5, 55.3, 57.3, 59.4, 60.3),
        },
        "SEED": {
            "alignment": _published("0.5M 4M 8M 24M 33M", 39.3, 48.7, 50.3, 53.1, 54.3),
            "none": _published("0.5M 4M 8M 24M 33M", 37.8, 47.5, 49.2, 52.3, 53.9),
        },
    },
)

_TAPS = Claim(
    name="tap_interval",
    title="Aligning several layers is better than the last alone, and an interval in between best.",
    where="figure 6",
    note="The decoder here has 4 layers, the published one 32: intervals 4, 2 and 1 tap 2, 3 and 5 "
    "states, published 8, 4 and 2 tap 5, 9 and 17.",
    findings=(
        Finding(
            text="tapping every second layer is better than the last layer alone",
            terms=((1, "base"), (-1, "tap_last")),
            published=0.11,
            main=True,
        ),
        Finding(
            text="tapping every second layer is better than every fourth",
            terms=((1, "base"), (-1, "tap_4")),
            published=0.09,
        ),
        Finding(
            text="tapping every second layer is better than every layer",
            terms=((1, "base"), (-1, "tap_1")),
            published=0.22,
        ),
    ),
    lines={"here": (("last", "tap_last"), ("4", "tap_4"), ("2", "base"), ("1", "tap_1"))},
    published={
        "GQA": {"EVE": _published("last 8 4 2", 49.66, 49.68, 49.77, 49.55)},
        "SEED": {"EVE": _published("last 8 4 2", 38.95, 39.21, 39.33, 39.33)},
    },
)

_ATTENTION = Claim(
    name="attention",
    title="The two attentions of the patch embedding help.",
    where="table 4 (CA1, CA2)",
    note="Without CA1 a cell is the mean of its patches; without CA2 the class token is a learned "
    "constant. Published at 0.5M samples.",
    findings=(
        Finding(
            text="local attention (CA1) raises the scores",
            terms=((1, "base"), (-1, "no_ca1")),
            published=0.4,
            main=True,
        ),
        Finding(
            text="class attention (CA2) raises the scores",
            terms=((1, "base"), (-1, "no_ca2")),
            published=0.0,
            main=True,
        ),
    ),
    lines={"here": (("both", "base"), ("no CA1", "no_ca1"), ("no CA2", "no_ca2"))},
    published={
        "GQA": {"EVE": (("both", 49.8), ("no CA1", 49.4), ("no CA2", 49.8))},
        "SEED": {"EVE": (("both", 39.3), ("no CA1", 40.1), ("no CA2", 39.3))},
    },
)

_ENCODER = Claim(
    name="encoder",
    title="The gap to an encoder-based model closes as data grows.",
    where="figure 7",
    note="The twin has a frozen EfficientNet-Lite0, trained on ImageNet, in place of the patch "
    "embedding; decoder, data and steps are equal. Published is LLaVA-1.5 on the same data, its "
    "encoder learning too, from 4M to 33M.",
    findings=(
        Finding(
            text="the twin is ahead with a quarter of the data",
            terms=((1, "few_twin"), (-1, "few")),
            published=3.9,
        ),
        Finding(
            text="the twin is ahead with all data",
            terms=((1, "twin"), (-1, "base")),
            published=3.8,
        ),
        Finding(
            text="the twin is ahead with twice the data",
            terms=((1, "long_twin"), (-1, "long")),
            published=2.3,
        ),
        Finding(
            text="its lead is smaller with twice the data than with a quarter",
            terms=((1, "few_twin"), (-1, "few"), (-1, "long_twin"), (1, "long")),
            published=1.6,
            main=True,
        ),
    ),
    lines={
        "EVE": _amounts("few", "base", "long"),
        "twin": _amounts("few_twin", "twin", "long_twin"),
    },
    published={
        "GQA": {
            "EVE": _published("4M 8M 12M 33M", 56.1, 58.9, 59.2, 60.8),
            "twin": _published("4M 8M 12M 33M", 60.0, 62.7, 63.2, 63.1),
        },
        "SEED": {
            "EVE": _published("4M 8M 12M 33M", 48.4, 50.3, 51.2, 54.3),
            "twin": _published("4M 8M 12M 33M", 55.2, 58.3, 59.3, 59.2),
        },
    },
)

_ANY_RATIO = Claim(
    name="any_ratio",
    title="Pictures of any shape are better kept in their shape than made square.",
    where="section 3.1 (no figures)",
    note="Scenes of up to 4:3 and single drawings of up to 2:1. Squares take more tokens: 112 x 84 "
    "pixels are 16 in their own shape and 21 as a square.",
    findings=(
        Finding(
            text="any shape is better than padding to squares",
            terms=((1, "any_ratio"), (-1, "padded")),
            main=True,
        ),
        Finding(
            text="any shape is better than squeezing to squares",
            terms=((1, "any_ratio"), (-1, "squeezed")),
            main=True,
        ),
    ),
    lines={
        "here": (("any shape", "any_ratio"), ("padded", "padded"), ("squeezed", "squeezed")),
    },
)

_HIGH = Claim(
    name="high_resolution",
    title="High resolution in the last stage alone raises the scores.",
    where="table 5, rows HD",
    note="56 pixels (2 x 2 cells) are low and 112 (4 x 4) high here, 672 and 1344 in the paper. "
    "The last row asks what the paper does not: whether high resolution pays earlier.",
    findings=(
        Finding(
            text="high resolution in the last stage is better than none",
            terms=((1, "high_last"), (-1, "low")),
            published=1.8,
            main=True,
        ),
        Finding(
            text="high resolution from stage 2 on is better than in the last stage alone",
            terms=((1, "base"), (-1, "high_last")),
        ),
    ),
    lines={"here": (("none", "low"), ("last stage", "high_last"), ("from stage 2", "base"))},
    published={
        "GQA": {
            "SFT 665K": (("none", 60.8), ("last stage", 62.6)),
            "SFT 1.8M": (("none", 61.8), ("last stage", 62.6)),
        },
        "SEED": {
            "SFT 665K": (("none", 54.3), ("last stage", 55.2)),
            "SFT 1.8M": (("none", 54.8), ("last stage", 56.8)),
        },
    },
)

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (_PREALIGN, _ALIGNMENT, _TAPS, _ATTENTION, _ENCODER, _ANY_RATIO, _HIGH)
}

__all__ = ["CLAIMS", "Claim", "Finding"]
