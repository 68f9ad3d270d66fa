"""The offline tasks that read: the same everywhere, true, legible, and apart from training.

Answers are found again here by reading the described page or table with rules of this file, and
pictures are compared with other drawings or measured.  Easy to get wrong: fonts differ a little
between builds of FreeType, so pictures are compared by likeness and never byte by byte.
"""

import re
import string
import subprocess
import sys
from collections import Counter, defaultdict
from datetime import date
from functools import lru_cache
from itertools import chain, combinations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from eve_vlm.data.phrases import SEEN_WORDS, UNSEEN_WORDS
from eve_vlm.data.rendered import chart_figure, page
from eve_vlm.data.rendered.charts import KINDS, TONES, chart
from eve_vlm.data.rendered.documents import KINDS as DOCUMENT_KINDS
from eve_vlm.data.rendered.documents import document
from eve_vlm.data.rendered.page import draw_page, text_box
from eve_vlm.data.rendered.sheet import DAYS, MONTHS
from eve_vlm.data.rendered.vocabulary import VOCABULARY
from eve_vlm.data.rendered.written_words import WrittenWords, numbers
from eve_vlm.data.scenes import SceneDataset
from eve_vlm.eval.offline import build_offline
from eve_vlm.eval.task import MissingDataError, Row

NAMES = ("reading", "documents", "charts")
needs_matplotlib = pytest.mark.skipif(
    not chart_figure.can_draw_charts(), reason="needs matplotlib (extra demo)"
)
TASKS = [pytest.param(n, marks=needs_matplotlib if n == "charts" else ()) for n in NAMES]


# --- the tasks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_those_of_the_split_file(name):
    task = build_offline(name)
    samples = task.samples()  # compares the digest itself
    assert len(samples) == task.split["samples"] and 300 <= len(samples) <= 400
    assert len({sample.id for sample in samples}) == len(samples)
    with pytest.raises(ValueError, match=f"{name} drew .* samples"):
        type(task)({**task.split, "seed": task.split["seed"] + 1}).samples()


@pytest.mark.parametrize("name", TASKS)
def test_listing_draws_nothing(name, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("drawn")

    monkeypatch.setattr(SceneDataset, "render", refuse)
    monkeypatch.setattr("eve_vlm.eval.offline.documents.draw_page", refuse)
    monkeypatch.setattr("eve_vlm.eval.offline.charts._picture", refuse)
    samples = build_offline(name).samples()
    with pytest.raises(AssertionError, match="drawn"):
        samples[0].images()


@pytest.mark.parametrize("name", TASKS)
def test_no_answer_is_frequent(name):
    samples = build_offline(name).samples()
    groups = defaultdict(Counter)
    for sample in samples:
        groups[sample.group][sample.answers[0].casefold()] += 1
    total = sum(groups.values(), Counter())
    # The best constant answer; a count of 1 to 5 has five answers, so its group has a third at most.
    assert total.most_common(1)[0][1] <= 0.06 * len(samples)
    for group, answers in groups.items():
        assert answers.most_common(1)[0][1] <= 0.34 * answers.total(), (group, answers)
    sizes = [answers.total() for answers in groups.values()]
    assert max(sizes) - min(sizes) <= 4, "groups of nearly equal size"


@pytest.mark.parametrize("name", TASKS)
def test_marks(name):
    task = build_offline(name)
    for sample in task.samples():
        for answer in sample.answers:
            right = task.mark(sample, answer.upper())
            assert set(right.values()) == {1.0} and task.metric in right
        assert set(task.mark(sample, "").values()) == {0.0}


@pytest.mark.parametrize("name", TASKS)
def test_questions_of_a_picture_are_one_unit(name):
    task = build_offline(name)
    rows = [
        Row(
            id=sample.id,
            group=sample.group,
            unit=sample.unit,
            prompt="",
            answer="",
            expected=sample.answers,
            marks=task.mark(sample, sample.answers[0]),
        )
        for sample in task.samples()
    ]
    units = task.units(rows)
    assert len(units) == {"reading": len(rows), "documents": 120, "charts": 120}[name]


@needs_matplotlib
def test_five_percent_are_for_values_only():
    task = build_offline("charts")
    checked = Counter()
    for sample in task.samples():
        answer = sample.answers[0]
        if not re.fullmatch(r"[\d.]+%?", answer):
            continue
        near = f"{1.04 * float(answer.rstrip('%')):.6g}"
        far = f"{1.06 * float(answer.rstrip('%')):.6g}"
        numeric = sample.group in ("value", "difference")
        assert task.mark(sample, near)["relaxed_accuracy"] == float(numeric)
        assert task.mark(sample, far)["relaxed_accuracy"] == 0
        checked[sample.group] += 1
    assert {"value", "difference", "count", "extreme"} <= set(checked)


def test_without_matplotlib_charts_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDataError, match=r"pip install 'eve-vlm\[demo\]'"):
        build_offline("charts").samples()
    with pytest.raises(ValueError, match=r"pip install 'eve-vlm\[demo\]'"):
        chart_figure.draw_chart(chart(0, split="held_out"))


