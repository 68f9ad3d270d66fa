"""Whole runs of recipes on a tiny model: three stages, resume, refusals, every kind of start.

Weights are compared bit for bit: the same operations in the same order on the same machine give
the same bits, and a run that is resumed has to do the same operations.
"""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import tiny
from eve_vlm import EveForConditionalGeneration, EveForPreTraining
from eve_vlm.serve.engine import EveEngine
from eve_vlm.train import run as run_module
from eve_vlm.train.build import build_model, build_processor
from eve_vlm.train.run import describe, finished_run, train
from eve_vlm.train.trainer import EveTrainer

OURS = ("model.vision_tower.", "model.multi_modal_projector.")


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return tiny.llava_file(tmp_path_factory.mktemp("captions"), captions=True)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    return tiny.llava_file(tmp_path_factory.mktemp("conversations"))


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(made, expected):
    assert set(made) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(made[name], weight), name


def terms(result):
    """The logged losses, without what the clock says."""
    return [
        {key: value for key, value in entry.items() if key.startswith(("loss", "step", "grad"))}
        for entry in result.losses
    ]


@pytest.fixture
def make(tmp_path, conversations):
    """A recipe on the conversations with some overrides; folders below `tmp_path`."""

    def made(*overrides, name="run", data=None, **start):
        keys = tiny.recipe_data(data or conversations, tmp_path / name, **start)
        return tiny.recipe(tmp_path / f"{name}.yaml", keys, *overrides)

    return made


# --- what a run does ------------------------------------------------------------------------------


def test_a_run_leaves_a_model_that_answers(make, tmp_path):
    recipe = make()
    result = train(recipe)
    folder = tmp_path / "run"
    names = {file.name for file in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "run.json"}
    assert names >= {"recipe.resolved.yaml", "parameters.txt", "processor_config.json"}
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert (result.steps, result.records) == (4, 8)
    assert [entry["step"] for entry in result.losses] == [1, 2, 3, 4]
    assert json.loads((folder / "run.json").read_text())["losses"] == result.losses
    assert "model.vision_tower" in (folder / "parameters.txt").read_text()
    assert finished_run(recipe) == result
    answer = EveEngine.from_pretrained(folder).ask("What is this?", [tiny.picture(20, 20)])
    assert isinstance(answer, str)


def test_the_recipe_beside_the_model_is_the_run(make, tmp_path):
    """It loads again, and then means exactly this run."""
    recipe = make("training.max_steps=2")
    train(recipe)
    from eve_vlm.train.recipe import load_recipe

    assert load_recipe(tmp_path / "run" / "recipe.resolved.yaml") == recipe


@pytest.mark.parametrize("format", ["chat", "plain"])
def test_one_batch_is_learnt(make, captions, format):
    """The loss of one batch halves, and more."""
    recipe = make(
        *(f"data.format={format}", "training.max_steps=40", "training.logging_steps=1"),
        *("training.per_device_train_batch_size=12", "stage.learning_rates={'*': 3.0e-3}"),
        data=captions,
    )
    losses = [entry["loss_lm"] for entry in train(recipe).losses]
    assert losses[-1] < losses[0] / 2


def test_one_batch_is_aligned(make, captions, teacher_folder):
    recipe = make(
        *("training.max_steps=60", "training.per_device_train_batch_size=12"),
        "stage.learning_rates={'*': 3.0e-3}",
        data=captions,
        teacher=teacher_folder,
    )
    losses = [entry["loss_alignment"] for entry in train(recipe).losses]
    assert losses[-1] < losses[0] / 2


def test_runs_repeat_bit_for_bit(make, tmp_path, teacher_folder):
    """From the seed alone, whatever was drawn before; another seed gives another model."""
    first = train(make(name="a", teacher=teacher_folder))
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    second = train(make(name="b", teacher=teacher_folder))
    assert terms(first) == terms(second)
    assert_equal(weights_of(tmp_path / "b"), weights_of(tmp_path / "a"))
    train(make("seed=4", name="c", teacher=teacher_folder))
    other = weights_of(tmp_path / "c")
    assert not torch.equal(other["lm_head.weight"], weights_of(tmp_path / "a")["lm_head.weight"])


