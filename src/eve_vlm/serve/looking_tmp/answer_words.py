"""An answer's tokens and its words: which tokens make a word, and which tokens a given text is.

Words are what people ask about, tokens are what a model looks from.  Easy to get wrong: one letter
may be several tokens (bytes), and a tokenizer may strip the blank of the first word, so words are
found in text that is decoded token by token, never in the text of single tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from eve_vlm.processing_eve import EveProcessor

from .messages import Messages


class Word(NamedTuple):
    """A word of the answer with the blank in front of it, and the places of its tokens."""

    text: str
    tokens: tuple[int, ...]


def words_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[Word, ...]:
    """Tokens grouped into words: one begins where the decoded text goes on with a blank.

    Tokens that are bytes of one letter stay together, and special tokens are in no word.
    """
    decoder, special = DecodeStream(), special_ids(tokenizer)
    words: list[tuple[str, list[int]]] = []
    waiting: list[int] = []  # bytes of a letter that is not whole yet
    for place, id in enumerate(ids):
        if id in special:
            continue
        waiting.append(place)
        new = decoder.step(tokenizer.backend_tokenizer, id)
        if not new:
            continue
        if not words or (new[0].isspace() and words[-1][0].strip()):
            words.append(("", []))
        words[-1] = (words[-1][0] + new, words[-1][1] + waiting)
        waiting = []
    if waiting:  # bytes that never became a letter
        words = words or [("\N{REPLACEMENT CHARACTER}", [])]
        words[-1] = (words[-1][0], words[-1][1] + waiting)
    if len(words) > 1 and not words[-1][0].strip():
        (text, tokens), (blanks, last) = words[-2:]
        words[-2:] = [(text + blanks, tokens + last)]
    return tuple(Word(text, tuple(tokens)) for text, tokens in words if text.strip())


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that are not text, such as the end and the image placeholder."""
    added = tokenizer.added_tokens_decoder.items()
    return {id for id, token in added if token.special} | set(tokenizer.all_special_ids)


def tokens_of(processor: EveProcessor, messages: Messages, answer: str) -> list[int]:
    """Token ids of an answer as they would stand behind the prompt, without the end.

    Raises:
        ValueError: if the answer holds a special token, such as the image placeholder.
    """
    tokenizer = processor.tokenizer

    def rendered(messages: Messages, **settings: bool) -> str:
        return tokenizer.apply_chat_template(
            messages, chat_template=processor.chat_template, tokenize=False, **settings
        )

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    special = special_ids(tokenizer)
    answer = answer.strip()
    bare = tokens(answer)
    if found := sorted(special.intersection(bare)):
        raise ValueError(
            f"The answer holds {tokenizer.decode(found[:1])!r}, which is no text; leave it out."
        )
    said = [{"role": "assistant", "content": answer}]
    before, whole = rendered(messages, add_generation_prompt=True), rendered([*messages, *said])
    head, ids = tokens(before), tokens(whole)
    if not whole.startswith(before) or ids[: len(head)] != head:
        return bare  # a template that opens an answer in another way
    behind = ids[len(head) :]
    ends = [place for place, id in enumerate(behind) if id in special]
    return behind[: ends[0]] if ends else behind


__all__ = ["Word", "special_ids", "tokens_of", "words_of"]
