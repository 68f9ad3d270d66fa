"""Tiny random models of other classes, saved as their real ones are: LLaVA, LLaVA-NeXT, Fuyu, Idefics3.

Each folder holds what a Hub repository of that class holds, so `from_pretrained` goes the whole
way. One thing a reader would get wrong: without torchvision only the `Pil` image processors exist.
"""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    FuyuConfig,
    FuyuForCausalLM,
    FuyuProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PersimmonConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

import tiny

PATCH, EDGE = 8, 16
# As on the pages of llava-hf: no start token, which the tokenizer writes; pictures first.
VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IDEFICS = (
    "<s>{% for message in messages %}{{ message['role'].capitalize() }}:"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def text_config(cls=LlamaConfig, **changes):
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # see tiny.py
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return cls(**settings | changes)


def vision_config(edge=EDGE):
    return CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=edge,
        patch_size=PATCH,
        initializer_range=0.3,
    )


def tokenizer():
    """Writes the start token itself, as Llama's does."""
    words = tiny.tokenizer()
    words.chat_template = None
    words.backend_tokenizer.post_processor = _start_token()
    return words


def _start_token():
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


def llava():
    config = LlavaConfig(vision_config=vision_config(), text_config=text_config(), image_token_id=3)
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}
    )
    processor = LlavaProcessor(
        pictures,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return LlavaForConditionalGeneration, config, processor


def llava_next():
    points = [[EDGE, 2 * EDGE], [2 * EDGE, EDGE], [2 * EDGE, 2 * EDGE]]
    config = LlavaNextConfig(
        vision_config=vision_config(),
        text_config=text_config(),
        image_token_id=3,
        image_grid_pinpoints=points,
    )
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": EDGE},
        crop_size={"height": EDGE, "width": EDGE},
        image_grid_pinpoints=points,
    )
    processor = LlavaNextProcessor(
        pictures,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return LlavaNextForConditionalGeneration, config, processor


def idefics3():
    words = tiny.tokenizer()
    words.chat_template = None
    places = [f"<row_{row}_col_{col}>" for row in (1, 2, 3, 4) for col in (1, 2, 3, 4)]
    words.add_tokens(
        ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places],
        special_tokens=True,
    )
    config = Idefics3Config(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 2 * EDGE,
            "patch_size": PATCH,
            "initializer_range": 0.3,
        },
        text_config=text_config(),
        image_token_id=3,
        scale_factor=2,
        pad_token_id=0,
    )
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 4 * EDGE}, max_image_size={"longest_edge": 2 * EDGE}
    )
    processor = Idefics3Processor(pictures, words, image_seq_len=4, chat_template=IDEFICS)
    return Idefics3ForConditionalGeneration, config, processor


def fuyu_tokenizer():
    """Of sentencepiece's kind: a mark for blanks, also in front of the first word."""
    marks = ["<unk>", "<s>", "<0x04>", "|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|"]
    letters = sorted({*"".join(tiny.QUESTIONS + tiny.ANSWERS), *map(chr, range(33, 127)), "\n"})
    words = {word for line in tiny.QUESTIONS + tiny.ANSWERS for word in line.split()}
    pieces = ["▁", *letters, *sorted("▁" + word for word in words), *sorted(words)]
    scores = [(one, 0.0) for one in marks]
    scores += [(one, -10.0 if len(one) == 1 else -5.0) for one in dict.fromkeys(pieces)]
    made = Tokenizer(models.Unigram(scores, unk_id=0))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "isolated")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="|ENDOFTEXT|",
        eos_token="|ENDOFTEXT|",
        unk_token="<unk>",
    )


def fuyu():
    words = fuyu_tokenizer()
    end = words.convert_tokens_to_ids("|ENDOFTEXT|")
    text = text_config(PersimmonConfig, vocab_size=len(words), eos_token_id=end)
    config = FuyuConfig(
        text_config=text.to_dict(),
        patch_size=PATCH,
        image_token_id=words.convert_tokens_to_ids("|SPEAKER|"),
        hidden_size=text.hidden_size,  # 5.17 reads it here, as the published files have it
    )
    pictures = FuyuImageProcessorPil(
        size={"height": 3 * PATCH, "width": 5 * PATCH},
        patch_size={"height": PATCH, "width": PATCH},
    )
    return FuyuForCausalLM, config, FuyuProcessor(pictures, words)


KINDS = {"llava": llava, "llava_next": llava_next, "idefics3": idefics3, "fuyu": fuyu}


def save(kind: str, folder: Path, *, seed: int = 0) -> Path:
    """A folder of this kind."""
    cls, config, processor = KINDS[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
