"""`eve bench`: formulas against torch's counter and the paper, floors by hand, and what is called.

No test looks at how long anything took on this machine: where seconds matter, a clock is told what
to say. What is run at all runs on the shape `tiny`, so one quick run serves many tests. One thing a
reader would get wrong: the counter sees no kernels of SDPA on a CPU, so counted models use eager
attention, which computes all pairs.
"""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

import tiny
from eve_vlm import EveConfig, cli
from eve_vlm.bench import paper
from eve_vlm.bench.answering import (
    _figures,
    decode_need,
    in_parts,
    parts_needed,
    prefill_need,
)
from eve_vlm.bench.encoders import NAMES, EncoderBased, image_tokens
from eve_vlm.bench.growth import exponent
from eve_vlm.bench.measuring import Case, Clock, Measured, Need, Spread, measure, timed
from eve_vlm.bench.page import PAGE, RESULTS, TIMES, page_of, write_results
from eve_vlm.bench.programme import FORMAT, SECTIONS, Settings, figures_of, run_bench
from eve_vlm.bench.roof import Roof, measured_roof
from eve_vlm.bench.subjects import SHAPES, TRAINABLE, Subject
from eve_vlm.bench.training import STEPS, batch_of, step_work
from eve_vlm.bench.words import QUESTION, grids_of, mixed, picture, records
from eve_vlm.data.encode import Encoder
from eve_vlm.flops import flops_of, terms_of
from eve_vlm.memory.machine import Device
from eve_vlm.serve.engine import EveEngine, user_message
from eve_vlm.serve.running_batch import RunningBatch
from eve_vlm.train.meter import counts_of
from eve_vlm.train.recipe import load_recipe, recipes_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject():
    return Subject("tiny", device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def quick(subject):
    """One run of everything, with the sections that users get."""
    settings = Settings(edges=(112,), batches=(1, 3), repeats=1, new_tokens=4, quick=True)
    return run_bench(subject, settings)


@pytest.fixture(scope="module")
def compared(subject):
    """A run with the published table."""
    sections = ("preprocessing", "embedding", "prefill")
    settings = Settings(edges=(112, 224), sections=sections, repeats=1, quick=True, paper=True)
    return run_bench(subject, settings)


class Told(Clock):
    """A clock that says what it is told to."""

    def __init__(self, *moments):
        super().__init__(CPU)
        self.moments = iter(moments)

    def __call__(self):
        return next(self.moments)


# --- formulas -------------------------------------------------------------------------------------


def test_published_figures_are_reproduced():
    """To the digits that the paper prints; where none of ours does, the difference is named."""
    config, clip = EveConfig(), paper.CLIP_L_336
    llava, eve, llava_hd, eve_hd = paper.PAPER
    square = paper.patch_embedding_flops(config, 24, 24)
    assert math.floor(square / 1e9) == 42 == eve.vision_flops / 1e9
    assert round(4 * square / 1e9) == 170 == eve_hd.vision_flops / 1e9
    assert round(paper.patch_embedding_flops(config, 48, 48) / 1e9, 1) == 167.8  # not four times
    encoder = paper.published_encoder_flops(clip, 4096)
    assert round(encoder / 1e9) == 372 == llava.vision_flops / 1e9
    assert round(paper.TILES * encoder / 1e9) == 1860 == llava_hd.vision_flops / 1e9
    decoder = [paper.published_decoder_flops(config, row.positions) for row in paper.PAPER]
    printed = [row.decoder_flops / 1e12 for row in paper.PAPER]
    assert (
        [math.floor(flops / 1e11) / 10 for flops in decoder] == printed == [15.2, 15.2, 76.1, 60.8]
    )
    assert [flops / decoder[0] for flops in decoder] == [1, 1, 5, 4]
    # Two operations for each weight would be half of what is printed.
    weights = 6_738_415_616 - 32_000 * 4096 - 65 * 4096
    assert decoder[0] == 2 * (2 * weights * 576)


def plain_patch_embedding(x, *, width, heads, depth_out):
    """(cells, 4, pixels) through the published form: a key and a value for every patch and cell."""
    weight = lambda out, given: torch.zeros(out, given)  # noqa: E731
    patches = F.linear(x, weight(width, x.shape[-1]))
    pooled = patches.mean(1)
    F.linear(pooled, weight(width, width))  # query
    keys_values = F.linear(patches, weight(2 * width, width))
    cells = pooled + F.linear(keys_values[..., :width].mean(1), weight(width, width))
    F.linear(torch.zeros(width), weight(width, width))  # the class token's query
    keys_values = F.linear(cells, weight(2 * width, width))
    first = F.linear(keys_values[:, :width].mean(0), weight(width, width))
    return cells, first


def test_patch_embedding_formula_against_the_counter():
    """Whole numbers, equal.  The learned row-end token goes through the projector too."""
    config = tiny.config()
    vision, width = config.vision_config, config.text_config.hidden_size
    rows, cols, side = 3, 5, vision.hidden_size
    pixels = torch.zeros(rows * cols, 4, 3 * vision.patch_size**2)
    with FlopCounterMode(display=False) as counter:
        cells, first = plain_patch_embedding(pixels, width=side, heads=8, depth_out=width)
        ends = torch.zeros(rows, side)
        tokens = torch.cat([cells, first[None], ends])
        F.linear(F.linear(tokens, torch.zeros(width, side)), torch.zeros(width, width))
    assert counter.get_total_flops() == paper.patch_embedding_flops(config, rows, cols)


@pytest.mark.parametrize("layers", [None, 2])
def test_encoder_formula_against_the_counter(layers):
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers or 3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
    )
    model = CLIPVisionModel._from_config(config, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 28, 28))
    config.num_hidden_layers = 3
    assert counter.get_total_flops() == paper.encoder_flops(config, layers=layers)


