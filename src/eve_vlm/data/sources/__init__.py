"""Where records come from: files in many forms, behind one shape, and mixtures of them."""

from eve_vlm.data.sources.build import build_mixture, build_source, source_of
from eve_vlm.data.sources.mixture import Mixture, MixtureRow
from eve_vlm.data.sources.quarantine import Quarantine, read_quarantine
from eve_vlm.data.sources.source import LlavaSource, Source

__all__ = [
    "LlavaSource",
    "Mixture",
    "MixtureRow",
    "Quarantine",
    "Source",
    "build_mixture",
    "build_source",
    "read_quarantine",
    "source_of",
]
