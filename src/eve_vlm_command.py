"""Starts the command `eve`, also where torch or transformers cannot be imported.

Importing any part of a package runs the package's `__init__` first, and that of `eve_vlm` imports
the model and so torch and transformers. This module stands beside the package so that somebody is
left to say what is wrong. `eve doctor` then runs without the model; any other command ends with one
sentence. Easy to get wrong: `python -m eve_vlm.cli` has no such protection.
"""

import importlib.util
import os
import sys
import traceback
import types

# What importing a package that was compiled against another torch has been seen to raise.
BREAKS = (ImportError, RuntimeError, OSError, AttributeError, TypeError, ValueError)


def explain(error: BaseException) -> str:
    """One line: the package in whose code the import ended, the kind of error, its first line."""
    while error.__cause__ is not None:  # transformers puts "Could not import module" around it
        error = error.__cause__
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    below = [name.replace(os.sep, "/").rpartition("-packages/")[2] for name in files]
    packages = [name.split("/")[0] for name, file in zip(below, files, strict=True) if name != file]
    where = f"in {packages[-1]}: " if packages else ""
    lines = str(error).strip().splitlines() or [""]
    return f"{where}{type(error).__name__}: {lines[0]}"


def without_model(note: str) -> None:
    """Puts an empty `eve_vlm` in place, whose other modules can be imported all the same."""
    for name in [name for name in sys.modules if name.split(".")[0] == "eve_vlm"]:
        del sys.modules[name]
    spec = importlib.util.find_spec("eve_vlm")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("the package eve_vlm itself is not installed")
    package = types.ModuleType("eve_vlm")
    package.__path__ = list(spec.submodule_search_locations)
    vars(package)["import_error"] = note
    sys.modules["eve_vlm"] = package


def main() -> None:
    """Runs the command line; with a broken torch or transformers only `eve doctor`."""
    try:
        import eve_vlm  # noqa: F401
    except BREAKS as error:
        if os.environ.get("EVE_DEBUG"):
            raise
        note = explain(error)
        if sys.argv[1:2] != ["doctor"]:
            sys.stderr.write(
                f"eve: what it builds on cannot be imported ({note}); run `eve doctor` to see what "
                "to mend.\n"
            )
            sys.exit(2)
        without_model(note)
    from eve_vlm.cli import main as run

    run()


if __name__ == "__main__":
    main()
