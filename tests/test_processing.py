"""The processor: how many placeholders a picture gets, where, and what survives saving. Exact."""

import json

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer
from transformers import AutoProcessor, PreTrainedTokenizerFast

import tiny
from eve_vlm import EveImageProcessor, EveProcessor, num_image_tokens
from eve_vlm.data.tokenizer import ROLES, train_tokenizer
from eve_vlm.processing_eve import VICUNA_CHAT_TEMPLATE

SIZES = ((20, 32), (32, 9), (7, 7))


def tokens_of(processor, height, width):
    grid = processor.image_processor.grid_of(height, width)
    return num_image_tokens(grid.rows, grid.cols)


def runs(ids, placeholder):
    """Lengths of the runs of placeholders."""
    text = "".join("i" if id == placeholder else "." for id in ids)
    return [len(run) for run in text.split(".") if run]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("words only", 0),
        ("<image>", 1),
        ("<image> what is this?", 1),
        ("this <image> and that <image>, then <image>.", 3),
    ],
)
def test_every_picture_gets_its_own_number_of_placeholders(processor, text, count):
    pictures = [tiny.picture(*size) for size in SIZES[:count]]
    inputs = processor(text=text, images=pictures or None, return_tensors="np")
    expected = [tokens_of(processor, *size) for size in SIZES[:count]]
    assert runs(inputs["input_ids"][0], processor.image_token_id) == expected
    assert ("pixel_values" in inputs) == bool(count)


def test_neighbouring_pictures_are_counted_together(processor):
    pictures = [tiny.picture(*size) for size in SIZES]
    inputs = processor(text="<image><image><image>", images=pictures)
    expected = sum(tokens_of(processor, *size) for size in SIZES)
    assert runs(inputs["input_ids"][0], processor.image_token_id) == [expected]


def test_texts_with_and_without_pictures_share_a_batch(processor):
    pictures = [tiny.picture(*size) for size in SIZES]
    texts = ["<image> what?", "only words, and quite a few of them", "a <image> b <image>"]
    batch = processor(
        text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt"
    )
    assert batch["image_grid_thw"].shape == (3, 3)
    given = [pictures[:1], None, pictures[1:]]
    for row, (text, images) in enumerate(zip(texts, given, strict=True)):
        alone = processor(text=text, images=images, return_tensors="pt")["input_ids"][0]
        kept = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][kept], alone)
        assert bool(kept[-1]) and int(kept.sum()) == len(alone)  # padding stands on the left


@pytest.mark.parametrize(
    ("text", "count"), [("no mark", 1), ("<image>", 2), ("<image> <image>", 1), ("<image>", 0)]
)
def test_more_or_fewer_marks_than_pictures_are_refused(processor, text, count):
    message = f"{text.count('<image>')} <image> marks but {count} pictures"
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=[tiny.picture(8, 8)] * count or None)


def test_numbers_without_pictures_equal_those_with(processor):
    said = processor._get_num_multimodal_tokens(image_sizes=list(SIZES))
    assert said["num_image_tokens"] == [tokens_of(processor, *size) for size in SIZES]
    grids = processor.image_processor([tiny.picture(*size) for size in SIZES])["image_grid_thw"]
    assert said["num_image_patches"] == [int(np.prod(grid)) for grid in grids]


def test_published_sizes():
    processor = EveProcessor(EveImageProcessor(), tiny.tokenizer())
    said = processor._get_num_multimodal_tokens(image_sizes=[(480, 640), (1, 1), (10, 6000)])
    assert said["num_image_tokens"] == [451, 601, 26]


