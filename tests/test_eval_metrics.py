"""Marks of answers beside what lmms-eval makes of the same answers, and beside published numbers.

`fixtures/eval/independent.json` holds inputs and lmms-eval 0.7.3's results; it is written by
`record_eval_fixtures.py`. Easy to get wrong: where ours differs on purpose the case is listed
here with the reason, so a new difference fails. Shares are compared to 1e-9: they are few thirds
and tenths, summed in another order.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from eve_vlm.eval.metrics import (
    MME_COGNITION,
    MME_PERCEPTION,
    anls,
    exact_match,
    levenshtein,
    normalise_text,
    normalise_vqa,
    open_match,
    option_letter,
    pair_scores,
    pair_units,
    relaxed_accuracy,
    token_f1,
    vqa_accuracy,
    yes_no,
    yes_no_marks,
    yes_no_scores,
)
from eve_vlm.eval.task import COUNT, Row

INDEPENDENT = json.loads(
    (Path(__file__).parent / "fixtures/eval/independent.json").read_text(encoding="utf-8")
)


def differences(cases, ours):
    """{input: (theirs, ours)} of the cases (input..., theirs) where the two differ."""
    assert len(cases) >= 8
    return {
        case[0]: (case[-1], found)
        for case in cases
        if (found := ours(*case[:-1])) != pytest.approx(case[-1], abs=1e-9)
    }


def total(units):
    names = {name for unit in units for name in unit}
    return {name: np.array(sum(unit.get(name, 0) for unit in units)) for name in names}


# --- VQA accuracy ---------------------------------------------------------------------------------


def test_vqa_forms_are_those_of_lmms_eval():
    forms = INDEPENDENT["vqa"]["forms"]
    assert len(forms) > 350  # random ones, and every contraction of the programme's table
    plain = {text: (form, normalise_vqa(text)) for text, form, _ in forms}
    # lmms-eval has mmf's pattern here; `vqaEval.py` looks for one comma between two digits.
    assert {text for text, (form, ours) in plain.items() if form != ours} == {"1,,000"}
    assert all(normalise_vqa(text, rule="textvqa") == form for text, _, form in forms)


def test_vqa_accuracy_is_that_of_lmms_eval():
    scores = INDEPENDENT["vqa"]["scores"]
    assert {round(score, 1) for *_, score, _ in scores} >= {0, 0.3, 0.6, 0.9, 1}
    for answer, people, plain, other in scores:
        assert vqa_accuracy(answer, people) == pytest.approx(plain, abs=1e-9)
        assert vqa_accuracy(answer, people, rule="textvqa") == pytest.approx(other, abs=1e-9)


# https://visualqa.org/evaluation.html and the VQA papers: 0, 0.3, 0.6, 0.9 and 1 for 0 to 4 of 10.
@pytest.mark.parametrize(("same", "share"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten_people(same, share):
    people = ["Two."] * same + ["seven"] * (10 - same)
    assert vqa_accuracy("2", people) == pytest.approx(share, abs=1e-9)


def test_vqa_accuracy_needs_people():
    assert vqa_accuracy("2", []) == 0


def test_unanimous_people_are_normalised_too():
    """The programme would compare "Yes" and "yes" letter by letter here; the published rule not."""
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 1


# --- exact match and words ------------------------------------------------------------------------


def test_gqa_rule():
    # LLaVA's conversion cuts full stops at the end, and `eval.py` compares; marks elsewhere stay.
    assert differences(INDEPENDENT["gqa"], lambda a, b: exact_match(a, [b], rule="gqa")) == {
        "do.g": (1.0, 0.0),
        "dog!": (1.0, 0.0),
    }


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("The cat!", "a cat"),
        ("three", "3"),
        ("1,200", "1200"),
        ("black-and-white", "Black and white"),
        ("\N{MINUS SIGN}3.5", "-3.5"),
        ("50%", "50"),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER A}bc", "abc"),
    ],
)
def test_lenient_match(answer, reference):
    assert exact_match(answer, ["something", reference]) == 1
    assert exact_match(answer, [reference], rule="exact") == 0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("3.5", "35"),
        ("-3", "3"),
        ("10:30", "1030"),
        ("", ""),
        ("the", "a"),
        ("cats", "cat"),
        ("!", "?"),
    ],
)
def test_lenient_match_keeps_what_matters(answer, reference):
    assert exact_match(answer, [reference]) == 0


def test_normalising_twice_changes_nothing():
    for text, *_ in INDEPENDENT["vqa"]["forms"]:
        assert normalise_text(normalise_text(text)) == normalise_text(text)


def test_token_f1():
    # "big cat" of "the big black cat": 2 common words of 2 and 3, so 2 * 2 / 5.
    assert token_f1("big cat", ["dog", "The big black cat."]) == pytest.approx(0.8, abs=1e-9)
    assert token_f1("cat cat", ["cat"]) == pytest.approx(2 / 3, abs=1e-9)
    assert token_f1("", ["cat"]) == token_f1("dog", ["cat"]) == token_f1("dog", []) == 0


# --- charts, documents, open answers --------------------------------------------------------------


def test_chartqa_rule_is_that_of_lmms_eval():
    cases = INDEPENDENT["chartqa"]
    assert sum(case[-1] for case in cases) > 50
    for answer, reference, right in cases:
        assert relaxed_accuracy(answer, reference) == right, (answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        # Five percent to both sides, borders in.
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        # What the published rule has no number in.
        ("1,000", "1000", 1),
        ("$1,040", "1,000", 1),
        ("12%", "12", 1),
        ("12%", "0.12", 0),
        ("about 12 units", "12", 1),
        ("-5", "5", 0),
        ("0", "0.0", 1),
        ("0.01", "0", 0),
        # Two numbers are none.
        ("2019 or 2020", "2019", 0),
        ("3 of 10", "3 of 10", 1),
        ("Blue.", "blue", 1),
        ("", "3", 0),
    ],
)
def test_lenient_numbers(answer, reference, right):
    assert relaxed_accuracy(answer, reference, rule="lenient") == right


def test_anls_is_that_of_lmms_eval():
    assert not differences(
        [[case[0], *case] for case in INDEPENDENT["docvqa"]], lambda _, a, b: anls(a, b)
    )
    # "abcd" and "abxy" are exactly half the same: the server's script keeps that, its paper not.
    assert anls("abcd", ["abxy"]) == 0.5
    assert anls("abcd", []) == 0


# Wikipedia, "Levenshtein distance" and "Wagner-Fischer algorithm".
@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("kitten", "sitting", 3),
        ("Saturday", "Sunday", 3),
        ("flaw", "lawn", 2),
        ("", "abc", 3),
        ("", "", 0),
    ],
)
def test_levenshtein(first, second, distance):
    assert levenshtein(first, second) == levenshtein(second, first) == distance


def test_open_answers_are_read_as_in_mmmu():
    cases = INDEPENDENT["mmmu_open"]
    assert {right for *_, right in cases} == {True, False}
    for answer, reference, right in cases:
        assert open_match(answer, [reference]) == right, (answer, reference)


# --- option letters -------------------------------------------------------------------------------


def letters(rule):
    """(answer, options, theirs, ours) of every recorded answer that lmms-eval reads by this rule."""
    return [
        (
            case["answer"],
            case["options"],
            case[theirs],
            option_letter(case["answer"], case["options"], rule=rule),
        )
        for case in INDEPENDENT["choices"]
        if (theirs := {"lenient": "mmbench"}.get(rule, rule)) in case
    ]


def test_mmmu_letters_are_those_of_lmms_eval():
    """None is recorded where the programme would draw a letter by chance."""
    cases = letters("mmmu")
    assert len(cases) > 140
    assert any(theirs is None for *_, theirs, _ in cases)
    assert [case for case in cases if case[2] != case[3]] == []


def test_scienceqa_letters():
    """EVE's and LLaVA's programme, from which lmms-eval's differs in three forms of answer."""
    for answer, options, theirs, ours in letters("scienceqa"):
        if theirs == ours:
            continue
        if ours is None:
            # lmms-eval takes a small letter, and "B." with nothing after it.
            assert answer.upper() == theirs or answer == f"{theirs}."
        else:
            # It does not know the sentence.
            assert theirs is None
            assert answer.startswith(f"The answer is {ours}.")
            assert ours in "ABCDE"[: len(options)]
    options = ["x", "y", "z"]
    read = [
        option_letter(text, options, rule="scienceqa") for text in ("B", "B. y", "The answer is B.")
    ]
    assert read == ["B"] * 3
    # Neither of two sentences; letters that are no option; the letter where a mark should follow.
    for text in (
        "The answer is A. The answer is B.",
        "D",
        "D. x",
        "The answer is D.",
        "The answer is B",
    ):
        assert option_letter(text, options, rule="scienceqa") is None


