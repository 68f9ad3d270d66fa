"""`eve reproduce`: what is trained once, verdicts, the switches behind the variants, the report.

Intervals are compared with SciPy-free values computed by hand, shared stages with a count of files,
and one whole claim runs in real processes with steps of one or two. Easy to get wrong: two steps
teach nothing, so no test here asks what the scores are.
"""

import dataclasses
import json
import math
import os
import re
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tiny
from eve_vlm import EveConfig, EveVisionConfig
from eve_vlm.alignment_eve import EvePatchAligner
from eve_vlm.cli import app
from eve_vlm.data.scene_source import SceneSource, squared
from eve_vlm.flops import terms_of_config
from eve_vlm.patch_embedding_eve import EvePatchEmbedding, PackedGrid
from eve_vlm.reproduce import page, running, scheduling, variants
from eve_vlm.reproduce.claims import CLAIMS
from eve_vlm.reproduce.variants import STAGES, VARIANTS, run_of, runs_of
from eve_vlm.reproduce.verdicts import compare, difference_of, joined, measure

SMALL = 0.002  # of the steps: one or two in each stage


# --- the table of variants ------------------------------------------------------------------------


def made(tmp_path, names, seeds=(0,), scale=SMALL):
    return runs_of(names, seeds, work=tmp_path, scale=scale, questions=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every variant of two seeds, as long as it is."""
    return made(tmp_path_factory.mktemp("whole"), list(VARIANTS), seeds=(0, 1), scale=1.0)


def test_every_variant_is_a_recipe_and_every_one_is_used(whole):
    """Overrides are checked as strictly as files, so building a run is the test."""
    digests = {run.digest for run in whole if run.seed == 0}
    assert len(digests) == len(VARIANTS)  # none says what another says
    assert {name for claim in CLAIMS.values() for name in claim.variants} == set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_chain_has_its_stages_steps_seed_and_starts(whole, name):
    (run,) = (run for run in whole if run.name == f"{name}-s1")
    assert [stage.name for stage in run.stages] == ["language", *VARIANTS[name].stages]
    before = None
    for stage in run.stages:
        recipe = stage.recipe
        assert (recipe.seed, recipe.stage.name) == (1, stage.name)
        assert (recipe.model.encoder is not None) == (
            VARIANTS[name].twin and stage.name != "language"
        )
        if before is not None and not stage.without:
            assert recipe.model.init_from == before
        before = recipe.output_dir
    steps = {stage.name: stage.recipe.training["max_steps"] for stage in run.stages}
    if "pretrain" in steps:
        assert steps["pretrain"] == 700 * VARIANTS[name].data
    assert steps["language"] == (1 if VARIANTS[name].new_decoder else 800)


def test_stages_that_begin_alike_are_the_same_stage(whole):
    runs = {run.variant.name: run for run in whole if run.seed == 0}

    def shared(first, second):
        pairs = zip(runs[first].stages, runs[second].stages, strict=False)
        return [a.name for a, b in pairs if a.digest == b.digest]

    assert shared("base", "long") == ["language", "prealign"]
    assert shared("base", "none") == ["language"]
    assert shared("few_no_alignment", "no_alignment") == ["language", "prealign"]
    assert shared("low", "high_last") == ["language", "prealign", "pretrain"]
    assert shared("no_ca1", "base") == ["language"]
    assert shared("twin", "long_twin") == ["language", "prealign"]
    assert shared("scratch", "none_long") == []


def test_each_stage_is_trained_by_one_process_after_what_it_starts_from(whole):
    segments = scheduling.segments_of(whole)
    trained = [stage.digest for segment in segments for stage in segment.stages]
    assert len(trained) == len(set(trained))
    assert set(trained) == {stage.digest for run in whole for stage in run.stages}
    finished = set()
    for _ in segments:  # some order exists in which each can begin
        finished |= {
            stage.digest
            for segment in segments
            if segment.first.before is None or segment.first.before in finished
            for stage in segment.stages
        }
    assert finished == set(trained)
    assert sorted(s.run.name for s in segments if s.run) == sorted(run.name for run in whole)
    inside = [stage for segment in segments for stage in segment.stages[:-1]]
    starts = {segment.first.before for segment in segments}
    assert not starts & {stage.digest for stage in inside}


def test_a_digest_follows_what_is_learnt_and_not_where(tmp_path):
    def digest(seed=0, work="a", **changes):
        values = {"scale": SMALL, "questions": 2} | changes
        return run_of(VARIANTS["base"], seed, work=tmp_path / work, **values).digest

    assert digest() == digest(work="b")
    others = {digest(), digest(seed=1), digest(scale=0.5), digest(questions=3)}
    assert len(others) == 4


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "low", "high", "verdict"),
    [
        # mean +- t * s / sqrt(n), by hand: s = 1, n = 3, t = 4.3027.
        ((1.0, 2.0, 3.0), 2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3), "not seen"),
        ((11.0, 12.0, 13.0), 12 - 4.3027 / math.sqrt(3), 12 + 4.3027 / math.sqrt(3), "confirmed"),
        ((-11.0, -12.0, -13.0), -14.4842, -9.5158, "contrary"),
        ((0.0, 0.0, 0.0), 0.0, 0.0, "not seen"),
        ((1.0, 1.0), 1.0, 1.0, "confirmed"),
    ],
)
def test_intervals_and_verdicts(values, low, high, verdict):
    """1e-3: the table of t has three digits behind the point."""
    found = difference_of(values)
    assert found.low == pytest.approx(low, abs=1e-3)
    assert found.high == pytest.approx(high, abs=1e-3)
    assert found.verdict == verdict


def test_one_seed_is_no_verdict():
    assert difference_of([5.0]).verdict == "not known yet"
    assert difference_of([]).verdict == "not known yet"
    assert joined(["confirmed", "contrary", "not seen"]) == "contrary"
    assert joined(["confirmed", "confirmed"]) == "confirmed"


def result(name, seed, score, *, first=2.0, collapse=None):
    return {
        "variant": name,
        "seed": seed,
        "scale": 1.0,
        "commit": "abc",
        "device": "cpu",
        "questions": 4,
        "seconds": {"pretrain": 3600.0},
        "curves": {"pretrain": {"steps": [10, 20, 30, 40], "loss": [first, 1.0, 1.0, 1.0]}},
        "collapse": {"pretrain": collapse},
        "scores": None if score is None else {"name": score - 0.1, "count": score + 0.1},
    }


def test_differences_are_paired_by_seed():
    """Seeds differ by far more than variants; a seed without all variants is left out."""
    some = [result("base", s, 0.2 + s / 10) for s in range(4)]
    some += [result("none", s, 0.1 + s / 10, first=3.0, collapse={}) for s in range(3)]
    results = {(one["variant"], one["seed"]): one for one in some}
    found = compare(results, ((1, "base"), (-1, "none")), "score")
    assert found.values == pytest.approx((10.0, 10.0, 10.0))
    assert compare(results, ((1, "none"), (-1, "base")), "early_loss").values == (1.0, 1.0, 1.0)
    assert compare(results, ((1, "none"), (-1, "base")), "collapsed").values == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="no figure of a run"):
        measure(some[0], "late_loss")


def published_value(claim, benchmark, label, place):
    return dict(claim.published[benchmark][label])[place]


def test_published_differences_are_those_of_the_published_lines():
    """Two places in the table for one number must agree; 1e-9 is rounding."""
    claim = CLAIMS["alignment"]
    gaps = [
        published_value(claim, "GQA", "alignment", x) - published_value(claim, "GQA", "none", x)
        for x in ("0.5M", "4M", "8M")
    ]
    expected = [*gaps, gaps[0] - gaps[2]]
    assert [one.published for one in claim.findings] == pytest.approx(expected, abs=1e-9)
    claim = CLAIMS["encoder"]
    gaps = [
        published_value(claim, "GQA", "twin", x) - published_value(claim, "GQA", "EVE", x)
        for x in ("4M", "8M", "33M")
    ]
    expected = [*gaps, gaps[0] - gaps[2]]
    assert [one.published for one in claim.findings] == pytest.approx(expected, abs=1e-9)


# --- what the variants switch ---------------------------------------------------------------------


def embedding(**switches):
    sizes = dict(patch_size=tiny.PATCH, merge_size=2, hidden_size=16, num_attention_heads=4)
    torch.manual_seed(0)
    return EvePatchEmbedding(EveVisionConfig(**sizes, **switches)).double()


def pictures():
    grids = torch.tensor([[1, 4, 2], [1, 2, 6]])
    pixels = torch.randn(
        20, 3 * tiny.PATCH**2, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return pixels, grids


def test_without_local_attention_a_cell_is_the_mean_of_its_patches():
    """Against the projection by hand, in float64: 1e-12 is the order of sums."""
    model, (pixels, grids) = embedding(merge_attention=False), pictures()
    assert not [name for name, _ in model.named_parameters() if "merge" in name]
    tokens = model(pixels, grids)
    patches = pixels @ model.patch_projection.weight.flatten(1).T
    cells = patches.view(-1, 4, 16).mean(1)
    place = PackedGrid.from_grid_thw(grids, 2).cell_position
    assert float((tokens[place] - cells).detach().abs().max()) < 1e-12


def test_without_class_attention_the_class_token_is_what_was_learnt():
    model, (pixels, grids) = embedding(class_attention=False), pictures()
    assert not [name for name, _ in model.named_parameters() if "class_attention" in name]
    tokens = model(pixels, grids)
    place = PackedGrid.from_grid_thw(grids, 2).class_position
    assert torch.equal(tokens[place], model.class_embedding.expand(2, -1))
    tokens.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_switches_are_saved_and_their_operations_not_counted(tmp_path):
    of = tiny.config()
    full = sum(term.forward for term in terms_of_config(of))
    for switch in ("merge_attention", "class_attention"):
        settings = of.to_dict()
        settings["vision_config"][switch] = False
        other = EveConfig(**settings)
        other.save_pretrained(tmp_path)
        assert getattr(EveConfig.from_pretrained(tmp_path).vision_config, switch) is False
        assert sum(term.forward for term in terms_of_config(other)) < full


def test_the_last_layer_alone_is_aligned_by_its_direct_map():
    """Exactly: nothing is attended to, so the other map adds its bias only."""
    of = tiny.config(aligned=True)
    of.alignment_config.tap_every = None
    torch.manual_seed(0)
    aligner = EvePatchAligner(of)
    assert aligner.taps == (tiny.LAYERS,)
    grids = torch.tensor([[1, 4, 6]])
    states = torch.randn(1 + 2 * 4, tiny.WIDTH, requires_grad=True)
    made = aligner((states,), grids)
    place = PackedGrid.from_grid_thw(grids, 2).cell_position
    expected = aligner.input(states[place]) + aligner.output.bias
    assert torch.equal(made, expected)
    made.sum().backward()
    assert bool((states.grad[place] != 0).any())


def test_squares():
    """Padded pictures keep their pixels in the middle; squeezed ones fill the square."""
    wide = tiny.picture(28, 112)
    padded = squared(wide, pad=True)
    assert padded.size == (112, 112)
    assert padded.crop((0, 42, 112, 70)).tobytes() == wide.tobytes()
    assert padded.getpixel((5, 41)) == padded.getpixel((5, 70)) == (122, 116, 104)
    stretched = squared(wide, pad=False)
    assert stretched.tobytes() == wide.resize((112, 112), Image.Resampling.BICUBIC).tobytes()
    options = {"size": 3, "families": {"word": 1}, "settings": {"word_canvases": [[56, 112]]}}
    plain = SceneSource.from_options(options, seed=0)[0].images[0]
    square = SceneSource.from_options(options | {"square": "pad"}, seed=0)[0].images[0]
    assert (plain.size, square.size) == ((112, 56), (112, 112))
    assert square.crop((0, 28, 112, 84)).tobytes() == plain.tobytes()
    with pytest.raises(ValueError, match="square is 'round'; use pad, squeeze or null"):
        SceneSource.from_options(options | {"square": "round"}, seed=0)


# --- runs -----------------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)], catch_exceptions=False)


def options(work, *more):
    return ("--scale", SMALL, "--questions", 2, "--work", work, *more)


@pytest.fixture(scope="module")
def preloaded():
    """Processes begin with what the trainer would import in each, where it is installed: 1.3 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling, "PRELOADED", [*scheduling.PRELOADED, "deepspeed"])
        yield


