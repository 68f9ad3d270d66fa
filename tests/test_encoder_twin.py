"""The encoder-based twin: the encoder's own features in EVE's places, frozen, trained as EVE is.

Features are compared with the library's models, asked directly about pictures that Pillow resized.
One thing a reader would get wrong: where an EVE cell has another size in pixels than the encoder's,
torch resizes in the model and Pillow in the test, and single values may differ by one step of 255;
an encoder with cells of the same size shows that all else is exact.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, CLIPVisionConfig, CLIPVisionModel

import tiny
from eve_vlm import EveEncoder, EveEncoderConfig, EveForConditionalGeneration, load
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import Encoder
from eve_vlm.data.records import Record
from eve_vlm.efficientnet_lite import EfficientNetLite0, EfficientNetLite0Config
from eve_vlm.encoder_twin_eve import encoder_parameters, put_encoder
from eve_vlm.export.folder import export
from eve_vlm.flops import terms_of
from eve_vlm.image_processing_eve import resize_picture
from eve_vlm.loading import load_model
from eve_vlm.memory.estimate import MemoryModel
from eve_vlm.memory.formulas import Workload
from eve_vlm.serve.engine import EveEngine
from eve_vlm.train.build import build_model
from eve_vlm.train.parameters import optimizer_groups, select_trainable
from eve_vlm.train.recipe import load_recipe
from eve_vlm.train.run import train
from test_cli import eve  # noqa: F401
from test_teacher import pytest_effnet, save
from tiny import refused

CELL = tiny.PATCH * tiny.MERGE  # pixels of EVE's cell
SAME = 1e-5  # of the largest value: float32 sums in another order
SIZES = [(20, 40), (32, 32), (40, 20), (10, 20), (40, 13)]  # two with one grid
PACKED = {"patch_size": tiny.PATCH, "merge_size": tiny.MERGE}
LEARNS = [
    "model.vision_tower.row_end_embedding",
    "model.multi_modal_projector.*",
    "model.language_model.*",
    "lm_head.*",
]


def close(made, expected, tolerance=SAME):
    assert made.shape == expected.shape
    allowed = tolerance * float(expected.abs().max())
    assert float((made - expected).abs().max()) <= allowed


def clip_folder(folder, *, patch=5, dropout=0.0):
    """A random CLIP whose pictures have `patch` pixels a cell, trained on 4 x 4 of them."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=4 * patch,
        patch_size=patch,
        attention_dropout=dropout,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def twin(folder, layer=-2, **text):
    """A tiny model made a twin; the same weights for the same encoder."""
    model = tiny.model(tiny.config(**text))
    torch.manual_seed(0)
    put_encoder(model, str(folder), layer, **PACKED)
    return model.eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def saved_twin(tmp_path_factory, clip, processor):
    """A twin's folder; read-only."""
    folder = tmp_path_factory.mktemp("twin")
    twin(clip).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pictures():
    return [tiny.picture(*size, seed=place) for place, size in enumerate(SIZES)]


def seen(processor, images):
    """What the image processor makes of them."""
    found = processor.image_processor(images, return_tensors="pt")
    return {"pixel_values": found["pixel_values"], "image_grid_thw": found["image_grid_thw"]}


def by_hand(model, processor, image, layer, *, mean, std, side):
    """(rows, columns, width) of the encoder's features of a picture that Pillow resized twice."""
    grid = processor.image_processor.grid_of(image.height, image.width)
    pixels = processor.image_processor.resize_to_grid(image)
    pixels = resize_picture(Image.fromarray(pixels), grid.rows * side, grid.cols * side)
    given = torch.tensor((pixels / 255 - np.array(mean)) / np.array(std), dtype=torch.float32)
    given = given.permute(2, 0, 1)[None]
    if isinstance(model, EfficientNetLite0):
        return model(given)[0].permute(1, 2, 0)
    keys = {} if "dinov2" in model.config.model_type else {"interpolate_pos_encoding": True}
    states = model(given, output_hidden_states=True, **keys).hidden_states[layer][0]
    return states[-grid.rows * grid.cols :].unflatten(0, (grid.rows, grid.cols))


def in_places(cells, row_end):
    """EVE's order of tokens, by loops: the class token, then rows that end in the row-end token."""
    tokens = [cells.flatten(0, 1).mean(0)]
    for row in cells:
        tokens += [*row, row_end]
    return torch.stack(tokens)


