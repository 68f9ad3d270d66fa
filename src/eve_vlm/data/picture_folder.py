"""Where the pictures of a data set lie: a folder, a tar or a URL prefix; names to picture refs.

A name must stay inside: `..` or an absolute path is refused, so that a data file of strangers
cannot reach for anything else on the disk.  Easy to get wrong: `image_folder: /` makes every
absolute path an inside one, for data sets that were written with whole paths.
"""

import base64
import binascii
import os
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eve_vlm.data.files import is_url
from eve_vlm.data.picture_ref import (
    PictureBytes,
    PictureFile,
    PicturePart,
    PictureRef,
    PictureUrl,
)
from eve_vlm.data.tar_index import Member, TarIndex


class PictureFolder:
    """Finds the pictures that records name.

    Args:
        place: a folder, a `.tar`, or a URL that names are put behind.
        free: take absolute paths as they are; for data sets whose library wrote them.

    Raises:
        ValueError: if the tar is not there or not whole.
    """

    def __init__(self, place: str | Path, *, free: bool = False):
        self.place, self.free = str(place), free
        self._tar: dict[str, Member] | None = None
        if self.place.endswith(".tar"):
            index = TarIndex(self.place)
            self._tar = {posixpath.normpath(member.name): member for member in index.members()}

    def find(self, value: Any, *, called: str) -> PictureRef:
        """The picture that a record gives: a name, a URL, a data URL, bytes, or bytes and a path.

        Args:
            value: what stands in the record.
            called: what the picture is called in messages, where it has no name of its own.

        Raises:
            ValueError: if it is none of these, or leads out of the folder.
        """
        if isinstance(value, PictureRef):
            return value
        if isinstance(value, Mapping):  # as Hugging Face data sets keep pictures
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes):
            return PictureBytes(name=called, data=value)
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"it has {value!r} where a text or a picture's name belongs; mend or remove it."
            )
        if value.startswith("data:"):
            return PictureBytes(name=called, data=_data_url(value))
        return self._named(value)

    def _named(self, name: str) -> PictureRef:
        if is_url(name):
            return PictureUrl(name=name, url=name)
        if self.free and Path(name).is_absolute():
            return PictureFile(name=name, path=name)
        if is_url(self.place):
            inside = self._inside(name)
            # Into an archive, the name goes in front: zip://a.jpg::s3://bucket/pictures.zip.
            first, chain, outer = self.place.partition("::")
            slash = "" if first.endswith("/") else "/"
            url = f"{first}{slash}{inside}{chain}{outer}"
            return PictureUrl(name=url, url=url)
        if self._tar is not None:
            member = self._tar.get(self._inside(name))
            if member is None:
                raise ValueError(
                    f"{self.place} holds no picture {name!r}; check data.sources.image_folder."
                )
            return PicturePart(
                name=f"{self.place}:{member.name}",
                path=self.place,
                offset=member.offset,
                length=member.length,
            )
        path = os.path.join(self.place, self._inside(name))
        return PictureFile(name=path, path=path)

    def _inside(self, name: str) -> str:
        """The name, counted from the folder and checked to stay in it."""
        inside = posixpath.normpath(name)
        if posixpath.isabs(inside) and self._tar is None and not is_url(self.place):
            inside = posixpath.relpath(inside, Path(self.place).absolute().as_posix())
        if posixpath.isabs(inside) or inside.split("/", 1)[0] == "..":
            raise ValueError(
                f"its picture {name!r} lies outside of {self.place}; set image_folder to a folder "
                "that holds it (/ takes every absolute path)."
            )
        return inside


def _data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("it has a data URL that is not base64; write data:image/png;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error:
        raise ValueError(
            "it has a data URL whose base64 is damaged; write the picture again."
        ) from None


__all__ = ["PictureFolder"]
