"""Frames of a video, evenly spread: from a folder of pictures, or a video file through PyAV.

A model of pictures sees a video as a few of them, the first and the last frame included.  Easy to
get wrong: a video file's own count of frames may be absent or too high, so the frames are counted
by decoding whenever the one that is wanted does not come.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eve_vlm.pictures import open_picture

VIDEOS = (".mp4", ".avi", ".webm", ".mkv", ".mov")
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def spread(total: int, count: int) -> list[int]:
    """Places of `count` of `total` frames, the first and the last included.

    >>> spread(9, 3)
    [0, 4, 8]
    """
    return [int(place) for place in np.linspace(0, total - 1, min(count, total)).astype(int)]


def video_frames(path: Path, count: int) -> list[Image.Image]:
    """Some frames of a video, in their order; all, if it has no more.

    Args:
        path: a video file, or a folder with its frames, whose names say their order.
        count: most frames.

    Raises:
        ValueError: if there are none, or they cannot be read.
    """
    if path.is_dir():
        names = sorted(one for one in path.iterdir() if one.suffix.lower() in PICTURES)
        if not names:
            raise ValueError(f"{path} has no pictures; put the video's frames there.")
        return [open_picture(names[place]) for place in spread(len(names), count)]
    return _decoded_frames(path, count)


def _decoded_frames(path: Path, count: int) -> list[Image.Image]:
    try:
        import av
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} needs the package av to be decoded; install it with pip install "
            f'"eve-vlm[video]", or put its frames as pictures into a folder {path.stem}.'
        ) from None
    try:
        with av.open(str(path)) as video:
            total = video.streams.video[0].frames if video.streams.video else 0
        places = spread(total, count) if total else []
        found = _at(path, places) if places else {}
        if len(found) < len(set(places)) or not places:
            places = spread(sum(1 for _ in _decode(path)), count)
            found = _at(path, places)
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path} cannot be decoded ({error}); get the video again.") from None
    if not found:
        raise ValueError(f"{path} has no frames; get the video again.")
    return [found[place] for place in places]


def _at(path: Path, places: list[int]) -> dict[int, Image.Image]:
    wanted = set(places)
    return {n: frame.to_image() for n, frame in enumerate(_decode(path)) if n in wanted}


def _decode(path: Path) -> Iterator[Any]:
    import av

    with av.open(str(path)) as video:
        if video.streams.video:
            yield from video.decode(video=0)


__all__ = ["PICTURES", "VIDEOS", "spread", "video_frames"]