# --- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        *("clip", "siglip", "dinov2", "dinov2 with registers"),
        pytest.param("efficientnet-lite0", marks=pytest_effnet),
    ],
)
@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_features_are_the_encoders_own(tmp_path, processor, kind, layer):
    """1 %: one step of 255 in single pixels (see above); measured 0.02 to 0.5 %."""
    name, about = kind, {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
    if kind != "efficientnet-lite0":
        save(kind, tmp_path)
        name, about = str(tmp_path), {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    model = twin(name, layer)
    tower = model.model.vision_tower
    plain, side = tower.encoder, {-1: 32, -2: 16}[layer]
    if kind != "efficientnet-lite0":
        plain, side = AutoModel.from_pretrained(tmp_path).eval(), 5
        plain = plain.vision_model if kind == "clip" else plain
    images = pictures()
    made = tower(**seen(processor, images))
    expected = [
        in_places(
            by_hand(plain, processor, image, layer, side=side, **about), tower.row_end_embedding
        )
        for image in images
    ]
    assert made.dtype == torch.float32
    close(made, torch.cat(expected), 0.01)
    wrong = torch.cat([expected[1], expected[0], *expected[2:]])
    far = float((made - wrong).abs().max() / wrong.abs().max())
    assert far > 0.1  # the tolerance tells pictures apart


@torch.no_grad()
def test_patches_are_put_together_exactly(tmp_path, processor):
    """Nothing to resize: the pixels before EVE's normalisation come back, bit for bit."""
    folder = clip_folder(tmp_path, patch=CELL)
    tower = twin(folder).model.vision_tower
    plain = CLIPVisionModel.from_pretrained(folder).eval()
    images = pictures()
    about = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "side": CELL}
    expected = [
        in_places(by_hand(plain, processor, image, -2, **about), tower.row_end_embedding)
        for image in images
    ]
    close(tower(**seen(processor, images)), torch.cat(expected))


@torch.no_grad()
def test_pixels_are_pillows_but_for_one_step(clip, processor):
    """Resized in the model against Pillow: at most one step of 255, in less than 1 % of values."""
    tower = twin(clip).model.vision_tower
    for image in pictures():
        given = seen(processor, [image])
        rows, cols = given["image_grid_thw"][0, 1:].tolist()
        made = tower._pixels(given["pixel_values"], rows, cols)[0].permute(1, 2, 0).numpy()
        made = (made * np.array([0.2, 0.3, 0.4]) + np.array([0.5, 0.4, 0.3])) * 255
        resized = processor.image_processor.resize_to_grid(image)
        height, width = rows // tiny.MERGE * 5, cols // tiny.MERGE * 5
        expected = resize_picture(Image.fromarray(resized), height, width)
        steps = np.abs(made - expected)
        assert steps.max() < 1.01 and (steps < 0.01).mean() > 0.99


def test_a_picture_takes_as_many_tokens_as_with_eve(clip, processor, model):
    given = seen(processor, pictures())
    made, eves = twin(clip).get_image_features(**given), model.get_image_features(**given)
    assert made.last_hidden_state.shape == eves.last_hidden_state.shape
    assert [len(one) for one in made.pooler_output] == [len(one) for one in eves.pooler_output]


@torch.no_grad()
def test_a_batch_is_its_pictures_alone(clip, processor):
    model = twin(clip)
    images = pictures()
    alone = [
        model.get_image_features(**seen(processor, [image])).last_hidden_state for image in images
    ]
    close(model.get_image_features(**seen(processor, images)).last_hidden_state, torch.cat(alone))


def test_half_precision_weights_are_the_encoders_type(clip, processor):
    """The projector computes in float32; 5 % of the largest value is some bfloat16 layers."""
    given = seen(processor, pictures())
    with torch.no_grad():
        expected = twin(clip).get_image_features(**given).last_hidden_state
        made = twin(clip).to(torch.bfloat16).get_image_features(**given).last_hidden_state
    assert made.dtype == torch.float32
    close(made, expected, 0.05)


# --- loss, saving, answering ----------------------------------------------------------------------


def batches(processor):
    """The same records as rows of their own and packed into two rows."""
    encoder = Encoder(processor, format="chat", max_length=256)
    records = []
    for index, number in enumerate([1, 0, 2, 1]):
        messages = tiny.conversation(tiny.QUESTIONS[index], tiny.ANSWERS[index], pictures=number)
        images = [tiny.picture(10 + 7 * n, 30, seed=10 * index + n) for n in range(number)]
        records.append(encoder(Record(id=str(index), messages=messages, images=images)))
    yield EveCollator(0)([[record] for record in records])
    yield EveCollator(0, packed=True)([records[:3], records[3:]])


def test_packed_is_separate(clip, processor):
    """Loss and all gradients; 1e-4 of each weight's largest as for EVE itself."""
    found = []
    for batch in batches(processor):
        model = twin(clip).train()
        loss = model(**tiny.for_model(batch)).loss
        loss.backward()
        found.append((loss.item(), {name: w.grad for name, w in model.named_parameters()}))
    (loss, gradients), (packed_loss, packed_gradients) = found
    assert packed_loss == pytest.approx(loss, abs=SAME)
    for name, gradient in gradients.items():
        if ".encoder." in name:
            assert gradient is None and packed_gradients[name] is None
        else:
            allowed = 1e-4 * float(gradient.abs().max()) + 1e-9
            assert float((packed_gradients[name] - gradient).abs().max()) <= allowed, name


def test_words_alone_touch_what_learns(clip, processor):
    """By gradients of exactly zero, or processes with and without pictures would wait for ever."""
    model = twin(clip).train()
    words = processor.tokenizer(tiny.QUESTIONS[1], return_tensors="pt").input_ids
    model(input_ids=words, labels=words).loss.backward()
    tower = model.model.vision_tower
    for weight in (tower.row_end_embedding, *model.model.multi_modal_projector.parameters()):
        assert weight.grad is not None and not weight.grad.any()
    assert all(weight.grad is None for weight in encoder_parameters(model))


@pytest.mark.parametrize("name", ["clip", pytest.param("lite0", marks=pytest_effnet)])
@torch.no_grad()
def test_a_saved_twin_is_the_same_bit_by_bit(tmp_path, clip, processor, name):
    """By our loader and by the library's Auto class."""
    model = twin(clip if name == "clip" else "efficientnet-lite0")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    given = seen(processor, pictures())
    expected = model.get_image_features(**given).last_hidden_state
    for again in (load(tmp_path).model, AutoModelForImageTextToText.from_pretrained(tmp_path)):
        assert type(again) is EveForConditionalGeneration
        assert isinstance(again.model.vision_tower, EveEncoder)
        state = again.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert torch.equal(again.get_image_features(**given).last_hidden_state, expected)
        assert not any(weight.requires_grad for weight in encoder_parameters(again))
        assert not again.model.vision_tower.encoder.training


@torch.no_grad()
def test_the_encoder_stays_in_eval_mode(tmp_path, processor):
    """Its dropout of 0.5 would show."""
    model = twin(clip_folder(tmp_path, dropout=0.5))
    given = seen(processor, pictures())
    expected = model.get_image_features(**given).last_hidden_state
    model.train()
    assert model.training and model.model.vision_tower.training
    assert not any(module.training for module in model.model.vision_tower.encoder.modules())
    assert torch.equal(model.get_image_features(**given).last_hidden_state, expected)
    model.requires_grad_(True).train()
    assert not any(weight.requires_grad for weight in encoder_parameters(model))


def test_the_engine_answers_about_pictures(saved_twin):
    """As the library's own loop does, token by token, and not alike for all pictures."""
    engine = EveEngine.from_pretrained(saved_twin)
    images = pictures()
    answers = [
        engine.ask(tiny.QUESTIONS[0], [image], max_new_tokens=8, temperature=0) for image in images
    ]
    assert len(set(answers)) > 1
    text = engine.processor.apply_chat_template(
        tiny.conversation(tiny.QUESTIONS[0]), add_generation_prompt=True
    )
    for image, answer in zip(images, answers, strict=True):
        given = engine.processor(images=[image], text=[text], return_tensors="pt")
        ids = given["input_ids"]
        for _ in range(8):
            logits = engine.model(**given | {"input_ids": ids, "attention_mask": None}).logits
            word = logits[:, -1].argmax(-1, keepdim=True)
            if int(word) == engine.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, word], 1)
        words = ids[0, given["input_ids"].shape[1] :]
        assert engine.tokenizer.decode(words, skip_special_tokens=True).strip() == answer.strip()


