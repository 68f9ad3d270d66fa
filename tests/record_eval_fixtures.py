"""Asks lmms-eval and scipy what they make of a few hundred answers, and stores what they say.

    PYTHON_WITH_LMMS_EVAL_AND_SCIPY tests/record_eval_fixtures.py

writes `tests/fixtures/eval/independent.json`, which `test_eval_metrics.py` and
`test_eval_statistics.py` compare ours with. It needs nothing of this project, and nothing is stored
but inputs and results. Recorded with lmms-eval 0.7.3 and scipy 1.17.1.
"""

import json
import random
from importlib.metadata import version
from pathlib import Path

import numpy as np
import scipy.stats
from lmms_eval.api.metrics import anls, exact_match_hf_evaluate
from lmms_eval.tasks._task_utils import mmmu_mcq_utils
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.chartqa.utils import relaxed_correctness
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
from lmms_eval.tasks.mme import utils as mme
from lmms_eval.tasks.mmmu import utils as mmmu
from lmms_eval.tasks.pope import utils as pope
from lmms_eval.tasks.scienceqa.utils import sqa_process_results
from lmms_eval.tasks.seedbench.utils import seed_process_result
from lmms_eval.tasks.textvqa.utils import textvqa_process_results
from lmms_eval.tasks.vqav2.utils import vqav2_process_results

OUT = Path(__file__).parent / "fixtures/eval/independent.json"
PIECES = (
    "a an the The two Ten none zero dog dogs cat's dont didn't couldntve its 1 1,000 3.5 .5 5. $20 "
    "red/green t-shirt (left) [x] {y} a_b 10:30 yes, no? yes! no; O'Hare Mr. U.S.A. 1,2,3 <b> x=3 "
    'two,three "stop" stop @ home new-york 12,5. e.g. `tick` back\\slash'
)
OPTIONS = (
    ("a cat", "two dogs", "the red car", "nothing"),
    ("12", "24", "36", "48", "60"),
    ("Vitamin A", "Vitamin B", "Vitamin C"),
    ("red", "dark red", "green", "blue"),
    ("yes", "no"),
)
CHOICES = (
    "{L} | {l} | {L}. | ({L}) | ({l}) | {L}) | {L}: | {L}, | {L}. {text} | ({L}) {text} | {text} | "
    "The answer is {L} | The answer is {L}. | The answer is {L}.\nIt is {text}. | Answer: {L} | "
    "the answer is ({L}) | The correct option is {L}. | I think it is {text} because of its form | "
    "It is {L} or {M} | ({L}) and ({M}) | {text}. | I do not know | {L}\n{M} | {M}. {text} | "
    "The answer is {L}. The answer is {M}. | DNA and so on | Option {L} | A picture of {text} here"
)
MMMU_OPEN = (
    ("The answer is 12.5", "12.5"),
    ("so x = 1,234", "1234"),
    ("x = 1,234", "234"),
    ("It could be 3e2 volts", "300"),
    ("therefore the result is\nParis.", "paris"),
    ("It is B", "B"),
    ("Band", "B"),
    ("no number here", "7"),
    ("y = 2\nz = 3", "2"),
    ("the sum is 5 and the answer is 6", "5"),
    ("the sum is 5 and the answer is 6", "6"),
    ("1.005", "1.0"),
    ("-3", "3"),
    ("-3", "-3"),
    ("final answer = 0.5", ".5"),
    ("", "1"),
    ("is", "is"),
    ("The answer is: ?", "1"),
    ("New York City. It is big", "New York"),
    ("10%", "10"),
    ("12abc", "12"),
    ("So the total is $1,000,000.", "1000000"),
)
CHART = (
    "5 5.2 5.25 5.26 4.75 4.74 0 0.0 -1 -1.04 12% 12 0.12 0.121% 1,000 1000 1050 1051 nan inf 1e3 "
    "1_000 Yes yes yes. 5. .5 % 3.2m $5 2019 2010"
)
DOCS = (
    ("invoice", "invoice"),
    ("Invoice", "invoice"),
    ("in voice", "invoice"),
    ("invoce", "invoice"),
    ("abcd", "abxy"),
    ("abcd", "axyz"),
    ("ab", "ba"),
    ("", "x"),
    ("x", ""),
    ("", ""),
    ("12  March   1999", "12 march 1999"),
    ("the answer is 4", "4"),
    ("straße", "strasse"),
    ("kitten", "sitting"),
    ("Sunday", "Saturday"),
)


