"""The commands that ask: `eve ask` puts one question about pictures to a model folder.

The engine behind it is imported inside, so that `eve --help` does not wait for it.
"""

import os
from typing import Annotated

import typer


def ask(
    words: Annotated[
        list[str],
        typer.Argument(metavar="PICTURE... QUESTION", help="Picture files, then the question."),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="A model folder or Hub id; without it the last quickstart run is taken."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
) -> None:
    """Ask a question about pictures.

    eve ask cat.png "What is this?"
    """
    *pictures, question = words
    if os.path.isfile(question):  # Path.is_file() raises for a question as long as a page
        raise ValueError(f"There is no question behind {question}; put it last, in quotes.")
    from eve_vlm.quickstart import last_quickstart_model
    from eve_vlm.serve.engine import EveEngine

    engine = EveEngine.from_pretrained(model or last_quickstart_model())
    typer.echo(engine.ask(question, pictures, max_new_tokens=max_new_tokens))


__all__ = ["ask"]
