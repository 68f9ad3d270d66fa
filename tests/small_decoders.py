"""Tiny random language models of many families, each with a tokenizer that knows no pictures.

Made in memory from a seed and saved as on the Hub. One thing a reader would get wrong: the families
differ on purpose in what their vocabularies offer as a place for pictures.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AddedToken, AutoModelForCausalLM, PreTrainedTokenizerFast

import tiny

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (  # begins with a line break and blanks, which must stay; marks its answers
    "\n  {{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "Q: {{ message['content'] | trim }}\n"
    "{% else %}{% generation %}A: {{ message['content'] }}{{ eos_token }}{% endgeneration %}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
RESERVED = tuple(f"<|reserved_special_token_{number}|>" for number in range(4))
GEMMA = ("<start_of_image>", "<unused0>", "<unused1>")
# Family: (settings, tied, more tokens, rows beyond the tokenizer, template, what is chosen).
FAMILIES = {
    "llama": ({}, True, RESERVED, 0, CHATML, ("unused", RESERVED[-1])),
    "mistral": ({"sliding_window": 16}, False, (), 0, MARKED, ("added", "<image>")),
    "qwen2": ({}, True, (), 5, CHATML, ("spare", "<image>")),
    "qwen3": ({}, False, ("<|image_pad|>",), 3, CHATML, ("known", "<|image_pad|>")),
    "gemma3_text": (
        {
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        True,
        GEMMA,
        0,
        MARKED,
        ("unused", "<unused1>"),
    ),
    "smollm3": ({}, True, RESERVED, 0, CHATML, ("unused", RESERVED[-1])),
    "olmo2": ({}, False, (), 0, MARKED, ("added", "<image>")),
    # Words called `wte` and layers called `h`, tied, without a head width of its own.
    "gpt2": (
        {"n_positions": 512, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
        True,
        (),
        0,
        CHATML,
        ("added", "<image>"),
    ),
}


def words(*, template: str | None, more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows no pictures, with some more special tokens."""
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*tiny.QUESTIONS, *tiny.ANSWERS] * 4, trainer)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in more])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=template,
    )


def decoder_folder(folder: Path, kind: str, *, tied: bool | None = None, **change) -> Path:
    """A random decoder of a family with its tokenizer and two end ids, as from the Hub."""
    settings, ties, more, spare, template, _ = FAMILIES[kind]
    tokenizer = words(template=change.pop("template", template), more=more)
    settings = tiny.config().text_config.to_dict() | settings
    for name in ("model_type", "rope_parameters", "layer_types", "num_hidden_layers"):
        settings.pop(name, None)
    settings |= FAMILIES[kind][0] | {
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer) + spare,
        "tie_word_embeddings": ties if tied is None else tied,
        "eos_token_id": 4,
        **change,
    }

    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings))
    made.generation_config.eos_token_id = [4, 2]
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
