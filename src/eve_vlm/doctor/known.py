"""Combinations that are known to fail or to mislead, each with where it was seen.

Easy to get wrong: what the metadata say is only a guess at what will happen, so where a package can
be imported in a process of its own, its error text decides and is shown; a hidden import error
costs users hours (LLaVA issue 1101).
"""

import re
from collections.abc import Callable

from eve_vlm.doctor.facts import DISTRIBUTION, Facts
from eve_vlm.doctor.findings import Finding, State, gib

SLOW_BFLOAT16 = 2.0  # times float32; less is not worth a word
ENOUGH_SHARED = 2**30  # bytes; containers often have 64 MiB, one batch of large pictures is more
MASK_RIGHT = (5, 23)  # transformers that was seen to be right; 5.17 was seen to be wrong
# From then on transformers' own adapter functions ask for a PEFT that was not out with it.
ADAPTERS_FROM, ADAPTERS_WANT = (5, 24), (0, 22)
GROUP = "known trouble"


def _is(name: str, state: State, found: str, mend: str = "", source: str = "") -> Finding:
    return Finding(GROUP, name, state, found, mend, source)


def package_import(facts: Facts) -> Finding:
    """Whether this package could be imported at all."""
    error = facts.import_errors.get(DISTRIBUTION)
    if error is None:
        return _is("import of eve_vlm", "ok", "works")
    mend = "mend what the error names; the lines marked BAD say how where it is known"
    return _is("import of eve_vlm", "bad", error, mend)


def torchvision(facts: Facts) -> Finding:
    """A torchvision for another torch, or a CUDA one beside a CPU torch, breaks transformers."""
    name, source = "torchvision", "pytorch/vision issue 9085, huggingface/diffusers issue 9109"
    if name not in facts.versions:
        return _is(name, "ok", "not installed, and not needed")
    version, torch = facts.versions[name], facts.versions.get("torch", "")
    pins = [re.search(r"^torch\s*\(?==\s*([\w.]+)", line) for line in facts.wants.get(name, [])]
    pin = next((found[1] for found in pins if found), "")
    mend = f"pip uninstall -y {name}; nothing here needs it"
    if error := facts.import_errors.get(name):
        built = f" (it was built for torch {pin}, here is {torch})" if pin else ""
        return _is(name, "bad", f"{version} cannot be imported: {error}{built}", mend, source)
    if pin and torch.split("+")[0] != pin:
        found = f"{version} was built for torch {pin}, here is {torch}"
        return _is(name, "warn", found, mend, source)
    return _is(name, "ok", f"{version} can be imported")


def flash_attention(facts: Facts) -> Finding:
    """A flash-attn for another torch; the library's own message often hides the reason."""
    name, source = "flash-attn", "Dao-AILab/flash-attention issue 1625, haotian-liu/LLaVA 1101"
    if name not in facts.versions:
        return _is(name, "ok", "not installed, and not needed: sdpa is the default")
    version = facts.versions[name]
    if error := facts.import_errors.get(name):
        mend = "pip uninstall -y flash-attn, or install the build for this torch"
        return _is(name, "bad", f"{version} cannot be imported: {error}", mend, source)
    return _is(name, "ok", f"{version} can be imported")


def deepspeed(facts: Facts) -> Finding:
    """DeepSpeed compiles its optimizers at first use and then wants the CUDA toolkit."""
    name, source = "deepspeed", "deepspeedai/DeepSpeed issue 2772"
    if name not in facts.versions:
        return _is(name, "ok", "not installed")
    version = facts.versions[name]
    mend = "install the CUDA toolkit and set CUDA_HOME to its folder, or train without deepspeed"
    if error := facts.import_errors.get(name):
        return _is(name, "bad", f"{version} cannot be imported: {error}", mend, source)
    if facts.torch.get("cuda_build") and not facts.cuda_toolkit:
        found = f"{version} without the CUDA toolkit: its own optimizers cannot be compiled"
        return _is(name, "warn", found, mend, source)
    return _is(name, "ok", version)