@pytest.fixture(scope="module")
def claim(tmp_path_factory, preloaded):
    """Folder of a claim about resolution: two of its variants, one seed, real processes."""
    work, high = tmp_path_factory.mktemp("claims"), CLAIMS["high_resolution"]
    lines = {"here": high.lines["here"][:2]}
    shorter = dataclasses.replace(high, findings=high.findings[:1], lines=lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CLAIMS, "high_resolution", shorter)
        done = command("high_resolution", *options(work, "--seeds", 0, "--workers", 2))
        assert done.exit_code == 0, done.output
        yield work


def test_a_claim_leaves_a_result_for_each_run(claim):
    names = {"low-s0.json", "high_last-s0.json"}
    assert {file.name for file in (claim / "results").glob("*.json")} == names
    # language, prealign, pretrain; twice finetune: low and high share all before.
    trained = [file.parent.name for file in claim.glob("*/run.json")]
    assert len(trained) == 5
    assert not list(claim.glob("*/report.html"))
    kept = json.loads((claim / "results" / "low-s0.json").read_text())
    assert list(kept["steps"]) == list(STAGES)
    assert kept["steps"] == {"language": 2, "prealign": 1, "pretrain": 1, "finetune": 3}
    assert set(kept["scores"]) == {"name", "word", "presence", "position", "corner", "count"}
    assert all(0 <= score <= 1 for score in kept["scores"].values())
    assert kept["curves"]["finetune"]["steps"] == [3]
    run = run_of(VARIANTS["low"], 0, work=claim, scale=SMALL, questions=2)
    assert kept["digest"] == run.digest


