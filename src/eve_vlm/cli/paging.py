"""The command that shows: `eve demo` opens a page to chat with a model and see where it looked.

The page is in `eve_vlm.serve.page.page`, imported inside so that `eve --help` does not wait for it.
Easy to get wrong: a model of `eve quickstart` knows pictograms only, so its examples are held-out
ones of those; any other drawing would get an answer that makes no sense.
"""

import threading
import webbrowser
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .answering import (
    Attention,
    AttentionKind,
    CompileSteps,
    Device,
    ModelName,
    NumberType,
    Quantize,
    StaticCache,
    open_engine,
    public_name,
)
from .default import default_model
from .serving import Host, Port

if TYPE_CHECKING:
    from eve_vlm.serve.page.parts import Example

QUICKSTART_MARK = "scores.json"  # in the folder of every finished quickstart
FAMILIES = ("name", "position", "count")  # of the quickstart's questions, one example each

Browser = Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Visitors who are answered together at most.")
]


def demo(
    model: ModelName = None,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    browser: Browser = True,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: NumberType = None,
    attention: AttentionKind = Attention.sdpa,
    quantize: Quantize = None,
    static_cache: StaticCache = False,
    compile_steps: CompileSteps = False,
) -> None:
    """Chat with a model on a page, and see where it looked.

    eve demo --model runs/quickstart

    Nothing leaves this machine: no account, no shared link, nothing loaded from elsewhere.
    """
    if find_spec("gradio") is None:
        raise ValueError(
            'eve demo needs gradio, which is not installed; run: pip install "eve-vlm[page]".'
        )
    from eve_vlm.serve.http.running import bound, is_loopback, url_of
    from eve_vlm.serve.page.server import allowed_hosts, make_server, page_app
    from eve_vlm.serve.worker import Worker

    name = model or default_model()
    with bound(host, port) as sock:  # before minutes of loading
        engine = open_engine(
            name,
            device=device,
            dtype=dtype,
            attention=attention,
            quantize=quantize,
            static_cache=static_cache,
            compile_steps=compile_steps,
            batch_size=batch_size,
            keep_tokens=None,
        )
        url = url_of(sock)

        def opened() -> None:
            typer.echo(f"The page of {public_name(name)} is at {url}; Ctrl-C ends it.")
            if not is_loopback(sock):
                typer.echo("Everybody who reaches this machine may ask.", err=True)
            if browser:  # in a thread, because a browser for terminals would hold the page up
                threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

        with (
            Worker(engine) as worker,
            page_app(
                worker,
                name=public_name(name),
                examples=_examples(name),
                hosts=allowed_hosts(sock),
            ) as app,
            suppress(KeyboardInterrupt),  # uvicorn repeats the signal when all is done
        ):
            make_server(app, on_start=opened).run(sockets=[sock])


def _examples(model: str) -> "list[Example]":
    """Held-out pictures for a model of the quickstart, simple drawings for any other."""
    from eve_vlm.serve.page.parts import Example, drawn_examples

    if not (Path(model).expanduser() / QUICKSTART_MARK).is_file():
        return drawn_examples()
    from PIL import Image

    from eve_vlm.data.records import text_of
    from eve_vlm.data.scene_source import SceneSource
    from eve_vlm.train.recipe import load_recipe

    examples = []
    recipe = load_recipe("tiny/3_finetune")
    for source in recipe.data.sources:
        for family in set(FAMILIES).intersection(source.options["families"]):
            options = {
                "split": "held_out",
                "size": 1,
                "families": {family: 1},
                "settings": {**source.options["settings"], "num_turns": 1},
            }
            try:
                record = SceneSource.from_options(options, seed=recipe.seed)[0]
            except ValueError:  # the packages that draw are not installed
                return drawn_examples()
            assert isinstance(record.images[0], Image.Image), "scenes are drawn, not read"
            examples.append(Example(record.images[0], text_of(record.messages[0]).strip()))
    return examples


__all__ = ["demo"]