@pytest.mark.parametrize("make", [document, chart])
def test_what_is_drawn_depends_on_seed_split_and_index_alone(make):
    forward = [make(index, split="held_out", seed=1) for index in range(40)]
    backward = [make(index, split="held_out", seed=1) for index in reversed(range(40))]
    assert forward == backward[::-1]
    others = [
        make(i, split=s, seed=n) for s in ("train", "held_out") for n in (1, 2) for i in (0, 8)
    ]
    assert not any(a == b for a, b in combinations(others, 2))


# --- apart from training --------------------------------------------------------------------------


def strings(vocabulary):
    lists = vocabulary._asdict()
    categories, themes = lists.pop("categories"), lists.pop("themes")
    titles = [theme.title for theme in themes]
    return [*chain(*lists.values(), *categories.values(), titles, categories)]


def test_vocabularies_share_nothing():
    train, held_out = (set(map(str.casefold, strings(VOCABULARY[s]))) for s in VOCABULARY)
    assert not train & held_out
    assert len(train) > 300 and len(held_out) > 300
    for vocabulary in VOCABULARY.values():
        for words in (*vocabulary[:-2], *vocabulary.categories.values()):
            assert len(set(words)) == len(words)


def test_only_characters_that_the_font_has():
    for vocabulary in VOCABULARY.values():
        assert set("".join(strings(vocabulary))) <= set(string.printable[:95])


def test_numbers_of_training_and_of_the_evaluation_differ():
    for digits in (2, 3, 4):
        train, held_out = (set(numbers(digits, split=split)) for split in VOCABULARY)
        assert not train & held_out and len(train | held_out) == 9 * 10 ** (digits - 1)
        assert 0.15 < len(held_out) / len(train | held_out) < 0.25  # about a fifth
        # No place of a held-out number is foreseeable: every last digit occurs.
        assert {number[-1] for number in held_out} == set(string.digits)
    assert numbers(1, split="train") == numbers(1, split="held_out") == tuple(string.digits)


def test_names_in_answers_are_on_no_training_page():
    seen = " ".join(
        text.words for index in range(400) for text in document(index, split="train", seed=9).texts
    )
    days = {*DAYS, *MONTHS}
    names = {
        answer
        for sample in build_offline("documents").samples()
        for answer in sample.answers
        if re.fullmatch(r"[A-Za-z :,]{3,}", answer) and not any(day in answer for day in days)
    }
    assert len(names) > 80
    assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", seen)]