def test_what_is_done_is_kept_and_the_report_needs_results_alone(claim):
    file = claim / "results" / "low-s0.json"
    before = file.stat().st_mtime_ns
    again = command("high_resolution", *options(claim, "--seeds", 0))
    assert again.exit_code == 0
    assert "2 of 2 runs have results" in again.output
    report = command("high_resolution", *options(claim, "--report-only"))
    assert "not known yet" in report.output
    assert file.stat().st_mtime_ns == before
    text = (claim / "results" / "high_resolution-report.html").read_text(encoding="utf-8")
    assert "High resolution in the last stage alone" in text
    assert text.count("<svg") == 1
    assert not re.search(r'(src|href)="?(http|//)', text)  # nothing is fetched


def test_a_failed_run_is_reported_and_the_others_go_on(claim, tmp_path):
    """The folder of one stage holds something else, which training refuses."""
    runs = made(claim, ["tap_4", "high_last"])  # of the other all is trained already
    bad = claim / runs[0].stages[1].digest[:12]
    bad.mkdir()
    (bad / "notes.txt").write_text("mine")
    said = []
    limits, before = scheduling.Limits(workers=2), dict(os.environ)
    outcome = scheduling.run_all(
        runs, tmp_path / "results", logs=tmp_path / "logs", limits=limits, say=said.append
    )
    assert dict(os.environ) == before, "what its processes inherit stays there"
    assert outcome.done == ["high_last-s0"]
    assert outcome.left == ["tap_4-s0"]
    (log,) = outcome.failed.values()
    assert "holds other files and no run" in Path(log).read_text()
    assert any("FAILED" in line for line in said)


