"""A record to model inputs: ids, labels, patches, and the teacher's view.

Labels come from the character spans of the answers in the rendered conversation, which is tokenised
once as a whole; nothing is tokenised in pieces and counted together, which is how published
trainers lose samples silently (LLaVA#1166).  A record that cannot be used raises a ValueError with
its id and the reason; it is the caller who counts.

A record's size in tokens and patches is known from its text and the headers of its pictures
(`Encoder.size`), so rows are planned without decoding a pixel.  Easy to get wrong: `<image>` is one
token while the text is tokenised, and is repeated afterwards.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jinja2 import TemplateError
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from eve_vlm.data.feature_table import KEY_BYTES, FeatureTable
from eve_vlm.data.packing import Size
from eve_vlm.data.picture_ref import open_image, open_with_digest, size_of_image
from eve_vlm.data.records import Record, parts_of, text_of
from eve_vlm.data.teacher_view import TeacherView
from eve_vlm.image_processing_eve import EveGrid, num_image_tokens
from eve_vlm.processing_eve import EveProcessor

IGNORED = -100
GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")


class EncodedRecord(NamedTuple):
    """One record as arrays; `T` tokens, `P` patches, `I` pictures."""

    id: str
    input_ids: np.ndarray
    """(T,) int64, with one placeholder per picture token."""
    labels: np.ndarray
    """(T,) int64, -100 where nothing is learnt."""
    pixel_values: np.ndarray
    """(P, 3 * p * p) float32."""
    image_grid_thw: np.ndarray
    """(I, 3) int64."""
    teacher_pixel_values: np.ndarray | None
    """(I, size, size, 3) uint8, less those in `teacher_kept`; None without a teacher."""
    source: str = ""
    """Name of the data set that it comes from."""
    teacher_keys: tuple[bytes, ...] = ()
    """What each picture's features are kept under; empty where none are."""
    teacher_kept: tuple[np.ndarray | None, ...] = ()
    """(cells, width) float16 for each picture, or None where the teacher has to be asked."""


class TeacherShare(NamedTuple):
    """What of a record is for the teacher; the fields are those of `EncodedRecord`."""

    pixel_values: np.ndarray | None
    """Canvases of the pictures that the teacher has to be asked about."""
    keys: tuple[bytes, ...] = ()
    """What each picture's features are kept under."""
    kept: tuple[np.ndarray | None, ...] = ()
    """Kept features of each picture, or None."""


class BadRecord(NamedTuple):
    """A record that cannot be used, and why."""

    reason: str
    id: str = ""
    source: str = ""
    number: int = -1
    """Its number in the data set; -1 in a stream, which has none."""


class Layout(NamedTuple):
    """How a record's pictures are laid out among its words."""

    grids: list[EveGrid]
    """One for each picture."""
    longest_edge: int
    """The longer side that the pictures are resized to."""
    size: Size
    """Tokens with pictures in place, and patches."""


