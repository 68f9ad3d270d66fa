"""The model `eve` of lmms-eval: its requests answered by our engine, found by an entry point.

`lmms-eval --model eve --model_args pretrained=FOLDER` needs nothing but this package installed
beside it, and this package never needs lmms-eval: the harness asks this module for classes by name,
and only then are they made of its base class.  Tried with lmms-eval 0.7.3.

Easy to get wrong: tasks that rank options know no conversations and run with `--force_simple` only,
which is why there are two classes.
"""

from functools import cache
from typing import Any

from .lmms_model import LmmsRequests


def manifest() -> Any:
    """What the entry point gives to the harness: where its model classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="eve",
        chat_class_path=f"{__name__}.EveLmms",
        simple_class_path=f"{__name__}.EveLmmsSimple",
    )


@cache
def _classes() -> dict[str, type]:
    from lmms_eval.api.model import lmms

    return {
        name: type(name, (LmmsRequests, lmms), {"is_simple": simple, "__module__": __name__})
        for name, simple in (("EveLmms", False), ("EveLmmsSimple", True))
    }


def __getattr__(name: str) -> type:
    """`EveLmms` for tasks that know conversations, `EveLmmsSimple` for `--force_simple`."""
    if name in ("EveLmms", "EveLmmsSimple"):
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["manifest"]
