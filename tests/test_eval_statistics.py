"""Intervals and paired tests beside scipy's, beside plain enumeration, and over many seeds.

`fixtures/eval/independent.json` holds scipy 1.17.1's results (`record_eval_fixtures.py`). Easy to
get wrong: both sides are random, so every tolerance is about four standard errors of the draws,
named where it stands; the seeds are fixed, so a test that passes always passes.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from eve_vlm.eval import statistics
from eve_vlm.eval.choices import yes_no_marks, yes_no_scores
from eve_vlm.eval.statistics import interval, mcnemar, paired_test
from eve_vlm.eval.task import COUNT, ratio

INDEPENDENT = json.loads(
    (Path(__file__).parent / "fixtures/eval/independent.json").read_text(encoding="utf-8")
)["statistics"]


def mean(sums):
    return {"accuracy": 100 * ratio(sums["accuracy"], sums[COUNT])}


def units_of(marks):
    return [{COUNT: 1.0, "accuracy": float(mark)} for mark in marks]


def f1_units(said, right):
    words = ("no", "yes")
    return [
        yes_no_marks(words[int(a)], words[int(b)]) | {COUNT: 1.0}
        for a, b in zip(said, right, strict=True)
    ]


# --- intervals ------------------------------------------------------------------------------------


def test_interval_of_a_mean_is_scipys():
    """60 different marks, so each is a kind of its own."""
    case = INDEPENDENT["mean"]
    found = interval(units_of(case["marks"]), mean, resamples=20_000)["accuracy"]
    assert found.value == pytest.approx(100 * np.mean(case["marks"]), abs=1e-9)
    # 20,000 draws know a 2.5 % quantile of this mean (deviation 4) to 0.08, four times that is 0.3.
    assert found.low == pytest.approx(100 * case["low"], abs=0.3)
    assert found.high == pytest.approx(100 * case["high"], abs=0.3)
    assert found.units == 60


def test_interval_of_f1_is_scipys():
    """80 answers of four kinds: drawing kinds must be drawing answers."""
    case = INDEPENDENT["f1"]
    found = interval(f1_units(case["said"], case["right"]), yes_no_scores, resamples=20_000)["f1"]
    # As above: the deviation is about 6, so four standard errors are 0.5.
    assert found.low == pytest.approx(100 * case["low"], abs=0.5)
    assert found.high == pytest.approx(100 * case["high"], abs=0.5)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, inside = np.random.default_rng(3), 0
    for seed in range(400):
        found = interval(units_of(rng.random(150) < 0.7), mean, resamples=400, seed=seed)
        inside += found["accuracy"].low <= 70 <= found["accuracy"].high
    # A percentile interval of 150 units holds about 94.5 %; four standard errors of 400 are 4.6 %.
    assert 0.90 < inside / 400 < 0.99


def test_questions_of_one_picture_are_drawn_together():
    """Asking each question three times tells nothing new, if its picture is the unit."""
    marks = np.random.default_rng(0).random(300) < 0.6
    once = interval(units_of(marks), mean)["accuracy"]
    units = [{COUNT: 3.0, "accuracy": 3.0 * mark} for mark in marks]
    assert interval(units, mean)["accuracy"] == once
    apart = interval(units_of(np.repeat(marks, 3)), mean)["accuracy"]
    # 1 / sqrt(3) as wide; the widths are known to about 4 %.
    assert apart.high - apart.low == pytest.approx((once.high - once.low) / np.sqrt(3), rel=0.16)


def test_level_and_seed():
    units = units_of(np.random.default_rng(1).random(50))
    wide, narrow = (interval(units, mean, level=level)["accuracy"] for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    assert interval(units, mean, seed=1) == interval(units, mean, seed=1)
    assert interval(units, mean, seed=1) != interval(units, mean, seed=2)


def test_one_unit_has_no_interval():
    found = interval(units_of([1]), mean)["accuracy"]
    assert (found.value, found.low, found.high, found.units) == (100, None, None, 1)


def test_marks_of_some_units_only():
    """A category's columns are only in its own pictures."""
    units = [{COUNT: 1.0, "cats": 1.0}, {COUNT: 1.0}, {COUNT: 2.0, "cats": 1.0}]
    found = interval(units, lambda sums: {"cats": ratio(sums["cats"], sums[COUNT])})
    assert found["cats"].value == 0.5