@needs_matplotlib
def test_names_in_chart_answers_are_in_no_training_chart():
    train = set()
    for index in range(400):
        drawn = chart(index, split="train", seed=9)
        train |= {*drawn.categories, *drawn.series, drawn.theme.title}
        assert set(drawn.tones) <= {tone for tones in TONES.values() for tone in tones["train"]}
    for index in range(120):
        drawn = chart(index, split="held_out", seed=9)
        assert not train & {*drawn.categories, *drawn.series, drawn.theme.title}
    for tones in TONES.values():
        assert not set(tones["train"]) & set(tones["held_out"])


def test_reading_groups():
    words = defaultdict(list)
    for sample in build_offline("reading").samples():
        words[sample.group].append(sample.answers[0])
    assert set(words["seen"]) == set(SEEN_WORDS) and set(words["unseen"]) == set(UNSEEN_WORDS)
    assert Counter(map(len, words["number"])) == dict.fromkeys((1, 2, 3, 4), 25)
    assert len(set(words["long"])) >= 90 and min(map(len, words["long"])) >= 8


# --- written words --------------------------------------------------------------------------------


def ink_of(picture):
    """Where the writing is, as numbers from 0 to 1, cropped: it is darker than any background."""
    grey = np.asarray(picture.convert("L"), float)
    dark = np.clip((np.median(grey) - grey) / (np.median(grey) - grey.min()), 0, 1)
    rows, cols = (np.flatnonzero((dark > 0.5).any(axis)) for axis in (1, 0))
    return dark[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]


def written(word, angle):
    font = ImageFont.load_default(40)
    mask = Image.new("L", (40 * (len(word) + 1), 90), 255)
    ImageDraw.Draw(mask).text((20, 15), word, fill=0, font=font)
    return mask.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=255)


def shape_of(ink):
    """Ink stretched to one size, with mean 0 and length 1; and how much wider than high it was."""
    small = np.asarray(Image.fromarray(np.uint8(255 * ink)).resize((96, 32)), float).ravel()
    small -= small.mean()
    return small / np.linalg.norm(small), np.log(ink.shape[1] / ink.shape[0])


def likeness(first, second):
    """Correlation of two shapes, less what their proportions differ."""
    return first[0] @ second[0] - abs(first[1] - second[1])


@pytest.mark.parametrize("group", ["seen", "unseen", "number", "long"])
def test_written_word_can_be_read(group):
    """By likeness to plain drawings of all words of its group, at turns of 4 degrees either way."""
    samples = [s for s in build_offline("reading").samples() if s.group == group]
    words = sorted({sample.answers[0] for sample in samples})
    plain = {
        (word, angle): shape_of(ink_of(written(word, angle))) for word in words for angle in (-4, 4)
    }
    some = samples[::3]
    read = []
    for sample in some:
        (picture,) = sample.images()
        assert picture.mode == "RGB"
        assert picture.size == ((168, 56) if group == "long" else (56, 56))
        shape = shape_of(ink_of(picture))
        read.append(max(plain, key=lambda key, shape=shape: likeness(shape, plain[key]))[0])
    right = sum(a == s.answers[0] for a, s in zip(read, some, strict=True))
    # Small letters on a run of two colours are told by a crude reader nearly always.
    assert right >= 0.95 * len(some), [(a, s.answers[0]) for a, s in zip(read, some, strict=True)]


def test_training_words_are_records():
    data = WrittenWords(
        VOCABULARY["train"].long_words, split="train", size=5, seed=3, canvases=((56, 168),)
    )
    for record in data:
        question, answer = (message["content"][-1]["text"] for message in record.messages)
        assert question == "What does it say?" and answer in VOCABULARY["train"].long_words
        assert record.images[0].size == (168, 56)


# --- documents ------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def lines_of(drawn):
    """Words of every base line from left to right, from top to bottom: how a page is read."""
    lines = defaultdict(list)
    for text in drawn.texts:
        lines[text.base].append((text_box(text).left, text.words))
    return [[words for _, words in sorted(line)] for _, line in sorted(lines.items())]


def value_after(lines, label):
    """What stands to the right of a label."""
    (found,) = [line[line.index(label) + 1] for line in lines if label in line[:-1]]
    return found