def test_seed_letters():
    """LLaVA's script wants the letter alone; lmms-eval takes the first letter of whatever is said."""
    for answer, options, theirs, ours in letters("seed"):
        alone = answer in list("ABCDE"[: len(options)])
        assert ours == (theirs if alone else None)


def test_lenient_letters_beside_mmbench():
    """Ours reads all that MMBench's rules without a judge read, but for two slips of theirs."""
    read = {case[0]: case[2:] for case in letters("lenient") if case[2] is not None}
    assert len(read) > 50
    assert {answer: both for answer, both in read.items() if both[0] != both[1]} == {
        "C. Vitamin A": ("A", "C"),  # the "A" of the option's text for a letter
        "I do not know": ("B", None),  # "no" in "not" for the option "no"
    }


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("b", "B"),
        (" (B) ", "B"),
        ("**B**", "B"),
        ("B: two dogs", "B"),
        ("The correct answer is (B) because", "B"),
        ("Two dogs!", "B"),
        ("It shows two dogs.", "B"),
        ("It is dark red", "D"),  # not the "red" inside it
        ("I think it is C", "C"),
        ("It is A", "A"),
        ("\u7b54\u6848\u662fB\u3002", "B"),  # "The answer is B." in Chinese
        ("A man and a woman", None),  # an article
        ("I see nothing", None),
        ("C or D", None),
        ("E", None),  # no option
        ("a cat or two dogs", None),
        ("", None),
    ],
)
def test_lenient_letters(answer, letter):
    assert option_letter(answer, ["a cat", "two dogs", "red", "dark red"]) == letter
    assert option_letter(answer, []) is None


