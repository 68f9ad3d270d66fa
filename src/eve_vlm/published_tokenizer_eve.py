"""The tokenizer of the published checkpoints: Vicuna's sentencepiece model, read as it was trained.

The published programme used the "legacy" rule of Llama tokenizers: one blank is put in front of
every piece of text, also behind a special token.  Easy to get wrong: `AutoTokenizer` of
transformers 5.23 gives other ids for pieces that begin with a blank (seen), so the parts are put
together here.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2


def published_tokenizer(file: str | Path, *, chat_template: str) -> PreTrainedTokenizerFast:
    """Reads a `tokenizer.json` or a sentencepiece `tokenizer.model`; `<image>` follows its words.

    Raises:
        ValueError: if the file is no such tokenizer, or sentencepiece is not installed.
    """
    file = Path(file)
    if file.suffix == ".json":
        given: dict[str, Any] = {"tokenizer_file": str(file)}
    else:
        given = {"tokenizer_object": _from_sentencepiece(file)}
    return PreTrainedTokenizerFast(
        **given,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=chat_template,
        padding_side="right",
    )


def _from_sentencepiece(file: Path) -> Tokenizer:
    """The same tokenizer as the library's fast format; 2 s for Vicuna's 32,000 words."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ValueError(
            f"{file} needs the package sentencepiece to be read; run `pip install sentencepiece`."
        ) from None
    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{file} is no sentencepiece model; copy it again.") from error
    ids = range(pieces.get_piece_size())
    vocab = {pieces.id_to_piece(index): index for index in ids}
    found = tuple(pieces.id_to_piece(index) for index in range(len(SPECIAL_TOKENS)))
    if found != SPECIAL_TOKENS:
        raise ValueError(
            f"{file} begins with {', '.join(found)} and not with {', '.join(SPECIAL_TOKENS)}; take "
            "the tokenizer of a published checkpoint."
        )
    # Merges come from words only; bytes and special tokens are never put together.
    plain = [index for index in ids if not pieces.is_control(index) and not pieces.is_byte(index)]
    plain = [index for index in plain if not pieces.is_unknown(index)]
    scores = {pieces.id_to_piece(index): pieces.get_score(index) for index in plain}
    merges = generate_merges({name: vocab[name] for name in scores}, scores)
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS]
    )
    return tokenizer


__all__ = ["published_tokenizer"]
