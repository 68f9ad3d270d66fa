"""Which model a command takes when none is named: eve-small, in this one place for all of them.

Easy to get wrong: a decoder that it needs is fetched here, at the first use, and a machine without
a network is then no worse off than before: the model of the last `eve quickstart` answers, and it
is said.
"""

import sys
from contextlib import redirect_stdout
from pathlib import Path

from .training import tell


class MissingDecoderError(ValueError):
    """The decoder is not there and could not be fetched."""


def default_model() -> str:
    """The folder of the model that answers when none is named.

    That is eve-small; where it needs a decoder that is neither there nor can be fetched, or this
    version has no eve-small, the model of the last quickstart run.

    Raises:
        ValueError: if there is neither; says both commands.
    """
    from eve_vlm.default_model import assembling
    from eve_vlm.last_quickstart import last_quickstart_model

    if not assembling.is_shipped():
        return str(last_quickstart_model())
    try:
        return str(eve_small())
    except MissingDecoderError as error:
        return _instead(str(error))


def eve_small() -> Path:
    """The folder of eve-small; a decoder that it needs is fetched and put to it at the first use.

    Raises:
        MissingDecoderError: if the decoder cannot be fetched.
        ValueError: if this version has no eve-small, or a file is damaged.
    """
    from eve_vlm.default_model import assembling

    if not assembling.is_shipped():
        raise ValueError("this version of the package was built without it.")
    if not assembling.is_whole() and not assembling.has_decoder():
        try:
            _fetch(assembling.DECODER)
        except ValueError as error:
            raise MissingDecoderError(str(error)) from None
    with redirect_stdout(sys.stderr):  # a library that greets at its import is no answer
        return assembling.assembled_folder(say=tell)


def _fetch(name: str) -> None:
    from eve_vlm.assets.catalogue import fetch, find_asset, require_space

    asset = find_asset(name)
    tell(
        f"eve-small: fetching its decoder once, {asset.bytes / 1e6:.0f} MB ({asset.what}; "
        f"{asset.licence})"
    )
    require_space([name])
    fetch(name, say=tell)


def _instead(problem: str) -> str:
    from eve_vlm.last_quickstart import last_quickstart_model

    try:
        folder = last_quickstart_model()
    except ValueError:
        raise ValueError(
            f"eve-small lacks its decoder: {problem} With a network `eve assets fetch smollm2` "
            "brings it; without one `eve quickstart` trains a model, or name a folder with --model."
        ) from None
    tell(f"eve-small lacks its decoder ({problem}), so {folder} answers.")
    return str(folder)


__all__ = ["MissingDecoderError", "default_model", "eve_small"]
