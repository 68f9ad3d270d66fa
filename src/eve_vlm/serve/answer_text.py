"""Tokens to text while they come, so that what was shown never has to be taken back.

Both whole answers and streamed ones are made here, so they are equal letter by letter.  Easy to get
wrong: a letter may take several tokens, blanks at both ends are no part of an answer, and the
beginning of a stop text may turn out to be ordinary text; all three are held back until known.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

HALF_A_LETTER = "\ufffd"  # what bytes decode to that are no letter, or none yet


class TextDecoder:
    """Decodes tokens one by one; letters that are not whole yet are held back.

    The tokenizers' own `DecodeStream` raises an error for bytes that are no letter behind others
    that are one (0.23, sentencepiece), and a model may say anything.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Tokens before `_read` were given out; those from `_from` are decoded with what follows,
        # because a word alone may lose the blank in front of it.
        self._from = self._read = 0

    def step(self, token_id: int) -> str:
        """Takes a token; returns the text that is now certain and was not given out before."""
        self._ids.append(token_id)
        text = self.rest()
        if not text or text.endswith(HALF_A_LETTER):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return text

    def rest(self) -> str:
        """What was not given out; bytes that are no letter as the tokenizer shows them."""
        before, text = self._decode(self._from, self._read), self._decode(self._from)
        return text[len(before) :]

    def _decode(self, first: int, behind: int | None = None) -> str:
        return self._tokenizer.decode(
            self._ids[first:behind], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class AnswerText:
    """The text of one answer.

    Args:
        stop: texts that end the answer, at the place where the first of them begins.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self._decoder, self._stop = TextDecoder(tokenizer), tuple(stop)
        self._decoded = ""  # all text that is certain, with outer blanks
        self._shown = 0  # letters of it that were given out or stripped in front
        self.stopped = False
        self.text = ""

    def push(self, token_id: int) -> str:
        """Takes a token; returns the text that is now certain and was not given out before."""
        new = self._decoder.step(token_id)
        return self._add(new) if new else ""

    def finish(self) -> str:
        """No token follows; returns what was held back."""
        given = "" if self.stopped else self._add(self._decoder.rest())
        return given + self._give(len(self._decoded.rstrip()))

    def _add(self, new: str) -> str:
        searched = max(0, len(self._decoded) - max(map(len, self._stop), default=0))
        self._decoded += new
        places = [self._decoded.find(one, searched) for one in self._stop]
        if found := [place for place in places if place >= 0]:
            self.stopped, self._decoded = True, self._decoded[: min(found)]
            return self._give(len(self._decoded.rstrip()))
        return self._give(len(self._decoded[: self._certain()].rstrip()))

    def _certain(self) -> int:
        """Letters in front of what may be the beginning of a stop text."""
        for length in range(min(len(self._decoded), max(map(len, self._stop), default=0)), 0, -1):
            if any(one.startswith(self._decoded[-length:]) for one in self._stop):
                return len(self._decoded) - length
        return len(self._decoded)

    def _give(self, upto: int) -> str:
        if not self.text:  # blanks in front
            stripped = len(self._decoded) - len(self._decoded.lstrip())
            self._shown = min(stripped, max(upto, 0))
        given = self._decoded[self._shown : upto] if upto > self._shown else ""
        self._shown, self.text = max(self._shown, upto), self.text + given
        return given


__all__ = ["AnswerText", "TextDecoder"]