def value_below(drawn, label):
    """What stands next below a label, in the same column."""
    at = next(text for text in drawn.texts if text.words == label)
    below = [t for t in drawn.texts if t.base > at.base and 0 <= t.x - at.x < 20]
    return min(below, key=lambda text: text.base).words


def read_receipt(drawn, question):
    lines = lines_of(drawn)
    good = re.fullmatch(r"How much is the (.+)\?", question)
    if good and good[1] != "tax":
        return value_after(lines, good[1])
    if "tax" in question:
        (tax,) = [line[1] for line in lines if line[0].startswith("Tax")]
        return tax
    (served,) = [line[0] for line in lines if line[0].startswith("You were served by ")]
    return {
        "What is the total?": value_after(lines, "Total"),
        "What is the subtotal?": value_after(lines, "Subtotal"),
        "What is the date?": value_after(lines, "Date"),
        "What is the name of the shop?": lines[0][0],
        "What is the receipt number?": value_after(lines, "Receipt No."),
        "Who served the customer?": served.split()[-1],
    }[question]


def read_letter(drawn, question):
    (firm,), (street,), (phone,), (reader, date), (_, number), (subject,), (dear,), *_ = lines_of(
        drawn
    )
    assert dear == f"Dear {reader},"
    return {
        "Which company sent the letter?": firm,
        "Who signed the letter?": lines_of(drawn)[-1][0],
        "To whom is the letter addressed?": reader,
        "What is the date of the letter?": date,
        "What is the letter about?": subject,
        "What is the reference number?": number.removeprefix("Ref. "),
        "What is the phone number of the company?": phone.removeprefix("Phone "),
        "In which town is the company?": street.split(", ")[1],
    }[question]


def read_form(drawn, question):
    lines = lines_of(drawn)
    if question == "What is the title of the form?":
        return lines[0][0]
    if question == "What is the number of the form?":
        return lines[1][0].removeprefix("Form ")
    label = re.fullmatch(r"What is the (.+)\?", question)[1].capitalize()
    if any(text.words == f"{label}:" for text in drawn.texts):
        return value_after(lines, f"{label}:")
    return value_below(drawn, label)


def read_notice(drawn, question):
    (title,), (when,), (clock,), (where,), (fee,), (host,), (phone,) = lines_of(drawn)
    day, date = when.split(", ", 1)
    return {
        "What is the event?": title,
        "On which date is it?": date,
        "On which day of the week is it?": day,
        "At what time does it begin?": re.search(r"\d+:\d\d", clock)[0],
        "Where does it take place?": where,
        "In which town is it?": where.split(", ")[1],
        "How much is a ticket?": fee.removeprefix("Tickets: "),
        "Who organises it?": host.removeprefix("Organised by "),
        "Which number can one call?": phone.removeprefix("Questions? Call "),
    }[question]


CELLS = {  # question: (heading of what is given, heading of what is asked)
    "On which shelf is this: (.+)": ("Item", "Shelf"),
    "What is the quantity of (.+)": ("Item", "Quantity"),
    "What is the price of (.+)": ("Item", "Price"),
    "What is on shelf (.+)": ("Shelf", "Item"),
    "Which item costs (.+)": ("Price", "Item"),
    "When does the train to (.+) leave": ("Destination", "Time"),
    "Which train goes to (.+)": ("Destination", "Train"),
    "From which platform does the train to (.+) leave": ("Destination", "Platform"),
    "Where does the train at (.+) go": ("Time", "Destination"),
    "Where does train (.+) go": ("Train", "Destination"),
    "In which department is (.+)": ("Name", "Department"),
    "In which room is (.+)": ("Name", "Room"),
    "What is the phone number of (.+)": ("Name", "Phone"),
    "Who is in the department (.+)": ("Department", "Name"),
    "Who is in room (.+)": ("Room", "Name"),
    "From which town is (.+)": ("Name", "Town"),
    "What is the age of (.+)": ("Name", "Age"),
    "How many points did (.+) get": ("Name", "Points"),
    "Who is from (.+)": ("Town", "Name"),
    "Who got (.+) points": ("Points", "Name"),
}