def test_our_patch_embedding_needs_no_more_than_the_published_form(subject):
    """The same function may be computed with fewer operations, never needs more."""
    model, grids = subject.model, [(8, 8)]
    from eve_vlm.flops import work_of

    work = work_of([], grids, labels=0, config=model.config)
    ours = sum(
        flops_of(terms_of(model), work, part=part).forward
        for part in ("patch embedding", "projector")
    )
    assert 0 < ours <= paper.patch_embedding_flops(model.config, 4, 4)


# --- clocks and floors ----------------------------------------------------------------------------


def test_rounds_are_in_turns_and_the_first_does_not_count():
    order = []

    def case(name):
        def run(clock):
            order.append(name)
            return {"seconds": timed(clock, lambda: None)}

        return Case(
            section="s", model="eve", name=name, run=run, needs={"seconds": Need(0, 1)}, tokens={}
        )

    # Begin and end of each: to warm up 100 s, then a: 1, 3, 2 and b: 10, 10, 40.
    lengths = [100, 100, 1, 10, 3, 10, 2, 40]
    moments = [moment for length in lengths for moment in (0, length)]
    one, two = measure([case("a"), case("b")], Told(*moments), repeats=3)
    assert order == ["a", "b"] * 4
    assert one.seconds["seconds"] == Spread(2, 1.5, 2.5, 3)
    assert two.seconds["seconds"] == Spread(10, 10, 25, 3)
    assert one.memory is None  # no model took part


def test_a_figure_stands_beside_the_larger_floor():
    roof = Roof(flops=100.0, bandwidth=10.0).best(Roof(50.0, 20.0))
    assert roof == Roof(100.0, 20.0)
    case = Case(
        section="prefill",
        model="eve",
        name="n",
        run=lambda clock: {},
        needs={"first token": Need(400, 20), "token": Need(50, 40)},
        tokens={"first token": 8, "token": 2},
        facts={"batch": 2},
    )
    seconds = {"first token": Spread(8.0, 7.0, 9.0, 3), "token": Spread(4.0, 4.0, 4.0, 3)}
    first, token = figures_of(Measured(case, seconds, 7), roof)
    assert (first["floor_seconds"], first["bound"], first["share_of_floor"]) == (4, "compute", 0.5)
    assert (token["floor_seconds"], token["bound"], token["share_of_floor"]) == (2, "memory", 0.5)
    assert (first["section"], token["section"]) == ("prefill", "decode")
    assert (first["tokens_per_second"], token["tokens_per_second"]) == (1.0, 0.5)
    assert token["batch"] == 2 and token["memory_bytes"] == 7


def test_rates_by_a_clock():
    """Products of 256 and 512 in 1 s each but one of 0.5 s; copies 2 s, sums 4 s."""
    one, two, half = (0, 1), (0, 2), (0, 0.5)
    moments = [*one * 3, *one, *half, *one, *two * 3, *(0, 4) * 3]
    roof = measured_roof(Told(*moments), torch.float32, quick=True)
    assert roof == Roof(2 * 512**3 / 0.5, max(2 * 2**25 / 2, 3 * 2**25 / 4))


