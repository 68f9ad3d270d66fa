"""Configurations: published defaults, refusals, and what survives saving. All comparisons exact."""

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen3Config

import tiny
from eve_vlm import EveAlignmentConfig, EveConfig, EveVisionConfig


def test_defaults_are_the_published_7b_sizes():
    made = EveConfig()
    vision, text = made.vision_config, made.text_config
    assert (vision.patch_size, vision.merge_size, vision.hidden_size) == (14, 2, 1024)
    assert vision.num_attention_heads == 8
    assert (text.model_type, text.hidden_size, text.num_hidden_layers) == ("llama", 4096, 32)
    assert (text.vocab_size, text.max_position_embeddings) == (32000, 4096)
    assert made.image_token_id == 32000 and made.alignment_config is None
    alignment = EveAlignmentConfig()
    assert (alignment.teacher_hidden_size, alignment.tap_every, alignment.pool_size) == (1024, 4, 1)


def test_saving_and_loading_gives_the_same_configuration(tmp_path):
    made = tiny.config(aligned=True, rope_theta=5e5)
    made.save_pretrained(tmp_path)
    for again in (EveConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is EveConfig
        assert type(again.text_config) is LlamaConfig
        assert type(again.vision_config) is EveVisionConfig
        assert type(again.alignment_config) is EveAlignmentConfig
        ignored = {"transformers_version", "_name_or_path"}
        assert {key: value for key, value in again.to_dict().items() if key not in ignored} == {
            key: value for key, value in made.to_dict().items() if key not in ignored
        }


def test_no_alignment_stays_none(tmp_path):
    tiny.config().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).alignment_config is None


def test_parts_may_come_as_dicts_or_objects():
    dicts = EveConfig(
        text_config={"model_type": "qwen3", "hidden_size": 32},
        vision_config={"patch_size": 4},
        alignment_config={"tap_every": 2},
    )
    objects = EveConfig(
        text_config=Qwen3Config(hidden_size=32),
        vision_config=EveVisionConfig(patch_size=4),
        alignment_config=EveAlignmentConfig(tap_every=2),
    )
    assert type(dicts.text_config) is Qwen3Config
    assert dicts.to_dict() == objects.to_dict()


def test_given_dicts_are_not_changed():
    text = {"model_type": "llama", "hidden_size": 32}
    EveConfig(text_config=text)
    assert text == {"model_type": "llama", "hidden_size": 32}


@pytest.mark.parametrize("tied", [True, False])
def test_tying_follows_the_decoder(tied):
    assert tiny.config(tie_word_embeddings=tied).tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: EveVisionConfig(patch_size=0), ("vision_config.patch_size", "0", "at least 1")),
        (lambda: EveVisionConfig(merge_size=-1), ("vision_config.merge_size", "-1")),
        (lambda: EveVisionConfig(num_channels=0), ("vision_config.num_channels",)),
        (lambda: EveVisionConfig(hidden_size=0), ("vision_config.hidden_size",)),
        (lambda: EveVisionConfig(hidden_size=30), ("30", "8", "heads")),
        (lambda: EveVisionConfig(num_attention_heads=0), ("num_attention_heads", "0")),
        (
            lambda: EveAlignmentConfig(tap_every=0),
            ("alignment_config.tap_every", "0", "at least 1"),
        ),
        (lambda: EveAlignmentConfig(pool_size=0), ("pool_size", "0", "at least 1")),
        (lambda: EveAlignmentConfig(teacher_hidden_size=30), ("30", "8", "heads")),
        (lambda: EveAlignmentConfig(num_attention_heads=0), ("num_attention_heads", "0")),
        (lambda: EveConfig(image_token_id=-200), ("image_token_id", "-200")),
        (lambda: EveConfig(text_config={"model_type": "lama"}), ("text_config", "'lama'")),
    ],
)
def test_impossible_values_are_refused(make, parts):
    with pytest.raises(ValueError) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("gemma2", "final_logit_softcapping"),
        ("granite", "logits_scaling"),
        ("cohere", "logit_scale"),
    ],
)
def test_decoders_that_change_their_logits_are_refused(model_type, name):
    """Their own heads do more than a matrix product; leaving that out would be silently wrong."""
    settings = {"logits_scaling": 8.0} if model_type == "granite" else {}
    with pytest.raises(ValueError, match=rf"text_config\.{name} is .* not supported"):
        EveConfig(text_config={"model_type": model_type, **settings})
