"""Where the model of the last `eve quickstart` is, which answers where eve-small cannot.

Apart from the quickstart, because every question asks for it and must not wait for the seconds in
which all that trains is imported.
"""

from pathlib import Path

from eve_vlm.cache import cache_folder

POINTER = "last_quickstart.txt"  # in the cache folder


def last_quickstart_model() -> Path:
    """The folder of the last quickstart run.

    Raises:
        ValueError: if there is none.
    """
    pointer = cache_folder() / POINTER
    if pointer.is_file():
        folder = Path(pointer.read_text(encoding="utf-8").strip())
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        "There is no model yet; run `eve quickstart` first, or name a folder with --model."
    )


def remember(output: Path) -> None:
    """Notes a run as the last one."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    (cache_folder() / POINTER).write_text(str(output.resolve()), encoding="utf-8")


__all__ = ["POINTER", "last_quickstart_model", "remember"]