def test_saving_and_loading_changes_nothing(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    inputs = dict(text="<image> what is this?", images=[tiny.picture(20, 32)], return_tensors="np")
    expected = processor(**inputs)
    for again in (EveProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(again) is EveProcessor
        assert type(again.image_processor) is EveImageProcessor
        assert again.chat_template == processor.chat_template
        assert again.image_token_id == processor.image_token_id
        made = again(**inputs)
        assert set(made) == set(expected)
        for name in expected:
            assert (made[name] == expected[name]).all()


def test_a_tokenizer_without_the_mark_is_refused():
    words = train_tokenizer(["some words"], vocab_size=300)
    with pytest.raises(ValueError, match=r"splits '<picture>' into \d+ tokens; add it first"):
        EveProcessor(EveImageProcessor(), words, image_token="<picture>")


# --- chat templates -------------------------------------------------------------------------------


def render(processor, messages, **settings):
    return processor.apply_chat_template(messages, tokenize=False, **settings)


def test_vicuna_template_word_for_word():
    processor = tiny.processor(chat_template=VICUNA_CHAT_TEMPLATE)
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    messages = tiny.conversation("What is this?", "A cat.") + tiny.conversation(
        "And this?", pictures=0
    )
    assert render(processor, messages, add_generation_prompt=True) == (
        f"<s>{system} USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: And this? ASSISTANT:"
    )
    spoken = [{"role": "system", "content": "Be brief."}, *tiny.conversation("Why?", pictures=0)]
    assert render(processor, spoken) == "<s>Be brief. USER: Why?"


def test_contents_may_be_plain_strings(processor):
    plain = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    parts = tiny.conversation("Why?", "So.", pictures=0)
    for template in (processor.chat_template, VICUNA_CHAT_TEMPLATE):
        rendered = render(processor, plain, chat_template=template)
        assert rendered == render(processor, parts, chat_template=template)
        assert rendered.endswith("USER: Why? ASSISTANT: So.</s>")


def test_chat_template_takes_pictures_along(processor):
    """One call from messages equals rendering, then the processor; a picture in the second turn."""
    picture, other = tiny.picture(20, 32), tiny.picture(8, 8)
    messages = tiny.conversation("What?", "A cat.") + tiny.conversation("And this?")
    with_pictures = tiny.conversation("What?", "A cat.") + tiny.conversation("And this?")
    with_pictures[0]["content"][0] = {"type": "image", "image": picture}
    with_pictures[2]["content"][0] = {"type": "image", "image": other}
    together = processor.apply_chat_template(
        with_pictures,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    text = render(processor, messages, add_generation_prompt=True)
    apart = processor(
        text=text, images=[picture, other], add_special_tokens=False, return_tensors="pt"
    )
    for name in ("input_ids", "pixel_values", "image_grid_thw"):
        assert torch.equal(together[name], apart[name])
    expected = [tokens_of(processor, 20, 32), tokens_of(processor, 8, 8)]
    assert runs(together["input_ids"][0].tolist(), processor.image_token_id) == expected


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="the library's own mask ignores the expansion of pictures in older versions; "
    "training makes its labels itself (test_encode)",
)
def test_assistant_mask_is_the_answer_and_its_end():
    """With a tokenizer whose words do not swallow the blank between "ASSISTANT:" and the answer."""
    backend = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    backend["added_tokens"] = [
        one for one in backend["added_tokens"] if one["content"] not in ROLES
    ]
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<s>", eos_token="</s>"
    )
    pictures = tiny.processor().image_processor
    processor = EveProcessor(pictures, words, chat_template=VICUNA_CHAT_TEMPLATE)
    messages = tiny.conversation("What?", "a red square")
    messages[0]["content"][0] = {"type": "image", "image": tiny.picture(20, 32)}
    made = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = np.array(made["input_ids"][0]), np.array(made["assistant_masks"][0]).astype(bool)
    assert processor.decode(ids[mask]) == " a red square</s>"


def test_added_mark_of_a_foreign_tokenizer():
    """A decoder's own tokenizer gets the mark behind its vocabulary."""
    words = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer()._tokenizer, eos_token="</s>")
    words.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    processor = EveProcessor(EveImageProcessor(), words, image_token="<picture>")
    assert processor.image_token_id == len(words) - 1
