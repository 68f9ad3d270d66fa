"""The command that compares: `eve parity` asks the same by every way and shows who differs.

The comparison itself is in `serve/parity.py`; here options are read and the table is drawn.  Easy
to get wrong: exit code 1 says that something differs, 2 that the comparison could not be made.
"""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .answering import Device, NumberType, open_engine

if TYPE_CHECKING:
    from eve_vlm.serve.engine import EveEngine
    from eve_vlm.serve.messages import Messages
    from eve_vlm.serve.parity import Comparison, Yardstick

HEADER = ("path", "equal answers", "equal tokens", "largest difference", "seconds", "")


def parity(
    model: Annotated[str, typer.Argument(help="A model folder or Hub id.")],
    picture: Annotated[
        list[Path] | None,
        typer.Option(help="Ask about this picture instead of drawn ones. May be repeated."),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(help="Ask this about every --picture, or alone. May be repeated."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    server: Annotated[
        bool, typer.Option("--server/--no-server", help="Start and ask `eve serve`, too.")
    ] = True,
    vllm: Annotated[
        bool | None,
        typer.Option(
            "--vllm/--no-vllm", help="Start and ask `vllm serve`, too; where it is installed."
        ),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=URL",
            help="Ask a server that runs, up to and with /v1. May be repeated.",
        ),
    ] = None,
    api_key: Annotated[
        str, typer.Option(envvar="EVE_API_KEY", help="Key of the servers of --url.")
    ] = "",
    device: Device = None,
    dtype: NumberType = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0, help="Largest difference of a log-probability that is rounding; by the dtype."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask the same by every way (notebook, batch, stream, chat, server) and compare the answers.

    eve parity runs/quickstart

    Exit code 0 when all answers are the same, 1 when some differ.
    """
    from eve_vlm.loading import find_model
    from eve_vlm.serve.parity import TOLERANCE

    named = dict(_named(one) for one in url or ())
    folder = find_model(model)
    engine = open_engine(str(folder), device=device, dtype=dtype)
    if tolerance is None:
        tolerance = TOLERANCE[engine.model.dtype]
    servers = _servers(engine, folder, server=server, vllm=vllm, named=named)
    questions = _questions(engine, picture or [], question or [])
    found, sticks = _compare(engine, questions, max_new_tokens, servers, api_key)
    agrees = all(row.agrees(tolerance) for row in found)
    if as_json:
        result = {"model": model, "tolerance": tolerance, "agrees": agrees}
        typer.echo(json.dumps(result | {"paths": [asdict(row) for row in found]}))
    else:
        typer.echo(_table(found, sticks, tolerance))
    raise typer.Exit(0 if agrees else 1)


def _compare(
    engine: "EveEngine",
    questions: "list[Messages]",
    max_new_tokens: int,
    servers: dict[str, AbstractContextManager[str]],
    key: str,
) -> "tuple[list[Comparison], list[Yardstick]]":
    """All paths, with a progress bar, and what they were compared with."""
    from tqdm.auto import tqdm

    from eve_vlm.serve.parity import OUR_PATHS, every_path, yardsticks

    found = []
    # The notebook, our paths in this process, and every server twice.
    total = 1 + len(OUR_PATHS) + 2 * len(servers)
    with tqdm(total=total, unit="path", desc="notebook") as bar:
        sticks = yardsticks(engine, questions, max_new_tokens=max_new_tokens)
        bar.update()
        for row in every_path(
            engine, questions, sticks, max_new_tokens=max_new_tokens, servers=servers, key=key
        ):
            found.append(row)
            bar.set_description(row.path)
            bar.update()
    return found, sticks


def _named(text: str) -> tuple[str, str]:
    name, equals, address = text.partition("=")
    if not equals or not address.startswith(("http://", "https://")):
        raise ValueError(
            f"--url {text} is not NAME=URL; give one such as vllm=http://127.0.0.1:8000/v1."
        )
    return name, address


def _questions(engine: "EveEngine", pictures: list[Path], questions: list[str]) -> "list[Messages]":
    from eve_vlm.serve.engine import user_message
    from eve_vlm.serve.parity import usual_questions

    if not pictures and not questions:
        return usual_questions(engine)
    asked = questions or ["What is in the picture?"]
    if not pictures:
        return [user_message(one, []) for one in asked]
    return [user_message(one, [picture]) for picture in pictures for one in asked]


def _servers(
    engine: "EveEngine",
    folder: Path,
    *,
    server: bool,
    vllm: bool | None,
    named: dict[str, str],
) -> dict[str, AbstractContextManager[str]]:
    """Servers by name: a context that gives the address, started there where it has to be."""
    from eve_vlm.serve.parity_servers import own_server, vllm_is_there, vllm_server

    places: dict[str, AbstractContextManager[str]] = {}
    if server:
        places["eve serve"] = own_server(engine)
    if vllm and not vllm_is_there():
        raise ValueError("vLLM is not installed here; install it, or give its --url.")
    if vllm or (vllm is None and vllm_is_there()):
        kind = str(engine.model.dtype).removeprefix("torch.")
        places["vllm serve"] = vllm_server(folder, dtype=kind, max_length=engine.max_length)
    return places | {name: nullcontext(address) for name, address in named.items()}


def _table(found: "list[Comparison]", sticks: "list[Yardstick]", tolerance: float) -> str:
    """What was equal, and where the first difference is."""
    tokens = sum(len(stick.token_ids) for stick in sticks)
    lines = [
        f"{len(sticks)} questions, {tokens} tokens by the library's pipeline (the notebook); "
        f"log-probabilities by a plain forward pass, equal up to {tolerance:g}",
        "",
    ]
    table = [HEADER] + [
        (
            row.path,
            f"{row.equal_answers} of {row.questions}",
            f"{row.equal_tokens} of {row.tokens}",
            f"{row.worst:.1e}",
            f"{row.seconds:.1f}",
            "" if row.agrees(tolerance) else "differs",
        )
        for row in found
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    for row in found:
        if row.other_prompts:
            lines.append(f"{row.path}: {row.other_prompts} prompts have another length there.")
        if row.first is not None:
            lines.append(
                f"{row.path}: question {row.first.question + 1} differs first, at token "
                f"{row.first.position + 1}, where the notebook's token is likelier by "
                f"{row.first.gap:.2g} (0 would be a tie)."
            )
    agrees = all(row.agrees(tolerance) for row in found)
    lines += ["", "Every way gives the same answers." if agrees else "The answers differ."]
    return "\n".join(lines)


__all__ = ["parity"]
