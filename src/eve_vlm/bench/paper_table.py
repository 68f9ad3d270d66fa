"""The published table beside formulas for the same models, and beside times measured here.

Published figures and formulas are those of 7B models; measured times are those of whatever was
measured, whose decoder may be smaller, so only their proportions compare.  Easy to get wrong: a
time for pictures is what lies between their layers' first and last moment within a prefill, not
what they take alone, since the rest is the decoder's only within one and the same pass.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from eve_vlm.configuration_eve import EveConfig
from eve_vlm.flops import flops_of, terms_of_config, work_of
from eve_vlm.image_processing_eve import num_image_tokens

from .encoders import NAMES, image_tokens
from .paper import (
    CLIP_L_336,
    GIGA,
    PAPER,
    TERA,
    TILES,
    encoder_flops,
    patch_embedding_flops,
    projector_flops,
    published_decoder_flops,
    published_encoder_flops,
)

SIDES = (24, 48)  # cells along a square of 672 and of 1344 pixels
FEATURE_LAYERS = 23  # of the encoder's 24: LLaVA reads the last but one
PARTS = ("preprocessing", "vision", "decoder")


def paper_table(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each published one; `data` is that of a run.

    Returns:
        `published`, `formula` (the table's own way of counting), `products` (all matrix products of
        what a square needs, two operations each), `ours` (those of this package's patch embedding)
        and `measured` seconds.
    """
    counted = _formulas()
    rows = []
    for place, row in enumerate(PAPER):
        edge = data["settings"]["edges"][place // 2]
        model = "eve" if row.model.startswith("EVE") else NAMES[place // 2]
        rows.append(
            {
                "model": row.model,
                "published": row._asdict(),
                **counted[place],
                "measured": _measured(data["figures"], model, edge),
            }
        )
    return rows


def _formulas() -> list[dict[str, Any]]:
    """In the order of `PAPER`: without an encoder and with one, at both sizes."""
    config = EveConfig()
    width, terms = config.text_config.hidden_size, terms_of_config(config)
    patches = SIDES[0] ** 2

    def decoder(positions: int) -> int:
        work = work_of([positions], labels=1, config=config)
        parts = [term for term in terms if term.part in ("decoder", "attention", "head")]
        return flops_of(parts, work).forward

    rows: list[dict[str, Any]] = []
    for size, (side, tiles) in enumerate(zip(SIDES, (1, TILES), strict=True)):
        encoder = encoder_flops(CLIP_L_336, layers=FEATURE_LAYERS)
        encoder += patches * projector_flops(CLIP_L_336.hidden_size, width)
        positions = image_tokens(CLIP_L_336, tiled=size > 0)
        rows.append(
            {
                "formula": {
                    "vision_flops": tiles * published_encoder_flops(CLIP_L_336, width),
                    "decoder_flops": published_decoder_flops(config, tiles * patches),
                },
                "products": {
                    "vision_flops": tiles * encoder,
                    "decoder_flops": decoder(positions),
                    "positions": positions,
                },
                "ours": None,
            }
        )
        patch, tokens = config.vision_config.merge_size, num_image_tokens(side, side)
        square = work_of([], [(patch * side, patch * side)], labels=0, config=config)
        ours = sum(
            flops_of(terms, square, part=part).forward for part in ("patch embedding", "projector")
        )
        rows.append(
            {
                "formula": {
                    # Of 1344 pixels four times that of 672, as published.
                    "vision_flops": (side // SIDES[0]) ** 2
                    * patch_embedding_flops(config, SIDES[0], SIDES[0]),
                    "decoder_flops": published_decoder_flops(config, side**2),
                },
                "products": {
                    "vision_flops": patch_embedding_flops(config, side, side),
                    "decoder_flops": decoder(tokens),
                    "positions": tokens,
                },
                "ours": ours,
            }
        )
    return rows


def _measured(figures: Sequence[Mapping[str, Any]], model: str, edge: int) -> dict[str, float]:
    """Seconds of each part of a prefill, of one square through one model."""
    found = {
        one["section"] if one["section"] == PARTS[0] else one["figure"]: one["seconds"]["median"]
        for one in figures
        if one["model"] == model and one["case"] == f"{edge} px: one square"
    }
    return {part: found[part] for part in PARTS} if found.keys() >= set(PARTS) else {}


def paper_lines(rows: Sequence[Mapping[str, Any]], subject: str) -> list[list[str]]:
    """The table as text, its heading first."""
    heading = ["model", "vision: published", "formula", "all products", "ours"]
    heading += ["decoder: published", "formula", "all products"]
    heading += ["vision s: published", f"{subject} here", "decoder s: published", f"{subject} here"]
    lines = [heading]
    for row in rows:
        published, measured = row["published"], row["measured"]
        lines.append(
            [
                row["model"],
                *(
                    f"{flops / GIGA:,.1f} G"
                    for flops in (
                        published["vision_flops"],
                        row["formula"]["vision_flops"],
                        row["products"]["vision_flops"],
                    )
                ),
                "-" if row["ours"] is None else f"{row['ours'] / GIGA:,.1f} G",
                *(
                    f"{flops / TERA:.2f} T"
                    for flops in (
                        published["decoder_flops"],
                        row["formula"]["decoder_flops"],
                        row["products"]["decoder_flops"],
                    )
                ),
                f"{published['vision_seconds']:.3f}",
                _seconds(measured, "vision"),
                f"{published['decoder_seconds']:.2f}",
                _seconds(measured, "decoder"),
            ]
        )
    return lines


def _seconds(measured: Mapping[str, float], part: str) -> str:
    return f"{measured[part]:.4g}" if part in measured else "-"


__all__ = ["PARTS", "paper_lines", "paper_table"]