def cpu_bfloat16(facts: Facts) -> Finding:
    """Measured: CPUs without instructions for it emulate bfloat16."""
    name = "bfloat16 on the CPU"
    ratio = facts.torch.get("bfloat16_ratio")
    if ratio is None:
        return _is(name, "ok", "not measured, torch cannot be imported")
    if ratio < SLOW_BFLOAT16:
        return _is(name, "ok", f"a matrix product takes {ratio:.1f} times as long as in float32")
    found = f"a matrix product takes {ratio:.0f} times as long as in float32"
    state: State = "ok" if facts.torch.get("gpus") else "warn"
    mend = "use float32 on this CPU, as in model.dtype=float32 of a recipe"
    return _is(name, state, found, mend, "pytorch/pytorch issue 146508, measured here")


def float16(facts: Facts) -> Finding:
    """Encoder-free models overflow in float16; only our patch embedding is safe."""
    found = "the patch embedding is computed in float32 in every dtype; the decoder is not"
    mend = "prefer bfloat16 or float32: encoder-free models overflow in float16"
    return _is("float16", "ok", found, mend, "InternLM/lmdeploy 2727, ggml-org/llama.cpp 24146")


def gpu_bfloat16(facts: Facts) -> Finding:
    """GPUs before compute capability 8.0 only emulate bfloat16."""
    old = [gpu["name"] for gpu in facts.torch.get("gpus", ()) if not gpu["bfloat16"]]
    if not old:
        return _is("bfloat16 on the GPU", "ok", "native, or no GPU")
    mend = "use float32 there; float16 overflows in encoder-free models"
    return _is("bfloat16 on the GPU", "warn", f"{', '.join(old)} only emulates it", mend)


def gpu_architectures(facts: Facts) -> Finding:
    """A torch without kernels for a GPU fails at the first product."""
    name, built = "kernels for the GPU", list(facts.torch.get("architectures", ()))
    without = [
        f"{gpu['name']} ({'.'.join(map(str, gpu['capability']))})"
        for gpu in facts.torch.get("gpus", ())
        if not facts.torch.get("hip_build") and not _runs_on(tuple(gpu["capability"]), built)
    ]
    if not without:
        return _is(name, "ok", "built in, or no GPU")
    found = f"torch was built for {', '.join(built)}, not for {', '.join(without)}"
    mend = "install the torch build whose CUDA version still (or already) knows this GPU"
    return _is(name, "bad", found, mend, "pytorch/pytorch issues 31285 and 81883")


def _runs_on(capability: tuple[int, ...], built: list[str]) -> bool:
    """sm_XY runs within its major version from Y on; compute_XY is compiled for anything later."""
    for name in built:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name)
        if found is None:
            continue
        made = (int(found[2]), int(found[3]))
        same_major = found[1] == "compute" or made[0] == capability[0]
        if same_major and made <= capability:
            return True
    return False


def unused_gpu(facts: Facts) -> Finding:
    """An NVIDIA driver is there, but torch cannot use it."""
    name = "GPU and torch build"
    if not facts.driver or facts.torch.get("gpus") or not facts.torch:
        return _is(name, "ok", "fit each other, or no GPU")
    if facts.environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return _is(name, "ok", "GPUs are hidden by CUDA_VISIBLE_DEVICES")
    if not facts.torch.get("cuda_build"):
        found = f"an NVIDIA driver ({facts.driver}) is installed but torch is a CPU build"
        mend = "install a CUDA build of torch: pytorch.org/get-started"
        return _is(name, "warn", found, mend)
    reason = facts.torch.get("cuda_warning") or "torch gives no reason"
    found = f"torch for CUDA {facts.torch['cuda_build']} finds no GPU: {reason}"
    mend = f"update the driver ({facts.driver}), or install a torch for an older CUDA"
    return _is(name, "warn", found, mend)


