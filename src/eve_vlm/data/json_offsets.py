"""Where each record of a JSON or JSON Lines file begins and ends, without reading the file whole.

A file is walked once in blocks of `BLOCK` bytes; what stays in memory is 16 bytes per record,
however long records or lines are.  Only structure is looked at (quotes, brackets, line breaks): a
record that is no valid JSON inside is found when it is read, and then named.  Easy to get wrong: a
quote behind an odd number of backslashes ends no text, and a block can end between the two.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from eve_vlm.data.files import open_file, read_range
from eve_vlm.data.kept_files import kept_array, stamp_of

BLOCK = 2**24
BOM = b"\xef\xbb\xbf"
BLANKS = b" \t\r\n"
# What matters in a JSON file, each as a code; all other bytes are 0.
QUOTE, BACKSLASH, OPEN, CLOSE, COMMA = 1, 2, 3, 4, 5
_CODES = bytes.maketrans(b'"\\[{]},', bytes([QUOTE, BACKSLASH, OPEN, OPEN, CLOSE, CLOSE, COMMA]))
_TABLE = bytes(_CODES[byte] if byte in b'"\\[{]},' else 0 for byte in range(256))


class JsonRecords:
    """The records of a `.json` list or a `.jsonl` file by number.

    Raises:
        ValueError: if the file is not there, or is no whole list of records.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self.lines = self.path.endswith(".jsonl")
        if self.path.endswith(".gz"):
            raise ValueError(
                f"{path} is compressed, so records cannot be read by number; unpack it, or read it "
                "in order with streaming: true."
            )
        self.stamp = stamp_of(path)
        find = line_spans if self.lines else element_spans
        self._spans = kept_array("json", [self.stamp, self.lines], lambda: find(self.path))

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process go names, not offsets: it maps the same file."""
        return JsonRecords, (self.path,)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._spans) - 1  # the last row counts lines

    def text(self, index: int) -> bytes:
        """The bytes of one record."""
        start, end = self._spans[index].tolist()
        return read_range(self.path, start, end - start)

    def __getitem__(self, index: int) -> Any:
        """One record.

        Raises:
            ValueError: if it is not valid JSON, with its line.
        """
        return parsed(self.text(index), lambda: self.place(index))

    def place(self, index: int) -> str:
        """The file and the line in which a record begins, for messages."""
        if int(self._spans[-1, 0]) == len(self):
            return f"{self.path}, line {index + 1}"  # one record a line
        return f"{self.path}, line {_line_at(self.path, int(self._spans[index, 0]))}"


def parsed(text: bytes, place: Any) -> Any:
    """JSON from bytes.

    Args:
        text: the bytes.
        place: gives file and line; called only if something is wrong.

    Raises:
        ValueError: if it is not valid JSON, or not UTF-8.
    """
    try:
        return json.loads(text.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{place()}: not valid JSON ({error.msg}); mend or remove it.") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place()}: not UTF-8 text ({error.reason}); save the file as UTF-8."
        ) from None
    except RecursionError:
        raise ValueError(f"{place()}: nested too deeply to be a record; remove it.") from None


def _line_at(path: str, offset: int) -> int:
    """The line, from 1, of the first byte from a place on that is no blank; reads up to there."""
    lines = 1
    with open_file(path) as file:
        file.seek(offset)
        while (byte := file.read(1)) and byte in BLANKS:
            offset += 1
        file.seek(0)
        while offset > 0 and (block := file.read(min(BLOCK, offset))):
            lines += block.count(b"\n")
            offset -= len(block)
    return lines


def _begin(file: BinaryIO, path: str) -> int:
    """Where the text begins, behind a byte order mark."""
    head = file.read(3)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is not UTF-8 text but UTF-16; save it as UTF-8.")
    start = 3 if head == BOM else 0
    file.seek(start)
    return start


# --- JSON Lines -----------------------------------------------------------------------------------


def line_spans(path: str) -> np.ndarray:
    """(records + 1, 2) int64 starts and ends of lines that hold something; last, all lines."""
    parts: list[np.ndarray] = []
    lines, blank = 0, True  # whether the line that is being read holds nothing so far
    with open_file(path) as file:
        base = _begin(file, path)
        begun = base
        while block := file.read(BLOCK):
            breaks = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            if not len(breaks):
                blank = blank and not block.strip(BLANKS)
                base += len(block)
                continue
            starts = np.concatenate([[begun], base + breaks[:-1] + 1])
            ends = base + breaks
            keep = np.ones(len(breaks), bool)
            keep[0] = not (blank and not block[: breaks[0]].strip(BLANKS))
            keep[1:] = _hold_something(block, breaks)
            parts.append(np.stack([starts, ends], 1)[keep])
            lines += len(breaks)
            begun = base + int(breaks[-1]) + 1
            blank = not block[int(breaks[-1]) + 1 :].strip(BLANKS)
            base += len(block)
        if not blank:
            parts.append(np.array([[begun, base]], np.int64))
            lines += 1
    return np.concatenate([*parts, [[lines, 0]]]).astype(np.int64)


def _hold_something(block: bytes, breaks: np.ndarray) -> np.ndarray:
    """Which of the lines between breaks are more than blanks."""
    starts, ends = breaks[:-1] + 1, breaks[1:]
    keep = ends > starts
    first = np.frombuffer(block, np.uint8)[np.minimum(starts, len(block) - 1)]
    for number in np.flatnonzero(keep & np.isin(first, np.frombuffer(BLANKS, np.uint8))):
        keep[number] = bool(block[starts[number] : ends[number]].strip(BLANKS))
    return keep


# --- JSON lists -----------------------------------------------------------------------------------


class _Marks(NamedTuple):
    """What stands outside texts in a block, by place in the file."""

    places: np.ndarray
    """(marks,) int64."""
    codes: np.ndarray
    """(marks,) OPEN, CLOSE or COMMA."""
    depths: np.ndarray
    """(marks,) brackets that are open behind each."""


def element_spans(path: str) -> np.ndarray:
    """(records + 1, 2) int64 starts and ends of the elements of one list; last, zeros."""
    parts: list[np.ndarray] = []
    with open_file(path) as file:
        base = _begin(file, path)
        base += _blanks_before(file, path)
        begun, closed = base + 1, False  # where the element that is being read begins
        for marks in _marks_of(file, base):
            # Commas of the list itself, and its closing bracket, end an element.
            cuts = marks.places[
                ((marks.codes == COMMA) & (marks.depths == 1))
                | ((marks.codes == CLOSE) & (marks.depths == 0))
            ]
            ends = np.flatnonzero((marks.codes == CLOSE) & (marks.depths == 0))
            if len(ends):
                last = int(marks.places[ends[0]])
                cuts, closed = cuts[cuts <= last], True
            if len(cuts):
                parts.append(np.stack([np.concatenate([[begun], cuts[:-1] + 1]), cuts], 1))
                begun = int(cuts[-1]) + 1
            if closed:
                break
        spans = np.concatenate(parts) if parts else np.empty((0, 2), np.int64)
        if not closed:
            raise ValueError(_broken(path, spans, begun))
        file.seek(begun)
        _nothing_behind(file, path)
    if len(spans) == 1 and not read_range(
        path, int(spans[0, 0]), int(spans[0, 1] - spans[0, 0])
    ).strip(BLANKS):
        spans = spans[:0]
    return np.concatenate([spans, [[0, 0]]]).astype(np.int64)


def _marks_of(file: BinaryIO, base: int) -> Iterator[_Marks]:
    """Brackets and commas outside of texts, block by block."""
    in_text, odd, depth = False, False, 0  # odd: the block ended behind an odd row of backslashes
    while block := file.read(BLOCK):
        codes = np.frombuffer(block.translate(_TABLE), np.uint8)
        places = np.flatnonzero(codes)
        codes = codes[places]
        codes, places, odd = _without_escapes(codes, places, odd, len(block))
        texts = np.cumsum(codes == QUOTE) + in_text  # odd inside of a text
        outside = (texts % 2 == 0) & (codes != QUOTE)
        in_text = bool(texts[-1] % 2) if len(texts) else in_text
        codes, places = codes[outside], places[outside]
        steps = (codes == OPEN).astype(np.int64) - (codes == CLOSE)
        depths = depth + np.cumsum(steps)
        depth = int(depths[-1]) if len(depths) else depth
        yield _Marks(places + base, codes, depths)
        base += len(block)


def _without_escapes(
    codes: np.ndarray, places: np.ndarray, odd: bool, length: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Marks without backslashes and the quotes that they escape; whether the block ends in one."""
    slashes = places[codes == BACKSLASH]
    if not len(slashes):
        if odd and len(places) and places[0] == 0:
            codes, places = codes[1:], places[1:]  # escaped by the block before
        return codes, places, False
    first = np.concatenate([[True], np.diff(slashes) > 1])  # of its row of backslashes
    starts = slashes[first]
    lengths = np.diff(np.concatenate([np.flatnonzero(first), [len(slashes)]]))
    behind = starts + lengths
    parity = lengths % 2
    if odd and starts[0] == 0:
        parity[0] ^= 1
    escaped = behind[parity == 1]
    if odd and starts[0] != 0:
        escaped = np.concatenate([[0], escaped])
    ends_odd = bool(behind[-1] == length and parity[-1])
    keep = (codes != BACKSLASH) & ~np.isin(places, escaped)
    return codes[keep], places[keep], ends_odd