def read_table(drawn, question):
    (title,), headings, *rows = lines_of(drawn)
    if question == "What is the title of the table?":
        return title
    (found,) = [
        (match[1], *columns)
        for form, columns in CELLS.items()
        if (match := re.fullmatch(rf"{form}\?", question))
    ]
    given, named, asked = found
    (row,) = [row for row in rows if row[headings.index(named)] == given]
    return row[headings.index(asked)]


READERS = {
    "receipt": read_receipt,
    "letter": read_letter,
    "table": read_table,
    "form": read_form,
    "notice": read_notice,
}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_are_what_the_page_says(split):
    asked = Counter()
    for index in range(150):
        drawn = document(index, split=split, seed=4)
        for question in drawn.questions:
            assert READERS[drawn.kind](drawn, question.text) == question.answers[0], (
                index,
                question,
            )
            asked[drawn.kind] += 1
    assert set(asked) == set(DOCUMENT_KINDS)


def test_sums_of_receipts_are_right():
    for index in range(0, 200, 5):
        lines = lines_of(document(index, split="held_out"))
        rows = [(label, value.lstrip("$")) for label, value in (ln for ln in lines if len(ln) == 2)]
        cents = {k: round(100 * float(v)) for k, v in rows if re.fullmatch(r"\d+\.\d\d", v)}
        (tax,) = [key for key in cents if key.startswith("Tax")]
        goods = sum(v for k, v in cents.items() if k not in ("Subtotal", "Total", tax))
        assert goods == cents["Subtotal"] and cents["Total"] == goods + cents[tax]
        assert abs(cents[tax] - goods * int(tax[4:-1]) / 100) <= 0.5


def test_days_of_notices_are_right():
    for index in range(4, 200, 5):
        day, written_date = lines_of(document(index, split="held_out"))[1][0].split(", ", 1)
        numeric = re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)|(\d\d)/(\d\d)/(\d{4})", written_date)
        if numeric:
            parts = numeric.groups()
            year, month, number = parts[:3] if parts[0] else parts[:2:-1]
        else:
            number, year = re.findall(r"\d+", written_date)
            month = MONTHS.index(re.search("[A-Z][a-z]+", written_date)[0]) + 1
        assert date(int(year), int(month), int(number)).strftime("%A") == day


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_no_text_is_clipped_or_covers_another(split):
    for index in range(200):
        drawn = document(index, split=split, seed=4)
        height, width = drawn.canvas
        boxes = [text_box(text) for text in drawn.texts]
        for box, text in zip(boxes, drawn.texts, strict=True):
            where = (split, index, text)
            assert box.left >= 8 and box.right <= width - 8, where
            assert box.top >= 8 and box.bottom <= height - 8, where
            for shape in drawn.shapes:
                frame, other = shape.frame, shape.box
                apart = (
                    *(box.right <= other.left, other.right <= box.left),
                    *(box.bottom <= other.top, other.bottom <= box.top),
                )
                inside = (
                    *(other.left + frame <= box.left, box.right <= other.right - frame),
                    *(other.top + frame <= box.top, box.bottom <= other.bottom - frame),
                )
                assert any(apart) or all(inside), where
        for (a, b), (first, second) in zip(
            combinations(boxes, 2), combinations(drawn.texts, 2), strict=True
        ):
            across = min(a.right, b.right) - max(a.left, b.left)
            down = min(a.bottom, b.bottom) - max(a.top, b.top)
            assert across <= 0 or down <= 0, (split, index, first, second)