class Encoder:
    """Turns records into arrays for training.

    Args:
        processor: tokenizer, image processor and chat template.
        format: `chat` learns each answer with its end token; `plain` (captions) renders pictures,
            answer and a line break, and learns the answer and the line break.
        max_length: longest sequence allowed, in tokens with pictures in place.
        max_patches: most patches of one record's pictures; None sets no limit.
        shrink: makes the pictures of a record smaller, all to the same longer side, where they
            would not fit otherwise; nothing else is ever cut.
        teacher_view: makes the teacher's views too.
        teacher_table: where its features are kept; a picture that is in it is not laid out.
    """

    def __init__(
        self,
        processor: EveProcessor,
        *,
        format: Literal["plain", "chat"],
        max_length: int,
        max_patches: int | None = None,
        shrink: bool = False,
        teacher_view: TeacherView | None = None,
        teacher_table: FeatureTable | None = None,
    ):
        self.processor, self.format, self.max_length = processor, format, max_length
        self.max_patches, self.shrink = max_patches, shrink
        self.teacher_view, self.teacher_table = teacher_view, teacher_table
        if format == "chat" and not processor.chat_template:
            raise ValueError(
                "The processor has no chat template; set processor.chat_template, or use format "
                "'plain'."
            )

    def __call__(self, record: Record) -> EncodedRecord:
        """Encodes one record.

        Raises:
            ValueError: with the record's id, if pictures and `<image>` marks differ in number, an
                answer is empty, a picture cannot be read, or the sequence is too long.
        """
        try:
            ids, labels = self.encode_text(record.messages, format=record.format)
            images, digests = self._opened(record)
            layout = self.layout(ids, [size_of_image(image) for image in images])
            share = self._for_teacher(images, digests, layout.grids)
            return self._with_pictures(record, ids, labels, images, layout, share)
        except ValueError as error:
            raise ValueError(f"Record {record.id!r}: {error}") from None

    def teacher_share(self, record: Record) -> tuple[TeacherShare, list[EveGrid]]:
        """What the teacher would get of a record, and its grids; no patch is cut.

        Raises:
            ValueError: as encoding it would.
        """
        try:
            ids, _ = self.encode_text(record.messages, format=record.format)
            images, digests = self._opened(record)
            grids = self.layout(ids, [size_of_image(image) for image in images]).grids
            return self._for_teacher(images, digests, grids), grids
        except ValueError as error:
            raise ValueError(f"Record {record.id!r}: {error}") from None

    def _opened(self, record: Record) -> tuple[list[Image.Image], list[bytes]]:
        """The pictures, and what their contents come to where features are kept by them."""
        if self.teacher_table is None:
            return [open_image(image) for image in record.images], []
        pairs = [open_with_digest(image) for image in record.images]
        return [image for image, _ in pairs], [digest for _, digest in pairs]

    def size(self, record: Record) -> Size:
        """What the record takes of a packed row, from its text and the headers of its pictures.

        Raises:
            ValueError: as encoding it would, save for damage behind a picture's header.
        """
        try:
            ids, _ = self.encode_text(record.messages, format=record.format)
            return self.layout(ids, [size_of_image(image) for image in record.images]).size
        except ValueError as error:
            raise ValueError(f"Record {record.id!r}: {error}") from None

    def layout(self, ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Layout:
        """The grids of pictures of (width, height) pixels, and what they take with the text.

        Raises:
            ValueError: if `<image>` marks and pictures differ in number, or it does not fit.
        """
        processor = self.processor.image_processor
        marks = list(ids).count(self.processor.image_token_id)
        if marks != len(sizes):
            raise ValueError(
                f"its text has {marks} {self.processor.image_token} marks but {len(sizes)} "
                "pictures; give one mark for each picture."
            )
        words, edge = len(ids) - len(sizes), processor.size["longest_edge"]
        full = layout = self._laid_out(words, sizes, edge)
        while self.shrink and not self._fits(layout.size) and edge > processor.size_multiple:
            edge -= processor.size_multiple
            layout = self._laid_out(words, sizes, edge)
        if not self._fits(layout.size):
            raise ValueError(self._too_large(words, full.size, layout.size))
        return layout

    def _laid_out(self, words: int, sizes: Sequence[tuple[int, int]], edge: int) -> Layout:
        processor = self.processor.image_processor
        grids = [processor.grid_of(height, width, longest_edge=edge) for width, height in sizes]
        tokens = words + sum(num_image_tokens(grid.rows, grid.cols) for grid in grids)
        side = processor.patch_size
        patches = sum((grid.height // side) * (grid.width // side) for grid in grids)
        return Layout(grids, edge, Size(tokens, patches))

    def _fits(self, size: Size) -> bool:
        few = self.max_patches is None or size.patches <= self.max_patches
        return few and size.tokens <= self.max_length

    def _too_large(self, words: int, full: Size, least: Size) -> str:
        if self.shrink and full != least:
            return (
                f"it needs {least.tokens} tokens and {least.patches} patches even with its "
                f"pictures made as small as they can be, but max_length is {self.max_length}; use "
                "a shorter conversation, fewer pictures or a larger max_length."
            )
        if full.tokens > self.max_length:
            return (
                f"it needs {full.tokens} tokens ({full.tokens - words} of them for pictures) but "
                f"max_length is {self.max_length}; use smaller pictures, a shorter conversation or "
                "a larger max_length."
            )
        return (
            f"its pictures have {full.patches} patches but a packed row takes {self.max_patches}; "
            "use smaller pictures or a larger data.packing.patches."
        )

    def encode_text(
        self, messages: Sequence[dict], *, format: Literal["plain", "chat"] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation, each picture still one placeholder."""
        plain = (format or self.format) == "plain"
        try:
            text, spans = self._plain(messages) if plain else self._chat(messages)
        except TemplateError as error:
            raise ValueError(
                f"the chat template refuses it ({error}); mend its turns or the template."
            ) from None
        if not spans:
            raise ValueError(
                "it holds no answer to learn from; give at least one assistant message."
            )
        tokens = self.processor.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True
        )
        ids, labels = tokens["input_ids"], [IGNORED] * len(tokens["input_ids"])
        for index, (start, end) in enumerate(tokens["offset_mapping"]):
            if end > start and any(start >= first and end <= last for first, last in spans):
                labels[index] = ids[index]
        return ids, labels

    def _plain(self, messages: Sequence[dict]) -> tuple[str, list[tuple[int, int]]]:
        """`<image>` marks, caption and line break.

        The user's words are not used, as published; without a picture they stand in its place.
        """
        pictures = sum(
            part["type"] == "image" for message in messages for part in parts_of(message)
        )
        answers = [text_of(message) for message in messages if message["role"] == "assistant"]
        if len(answers) != 1 or len(messages) > 2:
            raise ValueError(
                "the plain format takes one caption for its pictures; use format 'chat'."
            )
        _check_answer(answers[0])
        tokenizer = self.processor.tokenizer
        place = self.processor.image_token * pictures
        if not pictures:
            place = "".join(text_of(message) for message in messages if message["role"] == "user")
        head = (tokenizer.bos_token or "") + place
        text = head + answers[0] + "\n"
        return text, [(len(head), len(text))]

    def _chat(self, messages: Sequence[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation, and where in it the answers with their end tokens are."""
        for message in messages:
            if message["role"] == "assistant":
                _check_answer(text_of(message))
        if not GENERATION.search(self.processor.chat_template):
            return self._answers_by_prefix(messages)
        # One rendering, in which the template itself marks the answers.
        texts, marks = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.processor.chat_template,
            return_assistant_tokens_mask=True,
            **self.processor.tokenizer.special_tokens_map,
        )
        return texts[0], marks[0]

    def _answers_by_prefix(self, messages: Sequence[dict]) -> tuple[str, list[tuple[int, int]]]:
        """For templates without marks: an answer is what one more message adds to the rendering."""
        spans = []
        whole = self._render(messages, add_generation_prompt=False)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], add_generation_prompt=True)
            behind = self._render(messages[: index + 1], add_generation_prompt=False)
            if not (whole.startswith(behind) and behind.startswith(before)):
                raise ValueError(
                    "the chat template changes earlier turns when later ones are added, so answers "
                    "cannot be found in it; give a template that only appends, or one that marks "
                    "answers with {% generation %}."
                )
            spans.append((len(before), len(behind.rstrip("\n"))))
        return whole, spans

    def _render(self, messages: Sequence[dict], *, add_generation_prompt: bool) -> str:
        return self.processor.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.processor.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def _with_pictures(
        self,
        record: Record,
        ids: list[int],
        labels: list[int],
        images: list[Image.Image],
        layout: Layout,
        share: TeacherShare,
    ) -> EncodedRecord:
        repeats = np.ones(len(ids), np.int64)
        repeats[np.asarray(ids) == self.processor.image_token_id] = [
            num_image_tokens(grid.rows, grid.cols) for grid in layout.grids
        ]
        return EncodedRecord(
            record.id,
            np.repeat(np.asarray(ids, np.int64), repeats),
            np.repeat(np.asarray(labels, np.int64), repeats),
            *self._pixels(images, layout.longest_edge),
            share.pixel_values,
            record.source,
            share.keys,
            share.kept,
        )

    def _pixels(
        self, images: list[Image.Image], longest_edge: int
    ) -> tuple[np.ndarray, np.ndarray]:
        processor = self.processor.image_processor
        if not images:
            width = 3 * processor.patch_size**2
            return np.empty((0, width), np.float32), np.empty((0, 3), np.int64)
        both = processor(images, size={"longest_edge": longest_edge}, return_tensors="np")
        return both["pixel_values"], both["image_grid_thw"]

    def _for_teacher(
        self, images: list[Image.Image], digests: list[bytes], grids: list[EveGrid]
    ) -> TeacherShare:
        """Kept features of the pictures, and canvases of the others."""
        view, table = self.teacher_view, self.teacher_table
        if view is None:
            return TeacherShare(None)
        unit = self.processor.image_processor.size_multiple
        cells = [(grid.height // unit, grid.width // unit) for grid in grids]
        keys: tuple[bytes, ...] = ()
        kept: tuple[np.ndarray | None, ...] = ()
        if table is not None:
            keys = tuple(_key(*pair) for pair in zip(digests, cells, strict=True))
            kept = tuple(
                table.get(key, rows * cols) for key, (rows, cols) in zip(keys, cells, strict=True)
            )
        views = [
            view.render(image, *size)
            for image, size, found in zip(images, cells, kept or [None] * len(cells), strict=True)
            if found is None
        ]
        empty = np.empty((0, view.size, view.size, 3), np.uint8)
        return TeacherShare(np.stack(views) if views else empty, keys, kept)


def _key(digest: bytes, cells: tuple[int, int]) -> bytes:
    """Under which features are kept: of this content, cut into so many rows and columns."""
    return hashlib.blake2b(digest + repr(cells).encode(), digest_size=KEY_BYTES).digest()


def _check_answer(answer: str) -> None:
    if not answer.strip():
        raise ValueError(
            "one of its answers is empty, so there is nothing to learn; fill it in or remove the "
            "turn."
        )


__all__ = ["IGNORED", "BadRecord", "EncodedRecord", "Encoder", "Layout", "TeacherShare"]