def test_ask_and_inspect_take_a_twins_folder(saved_twin, tmp_path, eve):  # noqa: F811
    tiny.picture(20, 30).save(tmp_path / "p.png")
    code, out, err = eve("ask", str(tmp_path / "p.png"), "What?", "--model", str(saved_twin))
    assert code == 0, err
    code, out, err = eve("inspect", str(saved_twin))
    count = sum(weight.numel() for weight in encoder_parameters(load_model(saved_twin)))
    assert code == 0 and f"{count:,}" in out.split("frozen encoder")[1].split("\n")[0], out


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    return tiny.llava_file(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make(tmp_path, conversations, clip):
    """A recipe for a twin, with some overrides."""

    def made(*overrides, name="run", start=None, encoder=clip, trainable=LEARNS, lora=None):
        keys = tiny.recipe_data(conversations, tmp_path / name, init_from=start)
        if encoder is not None:
            keys["model"]["encoder"] = {"name": str(encoder), "layer": -2}
        keys["stage"]["trainable"] = trainable
        keys["stage"]["learning_rates"] = {"*": 1.0e-2}
        keys["training"]["max_steps"] = 2
        if lora:
            keys["lora"] = lora
        return tiny.recipe(tmp_path / f"{name}.yaml", keys, *overrides)

    return made


def same(weights, others, start):
    """Whether all weights that begin so are bitwise equal in both."""
    names = [name for name in weights if name.startswith(start)]
    assert names
    return all(torch.equal(weights[name], others[name]) for name in names)


ENCODER, PROJECTOR = "model.vision_tower.encoder.", "model.multi_modal_projector."
ROW_END, DECODER = "model.vision_tower.row_end_embedding", "model.language_model."


def test_two_stages_from_an_eve_folder(make, saved_model, tmp_path, clip):
    """Prealign moves the projector alone, finetune the decoder too; the encoder nothing at all."""
    train(make(name="first", start=saved_model, trainable=LEARNS[:2]))
    train(make(name="second", start=tmp_path / "first"))
    start, first, second = (
        load_model(folder).state_dict()
        for folder in (saved_model, tmp_path / "first", tmp_path / "second")
    )
    own = CLIPVisionModel.from_pretrained(clip).state_dict()
    for state in (first, second):
        found = {name.removeprefix(ENCODER): state[name] for name in state if ENCODER in name}
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], own[name]) for name in own)
    assert same(first, start, DECODER) and same(first, start, "lm_head.")
    for moved in (PROJECTOR, ROW_END, DECODER):
        assert not same(second, first, moved), moved
    table = (tmp_path / "second" / "parameters.txt").read_text(encoding="utf-8")
    frozen = sum(weight.numel() for weight in encoder_parameters(load_model(tmp_path / "second")))
    assert f"{frozen:,} frozen" in table


