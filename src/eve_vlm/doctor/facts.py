"""What `eve doctor` finds out about a machine, before it judges anything.

Nothing that may be broken is imported here: versions come from package metadata, and torch and
whatever is compiled against it are imported in processes of their own, whose error text is kept.
Easy to get wrong: inside a container the cores and the memory of the machine are not what a process
may take; the limits of its control group are.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DISTRIBUTION = "eve-vlm"
# Packages with parts compiled against one torch, by their import names.
COMPILED = {"torchvision": "torchvision", "flash-attn": "flash_attn", "deepspeed": "deepspeed"}
PATIENCE = 120  # seconds for one import in a process of its own; ten are usual on a busy machine
HUB_PATIENCE = 2.5  # seconds; name servers alone may take longer than any timeout of a socket
CGROUP = Path("/sys/fs/cgroup")
NVIDIA = Path("/proc/driver/nvidia/version")
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Facts:
    """Everything that the checks judge; tests forge machines by replacing some of it.

    versions: of installed distributions, by normalised name.
    wants: what some installed distributions require, by normalised name.
    own: requirements of this package, [] where it is not installed.
    torch: what `probe.py` answered; empty where torch could not be imported.
    import_errors: last line of the error, by normalised name, of what could not be imported.
    cores, limit: cores that this process may use, and the control group's limit on CPU time.
    memory: (total, free) bytes of RAM, None where unknown; `shared` of it for data workers.
    disks: free bytes, by what the folder is; None where it cannot be written to.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    wants: Mapping[str, list[str]] = field(default_factory=dict)
    own: list[str] = field(default_factory=list)
    torch: Mapping[str, Any] = field(default_factory=dict)
    import_errors: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    cores: int = 1
    limit: float | None = None
    memory: tuple[int, int] | None = None
    shared: int | None = None
    disks: Mapping[str, int | None] = field(default_factory=dict)
    driver: str = ""
    cuda_toolkit: bool = False
    hub: str = "not asked"


def normalised(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def tidy(text: str) -> str:
    """Text for a public report: no home folder, no folder of installed packages."""
    for folder in sorted({path for path in sys.path if path.endswith("-packages")}, reverse=True):
        text = text.replace(folder + os.sep, "")
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def run_python(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and error text of this Python with arguments, in a process of its own.

    `-P`: neither the script's folder nor the working folder may stand in for installed packages.
    """
    command = [sys.executable, "-P", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return 1, "", f"it did not end within {PATIENCE} seconds"
    if done.returncode < 0:
        return done.returncode, "", f"it was ended by signal {-done.returncode}"
    return done.returncode, done.stdout, done.stderr


def error_of(stderr: str) -> str:
    """The line of a traceback that says what happened: the last one that names an error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Warning)\b", line)]
    return tidy((named or lines or ["it ended without a word"])[-1])


def probe_torch() -> tuple[dict[str, Any], str]:
    """What torch says of this machine, and the error where it says nothing."""
    code, output, stderr = run_python(str(Path(__file__).with_name("probe.py")))
    return (json.loads(output.splitlines()[-1]), "") if code == 0 else ({}, error_of(stderr))


def import_error(module: str) -> str:
    """The error of importing a module, "" if it can be imported."""
    code, _, stderr = run_python("-c", f"import {module}")
    return "" if code == 0 else error_of(stderr)


def cpu_limit(root: Path = CGROUP) -> float | None:
    """Cores' worth of CPU time that the control group allows; None without a limit."""
    new, old = root / "cpu.max", root / "cpu" / "cpu.cfs_quota_us"
    if new.is_file():
        quota, period = new.read_text().split()[:2]
    elif old.is_file():
        quota, period = old.read_text(), old.with_name("cpu.cfs_period_us").read_text()
    else:
        return None
    return None if quota.strip() in ("max", "-1") else int(quota) / int(period)


def memory_limit(root: Path = CGROUP) -> int | None:
    """Bytes that the control group allows; None without a limit."""
    for file in (root / "memory.max", root / "memory" / "memory.limit_in_bytes"):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            return int(text)
    return None


def memory() -> tuple[int, int] | None:
    """Total and free bytes of RAM, within the limit of the control group."""
    try:
        import psutil  # comes with accelerate
    except ImportError:
        return None
    state = psutil.virtual_memory()
    total = min(state.total, memory_limit() or state.total)
    return total, min(total, state.available)


def usable_cores() -> int:
    """Cores that this process may run on, which may be fewer than the machine has."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_disk(folder: Path) -> int | None:
    """Free bytes where a folder is or would be; None if nothing can be written there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        probe = folder / f".eve-doctor-{os.getpid()}"
        probe.touch()
        probe.unlink()
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def nvidia_driver(file: Path = NVIDIA) -> str:
    """Version of the NVIDIA kernel driver, "" if there is none."""
    if file.is_file():
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", file.read_text())
        return found[0] if found else "unknown"
    program = shutil.which("nvidia-smi")  # Windows has no such file
    if program is None:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else ""


def ask_hub(*, offline: bool = False) -> str:
    """How the model hub is reached: "offline", "reachable" or "not reachable"; takes seconds."""
    if offline:
        return "not asked"
    try:
        from huggingface_hub import constants
    except (ImportError, OSError, RuntimeError, AttributeError):
        return "not asked: huggingface_hub cannot be imported"
    if constants.HF_HUB_OFFLINE:
        return "offline"
    answers: list[str] = []

    def knock() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=HUB_PATIENCE):
                answers.append("reachable")
        except urllib.error.HTTPError:
            answers.append("reachable")  # it answered, if only to refuse
        except (OSError, ValueError):
            answers.append("not reachable")

    # A thread that may be left behind, because looking up a name knows no timeout.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE)
    return answers[0] if answers else "not reachable"


def gather(*, offline: bool = False, broken: str = "") -> Facts:
    """Asks everything, side by side where it takes long.

    Args:
        offline: do not ask for the model hub.
        broken: the error of importing this package, if whoever calls has seen one.
    """
    from eve_vlm.cache import cache_folder

    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        # A folder without a name is what a broken uninstall leaves behind.
        if distribution.metadata and "Name" in distribution.metadata:
            found.setdefault(normalised(distribution.metadata["Name"]), distribution)
    with ThreadPoolExecutor() as pool:
        torch = pool.submit(probe_torch)
        hub = pool.submit(ask_hub, offline=offline)
        imports = {
            name: pool.submit(import_error, module)
            for name, module in COMPILED.items()
            if name in found
        }
    errors = {name: error for name, future in imports.items() if (error := future.result())}
    if torch.result()[1]:
        errors["torch"] = torch.result()[1]
    if broken:
        errors[DISTRIBUTION] = tidy(broken)
    own = found.get(DISTRIBUTION)
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or shutil.which("nvcc")
    return Facts(
        versions={name: distribution.version for name, distribution in found.items()},
        wants={name: found[name].requires or [] for name in COMPILED if name in found},
        own=(own.requires or []) if own else [],
        torch=torch.result()[0],
        import_errors=errors,
        environment=dict(os.environ),
        cores=usable_cores(),
        limit=cpu_limit(),
        memory=memory(),
        shared=shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None,
        disks={"cache folder": free_disk(cache_folder()), "working folder": free_disk(Path.cwd())},
        driver=nvidia_driver(),
        cuda_toolkit=bool(toolkit) or Path("/usr/local/cuda").is_dir(),
        hub=hub.result(),
    )


__all__ = ["Facts", "ask_hub", "gather", "tidy"]
