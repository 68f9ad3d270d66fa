"""Public benchmarks on data sets of a few rows, with the columns of the real ones.

Expected prompts, scores and files are written by hand.  One thing a reader would get wrong: the
right answers stand here in the words of a model (`said`), not in those of the data set, so that a
test fails where a benchmark hands its own answers to its own marks.
"""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from eve_vlm.eval.asking import Reply, row_of
from eve_vlm.eval.benchmarks import (
    BENCHMARKS,
    build_benchmark,
    preset_names,
    published_scores,
    published_sources,
)
from eve_vlm.eval.benchmarks.judge import Judge
from eve_vlm.eval.benchmarks.presets import load_preset
from eve_vlm.eval.runner import summary
from eve_vlm.eval.task import MissingDataError

datasets = pytest.importorskip("datasets", reason="the tables are read by datasets")

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
TEN = ["2"] * 8 + ["two", "many"]


def png(gray):
    """A picture of 16 x 16 pixels, told apart by its gray."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (gray,) * 3).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def vqa(number, answers, **more):
    return {"question_id": number, "question": "How many dogs?", "answers": answers} | more


def people(answers):
    return [
        {"answer": answer, "answer_confidence": "yes", "answer_id": n}
        for n, answer in enumerate(answers, 1)
    ]


def pope(sampling, number, answer, image):
    return {
        "id": f"{number}",
        "question_id": f"{number}",
        "question": "Is there a dog in the image?",
        "answer": answer,
        "image_source": image,
        "category": sampling,
    }


def mmbench(index, answer, options, hint="nan", category="ocr"):
    return {
        **{"index": index, "question": "Which?", "hint": hint, "answer": answer},
        **dict(zip("ABCD", options, strict=True)),
        **{"category": category, "L2-category": "perception", "source": "s", "comment": "nan"},
    }


def mathvista(pid, question_type, answer_type, answer, choices=None, precision=None):
    return {
        **{"pid": pid, "query": f"Hint: ...\nQuestion: {pid}?", "image": f"images/{pid}.jpg"},
        **{"choices": choices, "answer": answer, "precision": precision},
        **{"question_type": question_type, "answer_type": answer_type},
        "metadata": {"task": "geometry", "skills": ["a"]},
    }


def pictured(rows, column="image", empty=False):
    return [row | {column: None if empty else png(40 + n)} for n, row in enumerate(rows)]


SCIENCE = {"choices": ["iron", "wood"], "subject": "natural science"}
SEED = {"choice_a": "a cat", "choice_b": "a dog", "choice_c": "a cow", "choice_d": "a hen"}

# benchmark: ({Parquet file: rows}, what a good model says to each row, the first prompt).
SETS = {
    "vqav2": (
        {
            "lmms-lab/VQAv2/data/validation-00000-of-00001.parquet": pictured(
                [
                    vqa(10, people(TEN), image_id=1, answer_type="number"),
                    vqa(11, people(["no"] * 10), image_id=1, answer_type="yes/no"),
                ]
            ),
            "lmms-lab/VQAv2/data/testdev-00000-of-00001.parquet": pictured(
                [vqa(20, None, image_id=7, answer_type=None), vqa(21, None, image_id=8)]
            ),
        },
        ["2", "No."],
        f"How many dogs?{SHORT}",
    ),
    "gqa": (
        {
            "lmms-lab/GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet": [
                {"id": "q1", "imageId": "n9", "question": "Who is it?", "answer": "man"},
                {"id": "q2", "imageId": "n8", "question": "Who?", "answer": "girl"},
            ],
            "lmms-lab/GQA/testdev_balanced_images/testdev-00000-of-00001.parquet": [
                {"id": "n8", "image": png(8)},
                {"id": "n9", "image": png(9)},
            ],
        },
        ["Man.", "girl"],
        f"Who is it?{SHORT}",
    ),
    "vizwiz": (
        {
            "lmms-lab/VizWiz-VQA/data/val-00000-of-00001.parquet": pictured(
                [vqa("VizWiz_val_00000000", TEN, category="number")]
            ),
            "lmms-lab/VizWiz-VQA/data/test-00000-of-00001.parquet": pictured(
                [vqa("VizWiz_test_00000000", [], category=None)]
            ),
        },
        ["Two"],
        f"How many dogs?{SHORT}",
    ),
    "sqa": (
        {
            "lmms-lab/ScienceQA/ScienceQA-IMG/test-00000-of-00001.parquet": pictured(
                [
                    {"question": "Which bends?", "answer": 1, "hint": "Look {here}."} | SCIENCE,
                    {"question": "Which rusts?", "answer": 0, "hint": ""} | SCIENCE,
                ]
            )
        },
        ["B", "A. iron"],
        f"Context: Look {{here}}.\nWhich bends?\nA. iron\nB. wood{LETTER}",
    ),
    "textvqa": (
        {
            "lmms-lab/textvqa/data/validation-00000-of-00001.parquet": pictured(
                [vqa(5, TEN, image_id="ab", ocr_tokens=["STOP", "2 m"])]
            ),
        },
        ["2"],
        f"How many dogs?{SHORT}",
    ),
    "pope": (
        {
            "lmms-lab/POPE/data/test-00000-of-00001.parquet": pictured(
                [
                    pope(sampling, number, answer, f"COCO_{number}")
                    for sampling in ("random", "popular", "adversarial")
                    for number, answer in ((1, "yes"), (2, "no"))
                ]
            )
        },
        ["Yes, there is.", "No, there is not."] * 3,
        f"Is there a dog in the image?{SHORT}",
    ),
    "mme": (
        {
            "lmms-lab/MME/data/test-00000-of-00001.parquet": pictured(
                [
                    {
                        "question_id": f"{kind}/1.png",
                        "question": f"Is it a {thing}? Please answer yes or no.",
                        "answer": answer,
                        "category": kind,
                    }
                    for kind in ("existence", "code_reasoning")
                    for thing, answer in (("dog", "Yes"), ("cat", "No"))
                ]
            )
        },
        ["Yes", "no, a dog"] * 2,
        f"Is it a dog?{SHORT}",
    ),
    "mmbench": (
        {
            "lmms-lab/MMBench/en/dev-00000-of-00001.parquet": pictured(
                [
                    mmbench("7", "A", ("red", "blue", "nan", "nan"), "Look."),
                    mmbench("1000007", "B", ("blue", "red", "nan", "nan"), "Look."),
                    mmbench("8", "D", ("1", "2", "3", "4"), category="count"),
                ]
            ),
            "lmms-lab/MMBench/en/test-00000-of-00001.parquet": pictured(
                [mmbench("9", "nan", ("red", "two\twords", "nan", None))]
            ),
        },
        ["A", "B", "The answer is D."],
        f"Look.\nWhich?\nA. red\nB. blue{LETTER}",
    ),
    "seed": (
        {
            "lmms-lab/SEED-Bench/data/test-00000-of-00001.parquet": [
                {"question_id": "1", "question": "What?", "answer": "B", "data_type": "image"}
                | {"data_id": "p1", "image": [png(1)]}
                | SEED,
                {"question_id": "2", "question": "What now?", "answer": "D", "data_type": "video"}
                | {"data_id": "v1", "image": [png(50 + n) for n in range(8)]}
                | SEED,
            ]
        },
        ["B", "D"],
        f"What?\nA. a cat\nB. a dog\nC. a cow\nD. a hen{LETTER}",
    ),
    "mmvet": (
        {
            "lmms-lab/MMVet/data/test-00000-of-00001.parquet": pictured(
                [
                    {"question_id": "v1_0", "question": "What is x?", "answer": "-1<AND>-5"}
                    | {"image_source": "s", "capability": "ocr,math"},
                ]
            )
        },
        ["x is -1 or -5"],
        "What is x?",
    ),
    "ocrbench": (
        {
            "echo840/OCRBench/data/test-00000-of-00001.parquet": pictured(
                [
                    {"dataset": "IIIT5K", "question": "what is written in the image?"}
                    | {"question_type": "Regular Text Recognition", "answer": ["CENTRE"]},
                    {"dataset": "HME100k", "question": "Write the formula."}
                    | {"question_type": "Handwritten", "answer": ["x ^ { 2 }"]},
                ]
            )
        },
        ["It says Centre.", "x^{2}"],
        "what is written in the image?",
    ),
    "mathvista": (
        {
            "AI4Math/MathVista/data/testmini-00000-of-00001.parquet": pictured(
                [
                    mathvista("1", "multi_choice", "text", "7 cm", ["5 cm", "7 cm"]),
                    mathvista("2", "free_form", "float", "1.2", precision=1.0),
                    mathvista("3", "free_form", "integer", "14"),
                    mathvista("4", "free_form", "list", "[1, 2]"),
                ],
                "decoded_image",
            )
        },
        ["(B)", "1.23", "14.0", "[1, 2]"],
        "Hint: ...\nQuestion: 1?",
    ),
    "mmmu": (
        {
            "lmms-lab/MMMU/data/validation-00000-of-00001.parquet": [
                {
                    **{"id": f"validation_Art_Theory_{n}", "question": question},
                    **{"options": options, "answer": answer, "question_type": kind},
                    **{f"image_{at}": png(at) if at <= n else None for at in range(1, 8)},
                }
                for n, question, options, answer, kind in (
                    (1, "See <image 1>. Who?", "['Goya', \"O'Keeffe\"]", "B", "multiple-choice"),
                    (2, "How much?", "[]", "['2.5', 'five halves']", "open"),
                )
            ]
        },
        ["(B)", "So it is 2.50"],
        f"See <image 1>. Who?\nA. Goya\nB. O'Keeffe\n{LETTER}",
    ),
    "ai2d": (
        {
            "lmms-lab/ai2d/data/test-00000-of-00001.parquet": pictured(
                [{"question": "Which eats?", "options": ["hare", "fox", "grass"], "answer": "1"}]
            )
        },
        ["B. fox"],
        f"Which eats?\nA. hare\nB. fox\nC. grass{LETTER}",
    ),
    "chartqa": (
        {
            "lmms-lab/ChartQA/data/test-00000-of-00001.parquet": pictured(
                [
                    {"type": "human_test", "question": "How many?", "answer": "100"},
                    {"type": "augmented_test", "question": "Which?", "answer": "Peru"},
                ]
            )
        },
        ["104", "peru"],
        "How many?\nAnswer the question with a single word.",
    ),
    "msvd_qa": ({}, ["a man", "he cooks"], f"who is cooking?{SHORT}"),
    "msrvtt_qa": ({}, ["a man", "he cooks"], f"who is cooking?{SHORT}"),
    "activitynet_qa": (
        {
            "lmms-lab/ActivityNetQA/data/test-00000-of-00001.parquet": [
                {"video_name": "v1", "question_id": "v1_1", "question": "is it day"}
                | {"answer": "yes", "type": "3"},
                {"video_name": "v2", "question_id": "v2_1", "question": "who runs"}
                | {"answer": "dog", "type": "5"},
            ]
        },
        ["it is", "a dog"],
        "Is it day? Answer the question using a single word or phrase.",
    ),
}
SCORED = {"vqav2": "validation", "vizwiz": "val"}
BEST = {"ocrbench": 1000.0, "mme": 200.0}
HIDDEN = {"vqav2": "testdev", "vizwiz": "test", "mmbench": "test"}


class Kind(Judge):
    """A judge that finds every answer right and reads it as it stands; real ones are below."""

    def __init__(self):
        self.facts_asked = []

    @property
    def facts(self):
        return {"model": "kind"}

    def check(self):
        pass

    def verdict(self, rubric, fields):
        self.facts_asked.append((rubric.name, dict(fields)))
        return {"mmvet": 1.0, "video": (True, 5), "mathvista": fields["answer"]}[rubric.name]


def frames_in(folder, count):
    folder.mkdir(parents=True)
    for n in range(count):
        Image.new("RGB", (16, 16), (n,) * 3).save(folder / f"{n:03}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All data sets, below one folder; what `datasets` makes of them is kept beside."""
    folder = tmp_path_factory.mktemp("root")
    for files, _, _ in SETS.values():
        for name, rows in files.items():
            write(folder / name, rows)
    for name in ("MSVD_Zero_Shot_QA", "MSRVTT_Zero_Shot_QA"):
        for video in ("one", "two"):
            frames_in(folder / name / "videos" / video, 20)
        questions = [
            {"video_name": "one", "question": "who is cooking?", "question_id": "0"},
            {"video_name": "two", "question": "what does he do?", "question_id": "1"},
        ]
        answers = [{"answer": "cook", "question_id": "1"}, {"answer": "man", "question_id": "0"}]
        (folder / name / "test_q.json").write_text(json.dumps(questions), "utf-8")
        (folder / name / "test_a.json").write_text(json.dumps(answers), "utf-8")
    for video in ("v_v1", "v2"):
        frames_in(folder / "lmms-lab/ActivityNetQA/all_test" / video, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield folder


def write(path, rows):
    """A Parquet file as `push_to_hub` writes it, with picture columns marked as such."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    data = datasets.Dataset.from_dict(columns)
    for name in names:
        if name.startswith(("image_", "image")) or name == "decoded_image":
            cells = [cell for cell in columns[name] if cell is not None]
            lists = cells and isinstance(cells[0], list)
            if not cells or isinstance(cells[0], dict) or lists:
                kind = datasets.List(datasets.Image()) if lists else datasets.Image()
                data = data.cast_column(name, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.to_parquet(path)


def built(name, root, **options):
    options = {"judge": Kind(), "splits": SCORED} | options
    return build_benchmark(name, data_root=root, **options)


def rows_of(task, answers):
    samples = task.samples()
    return [row_of(task, *pair) for pair in zip(samples, map(Reply, answers), strict=True)]


def value(task, answers, score=None):
    scores = summary(task, rows_of(task, answers), resamples=2)["scores"]
    return scores[score or task.metric]["value"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_are_those_of_the_preset(name, root):
    """Letter for letter; ids differ, the pictures are there and upright RGB."""
    task = built(name, root)
    samples = task.samples()
    assert len(samples) == len(SETS[name][1])
    assert task.prompt(samples[0]) == SETS[name][2]
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        pictures = sample.images()
        assert pictures and {(one.mode, one.size) for one in pictures} == {("RGB", (16, 16))}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_good_and_empty_answers(name, root):
    """Exact: the best score there is, and 0 without asking a judge."""
    task = built(name, root)
    said = SETS[name][1]
    best = BEST.get(name, 100.0)
    assert value(task, said) == pytest.approx(best, abs=1e-3)
    task.judge.facts_asked.clear()
    assert value(task, [""] * len(said)) == 0
    assert not task.judge.facts_asked
    assert not any(row.failed for row in rows_of(task, said))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_a_result_says_of_the_way_of_asking(name, root):
    settings = built(name, root).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["preset"] == "published@1"
    assert json.loads(settings["preset_text"])["max_new_tokens"] == built(name, root).max_new_tokens
    judged = {"mmvet", "mathvista", "msvd_qa", "msrvtt_qa", "activitynet_qa"}
    assert ("judge" in settings) == (name in judged) == built(name, root).needs_judge
    assert ("rubric" in settings) == (name in judged)


# --- presets and published scores -----------------------------------------------------------------

# Whoever must change one of these has changed a frozen preset: write a new version instead.
DIGESTS = {"published@1": "65cbbc6097b96292", "published-hints@1": "60db9d1ea0290b0d"}


@pytest.mark.parametrize("preset", preset_names())
def test_presets_are_frozen(preset):
    texts = "".join(load_preset(preset, name).text for name in BENCHMARKS)
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == DIGESTS[preset]


def test_a_preset_that_does_not_exist():
    with pytest.raises(ValueError) as error:
        build_benchmark("pope", preset="published@9")
    assert str(error.value) == (
        "There is no preset 'published@9'; there are published-hints@1, published@1."
    )


def test_hints_are_a_preset_of_their_own(root):
    text = built("textvqa", root, preset="published-hints@1")
    assert text.prompt(text.samples()[0]) == (
        f"How many dogs?\nReference OCR token: STOP, 2 m{SHORT}"
    )
    photo = built("vizwiz", root, preset="published-hints@1")
    assert photo.prompt(photo.samples()[0]) == (
        "How many dogs?\nWhen the provided information is insufficient, respond with "
        f"'Unanswerable'.{SHORT}"
    )
    other = built("gqa", root, preset="published-hints@1")
    assert other.prompt(other.samples()[0]) == SETS["gqa"][2]


def test_published_scores():
    """The rows of the two tables that stand for EVE, typed again from the paper."""
    names = ("vqav2", "gqa", "vizwiz", "sqa", "textvqa", "pope", "mme", "mmbench", "seed", "mmvet")
    table = {
        "EVE-7B": (75.4, 60.8, 41.8, 63.0, 51.9, 83.6, 1217.3, 49.5, 54.3, 25.6),
        "EVE-7B (HD)": (78.6, 62.6, 51.1, 64.9, 56.8, 85.0, 1305.7, 52.3, 56.8, 25.7),
        "LLaVA-1.5": (78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 58.6, 30.5),
    }
    for model, scores in table.items():
        assert tuple(published_scores(name)[model] for name in names) == scores
    assert published_scores("pope")["Fuyu-8B (HD)"] == 74.1
    assert published_scores("ocrbench")["EVE-7B (HD)"] == 398
    assert published_scores("counting") == {}
    for name in BENCHMARKS:
        assert published_scores(name).keys() == published_sources(name).keys() != set()


# --- scores that are no means ---------------------------------------------------------------------


def test_pope_is_the_mean_of_three_f1_scores(root):
    """Random: all right, F1 1; popular: yes to all, F1 2/3; adversarial: no to all, F1 0."""
    task = built("pope", root)
    answers = ["yes", "no", "yes", "yes", "no", "no"]
    assert value(task, answers) == pytest.approx(100 * (1 + 2 / 3 + 0) / 3, abs=1e-3)
    assert value(task, answers, "accuracy") == pytest.approx(100 * (1 + 0.5 + 0.5) / 3, abs=1e-3)
    whole = summary(task, rows_of(task, answers), resamples=2)
    assert whole["units"] == 2  # photos
    f1 = {name: group["scores"]["f1"]["value"] for name, group in whole["groups"].items()}
    assert f1 == pytest.approx({"random": 100, "popular": 200 / 3, "adversarial": 0}, abs=1e-3)


def test_mme_counts_pairs(root):
    """One of two right: 50 for the questions, nothing for the pair."""
    task = built("mme", root)
    assert value(task, ["yes", "yes", "yes", "no"]) == 50
    assert value(task, ["yes", "yes", "yes", "no"], "cognition") == 200


def test_mmbench_wants_all_rotations(root):
    """Question 7 is asked twice and once answered wrongly, question 8 is right."""
    task = built("mmbench", root)
    assert value(task, ["A", "A", "D"]) == 50
    assert value(task, ["A", "A", "D"], "each") == pytest.approx(200 / 3, abs=1e-3)


def test_vqa_accuracy_of_a_few(root):
    """ "two" is "2" by the rule, so nine agree; one of ten says "many", which is worth 0.3."""
    task = built("vqav2", root)
    assert value(task, ["many", "yes"]) == pytest.approx(100 * 0.3 / 2, abs=1e-3)


# --- files for servers ----------------------------------------------------------------------------


def test_hidden_answers_have_files_instead_of_scores(root):
    answers = {"vqav2": ["The 2 Dogs.", "No"], "vizwiz": ["Unanswerable."], "mmbench": ["B"]}
    files = {
        "vqav2_testdev.json": '[{"question_id": 20, "answer": "2 dogs"}, '
        '{"question_id": 21, "answer": "no"}]',
        "vizwiz_test.json": '[{"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"}]',
        "mmbench_test.tsv": "index\tquestion\tA\tB\tC\tD\tanswer\tcategory\tl2-category\tprediction"
        '\n9\tWhich?\tred\t"two\twords"\t\t\t\tocr\tperception\tB\n',
    }
    found = {}
    for name, split in HIDDEN.items():
        task = built(name, root, splits={name: split})
        rows = rows_of(task, answers[name])
        assert all(row.marks == {} for row in rows)
        assert summary(task, rows)["scores"] is None
        found |= task.upload(rows)
    assert found == files


def test_splits_with_answers_have_no_files_but_mmbench_dev(root):
    files = {}
    for name in BENCHMARKS:
        task = built(name, root)
        files |= task.upload(rows_of(task, SETS[name][1]))
    assert list(files) == ["mmbench_dev.tsv"]
    assert len(files["mmbench_dev.tsv"].splitlines()) == 4


# --- data -----------------------------------------------------------------------------------------


def test_data_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(MissingDataError) as error:
        build_benchmark("pope", data_root=tmp_path).samples()
    fetch = (
        "fetch it with `hf download --repo-type dataset lmms-lab/POPE --local-dir "
        "ROOT/lmms-lab/POPE` and evaluate with --data-root ROOT."
    )
    assert str(error.value) == f"{tmp_path} has no lmms-lab/POPE; {fetch}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingDataError) as error:
        build_benchmark("pope").samples()
    assert str(error.value) == f"lmms-lab/POPE is not in the Hub's cache; {fetch}"
    with pytest.raises(MissingDataError, match=r"MSVD_Zero_Shot_QA is not there; make ROOT/"):
        build_benchmark("msvd_qa").samples()


def test_a_split_that_is_not_there(root):
    with pytest.raises(MissingDataError, match=r"no split tset in data .*'test'"):
        built("pope", root, splits={"pope": "tset"}).samples()


def test_the_hubs_cache_is_read(root, tmp_path, monkeypatch):
    """In the cache's own layout, under the name to which the sets moved."""
    repository = tmp_path / "datasets--lmms-lab-encoder--POPE"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc", "utf-8")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "data").symlink_to(root / "lmms-lab/POPE/data")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert len(build_benchmark("pope").samples()) == 6


def test_some_of_the_files_are_not_a_data_set(root, tmp_path):
    there = root / "lmms-lab/POPE/data/test-00000-of-00001.parquet"
    folder = tmp_path / "lmms-lab/POPE/data"
    folder.mkdir(parents=True)
    (folder / "test-00000-of-00003.parquet").write_bytes(there.read_bytes())
    with pytest.raises(MissingDataError, match="has 1 of the 3 files of test"):
        build_benchmark("pope", data_root=tmp_path).samples()


def test_pictures_are_opened_when_they_are_asked_for(root, tmp_path):
    """A damaged one disturbs nobody who only lists."""
    row = pope("random", 1, "yes", "COCO_1") | {"image": {"bytes": b"no picture", "path": None}}
    write(tmp_path / "lmms-lab/POPE/data/test-00000-of-00001.parquet", [row])
    [sample] = build_benchmark("pope", data_root=tmp_path).samples()
    with pytest.raises(ValueError, match=r"lmms-lab/POPE test, row 0, image"):
        sample.images()


def test_each_row_has_its_own_pictures(root):
    """Grays: GQA looks pictures up by id, SEED takes a video's middle, MMMU what there is."""

    def grays(name):
        return [
            [one.getpixel((0, 0))[0] for one in sample.images()]
            for sample in built(name, root).samples()
        ]

    assert grays("gqa") == [[9], [8]]
    assert grays("seed") == [[1], [53]]
    assert grays("mmmu") == [[1], [1, 2]]
    assert grays("pope") == [[40 + n] for n in range(6)]


def test_a_column_that_is_not_there(tmp_path, root):
    row = {"question_id": "1", "question": "Is it?", "anwser": "yes", "category": "random"}
    write(
        tmp_path / "lmms-lab/POPE/data/test-00000-of-00001.parquet", [row | {"image_source": "a"}]
    )
    with pytest.raises(ValueError, match="has no column answer; did you mean 'anwser'"):
        build_benchmark("pope", data_root=tmp_path).samples()


def test_answers_for_some_rows_only_are_refused(root, tmp_path):
    rows = pictured([mmbench("7", "A", "1234"), mmbench("8", "nan", "1234")])
    write(tmp_path / "lmms-lab/MMBench/en/dev-00000-of-00001.parquet", rows)
    with pytest.raises(ValueError, match="no answers for 1 of its 2 questions"):
        build_benchmark("mmbench", data_root=tmp_path).samples()


def test_a_digest_is_of_the_words_and_not_of_remarks():
    """Same words, same digest, whatever the preset is called; other words, another."""
    plain, hints = (load_preset(name, "gqa") for name in preset_names())
    assert plain.name != hints.name and plain.digest == hints.digest
    assert replace(plain, source="another remark").digest == plain.digest
    assert replace(plain, prompt="{question}").digest != plain.digest


def test_no_such_benchmark():
    with pytest.raises(ValueError, match="There is no benchmark 'vqa'; there are vqav2, gqa,"):
        build_benchmark("vqa")


def test_the_package_holds_the_tables():
    """They are data of the package, which the wheel takes as it takes the code."""
    import eve_vlm.eval.benchmarks

    folder = Path(eve_vlm.eval.benchmarks.__file__).parent
    assert {path.name for path in folder.glob("*.yaml")} == {"presets.yaml", "published.yaml"}
