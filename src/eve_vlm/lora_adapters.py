"""Adapters put between the layers of a model, by PEFT's own function and not by the library's.

The library's `add_adapter` does the same, but first asks for the PEFT that it wants: 0.22 in
transformers 5.24, when 0.21.2 was the latest there was.  Easy to get wrong: the library looks at
one mark of a model to see that it has adapters; without it a quantized model is not trained, and
gradients do not reach checkpointed layers.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import peft

    from .modeling_eve import EveForConditionalGeneration

ADAPTER = "default"  # PEFT's name of the only one
INSTALL = 'pip install "eve-vlm[lora]"'


def put_adapters(model: "EveForConditionalGeneration", settings: "peft.PeftConfig") -> None:
    """Puts new adapters in place; they are then all that learns.

    Args:
        model: is changed.
        settings: kept as `model.peft_config[ADAPTER]`, with the model's name as their base.

    Raises:
        ValueError: PEFT's own, if the model has none of the layers that they ask for.
    """
    import peft

    settings.base_model_name_or_path = model.name_or_path
    peft.inject_adapter_in_model(settings, model, ADAPTER)
    model._hf_peft_config_loaded = True


def require_peft(what: str) -> None:
    """Says how to install PEFT where it is missing.

    Raises:
        ValueError: if it is.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ValueError(f"{what} needs peft; install it with: {INSTALL}") from None


__all__ = ["ADAPTER", "put_adapters", "require_peft"]