def test_three_stages_in_sequence(make, tmp_path, captions, teacher_folder):
    """Prealign moves only the patch embedding and the aligner; each stage begins where one ended."""
    new = ["model.vision_tower.*", "model.multi_modal_projector.*", "aligner.*"]
    language = make("data.format=plain", name="language", data=captions)
    train(language)
    before = weights_of(tmp_path / "language")
    prealign = make(
        *(f"stage.trainable={json.dumps(new)}", "stage.name=prealign", "data.format=plain"),
        name="prealign",
        data=captions,
        init_from=tmp_path / "language",
        teacher=teacher_folder,
    )
    train(prealign)
    after = weights_of(tmp_path / "prealign")
    for name, weight in after.items():
        learns = name.startswith((*OURS, "aligner."))
        if name in before:
            assert torch.equal(weight, before[name]) != learns, name
        else:
            assert name.startswith("aligner."), name
    pretrain = make(
        *("stage.name=pretrain", "data.format=plain"),
        name="pretrain",
        data=captions,
        init_from=tmp_path / "prealign",
        teacher=teacher_folder,
    )
    start = build_model(pretrain, build_processor(pretrain, None), tiny.TEACHER_WIDTH)
    assert isinstance(start, EveForPreTraining)
    assert_equal(dict(start.state_dict()), after)  # the aligner goes on, too
    train(pretrain)
    learnt = weights_of(tmp_path / "pretrain")
    assert all(not torch.equal(learnt[name], weight) for name, weight in after.items())
    # A last stage without a teacher drops the aligner.
    finetune = make(name="finetune", init_from=tmp_path / "pretrain")
    train(finetune)
    assert {name for name in learnt if not name.startswith("aligner.")} == set(
        weights_of(tmp_path / "finetune")
    )


def test_no_checkpoint_holds_a_teacher(make, tmp_path, teacher_folder):
    train(make("training.save_strategy=steps", "training.save_steps=2", teacher=teacher_folder))
    teacher = {
        weight.numel() for weight in load_file(teacher_folder / "model.safetensors").values()
    }
    assert teacher
    model = tiny.model(tiny.config(aligned=True))
    known = set(model.state_dict())
    for file in (tmp_path / "run").rglob("*.safetensors"):
        assert set(load_file(file)) <= known
    assert len(list((tmp_path / "run").rglob("*.safetensors"))) == 3


def test_high_definition_stage_pools_cells(make, tmp_path, captions, teacher_folder):
    """Twice the side, four times the tokens, the same teacher cells."""
    train(make(name="before", data=captions, teacher=teacher_folder))
    recipe = make(
        *(
            f"model.image.longest_edge={2 * tiny.EDGE}",
            f"model.image.size_multiple={2 * tiny.MULTIPLE}",
        ),
        name="hd",
        data=captions,
        init_from=tmp_path / "before",
        teacher=teacher_folder,
    )
    result = train(recipe)
    losses = [entry["loss_alignment"] for entry in result.losses]
    assert all(0 < loss < 2 for loss in losses), losses
    config = json.loads((tmp_path / "hd" / "config.json").read_text())
    assert config["alignment_config"]["pool_size"] == 2
    engine = EveEngine.from_pretrained(tmp_path / "hd")
    assert engine.processor.image_processor.grid_of(9, 9).rows == 8


def test_bfloat16_weights(make, tmp_path):
    train(make("model.dtype=bfloat16", "training.max_steps=2"))
    saved = weights_of(tmp_path / "run")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}


# --- stop and go on -------------------------------------------------------------------------------


class Stopped(BaseException):
    """As when the machine is switched off."""


def stop_at(monkeypatch, step):
    plain = EveTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Stopped
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(EveTrainer, "training_step", training_step)


KEPT = (
    *("training.max_steps=7", "training.save_strategy=steps", "training.save_steps=3"),
    *("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"),
)


@pytest.mark.parametrize("kind", ["language", "prealign with a teacher"])
def test_a_stopped_run_goes_on_bit_for_bit(make, tmp_path, monkeypatch, teacher_folder, kind):
    """Stopped in the second epoch, after step 5; the last checkpoint is of step 3."""
    settings, start = list(KEPT), {}
    if "teacher" in kind:
        settings.append(
            "stage.trainable=['model.vision_tower.*','model.multi_modal_projector.*','aligner.*']"
        )
        start = {"teacher": teacher_folder}
    whole = train(make(*settings, name="whole", **start))
    recipe = make(*settings, name="stopped", **start)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Stopped):
            train(recipe)
    assert finished_run(recipe) is None
    torch.manual_seed(1234)
    again = train(recipe, resume=True)
    assert terms(again) == terms(whole)
    assert (again.steps, again.records) == (whole.steps, whole.records)
    assert_equal(weights_of(tmp_path / "stopped"), weights_of(tmp_path / "whole"))