# --- yes or no ------------------------------------------------------------------------------------


def test_mme_reading():
    # The benchmark's programme knows no "y" and "n"; lmms-eval has them from another programme.
    assert (
        differences(
            [[*case] for case in INDEPENDENT["yes_no"]["mme"] if case[0] not in "yn"],
            lambda a: yes_no(a, rule="mme"),
        )
        == {}
    )
    assert yes_no("y", rule="mme") == yes_no("n", rule="mme") == yes_no("", rule="mme") == "other"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("No, there is none", "no"),
        ("There is not a dog", "no"),
        ("Yes. There is no cat.", "yes"),  # the first sentence only
        ("I see a dog", "yes"),  # whatever is not no is yes
        ("NO", "yes"),  # the programme looks for "No" and "no"
        ("nothing", "yes"),  # words, not beginnings
        ("", "other"),  # the programme has yes; saying nothing is no answer here
        (" . ", "other"),
    ],
)
def test_pope_reading(answer, said):
    assert yes_no(answer) == said


def test_pope_columns_are_those_of_lmms_eval():
    """For answers that are one word; lmms-eval reads no others, and compares whole answers."""
    for case in INDEPENDENT["yes_no"]["pope"]:
        sums = total([yes_no_marks(said, right) | {COUNT: 1} for said, right in case["pairs"]])
        scores = yes_no_scores(sums)
        for name in ("accuracy", "precision", "recall", "f1"):
            assert scores[name] == pytest.approx(100 * case[name], abs=1e-9)
        said_yes = [said == "yes" for said, _ in case["pairs"]]
        assert scores["yes"] == pytest.approx(100 * np.mean(said_yes), abs=1e-9)