def assistant_mask(facts: Facts) -> Finding:
    """Wrong in transformers 5.17 where pictures are expanded: places are not moved along."""
    name, version = "assistant mask", facts.versions.get("transformers", "")
    if _release(facts, "transformers", MASK_RIGHT) >= MASK_RIGHT:
        return _is(name, "ok", "right with pictures, or not asked")
    found = f"transformers {version} may give a wrong assistant mask with pictures (5.17 does)"
    mend = "nothing for `eve train`, which makes its own labels; update to 5.23 if you ask for it"
    return _is(name, "warn", found, mend, "run with 5.17.0 and 5.23.0")


def adapters(facts: Facts) -> Finding:
    """From 5.24 on transformers refuses older PEFT, but in functions only that we do not call."""
    name, ours = "PEFT", "`eve` puts adapters in place by PEFT's own function"
    old = _release(facts, "peft", ADAPTERS_WANT) < ADAPTERS_WANT
    if not old or _release(facts, "transformers", (0, 0)) < ADAPTERS_FROM:
        return _is(name, "ok", "not installed, or what transformers asks for")
    found = f"{facts.versions['peft']}: `add_adapter` of transformers asks for 0.22; {ours}"
    return _is(name, "ok", found, "", "run with 5.24.0 and 0.21.2")


def _release(facts: Facts, package: str, unknown: tuple[int, int]) -> tuple[int, int]:
    parts = re.match(r"(\d+)\.(\d+)", facts.versions.get(package, ""))
    return unknown if parts is None else (int(parts[1]), int(parts[2]))


def pillow(facts: Facts) -> Finding:
    """Pillow 13 resizes some tall pictures in the other order, which we get around."""
    found = f"{facts.versions.get('pillow', 'not installed')}: pictures are resized alike with all"
    return _is("Pillow", "ok", found, "", "seen with 10.1 to 13.0; the self-test compares bytes")


def threads(facts: Facts) -> Finding:
    """More threads than cores, or than the control group allows, wait for one another."""
    name, wanted = "threads", facts.torch.get("threads", 1)
    allowed = min(float(facts.cores), facts.limit or float(facts.cores))
    if wanted <= max(1.0, allowed):
        return _is(name, "ok", "no more than cores")
    found = f"torch uses {wanted} threads, this process may use {allowed:g} cores"
    mend = f"export OMP_NUM_THREADS={max(1, int(allowed))}"
    return _is(name, "warn", found, mend, "pytorch/pytorch issue 193859")


def shared_memory(facts: Facts) -> Finding:
    """Data workers hand over batches in /dev/shm and die with a bus error when it is full."""
    name = "shared memory"
    if facts.shared is None or facts.shared >= ENOUGH_SHARED:
        return _is(name, "ok", "enough for data workers, or not used on this system")
    found = f"/dev/shm has {gib(facts.shared)}: data workers may end with a bus error"
    mend = "start the container with --shm-size=8g, or set training.dataloader_num_workers=0"
    return _is(name, "warn", found, mend, "pytorch/pytorch issue 5040")


def tensor_float32(facts: Facts) -> Finding:
    """An environment variable that makes float32 products on GPUs keep 10 bits of 23."""
    name = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
    if facts.environment.get(name, "0") == "0" or not facts.torch.get("gpus"):
        return _is("TF32", "ok", "not forced by the environment")
    found = f"{name} is set: float32 keeps 10 bits, and the self-test in it will fail"
    mend = f"unset {name}; the patch embedding relies on float32"
    return _is("TF32", "warn", found, mend, "torch's notes on numerical accuracy")


KNOWN: tuple[Callable[[Facts], Finding], ...] = (
    *(package_import, torchvision, flash_attention, deepspeed, unused_gpu, gpu_architectures),
    *(gpu_bfloat16, cpu_bfloat16, float16, tensor_float32, threads, shared_memory),
    *(assistant_mask, adapters, pillow),
)

__all__ = ["KNOWN"]