def test_a_run_without_a_checkpoint_begins_again(make, tmp_path, monkeypatch):
    whole = train(make(*KEPT, name="whole"))
    recipe = make(*KEPT, name="stopped")
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Stopped):
            train(recipe)
    assert terms(train(recipe, resume=True)) == terms(whole)
    assert_equal(weights_of(tmp_path / "stopped"), weights_of(tmp_path / "whole"))


def test_resuming_what_was_never_begun_just_begins(make):
    assert train(make("training.max_steps=1"), resume=True).steps == 1


# --- output folders -------------------------------------------------------------------------------


def test_an_unfinished_run_is_not_overwritten(make, monkeypatch, tmp_path):
    recipe = make(*KEPT)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Stopped):
            train(recipe)
    text = tiny.refused(lambda: train(recipe, resume=False))
    assert "unfinished" in text and "--no-resume" in text and str(tmp_path / "run") in text


@pytest.mark.parametrize("resume", [False, True])
def test_a_different_run_is_refused(make, tmp_path, resume):
    train(make("training.max_steps=1"))
    before = weights_of(tmp_path / "run")
    text = tiny.refused(lambda: train(make("training.max_steps=2"), resume=resume))
    assert "different run (training.max_steps was 1 and is 2" in text
    assert str(tmp_path / "run") in text
    assert_equal(weights_of(tmp_path / "run"), before)
    assert finished_run(make("training.max_steps=2")) is None


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_is_refused(make, resume):
    recipe = make("training.max_steps=1")
    train(recipe)
    assert "finished" in tiny.refused(lambda: train(recipe, resume=resume))


def test_a_folder_with_other_files_is_refused(make, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "holiday.jpg").write_text("x")
    assert "holds other files and no run" in tiny.refused(lambda: train(make()))
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["holiday.jpg"]


def test_a_refused_recipe_leaves_no_folder(make, tmp_path):
    """So that mending it and starting again is not refused in turn."""
    with pytest.raises(ValueError):
        train(make("stage.trainable=['nothing.*']"))
    assert not (tmp_path / "run").exists()


# --- starts ---------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def decoder(request, tmp_path):
    """A language model with its tokenizer, as from the Hub, that knows no pictures."""
    words = tiny.tokenizer()
    words.chat_template = None
    backend = json.loads(words._tokenizer.to_str())
    backend["added_tokens"] = [
        one for one in backend["added_tokens"] if one["content"] != "<image>"
    ]
    backend["model"]["vocab"].pop("<image>")
    # Ids must run on without a gap.
    backend["model"]["vocab"] = {
        word: id - (id > 3) for word, id in backend["model"]["vocab"].items()
    }
    for one in backend["added_tokens"]:
        one["id"] -= one["id"] > 3
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<s>", eos_token="</s>"
    )
    settings = tiny.config(tie_word_embeddings=request.param).text_config.to_dict()
    settings["vocab_size"] = len(plain)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings)).eval()
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    folder = tmp_path / "decoder"
    model.save_pretrained(folder)
    plain.save_pretrained(folder)
    return folder, model, plain


def test_a_decoder_gets_a_patch_embedding(make, tmp_path, decoder):
    folder, bare, plain = decoder
    recipe = make(f"model.decoder={folder}", "model.text_config=null", "training.max_steps=1")
    processor = build_processor(recipe, None)
    assert processor.image_token_id == len(plain) and len(processor.tokenizer) == len(plain) + 1
    assert processor.chat_template and processor.tokenizer.pad_token_id is not None
    model = build_model(recipe, processor, None).eval()
    assert type(model) is EveForConditionalGeneration
    for name, weight in bare.base_model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], weight), name
    assert torch.equal(model.lm_head.weight, bare.lm_head.weight)
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        # 1e-5: loaded weights lie elsewhere in memory, which may change the order of sums.
        assert torch.allclose(model(input_ids=ids).logits, bare(input_ids=ids).logits, atol=1e-5)
    assert model.generation_config.eos_token_id == plain.eos_token_id
    train(recipe)
    loaded = EveForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert loaded.config.tie_word_embeddings == bare.config.tie_word_embeddings
    answer = EveEngine.from_pretrained(tmp_path / "run").ask("What is this?", [tiny.picture(9, 9)])
    assert isinstance(answer, str)


