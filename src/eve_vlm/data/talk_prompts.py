"""Prompts without a picture: templates times topics, for conversations that keep a decoder's words.

What a decoder answers to them is trained on beside the pictures, so that it goes on speaking as it
did.  Every fifth topic is held out, by a hash, and its prompts are never trained on.  Easy to get
wrong: a prompt is drawn without repeats, so the first 1,000 are the same whether 1,000 or 8,000 are
wanted, and no two are equal.
"""

import hashlib
from functools import cache

from eve_vlm.data.phrases import plural
from eve_vlm.data.pictograms import SEEN
from eve_vlm.data.rendered.vocabulary import VOCABULARY, PageSplit
from eve_vlm.data.splits import Dice

PROMPT_KEY = 65  # tells these dice from those of other generators with the same seed
HELD_OUT_MODULUS = 5
SUM_SHARE = 12  # one of so many prompts is a sum

SUBJECTS = (
    *("gravity", "the moon", "the sun", "rain", "snow", "clouds", "the ocean", "rivers"),
    *("mountains", "volcanoes", "earthquakes", "the seasons", "the weather", "electricity"),
    *("magnets", "sound", "light", "rainbows", "shadows", "batteries", "bridges", "airplanes"),
    *("bicycles", "trains", "ships", "engines", "computers", "the internet", "telephones"),
    *("cameras", "books", "libraries", "schools", "museums", "hospitals", "farms", "cities"),
    *("villages", "markets", "money", "banks", "taxes", "elections", "laws", "maps", "calendars"),
    *("numbers", "fractions", "triangles", "circles", "algebra", "statistics", "probability"),
    *("poetry", "music", "painting", "dancing", "theatre", "cooking", "baking", "gardening"),
    *("fishing", "running", "swimming", "football", "chess", "sleep", "dreams", "memory"),
    *("friendship", "honesty", "patience", "courage", "kindness", "teamwork", "leadership"),
    *("breakfast", "bread", "cheese", "soup", "coffee", "tea", "chocolate", "vegetables", "salt"),
    *("water", "air", "fire", "soil", "forests", "deserts", "islands", "trees", "insects"),
    *("birds", "whales", "wolves", "horses", "bees", "spiders", "dinosaurs", "bacteria", "viruses"),
    *("the heart", "the brain", "bones", "teeth", "vaccines", "exercise", "stress", "holidays"),
    *("birthdays", "weddings", "families", "grandparents", "neighbours", "gifts", "letters"),
    *("newspapers", "photographs", "clothes", "shoes", "hats", "furniture", "windows", "doors"),
    *("paper", "glass", "plastic", "recycling", "pollution", "wind power", "solar panels"),
    *("robots", "space travel", "stars", "planets", "telescopes", "the Roman Empire", "castles"),
)
TEMPLATES = (
    "What is the most interesting thing about {t}?",
    "Explain {t} to a child.",
    "Explain {t} in two sentences.",
    "Tell me something about {t}.",
    "Why do people care about {t}?",
    "Write a very short story about {t}.",
    "Write a short poem about {t}.",
    "Write three sentences about {t}.",
    "List three facts about {t}.",
    "List five words that go with {t}.",
    "List some questions that one could ask about {t}.",
    "Give me a good title for a book about {t}.",
    "What should a beginner know about {t}?",
    "What are common mistakes when people talk about {t}?",
    "How would you describe {t} to somebody who has never heard of it?",
    "Name one advantage and one disadvantage of {t}.",
    "What did people think of {t} a hundred years ago?",
    "How do I learn more about {t}?",
    "Write a message to a friend about {t}.",
    "Write an advertisement about {t} in one sentence.",
    "Write a dialogue of four lines about {t}.",
    "Is it true that everybody likes {t}? Give a reason.",
    "What can go wrong with {t}?",
    "Compare {t} with something similar.",
    "Suggest a game for children that has to do with {t}.",
    "What is a good question for a quiz about {t}? Give the answer too.",
    "Summarise what is known about {t}.",
    "Why would {t} be in the news?",
    "Begin a speech about {t}.",
    "Make a plan for a lesson about {t}.",
    "Give two examples that have to do with {t}.",
    "I am writing an essay on {t}. How should I begin?",
    "Imagine a world without {t}. What would be different?",
    "Translate the idea of {t} into everyday words.",
    "What is your favourite thing about {t}?",
    "Tell a joke about {t}.",
    "How could the weather have to do with {t}?",
    "Who works with {t}, and what do they do?",
    "Give advice to someone who worries about {t}.",
    "Can one live without {t}? Answer in one word, then say why.",
)
WORD_TEMPLATES = (
    "Define the word {w}.",
    "Use the word {w} in a sentence.",
    "What is another word for {w}?",
    "What is the opposite of {w}, if there is one?",
    "How do you spell {w} backwards?",
    "Rewrite this sentence without the word {w}: We talked about {w} all day.",
    "Rewrite this more politely: Give me the {w} now!",
    "Which word does not belong: {w}, table, Monday?",
)
SUMS = (
    "What is {a} plus {b}?",
    "What is {a} minus {b}?",
    "What is {a} times {b}?",
    "I have {a} apples and eat {b}. How many are left?",
    "Which is larger, {a} or {b}?",
    "Count from {b} to {a}.",
    "A ticket costs {b} dollars. How much do {a} tickets cost?",
)


def talk_prompts(number: int, *, split: PageSplit = "train", seed: int = 0) -> list[str]:
    """The first so many prompts of a split, all different.

    Raises:
        ValueError: if there are not so many.
    """
    told = _told(split)
    order = Dice(seed, PROMPT_KEY, int(split == "held_out")).shuffled(told)
    most = len(order) + len(order) // (SUM_SHARE - 1)
    if not 1 <= number <= most:
        raise ValueError(f"{number} prompts are wanted, but there are 1 to {most}; take fewer.")
    sums = _sums(split, seed)
    left = iter(order)
    return [
        sums[place // SUM_SHARE] if place % SUM_SHARE == SUM_SHARE - 1 else next(left)
        for place in range(number)
    ]


def is_held_out_topic(topic: str) -> bool:
    """Whether training never talks about it."""
    digest = hashlib.sha256(f"eve-vlm talk 1 {topic}".encode()).digest()
    return digest[0] % HELD_OUT_MODULUS == 0


@cache
def topics(split: PageSplit) -> tuple[str, ...]:
    """What is talked about."""
    lists = VOCABULARY["train"]
    goods = (good.lower() for good in lists.goods)
    every = dict.fromkeys((*SUBJECTS, *map(plural, SEEN), *map(plural, lists.occupations), *goods))
    return tuple(one for one in every if is_held_out_topic(one) == (split == "held_out"))


def _told(split: PageSplit) -> list[str]:
    words = [
        word
        for word in VOCABULARY["train"].long_words
        if is_held_out_topic(word) == (split == "held_out")
    ]
    return [
        *(template.format(t=topic) for template in TEMPLATES for topic in topics(split)),
        *(template.format(w=word) for template in WORD_TEMPLATES for word in words),
    ]


def _sums(split: PageSplit, seed: int) -> list[str]:
    """Different sums, more than are ever needed; those whose numbers end in 7 are held out."""
    every = [
        text.format(a=a, b=b)
        for text in SUMS
        for a in range(3, 41)
        for b in range(2, a)
        if ((a + b) % 10 == 7) == (split == "held_out")
    ]
    return Dice(seed, PROMPT_KEY, 2 + int(split == "held_out")).shuffled(every)


__all__ = ["is_held_out_topic", "talk_prompts", "topics"]