def test_tokens_are_timed_when_all_rows_run():
    """Rows begin at 1 s and 3 s; behind that 2 + 3 tokens come in 2 s, so a step takes 0.8 s."""

    class Row:
        def __init__(self, *times):
            self.times = times

    rows = [Row(1, 2, 3, 4, 5), Row(3, 3.5, 4.5, 5)]
    assert _figures(rows, 0.5) == {"first token": 2.5, "token": pytest.approx(2 / (5 / 2))}
    assert _figures([Row(2)], 1) == {"first token": 1}


def test_parts_of_a_prefill_are_taken_within_one_pass():
    """Begins at 10, pictures from 12 to 15, ends at 21; the hooks are gone behind it."""
    parts = torch.nn.ModuleDict({name: torch.nn.Identity() for name in ("a", "b")})

    class Model:
        vision_tower, multi_modal_projector = parts["a"], parts["b"]

    x = torch.zeros(1)
    clock = Told(10, 12, 15, 21)
    found = in_parts(clock, lambda: parts["b"](parts["a"](x)), Model)
    assert found == {"prefill": 11, "vision": 3, "decoder": 8}
    parts["b"](parts["a"](x))  # would ask the clock, which has nothing left to say
    needs = parts_needed(Need(100, 50), Need(30, 20))
    assert needs == {"prefill": (100, 50), "vision": (30, 20), "decoder": (70, 30)}


def test_exponents():
    assert exponent([(1, 5), (2, 10), (8, 40)]) == pytest.approx(1)
    assert exponent([(10, 7), (1000, 7)]) == pytest.approx(0)


# --- what is counted ------------------------------------------------------------------------------


def test_needs_equal_independent_arithmetic(subject):
    """Tokens and operations from sizes of the shape alone: 2 x weights, and pairs of attention."""
    engine, pictures = subject.engine(112), mixed(3)
    # A square, 3 : 1 and 1 : 2 at 112 pixels are 4 x 4, 2 x 4 (rounded up) and 4 x 2 cells.
    assert [(grid.rows, grid.cols) for grid in grids_of(engine.processor, pictures)] == [
        (4, 4),
        (2, 4),
        (4, 2),
    ]
    prompts = [engine.encode(user_message(QUESTION, [one])) for one in pictures]
    assert [prompt.image_tokens for prompt in prompts] == [21, 11, 13]
    layers, width, inner, words = 4, 64, 128, 512
    weights = layers * (2 * width * width + 2 * width * 32 + 3 * width * inner)
    lengths = [len(prompt) for prompt in prompts]
    heads = 2 * width * words
    need = decode_need(engine, lengths)
    attention = 4 * width * layers
    assert need.flops == 3 * (2 * weights + heads) + attention * sum(lengths)
    norms = (2 * layers + 1) * width
    rotary = sum(one.numel() for one in subject.model.model.language_model.buffers())
    cache = 2 * layers * 32 * sum(lengths)
    assert need.bytes == 4 * (weights + norms + words * width + rotary + cache)
    need = prefill_need(engine, prompts, pictures)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    reading = sum(lengths) * 2 * weights + 3 * heads + attention * pairs
    seeing = need.flops - reading
    published = [
        paper.patch_embedding_flops(subject.config, *grid) for grid in ((4, 4), (2, 4), (4, 2))
    ]
    assert 0 < seeing <= sum(published)


def test_a_step_has_the_work_that_the_trainer_counts(subject):
    encode = Encoder(subject.processor(112), format="plain", max_length=2048)
    encoded = [encode(record) for record in records(4, "pretrain")]
    work = step_work(encoded, subject, aligned=None)
    for packed in (False, True):
        batch = batch_of(encoded, subject, packed=packed)
        assert batch["input_ids"].shape[0] == (1 if packed else 4)
        counts = counts_of(batch, subject.config, pad_token_id=0)
        named = [work.passes, work.pictures, work.patches, work.cells, work.image_tokens]
        named += [0, work.tokens, work.pairs, work.window_pairs, work.labels]
        assert counts.tolist() == named