def plain_likeness(picture, text, words):
    """How much the ink at the place of a text is like words that plain Pillow writes there."""
    box = text_box(text)
    grey = np.asarray(picture.convert("L").crop(box), float)
    mask = Image.new("L", (box.width, box.height))
    anchor = {"left": "ls", "middle": "ms", "right": "rs"}[text.align]
    ImageDraw.Draw(mask).text(
        (text.x - box.left, text.base - box.top),
        words,
        fill=255,
        font=ImageFont.load_default(text.size),
        anchor=anchor,
    )
    return np.corrcoef(np.median(grey) - grey.ravel(), np.asarray(mask, float).ravel())[0, 1]


def test_page_shows_its_texts():
    """0.99 for plain letters: the same font in other colours; a letter drawn twice is still 0.7."""
    for index in range(15):
        drawn = document(index, split="held_out", seed=4)
        picture = draw_page(drawn)
        assert picture.size == drawn.canvas[::-1] and picture.mode == "RGB"
        for text in drawn.texts:
            found = plain_likeness(picture, text, text.words)
            assert found > (0.7 if text.bold else 0.99), (index, text, found)
            if text.words.isalpha():  # other words do not pass for it
                assert plain_likeness(picture, text, text.words.swapcase()[::-1]) < 0.7


def test_ink_of_a_page_is_in_its_boxes():
    for index in range(30):
        drawn = document(index, split="held_out", seed=4)
        pixels = np.asarray(draw_page(drawn)).astype(int)
        paper = np.abs(pixels - drawn.paper).sum(axis=2) > 0
        for box in [*map(text_box, drawn.texts), *(shape.box for shape in drawn.shapes)]:
            # One pixel for the soft edges of letters.
            paper[max(box.top - 1, 0) : box.bottom + 1, max(box.left - 1, 0) : box.right + 1] = (
                False
            )
        assert not paper.any()


# --- charts ---------------------------------------------------------------------------------------


def charts_of(kind, number, split="held_out", seed=5):
    return [
        chart(len(KINDS) * place + KINDS.index(kind), split=split, seed=seed)
        for place in range(number)
    ]


def table_of(drawn):
    """{(series, category): value} as a reader of the chart would write it down."""
    return {
        (series, category): value
        for series, row in zip(drawn.series or ("",), drawn.values, strict=True)
        for category, value in zip(drawn.categories, row, strict=True)
    }


def chart_answer(drawn, question):
    """All that a question of a chart can ask, answered from the table alone."""
    table = table_of(drawn)
    named = [name for name in drawn.series if re.search(rf"values? of {name}\b", question)]
    row = {c: v for (s, c), v in table.items() if s == (named[0] if named else "")}
    colours = dict(zip(drawn.series or drawn.categories, drawn.colours, strict=False))
    if match := re.fullmatch(r"What is the value.* for (\w+)\?", question):
        return row[match[1]]
    if match := re.fullmatch(r"Which \w+ has the (largest|smallest) value.*\?", question):
        wanted = (max if match[1] == "largest" else min)(row.values())
        (name,) = [name for name, value in row.items() if value == wanted]
        return name
    if match := re.fullmatch(r"What is the difference between (\w+) and (\w+).*\?", question):
        return max(row[match[1]], row[match[2]]) - min(row[match[1]], row[match[2]])
    if match := re.fullmatch(r"How many \w+ have a value.* above ([\d.]+)%?\?", question):
        assert float(match[1]) not in row.values(), "nothing lies on the limit"
        return sum(value > float(match[1]) for value in row.values())
    if re.fullmatch(r"What is the color of the (bars|line)\?", question):
        (colour,) = drawn.colours
        return colour
    if match := re.fullmatch(r"What is the color of (?:the \w+ )?(\w+)\?", question):
        return colours[match[1]]
    match = re.fullmatch(r"Which \w+ is shown in (\w+)\?", question)
    (name,) = [name for name, colour in colours.items() if colour == match[1]]
    return name


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_chart_answers_follow_from_the_table(split):
    for index in range(400):
        drawn = chart(index, split=split, seed=5)
        kinds = [question.kind for question in drawn.questions]
        assert kinds == ["value", "extreme", "difference", "count", "colour"]
        for question in drawn.questions:
            found = chart_answer(drawn, question.text)
            wanted = question.answers[-1] if drawn.kind == "pie" else question.answers[0]
            if isinstance(found, (int, float)):
                assert abs(float(wanted) - found) < 1e-9, (index, question)  # of decimal digits
            else:
                assert found in question.answers, (index, question)


