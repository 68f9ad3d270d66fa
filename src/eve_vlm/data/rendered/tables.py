"""Tables as documents: lists of goods, departures, staff and results, with questions on cells.

A table is rows of texts below headings; a question names a row and asks for a column, or the other
way round.  Easy to get wrong: the other way round is asked only of columns in which no value
stands twice, else it would have several answers.
"""

from collections.abc import Sequence
from typing import NamedTuple

from eve_vlm.data.phrases import Box
from eve_vlm.data.rendered.page import Align
from eve_vlm.data.rendered.sheet import SIDES, Sheet, different

COLUMNS = (32, 290, 460, 640)  # pixels; where columns begin, the last one where it ends


class _Table(NamedTuple):
    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    asked: dict[int, str]
    """Column: the question for its cell, with the name of the row at `{}`."""
    turned: dict[int, str]
    """Column: the question for the name of the row, with the cell at `{}`."""
    name: int = 0
    """Column of the names of rows."""


def write_table(sheet: Sheet) -> None:
    """One of four kinds of tables, ruled, framed or striped."""
    table = sheet.dice.choice((_goods, _departures, _staff, _results))(sheet)
    sheet.down(62)
    sheet.title(table.title, sheet.dice.choice(SIDES[:2]))
    sheet.down(sheet.step)
    style = sheet.dice.choice(("rules", "frame", "stripes"))
    top, height = sheet.y, 2 * sheet.size + 6
    for number, row in enumerate((table.headings, *table.rows)):
        box = Box(sheet.margin - 10, sheet.y, sheet.width - sheet.margin + 10, sheet.y + height)
        if number == 0 or (style == "stripes" and number % 2 == 0):
            sheet.box(box, sheet.shade)
        if number and style == "rules":
            sheet.rule(left=box.left, right=box.right)
        sheet.down(height * 2 // 3)
        for place, (x, words) in enumerate(zip(COLUMNS, row, strict=True)):
            align: Align = "right" if place == len(row) - 1 else "left"
            sheet.write(words, x, align=align, bold=number == 0)
        sheet.down(height - height * 2 // 3)
    if style == "frame":
        sheet.box(Box(box.left, top, box.right, sheet.y), sheet.ink, frame=2)
    _ask(sheet, table)


def _ask(sheet: Sheet, table: _Table) -> None:
    sheet.ask("title", "What is the title of the table?", table.title)
    for row in table.rows:
        for column, question in table.asked.items():
            kind = table.headings[column].lower()
            sheet.ask(kind, question.format(row[table.name]), row[column])
    for column, question in table.turned.items():
        cells = [row[column] for row in table.rows]
        for row in table.rows:
            if cells.count(row[column]) == 1:
                sheet.ask("row", question.format(row[column]), row[table.name])


def _number_of_rows(sheet: Sheet) -> int:
    return 4 + sheet.dice.below(4)


def _goods(sheet: Sheet) -> _Table:
    goods = different(sheet.dice, sheet.words.goods, _number_of_rows(sheet))
    rows = [
        (
            good,
            f"{sheet.dice.choice('ABCDEFGH')}{1 + sheet.dice.below(40)}",
            str(2 + sheet.dice.below(180)),
            sheet.amount(45 + sheet.dice.below(4955)),
        )
        for good in goods
    ]
    asked = {
        1: "On which shelf is this: {}?",
        2: "What is the quantity of {}?",
        3: "What is the price of {}?",
    }
    title = f"Stock of {sheet.firm('Store', 'Market', 'Depot')}"
    turned = {1: "What is on shelf {}?", 3: "Which item costs {}?"}
    return _Table(title, ("Item", "Shelf", "Quantity", "Price"), rows, asked, turned)


def _departures(sheet: Sheet) -> _Table:
    home, *towns = different(sheet.dice, sheet.words.towns, 1 + _number_of_rows(sheet))
    rows = [
        (
            town,
            sheet.clock(),
            f"{sheet.dice.choice(('IC', 'RE', 'EX'))} {sheet.number(3)}",
            str(1 + sheet.dice.below(24)),
        )
        for town in towns
    ]
    asked = {
        1: "When does the train to {} leave?",
        2: "Which train goes to {}?",
        3: "From which platform does the train to {} leave?",
    }
    turned = {1: "Where does the train at {} go?", 2: "Where does train {} go?"}
    headings = ("Destination", "Time", "Train", "Platform")
    return _Table(f"Departures from {home}", headings, rows, asked, turned)


def _staff(sheet: Sheet) -> _Table:
    number = _number_of_rows(sheet)
    firsts = different(sheet.dice, sheet.words.first_names, number)
    lasts = different(sheet.dice, sheet.words.last_names, number)
    rows = [
        (
            f"{first} {last}",
            sheet.dice.choice(sheet.words.departments),
            sheet.number(3),
            sheet.phone(),
        )
        for first, last in zip(firsts, lasts, strict=True)
    ]
    asked = {
        1: "In which department is {}?",
        2: "In which room is {}?",
        3: "What is the phone number of {}?",
    }
    turned = {1: "Who is in the department {}?", 2: "Who is in room {}?"}
    title = f"Staff of {sheet.firm('Bank', 'Museum', 'Press')}"
    return _Table(title, ("Name", "Department", "Room", "Phone"), rows, asked, turned)


def _results(sheet: Sheet) -> _Table:
    number = _number_of_rows(sheet)
    names = different(sheet.dice, sheet.words.first_names, number)
    lasts = different(sheet.dice, sheet.words.last_names, number)
    points = sorted((100 + sheet.dice.below(900) for _ in range(number)), reverse=True)
    rows = [
        (
            f"{first} {last}",
            sheet.dice.choice(sheet.words.towns),
            str(18 + sheet.dice.below(60)),
            str(point),
        )
        for first, last, point in zip(names, lasts, points, strict=True)
    ]
    asked = {
        1: "From which town is {}?",
        2: "What is the age of {}?",
        3: "How many points did {} get?",
    }
    turned = {1: "Who is from {}?", 3: "Who got {} points?"}
    title = f"Results: {sheet.dice.choice(sheet.words.events)}"
    return _Table(title, ("Name", "Town", "Age", "Points"), rows, asked, turned)


__all__ = ["write_table"]