class Clock:
    """Stands still until a process has logged a step, and then is far beyond every limit."""

    def __init__(self, logs):
        self.logs, self.sleep = logs, time.sleep

    def monotonic(self):
        texts = (file.read_text() for file in self.logs.glob("*.log"))
        return 1e6 if any("pretrain: step" in text for text in texts) else 0.0


def test_the_time_limit_stops_and_the_next_call_goes_on(tmp_path, monkeypatch, preloaded):
    """A stage of thousands of steps is stopped, saves itself, and is not begun anew."""
    monkeypatch.setattr(variants, "LOGGING_STEPS", 1)
    run = run_of(VARIANTS["scratch"], 0, work=tmp_path, scale=10.0)
    assert [len(segment.stages) for segment in scheduling.segments_of([run])] == [2]
    monkeypatch.setattr(scheduling, "time", Clock(tmp_path / "logs"))
    limits = scheduling.Limits(minutes=1)
    arguments = {"logs": tmp_path / "logs", "limits": limits, "say": lambda _: None}
    outcome = scheduling.run_all([run], tmp_path / "results", **arguments)
    assert outcome.left == ["scratch-s0"]
    assert not outcome.failed
    folder = tmp_path / run.stages[1].digest[:12]
    (saved,) = (int(found.name.split("-")[1]) for found in folder.glob("checkpoint-*"))
    assert 1 <= saved < run.stages[1].recipe.training["max_steps"]
    for file in (tmp_path / "logs").glob("*.log"):
        file.unlink()
    scheduling.run_all([run], tmp_path / "results", **arguments)
    again = [int(found.name.split("-")[1]) for found in folder.glob("checkpoint-*")]
    assert max(again) > saved