def texts(rng, number):
    made = [" ".join(rng.choices(PIECES.split(), k=rng.randint(1, 5))) for _ in range(number)]
    extra = [
        "",
        " ",
        "\tyes\n",
        "a\nb",
        "The",
        "1,,000",
        "it's",
        "..",
        "3.",
        ". .",
        "ONE",
        "Im",
        "I'dve",
    ]
    return [*made, *extra, *EvalAIAnswerProcessor.CONTRACTIONS]


def vqa(rng):
    reader = EvalAIAnswerProcessor()
    forms = []
    for text in texts(rng, 250):
        flat = text.replace("\n", " ").replace("\t", " ").strip()
        plain = reader.process_digit_article(reader.process_punctuation(flat))
        forms.append([text, plain, reader(text)])
    scores = []
    for _ in range(120):
        words = [" ".join(rng.choices(PIECES.split(), k=rng.randint(1, 2))) for _ in range(3)]
        words += [words[0].upper(), words[0] + "."]
        people = rng.choices(words, k=10)
        answer = rng.choice(words)
        dicts = [{"answer": text, "answer_id": at} for at, text in enumerate(people)]
        plain = vqav2_process_results({"answers": dicts, "question_id": 0}, [answer])
        other = textvqa_process_results({"answers": list(people), "question_id": 0}, [answer])
        scores.append([answer, people, plain["exact_match"], other["exact_match"]])
    return {"forms": forms, "scores": scores}


def choices(rng):
    mmmu_mcq_utils.random.choice = lambda letters: None  # says where it would draw by chance
    judge = MMBench_Evaluator()
    found = []
    for options in OPTIONS:
        letters = "ABCDE"[: len(options)]
        for form in [*CHOICES.split(" | "), ""]:
            at, other = rng.sample(range(len(options)), 2)
            answer = form.format(
                L=letters[at], l=letters[at].lower(), M=letters[other], text=options[at]
            )
            named = dict(zip(letters, options, strict=True))
            row = {"answer": answer, "options": options}
            row["mmmu"] = mmmu.parse_multi_choice_response(answer, list(letters), named)
            if len(options) < 5:
                row["mmbench"] = judge.can_infer(answer, dict(named)) or None
            doc = {"choices": options}
            right = [
                sqa_process_results(doc | {"answer": i}, [answer])["exact_match"] == 1
                for i in range(len(options))
            ]
            row["scienceqa"] = letters[right.index(True)] if any(right) else None
            doc = {"answer": "A", "data_type": "image", "question_id": 0}
            row["seed"] = seed_process_result(doc, [answer])["seed_all"]["pred"]
            found.append(row)
    return found


def yes_no(rng):
    answers = [
        "yes",
        "no",
        "Yes.",
        "No, it is not",
        "y",
        "n",
        "unknown",
        "Not at all",
        "I think yes",
    ]
    answers += ["yesterday", "now", "nothing", " yes", "the yes", "", "YES", "it is no", "aye"]
    columns = []
    for _ in range(8):
        share = rng.random()
        pairs = [
            (rng.choice(("yes", "no")), "yes" if rng.random() < share else "no") for _ in range(40)
        ]
        rows = [
            pope.pope_process_results({"answer": right, "question_id": i}, [said])["pope_f1_score"]
            for i, (said, right) in enumerate(pairs)
        ]
        columns.append(
            {
                "pairs": pairs,
                "accuracy": pope.pope_aggregate_accuracy(rows),
                "precision": pope.pope_aggregate_precision(rows),
                "recall": pope.pope_aggregate_recall(rows),
                "f1": pope.pope_aggregate_f1_score(rows),
            }
        )
    points = []
    for part in mme.eval_type_dict.values():
        rows = [
            {"question_id": f"{i}.png", "category": group, "score": float(rng.random() < 0.7)}
            for group in part
            for i in range(rng.randint(3, 9))
            for _ in range(2)
        ]
        points.append([[[*row.values()] for row in rows], mme.mme_aggregate_results(rows)])
    return {
        "mme": [[text, mme.parse_pred_ans(text)] for text in answers],
        "pope": columns,
        "mme_points": points,
    }


