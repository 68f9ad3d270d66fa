"""What a recipe wants of devices: arguments of the library's trainer, and whether they are here.

One key says how a model is spread; the settings behind it are here and not in every recipe.  A
recipe that needs others gives `training.deepspeed` or `training.fsdp_config` itself.  Easy to get
wrong: DeepSpeed clips gradients only where its own configuration says so, hence
`gradient_clipping: auto`; and unknown keys of `fsdp_config` are left out without a word.
"""

from typing import Any

from transformers.utils import (
    is_torch_bf16_gpu_available,
    is_torch_tf32_available,
    is_torch_xla_available,
)

from eve_vlm.train.sections import DevicesSection, Recipe


def check_device(recipe: Recipe) -> None:
    """Refuses a recipe for a GPU where there is none, before anything is built or trained.

    Raises:
        ValueError: with the keys that want one.
    """
    training = recipe.training
    # As the library asks; a TPU (XLA) is no GPU and knows bfloat16.
    half = training.get("use_cpu") or is_torch_bf16_gpu_available() or is_torch_xla_available()
    wants = []
    if training.get("bf16") and not half:
        wants.append("bf16")
    if training.get("tf32") and not is_torch_tf32_available():
        wants.append("tf32")
    if wants:
        keys = " and ".join(f"training.{name}" for name in wants)
        raise ValueError(
            f"{keys} {'want' if wants[1:] else 'wants'} a GPU, and torch finds none here that can; "
            f"give {' '.join(f'training.{name}=false' for name in wants)} to train in float32 all "
            "the same, or take a recipe for a CPU."
        )


def strategy_arguments(devices: DevicesSection) -> dict[str, Any]:
    """Arguments of `TrainingArguments` for a strategy; empty for `ddp`, which needs none."""
    if devices.strategy == "ddp":
        return {}
    if devices.strategy == "fsdp2":
        return {"fsdp": True, "fsdp_config": _fsdp2(devices.cpu_offload)}
    stage = 2 if devices.strategy == "zero2" else 3
    return {"deepspeed": _zero(stage, devices.cpu_offload)}


def _zero(stage: int, offload: bool) -> dict[str, Any]:
    """DeepSpeed's ZeRO; "auto" takes the value that the recipe gives under `training`."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    host = {"device": "cpu", "pin_memory": True}
    if offload:
        zero["offload_optimizer"] = host
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if offload:
            zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
    }


def _fsdp2(offload: bool) -> dict[str, Any]:
    """Layers are sharded one by one; the rest of the model is one group."""
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": True,
        "cpu_offload": offload,
        "state_dict_type": "FULL_STATE_DICT",
    }


__all__ = ["check_device", "strategy_arguments"]
