"""What `eve doctor` reports: versions, the machine, the hub, and which extras are complete.

Each check is a small function from facts to findings, so that a test can forge the machine. Easy to
get wrong: being offline, or without a GPU, or without an extra, is an ordinary state and never
"bad".
"""

import platform
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from eve_vlm.doctor.facts import DISTRIBUTION, Facts, normalised

if TYPE_CHECKING:
    from packaging.requirements import Requirement

State = Literal["ok", "warn", "bad"]
ALWAYS_SHOWN = ("torch", "transformers", "accelerate", "safetensors", "pillow", "numpy")
SHOWN_TOO = ("tokenizers", "huggingface-hub")  # come with transformers, and matter in reports
LITTLE_DISK = 5 * 2**30  # bytes; a small model, its optimizer and a checkpoint


class Finding(NamedTuple):
    """One line: what was looked at, how it is, what was found, how to mend it, and the source."""

    group: str
    name: str
    state: State
    found: str
    mend: str = ""
    source: str = ""


def gib(size: int) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:,.1f} GiB"


def versions(facts: Facts) -> Iterator[Finding]:
    """Python, this package, and everything that it cannot do without, against the stated ranges."""
    from packaging.requirements import Requirement

    yield Finding("versions", "python", "ok", platform.python_version())
    own = facts.versions.get(DISTRIBUTION)
    if own is None:
        mend = "pip install -e . in its folder; until then versions are not compared"
        yield Finding("versions", DISTRIBUTION, "warn", "runs from a folder, not installed", mend)
    else:
        yield Finding("versions", DISTRIBUTION, "ok", own)
    needed = [Requirement(line) for line in facts.own]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in needed:
        yield _in_range(facts, normalised(one.name), one)
    named = {normalised(one.name) for one in needed}
    rest = SHOWN_TOO if needed else (*ALWAYS_SHOWN, *SHOWN_TOO)
    for name in rest:
        if name not in named:
            yield Finding("versions", name, "ok", facts.versions.get(name, "not installed"))


def _in_range(facts: Facts, name: str, wanted: "Requirement") -> Finding:
    found = facts.versions.get(name)
    if found is None:
        return Finding(
            "versions", name, "bad", "not installed", f"pip install '{wanted.name}{_range(wanted)}'"
        )
    if wanted.specifier.contains(found, prereleases=True):
        return Finding("versions", name, "ok", found)
    mend = f"pip install '{wanted.name}{_range(wanted)}'"
    return Finding("versions", name, "bad", f"{found}, outside {_range(wanted)}", mend)


def _range(wanted: "Requirement") -> str:
    """A requirement's range, the lower bound first."""
    return ",".join(sorted(map(str, wanted.specifier), key=lambda part: part.startswith("<")))


def torch_build(facts: Facts) -> Iterator[Finding]:
    """What torch was built for, or why it cannot be imported."""
    error = facts.import_errors.get("torch")
    if error:
        mend = "install torch again, from the index for this machine: pytorch.org/get-started"
        yield Finding("devices", "torch", "bad", f"cannot be imported: {error}", mend)
        return
    cuda, hip = facts.torch.get("cuda_build"), facts.torch.get("hip_build")
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU"
    yield Finding("devices", "torch build", "ok", f"{facts.torch.get('version')} for {build}")


def devices(facts: Facts) -> Iterator[Finding]:
    """Cores, memory, GPUs and disks."""
    system = f"{platform.system()} {platform.machine()}"
    limited = "" if facts.limit is None else f", limited to {facts.limit:g} by the control group"
    threads = facts.torch.get("threads")
    used = "" if threads is None else f", torch uses {threads} threads"
    yield Finding("devices", "CPU", "ok", f"{facts.cores} cores{limited}{used} ({system})")
    if facts.memory is None:
        yield Finding(
            "devices", "RAM", "warn", "unknown, psutil is not installed", "pip install psutil"
        )
    else:
        total, free = facts.memory
        yield Finding("devices", "RAM", "ok", f"{gib(free)} free of {gib(total)}")
    for index, gpu in enumerate(facts.torch.get("gpus", ())):
        capability = ".".join(map(str, gpu["capability"]))
        found = f"{gpu['name']}, {gib(gpu['free'])} free of {gib(gpu['total'])}, "
        driver = f", driver {facts.driver}" if facts.driver else ""
        found += f"compute capability {capability}{driver}"
        yield Finding("devices", f"GPU {index}", "ok", found)
    if facts.torch.get("mps"):
        yield Finding("devices", "GPU", "ok", "Apple (mps), shares the RAM")
    elif not facts.torch.get("gpus"):
        yield Finding("devices", "GPU", "ok", "none that torch can use")
    for name, left in facts.disks.items():
        yield _disk(name, left)


def _disk(name: str, free: int | None) -> Finding:
    if free is None:
        mend = "mend its permissions, or set EVE_CACHE to another folder"
        if name == "working folder":
            mend = "run from a folder that you may write to"
        return Finding("devices", name, "bad" if "cache" in name else "warn", "read-only", mend)
    if free < LITTLE_DISK:
        mend = "make room, or set EVE_CACHE to a folder on a larger disk"
        return Finding("devices", name, "warn", f"only {gib(free)} free", mend)
    return Finding("devices", name, "ok", f"can be written to, {gib(free)} free")


HUB = {
    "offline": ("offline, because HF_HUB_OFFLINE is set: folders and the cache work", ""),
    "reachable": ("reachable", ""),
    "not reachable": (
        "not reachable: folders and the cache work, names that are not in the cache do not",
        "nothing, if that is meant; HF_HUB_OFFLINE=1 then saves the waiting",
    ),
}


def hub(facts: Facts) -> Iterator[Finding]:
    """The model hub; not reaching it is an ordinary state."""
    found, mend = HUB.get(facts.hub, (facts.hub, ""))
    yield Finding("devices", "model hub", "ok", found, mend)


def extras(facts: Facts) -> Iterator[Finding]:
    """Every extra of the package's metadata: complete, or what is missing and the pip line."""
    from packaging.requirements import Requirement

    wanted: dict[str, dict[str, Requirement]] = {}
    for line in facts.own:
        one = Requirement(line)
        for extra in _extras_of(one):
            if one.marker and one.marker.evaluate({"extra": extra}):
                wanted.setdefault(extra, {})[normalised(one.name)] = one
    for extra, requirements in wanted.items():
        lacking = [
            f"{one.name}{_range(one)}"
            for name, one in requirements.items()
            if not _fits(facts.versions.get(name), one)
        ]
        if lacking:
            mend = "pip install " + " ".join(f"'{name}'" for name in lacking)
            yield Finding("extras", extra, "ok", f"{len(lacking)} missing", mend)
        else:
            yield Finding("extras", extra, "ok", f"complete ({len(requirements)} packages)")


def _extras_of(one: "Requirement") -> list[str]:
    return re.findall(r"extra == [\"']([\w.-]+)[\"']", str(one.marker or ""))


def _fits(version: str | None, one: "Requirement") -> bool:
    return version is not None and one.specifier.contains(version, prereleases=True)


__all__ = ["Finding", "State", "devices", "extras", "hub", "torch_build", "versions"]