def statistics():
    rng = np.random.default_rng(7)
    marks = np.round(rng.random(60) ** 2, 3)
    mean = scipy.stats.bootstrap(
        (marks,), np.mean, n_resamples=100_000, method="percentile", rng=1, batch=1000
    ).confidence_interval
    said, right = rng.random(80) < 0.5, rng.random(80) < 0.4
    said |= right & (rng.random(80) < 0.6)

    def f1(said, right, axis):
        both = np.sum(said & right, axis=axis)
        return 2 * both / (np.sum(said, axis=axis) + np.sum(right, axis=axis))

    f1_low_high = scipy.stats.bootstrap(
        (said, right), f1, n_resamples=100_000, method="percentile", paired=True, rng=2, batch=1000
    ).confidence_interval
    first = np.round(rng.random(12), 2)
    second = np.round(np.clip(first + rng.normal(0.1, 0.2, 12), 0, 1), 2)
    test = scipy.stats.permutation_test(
        (second, first),
        lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,  # all 4,096
    )
    changes = [(0, 1), (1, 5), (5, 1), (0, 10), (9, 1), (30, 18), (120, 171), (0, 0), (3, 3)]
    changes += [(5000, 5200), (60_000, 61_000)]
    return {
        "mean": {"marks": marks.tolist(), "low": mean.low, "high": mean.high},
        "f1": {
            "said": said.astype(int).tolist(),
            "right": right.astype(int).tolist(),
            "low": f1_low_high.low,
            "high": f1_low_high.high,
        },
        "permutation": {"first": first.tolist(), "second": second.tolist(), "p": test.pvalue},
        "mcnemar": [
            [*pair, scipy.stats.binomtest(pair[0], sum(pair)).pvalue if sum(pair) else 1.0]
            for pair in changes
        ],
    }


def main():
    rng = random.Random(20)
    gqa = [
        (text, "dog") for text in ("dog", "Dog", "dog.", "Dog...", "a dog", "dogs", "do.g", "dog!")
    ]
    found = {
        "lmms_eval": version("lmms_eval"),
        "scipy": version("scipy"),
        "vqa": vqa(rng),
        "gqa": [
            [
                *pair,
                float(
                    exact_match_hf_evaluate(
                        [pair[0]], [pair[1]], ignore_case=True, ignore_punctuation=True
                    )["exact_match"]
                ),
            ]
            for pair in gqa
        ],
        "chartqa": [
            [a, b, bool(relaxed_correctness(a, b))] for a in CHART.split() for b in CHART.split()
        ],
        "docvqa": [
            [answer, [right], float(anls(references=[right], predictions=[answer])["anls"])]
            for answer, right in DOCS
        ]
        + [
            [
                "Sunday",
                ["x", "Saturday", "sun"],
                float(anls(references=["x", "Saturday", "sun"], predictions=["Sunday"])["anls"]),
            ]
        ],
        "mmmu_open": [[a, b, mmmu.eval_open(b, mmmu.parse_open_response(a))] for a, b in MMMU_OPEN],
        "choices": choices(rng),
        "yes_no": yes_no(rng),
        "statistics": statistics(),
    }
    lines = (
        f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"
        for name, value in found.items()
    )
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
