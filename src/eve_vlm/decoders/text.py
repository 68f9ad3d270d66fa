"""What a decoder reads and writes: its tokenizer's picture placeholder and its chat template.

Both stay the decoder's own.  An id of its vocabulary that says nothing yet becomes the placeholder,
and the chat template gets a few lines in front that turn pictures into that id; with text alone it
writes the same bytes as before.  Easy to get wrong: the placeholder keeps its own name, so whatever
looks for pictures in a text must ask `processor.image_token` and not look for `<image>`.
"""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jinja2 import TemplateError
from transformers import AddedToken, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from eve_vlm.errors import first_line
from eve_vlm.processing_eve import VICUNA_CHAT_TEMPLATE

IMAGE = "<image>"
# What published models call a picture's place, the commonest first.
KNOWN = (
    *(IMAGE, "<|image_pad|>", "<|image|>", "[IMG]", "<image_soft_token>", "<IMG_CONTEXT>"),
    *("<image_pad>", "<|IMAGE|>", "<|image_1|>", "<image_placeholder>"),
)
# Ids that a vocabulary keeps free: Llama 3 and SmolLM3 (reserved), Gemma, Falcon 3 and InternLM
# (unused), OLMo 2 (extra_id), Phi-3 and DeepSeek (placeholder), Mistral (control_8, SPECIAL_20),
# Phi-4 (dummy_0).  A bracket in front, or "unused" and "Ġreserved" would be words.
UNUSED = re.compile(
    r"[<\[>|].*(reserved|unused|extra_id|place.?holder|(control|special|dummy|extra)_?\d)",
    re.IGNORECASE | re.DOTALL,
)
# Marks of source code that SmolLM2's family has and does not use.  In SmolLM2-135M-Instruct the
# rows of these five are equal to 1e-5 (norm 3.2937), so none ever learnt anything; a mark that is
# used is 0.40 away from them (<|im_start|>), <filename> 4.92.  Models of source code do use them,
# which is why the rows are looked at again in every decoder.
CODE_MARKS = (
    *("<empty_output>", "<jupyter_script>", "<jupyter_code>", "<issue_closed>", "<issue_start>"),
)
SAME_ROW = 0.01  # of a row's length; 0.12 apart is the nearest used one, 0.0024 quantisation

# Both forms end an answer in a token of their own.
CHATML_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ message['content'] + '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ message['content'] + '<|im_end|>' }}{%- endif -%}"
    "{{ '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

# It writes nothing; its last line break is what Jinja's trim_blocks takes away, so that the
# decoder's own template begins where it always did, at the beginning of a line.
_PRELUDE = """\
{%- set eve = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if content is defined and content is iterable and content is not string -%}
{%- set eve.text = '' -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}
{%- set eve.text = eve.text + IMAGE_TOKEN + ('' if loop.last else '\\n') -%}
{%- elif part['type'] == 'text' -%}
{%- set eve.text = eve.text + part['text'] -%}
{%- else -%}
{{- raise_exception('A message has a part of type ' + part['type'] | string + \
'; this model reads parts of type text and image.') -}}
{%- endif -%}
{%- endfor -%}
{%- set eve.messages = eve.messages + [dict(message, content=eve.text)] -%}
{%- else -%}
{%- set eve.messages = eve.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = eve.messages %}
"""


class Placeholder(NamedTuple):
    """The id that stands for a token of a picture."""

    token: str
    id: int
    kind: Literal["known", "unused", "spare", "added"]
    why: str
    """For a person: where it comes from."""


def add_placeholder(
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int | None = None,
    embedding: torch.Tensor | None = None,
    taken: Collection[int] = (),
) -> Placeholder:
    """Chooses the placeholder: a known one, an unused id, or `<image>` added to the tokenizer.

    Args:
        tokenizer: gets `<image>` behind its words where it has no id to spare; its special tokens
            and their names stay as they are.
        rows: of the decoder's embedding matrix; None where it will be made to fit.
        embedding: (rows, D), to see which marks never learnt anything.
        taken: ids that mean something, such as the ends of an answer.
    """
    limit = len(tokenizer) + 1 if rows is None else rows
    taken = {*taken, *_named(tokenizer)}
    known = [
        (token, id)
        for token in KNOWN
        if (id := _single_id(tokenizer, token)) is not None and id not in taken
    ]
    for token, id in known:
        if id < limit:
            return Placeholder(token, id, "known", "the tokenizer's own token for pictures")
    for token, id, why in _unused(tokenizer, embedding, taken):
        if id < limit:
            return Placeholder(token, id, "unused", why)
    if known:
        token, id = known[0]
        return Placeholder(token, id, "added", "the tokenizer's own, which had no embedding yet")
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    id = int(tokenizer.convert_tokens_to_ids(IMAGE))
    if id < limit and rows is not None:
        return Placeholder(IMAGE, id, "spare", "new, on a row of the embedding without a word")
    return Placeholder(IMAGE, id, "added", "new, because no id of the vocabulary is free")


