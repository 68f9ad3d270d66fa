"""Small documents with questions: receipts, letters, tables, forms and notices.

Document `index` of a split and seed is always the same, whatever was made before it.  Names, goods,
towns and titles of `held_out` are on no page of `train`, and letters, inks and papers have other
sizes and hues.  Easy to get wrong: an answer is what the page says, letter by letter, not what it
means; a date is right only in the way in which the page writes it.
"""

from collections.abc import Callable

from eve_vlm.data.phrases import Box
from eve_vlm.data.rendered.page import Page
from eve_vlm.data.rendered.sheet import DAYS, SIDES, SPLIT_KEYS, Sheet, different
from eve_vlm.data.rendered.tables import write_table
from eve_vlm.data.rendered.vocabulary import PageSplit
from eve_vlm.data.splits import Dice

DOCUMENT_KEY = 60  # tells these dice from those of other generators with the same seed


def document(index: int, *, split: PageSplit, seed: int = 0) -> Page:
    """Document `index`: the five kinds take turns."""
    kind = KINDS[index % len(KINDS)]
    dice = Dice(seed, DOCUMENT_KEY, SPLIT_KEYS[split], index)
    canvas, title_size, write = _WRITERS[kind]
    sheet = Sheet(kind, canvas, dice=dice, split=split, title_size=title_size)
    write(sheet)
    return sheet.page()