@pytest.mark.parametrize("name", NAMES)
def test_encoder_based_models_have_the_library_s_tokens(subject, name):
    """As many as the model makes of a square, and as the library's processor would ask for."""
    encoder = SHAPES["tiny"].encoder
    other = EncoderBased(name, subject.model, encoder, torch.tensor([7, 8]))
    made = torch.cat(list(other.see().pooler_output))
    assert made.shape == (other.image_tokens, 64)
    if name == "llava-1.6":
        from transformers import LlavaNextProcessor

        side = encoder.image_size
        processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
        processor.image_processor, processor.patch_size = other.pictures, encoder.patch_size
        processor.num_additional_image_tokens = 1  # the class token, which is left out behind
        asked = processor._get_number_of_features(2 * side, 2 * side, side, side) - 1
        assert asked == other.image_tokens == image_tokens(encoder, tiled=True) == 88
    else:
        assert other.image_tokens == (56 // 14) ** 2
    # The very decoder of EVE, behind another way in.
    assert other.model.model.language_model is subject.model.model.language_model
    assert other.read().logits.shape == (1, 1, 512)


def test_stages_learn_what_the_recipes_say():
    for file, stage in (
        ("1_prealign", "prealign"),
        ("2_pretrain", "pretrain"),
        ("3_finetune", "finetune"),
    ):
        recipe = load_recipe(recipes_folder() / "eve_7b" / f"{file}.yaml")
        assert list(TRAINABLE[stage]) == list(recipe.stage.trainable)
    assert {stage for stage, *_ in STEPS} == set(TRAINABLE)


# --- a whole run ----------------------------------------------------------------------------------

FIGURE = {
    **{"section": str, "model": str, "case": str, "figure": str, "seconds": dict, "bound": str},
    **{"flops": int, "floor_seconds": float, "share_of_floor": float, "tokens": int},
    **{"bytes": int, "tokens_per_second": float, "longest_edge": int},
}


def test_everything_is_measured(quick):
    """Every section, EVE and the encoder-based model, each stage; numbers that make sense."""
    assert {one["section"] for one in quick["figures"]} == set(SECTIONS) - {"growth"}
    for one in quick["figures"]:
        for name, kind in FIGURE.items():
            assert isinstance(one[name], kind), (name, one[name])
        seconds = one["seconds"]
        assert (
            0 < seconds["low"] <= seconds["median"] <= seconds["high"] and seconds["repeats"] == 1
        )
        assert one["floor_seconds"] > 0 and one["tokens"] > 0
    models = {(one["section"], one["model"]) for one in quick["figures"]}
    assert {(section, NAMES[0]) for section in ("preprocessing", "embedding", "prefill")} < models
    steps = {
        (one["stage"], one["packed"], one["aligned"])
        for one in quick["figures"]
        if one["figure"] == "backward"
    }
    assert steps == set(STEPS)
    assert {(one["what"], one["by"]) for one in quick["growth"]} == {
        ("embedding", "pictures in a batch"),
        ("embedding", "tokens of a picture"),
        ("first token", "tokens of a picture"),
        ("first token", "layers"),
    }
    # Operations of embeddings grow with pictures to the power of 1, up to what a pass costs once.
    assert quick["growth"][0]["flops_exponent"] == pytest.approx(1, abs=0.01)


def test_memory_counts_weights_and_what_is_made(quick, subject):
    """A step takes more than answering, and both more than the weights."""
    weights = sum(part.nbytes for part in subject.model.parameters())
    peaks = {one["figure"]: one["memory_bytes"] for one in quick["figures"]}
    assert weights < peaks["first token"] < peaks["step"]
    assert all(
        one["memory_bytes"] is None for one in quick["figures"] if one["section"] == "preprocessing"
    )


def test_a_run_is_one_line_of_json(quick):
    again = json.loads(json.dumps(quick))
    assert again["format"] == FORMAT and "\n" not in json.dumps(quick)
    assert again["versions"]["torch"] == torch.__version__
    assert again["settings"]["subject"] == "tiny" and again["settings"]["batches"] == [1, 3]
    assert again["roof"]["flops_per_second"] == max(
        one["flops_per_second"] for one in again["roof"]["measured"]
    )
    assert len(again["load"]) == 2


def test_what_users_call_is_what_is_measured(subject, monkeypatch):
    """The image processor, the engine's encoding, its running batch, the library's generate."""
    called = []

    def spy(owner, name):
        whole = getattr(owner, name)

        def wrapper(*args, **kwargs):
            called.append(name)
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    spy(type(subject.processor(112).image_processor), "preprocess")
    spy(EveEngine, "encode")
    spy(RunningBatch, "read_prompts")
    spy(type(subject.model), "generate")
    sections = ("preprocessing", "prefill", "decode")
    settings = Settings(
        edges=(112,), batches=(2,), sections=sections, repeats=1, new_tokens=3, quick=True
    )
    run_bench(subject, settings)
    assert set(called) == {"preprocess", "encode", "read_prompts", "generate"}


def test_models_are_left_as_they_were(quick, subject):
    """Training cases let weights learn for a while; nothing of it stays."""
    assert not subject.model.training
    for parameter in subject.model.parameters():
        assert parameter.grad is None and not parameter.requires_grad


def test_page_and_files(quick, compared, tmp_path):
    pytest.importorskip("matplotlib", reason="draws the page")
    data = quick | {"paper": compared["paper"]}
    written = write_results(data, tmp_path / "out")
    assert [file.name for file in written] == [RESULTS, PAGE, TIMES]
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(data))
    html = written[1].read_text(encoding="utf-8")
    assert html.count("<svg") == 2 + len(quick["growth"]) and "LLaVA-1.6 (HD)" in html
    assert "http-equiv" not in html and "<script" not in html
    assert written[2].read_text(encoding="utf-8").count("<svg") == 1
    assert "The published table" not in page_of(quick)


