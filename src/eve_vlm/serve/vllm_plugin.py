"""vLLM's way to our models: `vllm serve FOLDER` finds this file by an entry point, without flags.

vLLM runs them through its transformers backend, so attention, cache and batching are its own; what
is here says which class serves an architecture, and mends three things that the backend gets wrong
for models like ours.  Easy to get wrong: vLLM calls `register_eve` in each of its processes, so it
must be cheap and harmless to repeat; the class itself is made where a model is loaded.
"""

from functools import cache
from typing import Any

ARCHITECTURES = ("EveForConditionalGeneration", "EveForPreTraining")
# vLLM asks this module for the class by name (`__getattr__` below).
SERVED_BY = f"{__name__}:EveForVllm"
# They compute in float32 whatever the weights' type; vLLM's own layers would not.
KEPT = ("vision_tower", "multi_modal_projector")


def register_eve() -> None:
    """Makes transformers know EVE's classes, and vLLM the class that serves them.

    Raises:
        ValueError: if vLLM is not installed.
    """
    try:
        from vllm import ModelRegistry
    except ImportError:
        raise ValueError(
            "Serving with vLLM needs vllm, which is not installed; install it as docs/vllm.md says."
        ) from None
    import eve_vlm

    eve_vlm.register()
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, SERVED_BY)


@cache
def _served_class() -> type:
    """The backend's multimodal class with three changes, each of which a test can see fail."""
    from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM

    class EveForVllm(TransformersMultiModalForCausalLM):
        """An `EveModel` in vLLM, with vLLM's language head."""

        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            # Published models have a placeholder that lies behind their last word.
            self.configure_mm_token_handling(
                self.text_config.vocab_size, [self.config.image_token_id]
            )

        def _create_hf_to_vllm_mapper(self) -> None:
            # `EveModel` passes over the head of a whole checkpoint, but here is one to load.
            # Without this it stays random, and nothing says so (seen with 0.32.0).
            self.model._keys_to_ignore_on_load_unexpected -= {r"^lm_head\.weight$"}
            super()._create_hf_to_vllm_mapper()

        def recursive_replace(self) -> None:
            # Out of sight of the replacement by vLLM's layers, which follow the weights' type and
            # fail on float32 input.
            kept = {name: self.model._modules.pop(name) for name in KEPT}
            super().recursive_replace()
            self.model._modules.update(kept)

    return EveForVllm


def __getattr__(name: str) -> type:
    if name == "EveForVllm":
        return _served_class()
    raise AttributeError(f"module {__name__} has no attribute {name}")


__all__ = ["ARCHITECTURES", "register_eve"]