def _receipt(sheet: Sheet) -> None:
    dice = sheet.dice
    align = dice.choice(SIDES[:2])
    shop, day = sheet.firm("Bakery", "Market", "Store", "Pharmacy", "Grocery"), sheet.day()
    date, number, clerk = (
        sheet.written_day(day),
        sheet.number(5),
        dice.choice(sheet.words.first_names),
    )
    sheet.down(58)
    sheet.title(shop, align)
    for line in (sheet.street(), dice.choice(sheet.words.towns)):
        sheet.down(sheet.step)
        sheet.write(line, sheet.side(align), align=align)
    sheet.down(sheet.step)
    sheet.rule()
    sheet.down(sheet.step)
    sheet.pair("Date", date)
    sheet.pair("Receipt No.", number)
    sheet.down(sheet.step // 2)
    goods = different(dice, sheet.words.goods, 3 + dice.below(4))
    prices = [45 + dice.below(1955) for _ in goods]
    for good, price in zip(goods, prices, strict=True):
        sheet.pair(good, sheet.amount(price))
        sheet.ask("price", f"How much is the {good}?", sheet.amount(price))
    subtotal, rate = sum(prices), dice.choice((5, 7, 8, 10))
    tax = (subtotal * rate + 50) // 100
    sheet.rule()
    sheet.down(sheet.step)
    sheet.pair("Subtotal", sheet.amount(subtotal))
    sheet.pair(f"Tax {rate}%", sheet.amount(tax))
    sheet.pair("Total", sheet.amount(subtotal + tax), bold=True)
    sheet.down(sheet.step // 2)
    sheet.write(f"You were served by {clerk}", sheet.side(align), align=align)
    sheet.ask("total", "What is the total?", sheet.amount(subtotal + tax))
    sheet.ask("subtotal", "What is the subtotal?", sheet.amount(subtotal))
    sheet.ask("tax", "How much is the tax?", sheet.amount(tax))
    sheet.ask("date", "What is the date?", date)
    sheet.ask("firm", "What is the name of the shop?", shop)
    sheet.ask("number", "What is the receipt number?", number)
    sheet.ask("person", "Who served the customer?", clerk)


def _letter(sheet: Sheet) -> None:
    dice = sheet.dice
    align = dice.choice(SIDES)
    firm = sheet.firm("Books", "Tours", "Motors", "Insurance", "Furniture")
    writer, reader = sheet.person(), sheet.person()
    date, number = sheet.written_day(sheet.day()), f"{dice.choice('ABCDEFGH')}-{sheet.number(4)}"
    town, phone = dice.choice(sheet.words.towns), sheet.phone()
    subject = dice.choice(sheet.words.subjects)
    sheet.down(60)
    sheet.title(firm, align)
    for line in (f"{sheet.street()}, {town}", f"Phone {phone}"):
        sheet.down(sheet.step)
        sheet.write(line, sheet.side(align), align=align)
    sheet.down(sheet.step // 2)
    sheet.rule()
    sheet.down(sheet.step * 3 // 2)
    sheet.write(reader, sheet.side("left"))
    sheet.write(date, sheet.side("right"), align="right")
    sheet.down(sheet.step)
    sheet.write(sheet.street(), sheet.side("left"))
    sheet.write(f"Ref. {number}", sheet.side("right"), align="right")
    sheet.down(sheet.step * 2)
    sheet.write(subject, sheet.side("left"), bold=True)
    sheet.down(sheet.step * 3 // 2)
    sheet.write(f"Dear {reader},", sheet.side("left"))
    sheet.down(sheet.step * 3 // 2)
    for sentence in different(dice, sheet.words.sentences, 3 + dice.below(3)):
        sheet.write(sentence, sheet.side("left"))
        sheet.down(sheet.step)
    sheet.down(sheet.step // 2)
    sheet.write("Yours sincerely,", sheet.side("left"))
    sheet.down(sheet.step)
    sheet.write(writer, sheet.side("left"))
    sheet.ask("firm", "Which company sent the letter?", firm)
    sheet.ask("person", "Who signed the letter?", writer)
    sheet.ask("person", "To whom is the letter addressed?", reader)
    sheet.ask("date", "What is the date of the letter?", date)
    sheet.ask("subject", "What is the letter about?", subject)
    sheet.ask("number", "What is the reference number?", number)
    sheet.ask("phone", "What is the phone number of the company?", phone)
    sheet.ask("town", "In which town is the company?", town)


def _form(sheet: Sheet) -> None:
    dice, words = sheet.dice, sheet.words
    align = dice.choice(SIDES[:2])
    title, number = dice.choice(words.forms), f"{sheet.number(2)}-{dice.choice('ABCDEFGH')}"
    fields = {
        "First name": dice.choice(words.first_names),
        "Last name": dice.choice(words.last_names),
        "Date of birth": sheet.written_day(sheet.day(years_ago=40)),
        "Occupation": dice.choice(words.occupations),
        "Street": sheet.street(),
        "Town": dice.choice(words.towns),
        "Phone number": sheet.phone(),
        "Member number": sheet.number(6),
    }
    left_out = dice.choice(("Occupation", "Member number", "Street", ""))
    fields.pop(left_out, None)
    sheet.down(64)
    sheet.title(title, align)
    sheet.down(sheet.step * 3 // 2)
    sheet.write(f"Form {number}", sheet.side(align), align=align)
    sheet.down(sheet.step)
    if dice.below(2):
        _underlined_fields(sheet, fields)
    else:
        _framed_fields(sheet, fields)
    sheet.ask("title", "What is the title of the form?", title)
    sheet.ask("number", "What is the number of the form?", number)
    for label, value in fields.items():
        sheet.ask(label.lower(), f"What is the {label.lower()}?", value)


def _underlined_fields(sheet: Sheet, fields: dict[str, str]) -> None:
    """One below another, each on a line."""
    column = sheet.margin + 170
    for label, value in fields.items():
        sheet.down(sheet.step * 3 // 2)
        sheet.write(f"{label}:", sheet.side("left"))
        sheet.write(value, column + 8)
        sheet.y += 8
        sheet.rule(left=column)
        sheet.y -= 8


def _framed_fields(sheet: Sheet, fields: dict[str, str]) -> None:
    """Two beside each other, each in a box below its label."""
    width, height = (sheet.width - 2 * sheet.margin - 16) // 2, 2 * sheet.size
    for place, (label, value) in enumerate(fields.items()):
        left = sheet.margin + place % 2 * (width + 16)
        if place % 2 == 0:
            sheet.down(sheet.step * 3 // 2 if place == 0 else height + sheet.step * 2)
        sheet.write(label, left)
        top = sheet.y + sheet.size // 2
        sheet.box(Box(left, top, left + width, top + height), sheet.shade, frame=2)
        sheet.write(value, left + 10, up=-(top - sheet.y + height * 2 // 3))


def _notice(sheet: Sheet) -> None:
    dice, words = sheet.dice, sheet.words
    align = dice.choice(SIDES[:2])
    height, width = sheet.canvas
    title, venue, town = (dice.choice(items) for items in (words.events, words.venues, words.towns))
    day, clock, fee, phone = sheet.day(), sheet.clock(), 100 * (2 + dice.below(28)), sheet.phone()
    date, host = sheet.written_day(day), sheet.person()
    if dice.below(2):
        sheet.box(Box(12, 12, width - 12, height - 12), sheet.ink, frame=4)
    else:
        sheet.box(Box(0, 0, width, 112), sheet.shade)
    sheet.margin = 44
    sheet.down(80)
    sheet.title(title, align)
    lines = [
        f"{DAYS[day.weekday()]}, {date}",
        dice.choice((f"at {clock}", f"Begins at {clock}", f"{clock} sharp")),
        f"{venue}, {town}",
        f"Tickets: {sheet.amount(fee)}",
        f"Organised by {host}",
        f"Questions? Call {phone}",
    ]
    sheet.down(sheet.step)
    for line in lines:
        sheet.down(sheet.step * 5 // 4)
        sheet.write(line, sheet.side(align), align=align)
    sheet.ask("title", "What is the event?", title)
    sheet.ask("date", "On which date is it?", date)
    sheet.ask("day", "On which day of the week is it?", DAYS[day.weekday()])
    sheet.ask("time", "At what time does it begin?", clock)
    sheet.ask("venue", "Where does it take place?", f"{venue}, {town}", venue)
    sheet.ask("town", "In which town is it?", town)
    sheet.ask("price", "How much is a ticket?", sheet.amount(fee))
    sheet.ask("person", "Who organises it?", host)
    sheet.ask("phone", "Which number can one call?", phone)


# Kind: (height, width), smallest size of the title, and who writes it.
_WRITERS: dict[str, tuple[tuple[int, int], int, Callable[[Sheet], None]]] = {
    "receipt": ((672, 448), 28, _receipt),
    "letter": ((672, 560), 28, _letter),
    "table": ((504, 672), 24, write_table),
    "form": ((672, 560), 32, _form),
    "notice": ((448, 672), 40, _notice),
}
KINDS = tuple(_WRITERS)

__all__ = ["KINDS", "document"]
