"""The published table of costs (EVE, table 6), and the formulas that its figures follow.

Everything here is arithmetic on sizes; `eve_vlm.flops` counts what our model really does, which is
less.  What reproduces the published figures was found by trying, as the paper does not say how it
counted:

- patch embedding 42 G: every matrix product of the published layer and its projector on a full
  square of 672 pixels, two operations for a multiplication and its addition (42.5 G).  The 170 G of
  1344 pixels are four times that; counted on the picture itself they are 167.8 G, as the class
  token and the row ends do not grow fourfold.
- encoder 372 G: the linear layers of all 24 layers of CLIP-L/14-336 and the projector, on 576
  patches (372.05 G).  Left out are the products inside attention, the patch projection and the
  class token; and LLaVA reads layer 23.  All products of 23 layers are 390 G, of 24 layers 406 G.
  1,860 G are five tiles of 372 G.
- decoder 15.2 T: four operations, not two, for each weight of Vicuna-7B's linear layers and head,
  on 576 positions, without attention's products; why four is not known.  The ratios 1 : 1 : 5 : 4
  are those of 576, 576, 2880 and 2304 positions; class token and row ends are left out (601 and
  2353 positions), and so are LLaVA-1.6's ends of rows (2928 positions for a square).

Easy to get wrong: with published figures these formulas must be compared, not `flops.terms_of`.
"""

from typing import NamedTuple

from transformers import CLIPVisionConfig

from eve_vlm.configuration_eve import EveConfig
from eve_vlm.image_processing_eve import num_image_tokens

GIGA, TERA = 10**9, 10**12


class Published(NamedTuple):
    """A row of the published table."""

    model: str
    vision_flops: float
    vision_seconds: float
    decoder_flops: float
    decoder_seconds: float
    positions: int
    """Image tokens as the table must have counted them."""


PAPER = (
    Published("LLaVA-1.5", 372 * GIGA, 0.033, 15.2 * TERA, 0.48, 576),
    Published("EVE-7B", 42 * GIGA, 0.003, 15.2 * TERA, 0.48, 576),
    Published("LLaVA-1.6 (HD)", 1860 * GIGA, 0.13, 76.1 * TERA, 2.07, 2880),
    Published("EVE-7B (HD)", 170 * GIGA, 0.013, 60.8 * TERA, 1.52, 2304),
)
TILES = 5  # of LLaVA-1.6: the whole picture and 2 x 2 parts of it
PER_WEIGHT = 4  # operations for each weight and position, as the table has them


def patch_embedding_flops(config: EveConfig, rows: int, cols: int) -> int:
    """The published form of patch embedding layer and projector, for a grid of cells.

    Keys and values of all four patches of a cell, of all cells for the class token, and every token
    through the projector.

    >>> round(patch_embedding_flops(EveConfig(), 24, 24) / 1e9, 2)
    42.48
    """
    vision = config.vision_config
    width, merge = vision.hidden_size, vision.merge_size**2
    square = 2 * width**2
    patch = 2 * vision.num_channels * vision.patch_size**2 * width + 2 * square
    cell = 2 * square + 2 * square  # query and output of merging; key and value for the class token
    tokens = num_image_tokens(rows, cols)
    projector = projector_flops(width, config.text_config.hidden_size, config.projector_depth)
    return rows * cols * (merge * patch + cell) + 2 * square + tokens * projector


def projector_flops(given: int, width: int, depth: int = 2) -> int:
    """Of a projector of linear layers, for each token."""
    return 2 * given * width + (depth - 1) * 2 * width**2


def encoder_flops(config: CLIPVisionConfig, *, layers: int | None = None) -> int:
    """All matrix products of a CLIP vision encoder for one square, its projector not counted.

    Args:
        layers: how many are run; all of them by default.

    >>> round(encoder_flops(CLIP_L_336, layers=23) / 1e9, 1), round(encoder_flops(CLIP_L_336) / 1e9)
    (366.0, 382)
    """
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + 1
    projection = 2 * config.num_channels * config.patch_size**2 * config.hidden_size
    per_layer = tokens * _linear(config) + 4 * tokens**2 * config.hidden_size
    layers = config.num_hidden_layers if layers is None else layers
    return patches * projection + layers * per_layer


def published_encoder_flops(config: CLIPVisionConfig, width: int) -> int:
    """What the published table counts of an encoder and its projector, for one square.

    >>> round(published_encoder_flops(CLIP_L_336, 4096) / 1e9, 1)
    372.1
    """
    patches = (config.image_size // config.patch_size) ** 2
    layers = config.num_hidden_layers * _linear(config)
    return patches * (layers + projector_flops(config.hidden_size, width))


def _linear(config: CLIPVisionConfig) -> int:
    """Of the linear layers of one encoder layer, for each position."""
    return 2 * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size)


def published_decoder_flops(config: EveConfig, positions: int) -> int:
    """What the published table counts of a decoder of the Llama kind with its head.

    >>> [round(published_decoder_flops(EveConfig(), n) / 1e12, 2) for n in (576, 2880, 2304)]
    [15.22, 76.11, 60.89]
    """
    text = config.text_config
    width, heads = text.hidden_size, text.num_attention_heads
    size = text.to_dict().get("head_dim") or width // heads
    attention = 2 * width * size * (heads + text.num_key_value_heads)
    per_layer = attention + 3 * width * text.intermediate_size
    weights = text.num_hidden_layers * per_layer + width * text.vocab_size
    return PER_WEIGHT * weights * positions


CLIP_L_336 = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)


__all__ = [
    "CLIP_L_336",
    "PAPER",
    "TILES",
    "Published",
    "encoder_flops",
    "patch_embedding_flops",
    "projector_flops",
    "published_decoder_flops",
    "published_encoder_flops",
]