def test_prealign_moves_projector_and_row_end(make, saved_model):
    recipe = make(start=saved_model, trainable=LEARNS[:2])
    model = build_model(recipe, tiny.processor(), None)
    names = set(select_trainable(model, recipe.stage))
    assert ROW_END in names and {name for name in names if name != ROW_END} == {
        name for name, _ in model.named_parameters() if name.startswith(PROJECTOR)
    }
    slots = {id(one) for group in optimizer_groups(model, recipe.stage) for one in group["params"]}
    assert not slots & {id(weight) for weight in encoder_parameters(model)}


def test_a_twin_from_nothing(make, tmp_path):
    """A new decoder, as `text_config` has it, and the processor's own colours."""
    train(make())
    config = load_model(tmp_path / "run").config.vision_config
    assert isinstance(config, EveEncoderConfig) and config.layer == -2
    assert tuple(config.encoder_mean) == (0.5, 0.4, 0.3)
    assert tuple(config.image_mean) == tuple(tiny.processor().image_processor.image_mean)


def test_lora_on_a_twin(make, saved_twin, tmp_path):
    pytest.importorskip("peft", reason="needs the extra lora")
    adapters = {"rank": 2, "alpha": 4.0}
    train(make(start=saved_twin, name="lora", trainable=LEARNS[:2], lora=adapters))
    before, after = load_model(saved_twin).state_dict(), load_model(tmp_path / "lora").state_dict()
    assert same(after, before, ENCODER)
    for moved in (PROJECTOR, ROW_END, DECODER):
        assert not same(after, before, moved), moved


