"""A small tokenizer of one's own, for a decoder that is trained from nothing.

Byte-level BPE, so that any text can be written, with whole words for whatever the training text
says often.  Easy to get wrong: `<image>` must be one special token, or the processor cannot count
pictures.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eve_vlm.processing_eve import SHORT_CHAT_TEMPLATE

ROLES = ("USER:", "ASSISTANT:")
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Learns a tokenizer from texts; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    # A blank in front of the first word too: "cat" and " cat" are one word.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ROLES),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # One token for each role, which takes the blanks around it with it.
    tokenizer.add_tokens([AddedToken(role, lstrip=True, rstrip=True) for role in ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=SHORT_CHAT_TEMPLATE,
    )


__all__ = ["train_tokenizer"]
