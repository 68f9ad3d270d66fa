"""Random conversations with pictures, for tests that compare one way of answering with another.

One thing a reader would get wrong: a picture may also come in a later turn, behind an answer.
"""

import random
from typing import Any

import tiny
from eve_vlm.serve.engine import user_message


def random_question(rng: random.Random, *, turns: int = 3, largest: int = 60) -> list[dict]:
    """A conversation of one to `turns` turns with up to three pictures each, some without any."""
    messages: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, turns)):
        if messages:
            answer = rng.choice(tiny.ANSWERS)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        pictures = [
            tiny.picture(
                rng.randint(3, largest), rng.randint(3, largest), seed=rng.randrange(10**6)
            )
            for _ in range(rng.choice([0, 0, 1, 1, 2, 3]))
        ]
        words = " ".join(rng.choices(tiny.QUESTIONS, k=rng.randint(1, 3)))
        messages += user_message(words, pictures)
    return messages