def test_results_of_two_scales_are_not_compared(tmp_path):
    for scale in (0.5, 1.0):
        kept = result("base", int(scale * 2), 0.5) | {"scale": scale}
        (tmp_path / f"base-s{scale}.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"results of the scales 0\.5, 1\.0"):
        page.read_results(tmp_path)
    with pytest.raises(ValueError, match="holds no results yet"):
        page.read_results(tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("colour",), "colour is no claim; name one of prealign, alignment"),
        (("prealign", "--seeds", "0,x"), "no list of numbers"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, text):
    with pytest.raises(ValueError, match=text):
        command(*arguments)


# --- the report -----------------------------------------------------------------------------------


@pytest.fixture
def results():
    """Every variant with three seeds; stage 1 helps clearly, attention does nothing."""
    found = {}
    for place, (name, variant) in enumerate(VARIANTS.items()):
        for seed in range(3):
            helps = 0.5 if name in ("base", "long") else 0.3
            score = None if not variant.scored else helps + seed / 50 + (place + seed) % 3 / 100
            found[name, seed] = result(name, seed, score)
    return found


def test_verdicts_follow_from_the_intervals(results):
    judged = page.judge(CLAIMS["prealign"], results)
    by_text = {one.finding.text: one for one in judged}
    raised = by_text["stage 1 raises the scores after stages 2 and 3"]
    assert raised.difference.verdict == "confirmed"
    assert raised.difference.low > 0
    assert "published +2.4 points" in raised.sentence
    # No run collapsed and no loss differs, which is a result too.
    assert page.verdict_of(judged) == "not seen"


def test_the_report_has_every_claim_and_says_the_same_as_the_table(results):
    text = page.markdown(list(CLAIMS.values()), results)
    html = page.page(list(CLAIMS.values()), results)
    for claim in CLAIMS.values():
        assert claim.title in text and claim.title in html
        for one in page.judge(claim, results):
            assert one.sentence in text
    assert html.count("<svg") == len(CLAIMS) + 1  # and the loss curves
    assert "no local attention" in html


def test_curves_are_thinned_by_means():
    losses = [{"step": step, "loss_lm": float(step)} for step in range(1, 1001)]
    curve = running.curve_of(losses)
    assert len(curve["steps"]) == running.POINTS
    assert curve["steps"][:2] == [10, 20]
    assert curve["loss"][:2] == [5.5, 15.5]


def test_collapse_is_seen_in_what_was_logged():
    """As in figure 5: 0.55 for a while, then 0.8 to the end; and a spike that heals is none."""
    down = [{"step": 10 * n, "loss_lm": 0.55} for n in range(1, 41)]
    up = [{"step": 400 + 10 * n, "loss_lm": 0.8} for n in range(1, 41)]
    seen = running.collapse_of(down + up)
    assert seen == {"since": 401, "before": pytest.approx(0.55), "after": pytest.approx(0.8)}
    spike = [{"step": 400 + 10 * n, "loss_lm": 0.8 if n < 8 else 0.55} for n in range(1, 41)]
    assert running.collapse_of(down + spike) is None


KEPT = Path(__file__).parents[1] / "benchmarks" / "claims"


@pytest.mark.parametrize("file", sorted(KEPT.glob("*-s*.json")), ids=lambda file: file.stem)
def test_kept_results_are_those_of_the_recipes_as_they_are(file, tmp_path):
    """A changed recipe makes them another experiment; they would be trained again."""
    kept = json.loads(file.read_text(encoding="utf-8"))
    run = run_of(
        VARIANTS[kept["variant"]],
        kept["seed"],
        work=tmp_path,
        scale=kept["scale"],
        questions=kept["questions"] or 200,
    )
    assert (run.name, run.digest) == (file.stem, kept["digest"])