def test_published_table_has_four_models_from_one_run(compared):
    data = compared
    assert [row["model"] for row in data["paper"]] == [row.model for row in paper.PAPER]
    shown = {(one["model"], one["longest_edge"]) for one in data["figures"]}
    assert shown == {("eve", 112), ("llava-1.5", 112), ("eve", 224), ("llava-1.6", 224)}
    for row in data["paper"]:
        published = row["published"]
        assert min(row["measured"].values()) > 0 and len(row["measured"]) == 3
        for part in ("vision_flops", "decoder_flops"):
            assert row["formula"][part] == pytest.approx(published[part], rel=0.012)
    assert [row["products"]["positions"] for row in data["paper"]] == [576, 601, 2928, 2353]


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def eve(monkeypatch, capsys, tmp_path):
    """Calls `eve` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["eve", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_command_ends_with_one_json_line(eve, tmp_path):
    code, out, _ = eve(
        *("bench", "--quick", "--shape", "tiny", "--only", "preprocessing", "--repeats", "1"),
        *("--output", tmp_path / "kept"),
    )
    assert code == 0
    data = json.loads(out.splitlines()[-1])
    assert data == json.loads((tmp_path / "kept" / RESULTS).read_text())
    assert "GFLOP/s in matrix products" in out and "from a JPEG file" in out
    assert {one["section"] for one in data["figures"]} == {"preprocessing"}


def test_a_folder_has_its_own_weights_and_pictures(eve, tmp_path):
    tiny.model().save_pretrained(tmp_path / "m")
    tiny.processor().save_pretrained(tmp_path / "m")
    code, out, err = eve(
        *("bench", tmp_path / "m", "--only", "decode", "--batch", "2", "--repeats", "1"),
        "--quick",
    )
    assert code == 0, err
    data = json.loads(out.splitlines()[-1])
    assert data["settings"]["edges"] == [tiny.EDGE] and not data["settings"]["random_weights"]
    token = data["figures"][-1]
    assert (token["figure"], token["tokens"]) == ("token", 2)
    assert token["image_tokens"] == 21 + 1 + 2 * 5  # a square of 4 x 4 cells, a panorama of 2 x 4


def test_refusals(eve, monkeypatch):
    def refused(*arguments):
        code, out, err = eve("bench", *arguments)
        assert code == 2 and out == "" and err.startswith("eve: ") and err.count("\n") == 1
        return err

    assert "--batch 1;2 is no list" in refused("--shape", "tiny", "--batch", "1;2")
    assert "neither a folder nor one of small" in refused("--shape", "huge")
    assert "not both" in refused("some-model", "--shape", "tiny")
    assert "--only speed is no part" in refused("--shape", "tiny", "--only", "speed")
    assert "leave --only out" in refused("--table", "paper", "--only", "prefill")
    message = refused("--shape", "tiny", "--table", "paper", "--longest-edge", "112")
    assert "compares two sizes" in message
    assert "size_multiple" in refused("--shape", "tiny", "--longest-edge", "100")
    small = [Device("RAM", "cpu", 2**29)]  # 512 MiB, about what torch alone takes
    monkeypatch.setattr("eve_vlm.bench.programme.this_machine", lambda: small)
    message = refused("--shape", "tiny", "--batch", "64")
    assert "64 questions together at 224 pixels takes about" in message and "512 MiB" in message
    roomy = [Device("RAM", "cpu", 2**33)]
    monkeypatch.setattr("eve_vlm.bench.programme.this_machine", lambda: roomy)
    assert "has 8.0 GiB" in refused("--shape", "eve-7b", "--only", "prefill", "--batch", "1")


def test_help_names_the_parts(eve):
    code, out, _ = eve("bench", "--help")
    assert code == 0
    for word in (
        "--shape",
        "--longest-edge",
        "--batch",
        "--only",
        "--quick",
        "--table",
        "--output",
    ):
        assert word in out


def test_noise_is_the_same_every_time():
    assert picture((8, 6)).tobytes() == picture((8, 6)).tobytes()
    assert picture((8, 6)).size == (8, 6)
    assert len({one.tobytes() for one in mixed(8)}) == 8
