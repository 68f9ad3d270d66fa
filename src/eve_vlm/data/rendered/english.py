"""Ordinary English words to be written in pictures: the whole words among a decoder's tokens.

A byte-level tokenizer holds some twenty thousand words that the web uses most, so the asset
`smollm2` is a word list too.  Easy to get wrong: reading the file takes seconds, so what was found
is kept in the cache folder, under the versions of the asset; and nothing of it enters this package.
"""

import hashlib
import re

from eve_vlm.assets.catalogue import asset_folder, find_asset
from eve_vlm.cache import cache_folder
from eve_vlm.output_folder import written_whole

DICTIONARIES = ("smollm2",)
"""Assets that hold words."""
TOKEN = re.compile("\u0120([a-z]{2,14})")  # a blank (as byte-level tokens write it), then letters


def english_words(asset: str) -> tuple[str, ...]:
    """Lower-case words of 2 to 14 letters, the most frequent first, and some beginnings of words.

    Raises:
        ValueError: if the asset holds no words or is not fetched.
    """
    if asset not in DICTIONARIES:
        raise ValueError(
            f"data.sources.options.dictionary is {asset!r}, which holds no words; use "
            f"{', '.join(DICTIONARIES)}, or leave it out."
        )
    versions = hashlib.sha256(repr((find_asset(asset).versions, TOKEN.pattern)).encode())
    file = cache_folder() / f"words-{asset}-{versions.hexdigest()[:12]}.txt"
    if file.is_file():
        return tuple(file.read_text(encoding="utf-8").split())
    words = tuple(found[1] for token in _tokens(asset) if (found := TOKEN.fullmatch(token)))
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as part:
        part.write_text("\n".join(words) + "\n", encoding="utf-8")
    return words


def _tokens(asset: str) -> list[str]:
    from gguf import GGUFReader

    folder = asset_folder(asset)
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise ValueError(f"{folder} holds no GGUF file; run `eve assets fetch {asset}` again.")
    tokens = GGUFReader(files[0]).fields["tokenizer.ggml.tokens"]
    return [bytes(tokens.parts[place]).decode("utf-8") for place in tokens.data]


__all__ = ["DICTIONARIES", "english_words"]