def test_a_new_decoder_takes_its_words_from_the_data(make, tmp_path):
    train(make("training.max_steps=1"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    engine = EveEngine.from_pretrained(tmp_path / "run")
    assert config["text_config"]["vocab_size"] == len(engine.processor.tokenizer)
    ids = engine.processor.tokenizer(" square")["input_ids"]
    assert len(ids) == 1  # a word of the data is one token
    assert engine.model.config.image_token_id == engine.processor.image_token_id
    text = engine.model.config.text_config
    words = engine.processor.tokenizer
    assert (text.eos_token_id, text.bos_token_id) == (words.eos_token_id, words.bos_token_id)


# --- recipes that do not fit ----------------------------------------------------------------------


def test_too_long_records_stop_the_run(make):
    text = tiny.refused(lambda: train(make("data.max_length=10")))
    assert "max_bad_share" in text and "max_length is 10" in text


def test_a_short_run_of_bad_records_only_is_no_success(make, tmp_path):
    """Too few for their share to be judged, but nothing was learnt."""
    recipe = make("data.max_length=10", "training.max_steps=1")
    text = tiny.refused(lambda: train(recipe))
    assert "None of the 2 records could be used" in text and "max_length is 10" in text
    assert finished_run(recipe) is None


def test_missing_pictures_stop_the_run(make, tmp_path):
    file = tiny.llava_file(tmp_path / "gone", captions=True)
    for picture in (tmp_path / "gone").glob("*.png"):
        picture.unlink()
    text = tiny.refused(lambda: train(make(data=file)))
    assert "cannot be used" in text and ".png is not a file" in text


def test_a_start_that_is_not_there(make, tmp_path):
    text = tiny.refused(lambda: train(make(init_from=tmp_path / "nowhere")))
    assert str(tmp_path / "nowhere") in text and "no model" in text


def test_a_decoder_that_is_not_there(make, tmp_path):
    for where in (str(tmp_path / "nowhere"), "nobody/nothing"):
        recipe = make(f"model.decoder={where}", "model.text_config=null")
        assert where in tiny.refused(lambda recipe=recipe: train(recipe))


def test_a_tokenizer_that_is_not_there(make, tmp_path):
    text = tiny.refused(lambda: train(make(f"model.tokenizer={tmp_path / 'nowhere'}")))
    assert str(tmp_path / "nowhere") in text


def test_a_teacher_that_is_not_there(make, tmp_path):
    text = tiny.refused(lambda: train(make(teacher=tmp_path / "nowhere")))
    assert "The teacher" in text and str(tmp_path / "nowhere") in text


@pytest.mark.parametrize(
    ("key", "value"),
    [("patch_size", 2), ("hidden_size", 48), ("num_attention_heads", 4), ("merge_size", 1)],
)
def test_another_vision_than_the_start_has_is_refused(make, saved_model, key, value):
    text = tiny.refused(lambda: train(make(f"model.vision.{key}={value}", init_from=saved_model)))
    assert f"model.vision.{key} is {value} in the recipe" in text


def test_a_tap_distance_beyond_the_decoder_is_refused(make, teacher_folder):
    recipe = make("stage.alignment.tap_every=9", teacher=teacher_folder)
    assert "tap_every (9)" in tiny.refused(lambda: train(recipe))


def test_globs_that_match_nothing_are_refused(make):
    text = tiny.refused(lambda: train(make("stage.trainable=['model.vision_towr.*']")))
    assert "'model.vision_towr.*' matches no parameter" in text


def test_unknown_attention_is_refused(make):
    text = tiny.refused(lambda: train(make("model.attn_implementation=flash")))
    assert "flash" in text


def test_unknown_decoder_type_is_refused(make):
    assert "'lama'" in tiny.refused(lambda: train(make("model.text_config.model_type=lama")))


# --- dry run --------------------------------------------------------------------------------------


def test_describe_tells_recipe_parameters_and_tokens(make, tmp_path, teacher_folder):
    text = describe(make(teacher=teacher_folder))
    assert "learning_rates" in text and "aligner" in text and "parameters" in text
    assert "4 x 4 cells = 21 tokens" in text and "2 sequences per device" in text
    assert not (tmp_path / "run").exists()


def test_describe_reads_the_start_where_there_is_one(make, tmp_path, saved_model):
    text = describe(make(init_from=saved_model))
    count = tiny.model().num_parameters()
    assert f"{count:,} parameters: {count:,} trained" in text
    assert "later holds no model" in tiny.refused(
        lambda: describe(make(init_from=tmp_path / "later"))
    )


def test_meta_build_is_the_real_model(make, monkeypatch):
    """The same names and shapes, without a number in memory."""
    recipe = make()
    seen = []
    plain = run_module.make_trainable
    monkeypatch.setattr(
        run_module,
        "make_trainable",
        lambda model, recipe: (seen.append(model), plain(model, recipe)),
    )
    describe(recipe)
    (made,) = seen
    assert {weight.device.type for weight in made.parameters()} == {"meta"}