def test_unlabelled_values_can_be_read_exactly():
    for index in range(400):
        drawn = chart(index, split="train")
        if not drawn.labelled:
            halves = {value / drawn.tick * 2 for row in drawn.values for value in row}
            assert halves <= set(range(2, 20))  # on a grid line or half-way
        if drawn.kind == "pie":
            assert sum(drawn.values[0]) == 100


@needs_matplotlib
def test_tones_are_what_people_call_them():
    """One of the three nearest colours of the xkcd survey, which matplotlib has, has the name."""
    from matplotlib.colors import XKCD_COLORS, to_rgb

    survey = {name: np.array(to_rgb(code)) * 255 for name, code in XKCD_COLORS.items()}
    synonyms = {"gray": "grey"}
    for name, splits in TONES.items():
        for tone in chain(*splits.values()):
            near = sorted(survey, key=lambda known: np.linalg.norm(survey[known] - tone))[:3]
            assert synonyms.get(name, name) in " ".join(near), (name, tone, near)


def is_tone(pixels, tone):
    return np.abs(pixels - np.array(tone)).max(axis=2) <= 2  # edges are softer and left out


def runs(flags):
    """Beginnings and ends of stretches that are true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(int), [0]))))
    return list(zip(edges[::2], edges[1::2], strict=True))


def frame_of(pixels):
    """(left, top, right, bottom) of the axes: their black lines are the longest ones."""
    dark = pixels.max(axis=2) < 100
    rows, cols = np.flatnonzero(dark.mean(axis=1) > 0.6), np.flatnonzero(dark.mean(axis=0) > 0.5)
    return cols.min(), rows.min(), cols.max(), rows.max()


@needs_matplotlib
@pytest.mark.parametrize("kind", ["bar", "grouped"])
def test_bars_are_as_high_as_their_values(kind):
    """Measured in pixels between the lower line of the frame, 0, and the upper one, ten ticks."""
    ways = Counter()
    for drawn in charts_of(kind, 8):
        pixels = np.asarray(chart_figure.draw_chart(drawn)).astype(int)
        left, top, right, bottom = frame_of(pixels)
        inside = pixels[top + 2 : bottom - 1, left + 2 : right - 1]
        if drawn.sideways:
            inside = inside.transpose(1, 0, 2)[::-1]
        full = len(inside) + 3  # pixels between the middles of the two lines
        bars = []
        for tone in dict.fromkeys(drawn.tones):
            mask = is_tone(inside, tone)
            base = mask[-4]  # one stretch of this row for each bar
            for begin, end in runs(base):
                # The lowest stretch is the bar; soft edges of digits above may have its tone.
                height = full - 1.5 - runs(mask[:, (begin + end) // 2])[-1][0]
                bars.append(((begin + end) / 2, height / full * 10 * drawn.tick))
        found = [value for _, value in sorted(bars)]
        wanted = [value for group in zip(*drawn.values, strict=True) for value in group]
        # Two pixels: the soft edge of a bar, and the width of the lines of the frame.
        assert np.allclose(found, wanted, rtol=0, atol=2 * 10 * drawn.tick / full), (found, wanted)
        ways[drawn.sideways, len(drawn.tones)] += 1
    assert len(ways) >= 2, "several ways of drawing were seen"


@needs_matplotlib
def test_lines_go_through_their_values():
    seen = 0
    for drawn in charts_of("line", 40):
        if len(drawn.values) > 1 or drawn.labelled or drawn.colours[0] in ("black", "gray"):
            continue  # other lines, labels and soft edges of letters would be taken for parts
        pixels = np.asarray(chart_figure.draw_chart(drawn)).astype(int)
        _, top, _, bottom = frame_of(pixels)
        mask = is_tone(pixels, drawn.tones[0])
        cols = np.flatnonzero(mask.any(axis=0))
        first, last = cols.min() + 4, cols.max() - 4  # a mark is 6 points, 8 pixels, wide
        for place, value in enumerate(drawn.values[0]):
            column = round(first + (last - first) * place / (len(drawn.values[0]) - 1))
            rows = np.flatnonzero(mask[:, column])
            found = (bottom - (rows.min() + rows.max()) / 2) / (bottom - top) * 10 * drawn.tick
            # Three pixels, because the line beside a peak pulls the middle down.
            assert abs(found - value) <= 3 * 10 * drawn.tick / (bottom - top), (drawn, place, found)
        seen += 1
    assert seen >= 3


@needs_matplotlib
def test_slices_have_their_shares():
    for drawn in charts_of("pie", 10):
        pixels = np.asarray(chart_figure.draw_chart(drawn)).astype(int)
        counts = np.array([is_tone(pixels, tone).sum() for tone in drawn.tones])
        # One in a hundred: every slice loses its edge, small ones relatively more.
        assert np.allclose(100 * counts / counts.sum(), drawn.values[0], atol=1.0)


def writing_of(figure):
    """(words, box) of all visible writing of a figure, in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    return [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in texts]