@pytest.mark.parametrize("number", [40, 2000])
def test_pieces_do_not_change_the_draws(number, monkeypatch):
    """Few kinds of units (2,000 of them) and many (40) are drawn in two ways."""
    rng = np.random.default_rng(2)
    units = units_of(rng.random(number) if number == 40 else rng.random(number) < 0.5)
    whole = interval(units, mean)["accuracy"]
    monkeypatch.setattr(statistics, "CHUNK", 100)
    pieces = interval(units, mean)["accuracy"]
    # The last digits are those of another matrix product.
    assert (pieces.low, pieces.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


# --- paired tests ---------------------------------------------------------------------------------


def test_permutation_test_is_scipys():
    """scipy goes through all 4,096 ways to swap 12 pairs."""
    case = INDEPENDENT["permutation"]
    found = paired_test(
        units_of(case["first"]), units_of(case["second"]), mean, "accuracy", permutations=40_000
    )
    # Four standard errors of 40,000 swaps: 4 * sqrt(p (1 - p) / 40,000), at most 0.01.
    assert found.p == pytest.approx(case["p"], abs=0.01)
    assert 0.01 < case["p"] < 0.99
    gain = np.subtract(case["second"], case["first"])
    assert found.difference == pytest.approx(100 * gain.mean(), abs=1e-9)
    assert found.exact_p is None


def test_swaps_of_f1_are_those_of_enumeration():
    """F1 is no mean, so the swapped sums must go through the score: all 1,024 ways, written out."""
    rng = np.random.default_rng(5)
    right = rng.random(10) < 0.6
    sides = [f1_units(rng.random(10) < share, right) for share in (0.3, 0.8)]

    def f1(units):
        tp, fp, fn = (sum(unit[name] for unit in units) for name in ("tp", "fp", "fn"))
        return 100 * 2 * tp / max(2 * tp + fp + fn, 1)

    seen = f1(sides[1]) - f1(sides[0])
    as_large = 0
    for swap in itertools.product((0, 1), repeat=10):
        one, two = ([sides[s ^ side][at] for at, s in enumerate(swap)] for side in (0, 1))
        as_large += abs(f1(two) - f1(one)) >= abs(seen) - 1e-9
    found = paired_test(*sides, yes_no_scores, "f1", permutations=40_000)
    assert found.difference == pytest.approx(seen, abs=1e-9)
    assert 0 < as_large < 1024
    assert found.p == pytest.approx(as_large / 1024, abs=0.01)  # four standard errors, as above


def test_mcnemar_is_scipys_binomial_test():
    for gained, lost, p in INDEPENDENT["mcnemar"]:
        # Sums of up to 60,000 logarithms keep nine digits.
        assert mcnemar(gained, lost) == pytest.approx(p, rel=1e-8)


def test_swapping_right_and_wrong_is_mcnemar():
    rng = np.random.default_rng(8)
    first, second = rng.random(200) < 0.6, rng.random(200) < 0.7
    found = paired_test(units_of(first), units_of(second), mean, "accuracy", permutations=40_000)
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    assert found.exact_p == mcnemar(gained, lost)
    assert found.p == pytest.approx(found.exact_p, abs=0.01)  # four standard errors, as above
    assert found.changed == gained + lost
    assert found.units == 200


def test_exact_p_is_only_for_single_right_or_wrong_samples():
    pairs = [{COUNT: 2.0, "accuracy": float(at % 2)} for at in range(10)]
    assert paired_test(pairs, pairs[::-1], mean, "accuracy", permutations=99).exact_p is None
    # A score of that name that is another function of the sums.
    units = units_of([0, 1, 1, 0, 1])
    found = paired_test(
        units,
        units_of([1, 1, 1, 1, 0]),
        lambda sums: {"accuracy": sums["accuracy"] ** 2},
        "accuracy",
        permutations=99,
    )
    assert found.exact_p is None


def test_no_difference_gives_even_ps():
    """Two runs of the same skill: p is below x in a share x of the cases."""
    ps = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        hard = rng.random(40)
        sides = (units_of(hard + rng.normal(0, 0.2, 40)) for _ in range(2))
        ps.append(paired_test(*sides, mean, "accuracy", permutations=299, resamples=2, seed=seed).p)
    # Four standard errors of 300 cases: 4 * sqrt(x (1 - x) / 300).
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        error = 4 * np.sqrt(share * (1 - share) / 300)
        assert np.mean(np.array(ps) <= share) == pytest.approx(share, abs=error)


def test_a_clear_difference_is_found():
    """Ten points over 500 questions, where single intervals overlap."""
    rng = np.random.default_rng(4)
    hard = rng.random(500)
    first, second = (units_of(hard + rng.normal(0, 0.1, 500) < skill) for skill in (0.55, 0.62))
    found = paired_test(first, second, mean, "accuracy")
    assert found.p < 0.001
    assert found.exact_p < 0.001
    assert 0 < found.low < found.difference < found.high
    assert (found.first, found.second) == (
        interval(first, mean)["accuracy"].value,
        interval(second, mean)["accuracy"].value,
    )
    assert interval(first, mean)["accuracy"].high > interval(second, mean)["accuracy"].low
    back = paired_test(second, first, mean, "accuracy")
    assert back.difference == -found.difference
    assert back.p == pytest.approx(found.p, abs=0.001)


def test_equal_runs():
    units = units_of([0, 1, 1, 0])
    found = paired_test(units, units, mean, "accuracy")
    assert (found.difference, found.low, found.high, found.p, found.exact_p) == (0, 0, 0, 1, 1)
    assert found.changed == 0


def test_p_is_never_zero():
    found = paired_test(
        units_of([0.0] * 60), units_of([1.0] * 60), mean, "accuracy", permutations=99
    )
    assert found.p == 0.01


def test_one_pair():
    found = paired_test(units_of([0]), units_of([1]), mean, "accuracy", permutations=99)
    assert (found.low, found.high, found.p) == (None, None, 1)


# --- what a user can cause ------------------------------------------------------------------------


def test_no_units():
    with pytest.raises(ValueError, match="no units to score; answer at least one sample"):
        interval([], mean)


def test_other_numbers_of_units():
    with pytest.raises(ValueError, match="has 2 units but the other has 3; evaluate both on"):
        paired_test(units_of([1, 0]), units_of([1, 0, 1]), mean, "accuracy")


def test_no_such_score():
    with pytest.raises(ValueError, match="metric is 'f1' but the scores are accuracy"):
        paired_test(units_of([1, 0]), units_of([1, 1]), mean, "f1")