def _named(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens with a role (begin, end, padding, ...)."""
    return {
        int(id)
        for token in tokenizer.special_tokens_map.values()
        if isinstance(token, str)
        if (id := tokenizer.convert_tokens_to_ids(token)) is not None
        and token not in KNOWN  # a role of its own for pictures is what we look for
    }


def _single_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """The id of a token that stays one token among words, else None."""
    id = tokenizer.get_vocab().get(token)
    if id is None or tokenizer.encode(token, add_special_tokens=False) != [id]:
        return None
    beside = tokenizer.encode(f"a{token}\nb", add_special_tokens=False)
    return int(id) if beside.count(id) == 1 else None


def _unused(
    tokenizer: PreTrainedTokenizerBase, embedding: torch.Tensor | None, taken: Collection[int]
) -> Iterator[tuple[str, int, str]]:
    """Tokens that mean nothing, the last first: whoever extends a decoder takes the first ones."""
    template = str(tokenizer.chat_template or "")
    added = sorted(tokenizer.added_tokens_decoder.items(), reverse=True)
    # Tokens that swallow the blanks beside them come last: they take a picture's line break away.
    added.sort(key=lambda item: item[1].lstrip or item[1].rstrip)
    for id, entry in added:
        token = entry.content
        free = UNUSED.match(token) and id not in taken and token not in template
        if free and _single_id(tokenizer, token) == id:
            yield token, id, "an id that the vocabulary keeps free"
    ids = {entry.content: id for id, entry in added}
    marks = [mark for mark in CODE_MARKS if mark in ids and mark not in template]
    if embedding is None or any(ids[mark] >= len(embedding) for mark in marks):
        return
    for mark in marks:
        row = embedding[ids[mark]].float()
        others = [embedding[ids[other]].float() for other in marks if other != mark]
        same = any(bool((row - other).norm() <= SAME_ROW * row.norm()) for other in others)
        if same and ids[mark] not in taken and _single_id(tokenizer, mark) == ids[mark]:
            yield mark, ids[mark], "a mark whose embedding never learnt anything"


def chat_template_of(
    tokenizer: PreTrainedTokenizerBase, *, name: str, given: str | None, image_token: str
) -> str:
    """The chat template of a new model, which takes pictures.

    Args:
        name: of the decoder, for messages.
        given: `vicuna`, `chatml`, a file with a Jinja template, or None for the decoder's own.

    Raises:
        ValueError: if there is none, or it cannot be rendered.
    """
    if given is None:
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if not own:
            raise ValueError(
                f"The tokenizer of {name} has no chat template; give one with --chat-template "
                "vicuna, --chat-template chatml or --chat-template FILE."
            )
        return with_pictures(own, tokenizer, image_token=image_token, name=f"of {name}")
    if given == "vicuna":
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of {name} has no end token, which the template vicuna ends an "
                "answer with; give --chat-template FILE."
            )
        quoted = image_token.replace("\\", "\\\\").replace("'", "\\'")
        return VICUNA_CHAT_TEMPLATE.replace(IMAGE, quoted)
    if given == "chatml":
        lacking = [
            mark for mark in ("<|im_start|>", "<|im_end|>") if _single_id(tokenizer, mark) is None
        ]
        if lacking:
            raise ValueError(
                f"The tokenizer of {name} has no token {lacking[0]}, which the template chatml "
                "is made of; give --chat-template vicuna."
            )
        return with_pictures(CHATML_CHAT_TEMPLATE, tokenizer, image_token=image_token, name=given)
    try:
        text = Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--chat-template {given} is neither vicuna nor chatml nor a file that can be read "
            f"({first_line(error)}); name a Jinja file."
        ) from None
    return with_pictures(text, tokenizer, image_token=image_token, name=given)


def with_pictures(
    template: str, tokenizer: PreTrainedTokenizerBase, *, image_token: str, name: str
) -> str:
    """A chat template that also takes messages of parts, with its own text unchanged behind.

    A picture becomes `image_token`, with a line break where words follow.  A template that writes
    exactly that token by itself is returned as it is.

    Raises:
        ValueError: if the template cannot be rendered or leaves out what is said.
    """
    question = [{"role": "user", "content": "What is this?"}]
    try:
        plain = _rendered(template, tokenizer, question)
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise ValueError(
            f"The chat template {name} cannot be rendered ({first_line(error)}); give another one "
            "with --chat-template."
        ) from None
    if "What is this?" not in plain:
        raise ValueError(
            f"The chat template {name} leaves out the question; give another one with "
            "--chat-template."
        )
    if _takes_pictures(template, tokenizer, image_token):
        return template
    made = _PRELUDE.replace("IMAGE_TOKEN", json.dumps(image_token, ensure_ascii=False)) + template
    if not _takes_pictures(made, tokenizer, image_token):
        raise ValueError(
            f"The chat template {name} does not keep the picture placeholder {image_token}; give "
            "another one with --chat-template."
        )
    return made


def _takes_pictures(template: str, tokenizer: PreTrainedTokenizerBase, image_token: str) -> bool:
    picture, words = {"type": "image"}, {"type": "text", "text": "What is this?"}
    try:
        one = _rendered(template, tokenizer, [{"role": "user", "content": [picture, words]}])
        parts = [{"role": "user", "content": [words, picture, picture]}]
        parts.append({"role": "assistant", "content": [{"type": "text", "text": "A hat."}]})
        two = _rendered(template, tokenizer, parts)
    except (TemplateError, TypeError, ValueError, LookupError):
        return False
    counts = (one.count(image_token), two.count(image_token))
    return (
        counts == (1, 2)
        and all("What is this?" in text for text in (one, two))
        and ("A hat." in two and "'type'" not in one + two)
    )


def _rendered(template: str, tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> str:
    given: dict[str, Any] = dict(tokenizer.special_tokens_map)
    texts, _ = render_jinja_template(
        conversations=[messages], chat_template=template, add_generation_prompt=True, **given
    )
    return texts[0]


__all__ = [
    "CHATML_CHAT_TEMPLATE",
    "Placeholder",
    "add_placeholder",
    "chat_template_of",
    "with_pictures",
]