@needs_matplotlib
@pytest.mark.parametrize("kind", KINDS)
def test_writing_of_charts_is_whole_and_apart(kind):
    for drawn in charts_of(kind, 5, "held_out", 2024) + charts_of(kind, 5, "train", 0):
        writing = writing_of(chart_figure.chart_figure(drawn))
        height, width = drawn.canvas
        for words, box in writing:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, (
                drawn,
                words,
            )
        for (a, first), (b, second) in combinations(writing, 2):
            across = min(first.x1, second.x1) - max(first.x0, second.x0)
            down = min(first.y1, second.y1) - max(first.y0, second.y0)
            assert across <= 0 or down <= 0, (drawn, a, b)
        words = " ".join(word for word, _ in writing).split()
        assert {*drawn.categories, *drawn.series, *drawn.theme.title.split()} <= set(words)
        if drawn.labelled:
            unit = "%" if kind == "pie" else ""
            assert {f"{value:g}{unit}" for value in drawn.values[0]} <= set(words)


@needs_matplotlib
def test_settings_of_the_user_do_not_count_and_are_kept():
    import matplotlib

    drawn = chart(0, split="held_out")
    usual = np.asarray(chart_figure.draw_chart(drawn))
    with matplotlib.rc_context({"font.size": 30.0, "figure.facecolor": "red"}):
        assert np.array_equal(np.asarray(chart_figure.draw_chart(drawn)), usual)
        assert matplotlib.rcParams["font.size"] == 30.0


@needs_matplotlib
def test_drawing_chooses_no_window_system():
    code = (
        "import sys; from eve_vlm.data.rendered import chart_figure, charts;"
        "chart_figure.draw_chart(charts.chart(0, split='train'));"
        "print('matplotlib.pyplot' in sys.modules, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_pages_are_drawn_in_their_colours():
    drawn = document(0, split="held_out")
    small = drawn._replace(
        canvas=(40, 60),
        shapes=(page.Shape(page.Box(10, 10, 20, 20), (1, 2, 3)),),
        texts=(page.Text("A", 30, 30, 16),),
    )
    pixels = np.asarray(draw_page(small))
    assert (pixels[10:20, 10:20] == (1, 2, 3)).all()
    assert tuple(pixels[9, 9]) == tuple(pixels[20, 20]) == small.paper
    assert tuple(small.ink) in {tuple(pixel) for pixel in pixels.reshape(-1, 3)}
