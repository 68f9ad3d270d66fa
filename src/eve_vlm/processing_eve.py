"""Text and pictures to model inputs: the one place that decides how many tokens a picture takes.

All orchestration (expansion of placeholders, chat templates, pictures by path or URL) is the
library's; this class only says what one `<image>` becomes.  Easy to get wrong: the class token and
the row-end tokens are made by the patch embedding, so they are image placeholders too, not words.
"""

from os import PathLike

from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .image_processing_eve import EveImageProcessor, num_image_tokens
from .published_eve import find_file, hub_arguments, published_config_of
from .published_tokenizer_eve import published_tokenizer

# The published conversation form (template v1): a system sentence, "USER: q ASSISTANT: a</s>".
# An answer begins at the blank before it, because that blank is part of its first token.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_TEXT_OF = "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
_TURNS = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ 'USER: ' }}" + _TEXT_OF + "{%- for part in message['content'] -%}"
    # A picture in front of words is followed by a line break, as in the published training data.
    "{%- if part['type'] == 'image' -%}{{ '<image>' if loop.last else '<image>\\n' }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ ' ASSISTANT:' }}{%- generation -%}{{ ' ' }}"
    + _TEXT_OF
    + "{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}"
    "{{ eos_token }}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"
)


def _chat_template(system: str) -> str:
    """The turns above behind a system sentence; a first `system` message replaces it."""
    first = "{%- if messages and messages[0]['role'] == 'system' -%}"
    system_text = "{%- set system = messages[0]['content'] if messages[0]['content'] is string "
    system_text += "else messages[0]['content'][0]['text'] -%}"
    default = "{%- else -%}{%- set system = '" + system.replace("'", "\\'") + "' -%}{%- endif -%}"
    return (
        first
        + system_text
        + default
        + "{{ bos_token }}{%- if system -%}{{ system + ' ' }}{%- endif -%}"
        + _TURNS
    )


VICUNA_CHAT_TEMPLATE = _chat_template(VICUNA_SYSTEM)
# For decoders made from nothing: no system sentence and no line break, which only cost tokens.
SHORT_CHAT_TEMPLATE = _chat_template("").replace(
    "'<image>' if loop.last else '<image>\\n'", "'<image>'"
)


class EveProcessor(ProcessorMixin):
    """Tokenizer and image processor together; call it with texts and pictures, or messages.

    Each `image_token` in a text becomes 1 + rows * (cols + 1) of them, by the picture's own grid.

    Raises:
        ValueError: if the tokenizer does not know `image_token` as one single token, or the
            placeholders in the texts and the pictures differ in number.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token="<image>",
        **kwargs,
    ):
        ids = tokenizer.encode(image_token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"The tokenizer splits {image_token!r} into {len(ids)} tokens; add it first with "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}})."
            )
        self.image_token = image_token
        self.image_token_id = ids[0]
        if chat_template is None:
            chat_template = tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, *args, **kwargs
    ) -> "EveProcessor":
        """The library's, which also makes the processor of a published checkpoint.

        Raises:
            ValueError: if a published checkpoint has no tokenizer, or names a preprocessor that
                nobody has.
        """
        name, hub = pretrained_model_name_or_path, hub_arguments(kwargs)
        if published_config_of(name, **hub) is None:
            return super().from_pretrained(name, *args, **kwargs)
        file = find_file(name, "tokenizer.json", **hub) or find_file(name, "tokenizer.model", **hub)
        if file is None:
            raise ValueError(
                f"{name} holds neither tokenizer.json nor tokenizer.model; copy one of them there "
                "from the published checkpoint."
            )
        return cls(
            EveImageProcessor.from_pretrained(name, **hub),
            published_tokenizer(file, chat_template=VICUNA_CHAT_TEMPLATE),
            chat_template=VICUNA_CHAT_TEMPLATE,
        )

    def validate_inputs(
        self, images: ImageInput | None = None, text: list[str] | None = None, **kwargs
    ) -> None:
        """Counts marks and pictures, which transformers 5.17 does not.

        Raises:
            ValueError: with both numbers, if they differ.
        """
        if text is not None:
            marks = sum(one.count(self.image_token) for one in text)
            given = 0 if images is None else len(make_flat_list_of_images(images))
            if marks != given:
                raise ValueError(
                    f"The text has {marks} {self.image_token} marks but {given} pictures were "
                    "given; give one mark for each picture."
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that stands for picture `image_idx` of `image_inputs`."""
        _, rows, cols = (int(count) for count in image_inputs["image_grid_thw"][image_idx])
        merge = kwargs.get("merge_size") or self.image_processor.merge_size
        return self.image_token * num_image_tokens(rows // merge, cols // merge)

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs
    ) -> MultiModalData:
        """Tokens and patches of pictures of these (height, width); servers call it."""
        if image_sizes is None:
            return MultiModalData()
        grids = [self.image_processor.grid_of(height, width) for height, width in image_sizes]
        merge = self.image_processor.merge_size
        return MultiModalData(
            num_image_tokens=[num_image_tokens(grid.rows, grid.cols) for grid in grids],
            num_image_patches=[grid.rows * grid.cols * merge * merge for grid in grids],
        )


__all__ = ["SHORT_CHAT_TEMPLATE", "VICUNA_CHAT_TEMPLATE", "EveProcessor"]