@pytest.mark.parametrize("stage", ["1_prealign", "2_pretrain", "3_finetune"])
def test_the_shipped_twin_differs_in_nothing_else(stage):
    """Same data, decoder, steps, rates: what is compared is the encoder alone."""
    twins, eves = load_recipe(f"tiny_twin/{stage}"), load_recipe(f"tiny/{stage}")
    assert twins.model.encoder is not None and set(eves.stage.learning_rates.values()) == set(
        twins.stage.learning_rates.values()
    )
    model = {"encoder": None, "init_from": eves.model.init_from}
    ours = {
        name: getattr(eves.stage, name) for name in ("trainable", "learning_rates", "alignment")
    }
    assert eves == dataclasses.replace(
        twins,
        name=eves.name,
        output_dir=eves.output_dir,
        model=dataclasses.replace(twins.model, **model),
        stage=dataclasses.replace(twins.stage, **ours),
    )


def test_memory_estimates_count_the_encoder_as_frozen(saved_twin):
    """Its weights are there; gradients and moments are those of what learns, in float32."""
    model = load_model(saved_twin)
    frozen = sum(weight.numel() for weight in encoder_parameters(model))
    learning = model.num_parameters() - frozen
    work = Workload(training=True, length=64, rows=2, cols=2)
    memory = MemoryModel(model.config)
    sizes, parts = memory.sizes(work), memory.estimate(work).phases["optimizer step"]
    assert sum(sizes.weights.values()) == 4 * (learning + frozen)
    assert sizes.elements == learning
    assert parts["optimizer's moments"] == 8 * learning and parts["gradients"] == 4 * learning


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("glob", ["*", "model.vision_tower.*", "*.encoder.*"])
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0}], ids=["whole", "lora"])
def test_the_encoder_does_not_learn(make, saved_twin, glob, lora):
    if lora:
        pytest.importorskip("peft", reason="needs the extra lora")
    text = refused(lambda: train(make(start=saved_twin, trainable=[glob], lora=lora)))
    assert f"{glob!r} would train the encoder" in text
    assert f"{ROW_END}, {PROJECTOR}*, {DECODER}*, lm_head.*" in text


def test_alignment_is_eves(make):
    text = refused(lambda: make("stage.alignment.teacher=efficientnet-lite0"))
    assert "stage.alignment" in text and "must be null with model.encoder" in text


def test_a_start_with_another_encoder(make, saved_twin, clip):
    for recipe in (
        make(start=saved_twin, encoder=None),
        make("model.encoder.layer=-1", start=saved_twin),
        make(start=saved_twin, encoder="other"),
    ):
        text = refused(lambda recipe=recipe: train(recipe), end="starts from.")
        assert "model.encoder is" in text and f"{clip}, layer -2" in text
    text = refused(lambda: train(make("model.vision.merge_size=1", start=saved_twin)))
    assert "model.vision.merge_size is 1" in text


def test_an_encoder_that_is_not_there(make, saved_model):
    text = refused(lambda: train(make(encoder="/no/such/folder")))
    assert "The encoder '/no/such/folder' cannot be loaded" in text and "model.encoder" in text
    text = refused(lambda: train(make("model.encoder.layer=-9")))
    assert "model.encoder.layer is -9" in text and "3 layers" in text
    text = refused(lambda: train(make(encoder=saved_model)))
    assert "vision model" in text
    text = refused(lambda: train(make("model.encoder.layer=-9", encoder="efficientnet-lite0")))
    assert "model.encoder.layer is -9" in text
    with pytest.raises(ValueError, match="stride is 4"):
        EfficientNetLite0Config(stride=4)


def test_lora_needs_a_twin_to_start_from(make, saved_model):
    pytest.importorskip("peft", reason="needs the extra lora")
    lora = {"rank": 2, "alpha": 4.0}
    text = refused(lambda: train(make(start=saved_model, trainable=LEARNS[:2], lora=lora)))
    assert "has no encoder yet" in text


def test_what_does_not_cover_twins_says_so(saved_twin, tmp_path, eve):  # noqa: F811
    assert "operations of an encoder" in refused(lambda: terms_of(load_model(saved_twin)))
    text = refused(lambda: export(saved_twin, tmp_path / "out", format="transformers"))
    assert "encoder-based twin" in text and not (tmp_path / "out").exists()
    assert export(saved_twin, tmp_path / "decoder", format="decoder").folder.is_dir()
    code, _, err = eve("fits", str(saved_twin), "--teacher", "efficientnet-lite0")
    assert code != 0 and "has no aligner" in err