# Li et al., EMNLP 2023, LLaVA on MSCOCO: 3,000 questions, half of them yes. The counts are the only
# whole ones with the published recall and share of yes; the other columns must follow.
@pytest.mark.parametrize(
    ("counts", "published"),
    [
        pytest.param((1497, 1364, 3, 136), (54.43, 52.32, 99.80, 68.65, 95.37), id="random"),
        pytest.param((1498, 1475, 2, 25), (50.77, 50.39, 99.87, 66.98, 99.10), id="adversarial"),
    ],
)
def test_published_rows_of_pope(counts, published):
    sums = dict(zip(("tp", "fp", "fn", "tn"), map(np.array, counts), strict=True))
    scores = yes_no_scores(sums | {COUNT: np.array(3000)})
    names = ("accuracy", "precision", "recall", "f1", "yes")
    assert tuple(round(float(scores[name]), 2) for name in names) == published


def test_unreadable_answers_are_wrong_and_not_yes():
    for right in ("yes", "no"):
        scores = yes_no_scores(total([yes_no_marks("", right) | {COUNT: 1}]))
        assert set(map(float, scores.values())) == {0.0}


# --- MME ------------------------------------------------------------------------------------------


def rows_of(found):
    return [
        Row(
            id=str(at),
            group=group,
            unit=f"{group} {picture}",
            prompt="",
            answer="",
            expected=(),
            marks={"accuracy": right},
        )
        for at, (picture, group, right) in enumerate(found)
    ]


def test_mme_points_are_those_of_lmms_eval():
    for name, (found, points) in zip(
        ("perception", "cognition"), INDEPENDENT["yes_no"]["mme_points"], strict=True
    ):
        units = pair_units(rows_of(found))
        assert len(units) == len({(group, picture) for picture, group, _ in found})
        assert pair_scores(total(units))[name] == pytest.approx(points, abs=1e-6)


def test_mme_limits_and_chance():
    """Fu et al. 2023, section 2.3: 200 points for a category, 2,000 and 800 in all; chance 50 + 25."""
    every = [
        (str(at), group, 1.0) for group in (*MME_PERCEPTION, *MME_COGNITION) for at in (1, 1, 2, 2)
    ]
    scores = pair_scores(total(pair_units(rows_of(every))))
    assert (float(scores["perception"]), float(scores["cognition"])) == (2000, 800)
    assert {float(scores[group]) for group in (*MME_PERCEPTION, *MME_COGNITION)} == {200}
    four = [
        (str(at), "OCR", float(right))
        for at, pair in enumerate(((0, 0), (0, 1), (1, 0), (1, 1)))
        for right in pair
    ]
    scores = pair_scores(total(pair_units(rows_of(four))))
    assert float(scores["OCR"]) == float(scores["perception"]) == 75
    assert float(scores["cognition"]) == 0


def test_a_cut_pair_is_not_a_right_pair():
    units = pair_units(rows_of([("1", "OCR", 1.0)]))
    assert float(pair_scores(total(units))["OCR"]) == 100


def test_scores_take_arrays():
    """Resampled sums come as arrays; each place must be scored by itself."""
    units = pair_units(rows_of(INDEPENDENT["yes_no"]["mme_points"][0][0]))
    weights = np.random.default_rng(0).integers(0, 3, (5, len(units)))
    names = {name for unit in units for name in unit}
    columns = {name: np.array([unit.get(name, 0) for unit in units]) for name in names}
    together = pair_scores({name: weights @ column for name, column in columns.items()})
    for at in range(5):
        one = pair_scores({name: weights[at] @ column for name, column in columns.items()})
        assert all(math.isclose(together[name][at], one[name]) for name in one)