def _blanks_before(file: BinaryIO, path: str) -> int:
    """Steps over blanks to the `[` that opens the list; returns how many there were."""
    count = 0
    while (byte := file.read(1)) and byte in BLANKS:
        count += 1
    if byte == b"[":
        file.seek(-1, 1)
        return count
    if not byte:
        raise ValueError(f"{path}, line 1: not valid JSON (it is empty); give a list of records.")
    what = {b"{": "an object", b'"': "a text"}.get(byte, "something else")
    raise ValueError(
        f"{path} holds {what}, not a list of records; give a JSON list, or name it .jsonl if "
        "every line is a record."
    )


def _nothing_behind(file: BinaryIO, path: str) -> None:
    place = file.tell()
    while block := file.read(BLOCK):
        if rest := block.lstrip(BLANKS):
            line = _line_at(path, place + len(block) - len(rest))
            raise ValueError(
                f"{path}, line {line}: not valid JSON (something follows the end of the list); "
                "mend or remove it."
            )
        place += len(block)


def _broken(path: str, spans: np.ndarray, begun: int) -> str:
    """Says where a list that never ends goes wrong: the first record that is no JSON by itself."""
    for number, (start, end) in enumerate(spans.tolist()):
        try:
            json.loads(read_range(path, start, end - start))
        except ValueError as error:
            line = _line_at(path, start)
            reason = str(error).split(":")[0]
            return (
                f"{path}, line {line}: not valid JSON ({reason} in record {number}, after which "
                "the list has no end); mend or remove it."
            )
    return (
        f"{path}, line {_line_at(path, begun)}: not valid JSON (the file ends inside record "
        f"{len(spans)}, which begins there); it is cut short, so get the file again."
    )


__all__ = ["BLANKS", "BLOCK", "BOM", "JsonRecords", "element_spans", "line_spans", "parsed"]
