"""What a run ran on: versions of everything that decides its numbers, the commit, the devices.

Written into the run's folder at the start, and again at a resume, because the machine may be
another by then.  Easy to get wrong: the version of this package says little in a checkout; the
commit does, and whether files differ from it.
"""

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import eve_vlm
from eve_vlm.output_folder import written_whole

VERSIONS_FILE = "versions.json"
PACKAGES = (
    *("torch", "transformers", "accelerate", "peft", "safetensors", "tokenizers", "datasets"),
    *("deepspeed", "bitsandbytes", "torchao", "flash-attn", "liger-kernel", "numpy", "pillow"),
)
PATIENCE = 10  # seconds for git


def versions(*, world_size: int = 1, device: torch.device | None = None) -> dict[str, Any]:
    """Versions, commit and devices; packages that are not installed are None."""
    return {
        "eve_vlm": eve_vlm.__version__,
        "commit": commit_of(Path(eve_vlm.__file__).resolve().parent),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "device": _device_name(device),
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "command": " ".join(Path(part).name if n == 0 else part for n, part in enumerate(sys.argv)),
    }


def write_versions(folder: Path, **facts: Any) -> None:
    """Writes `versions.json`; see `versions`."""
    with written_whole(folder / VERSIONS_FILE) as part:
        part.write_text(json.dumps(versions(**facts), indent=1) + "\n", encoding="utf-8")


def commit_of(folder: Path) -> str | None:
    """The commit of a checkout, with "+" where files differ from it; None outside of one."""
    found = _git(folder, "rev-parse", "HEAD")
    if not found:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", str(folder))
    return found + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device | None) -> str:
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


__all__ = ["VERSIONS_FILE", "commit_of", "versions", "write_versions"]
