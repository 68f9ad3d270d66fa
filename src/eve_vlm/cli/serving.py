"""The command that serves: `eve serve` answers whoever speaks the OpenAI protocol.

Everything behind it is in `eve_vlm.serve.http`, imported inside so that `eve --help` does not wait
for it.  Easy to get wrong: a key on the command line shows in the machine's list of processes;
`EVE_API_KEY` does not.
"""

import json
import shlex
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .answering import (
    Attention,
    AttentionKind,
    CompileSteps,
    Device,
    NumberType,
    Quantize,
    StaticCache,
    open_engine,
    public_name,
)
from .default import default_model

if TYPE_CHECKING:
    from eve_vlm.serve.http.app import Service

SAFETY, LIMITS = "Who may ask", "Limits, for each request unless they say otherwise"
MIB = 2**20


def _limit(name: str, about: str, *, least: float = 1, metavar: str | None = None) -> Any:
    return typer.Option(name, min=least, metavar=metavar, help=about, rich_help_panel=LIMITS)


Model = Annotated[
    str | None,
    typer.Argument(help="A model folder or Hub id; eve-small if left out."),
]
Host = Annotated[
    str, typer.Option("--host", help="Where to listen; by default only this machine reaches it.")
]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any free one.")]
Name = Annotated[
    str | None, typer.Option("--name", help="What clients call the model; MODEL's last part.")
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Answers that are made together at most.")
]
KeepTokens = Annotated[
    int,
    typer.Option(
        "--keep-tokens",
        min=0,
        help="Positions of finished conversations whose caches are kept, of all clients together, "
        "so that the next turn reads only what is new; 0 keeps none.",
    ),
]
Grace = Annotated[
    float,
    typer.Option("--grace", min=0, help="Seconds that running answers have after Ctrl-C."),
]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        envvar="EVE_API_KEY",
        help="Ask for this key; may be repeated, or be several words in the variable.",
        rich_help_panel=SAFETY,
    ),
]
WithoutKey = Annotated[
    bool,
    typer.Option(
        "--without-key",
        help="Let everybody ask who reaches --host, without a key.",
        rich_help_panel=SAFETY,
    ),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        metavar="NAME",
        help="Answer to this Host header too, as behind a proxy; may be repeated.",
        rich_help_panel=SAFETY,
    ),
]
MaxBody = Annotated[int, _limit("--max-body", "Size, pictures included.", metavar="MIB")]
MaxPictures = Annotated[int, _limit("--max-pictures", "Pictures of all turns.", least=0)]
MaxPicture = Annotated[int, _limit("--max-picture", "Size of one picture file.", metavar="MIB")]
MaxMegapixels = Annotated[
    float, _limit("--max-megapixels", "Width times height of one picture.", least=0.001)
]
MaxText = Annotated[int, _limit("--max-text", "Letters of all turns.")]
MaxTokens = Annotated[int, _limit("--max-tokens", "Longest answer that may be asked for.")]
DefaultTokens = Annotated[
    int, _limit("--default-tokens", "Longest answer of a request that names no length.")
]
MaxAnswers = Annotated[int, _limit("--max-answers", "Answers to one request (`n`).")]
Queue = Annotated[
    int, _limit("--queue", "Answers that may wait, of all requests together.", least=0)
]
Seconds = Annotated[
    float, _limit("--time-limit", "From a request's first byte to its answer's last.", least=0.1)
]
Fetch = Annotated[
    bool,
    typer.Option(
        "--fetch/--no-fetch",
        help="Fetch pictures by https URL, from public addresses.",
        rich_help_panel=LIMITS,
    ),
]


def serve(
    model: Model = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    device: Device = None,
    dtype: NumberType = None,
    attention: AttentionKind = Attention.sdpa,
    quantize: Quantize = None,
    static_cache: StaticCache = False,
    compile_steps: CompileSteps = False,
    batch_size: BatchSize = 32,
    keep_tokens: KeepTokens = 4096,
    grace: Grace = 30.0,
    api_key: Keys = None,
    without_key: WithoutKey = False,
    allow_host: AllowHost = None,
    max_body: MaxBody = 32,
    max_pictures: MaxPictures = 16,
    max_picture: MaxPicture = 16,
    max_megapixels: MaxMegapixels = 32.0,
    max_text: MaxText = 200_000,
    max_tokens: MaxTokens = 4096,
    default_tokens: DefaultTokens = 512,
    max_answers: MaxAnswers = 8,
    queue: Queue = 64,
    time_limit: Seconds = 600.0,
    fetch: Fetch = True,
) -> None:
    """Serve a model to everything that speaks the OpenAI protocol.

    eve serve MODEL --port 8000

    Requests that wait together are answered together. docs/serve.md has an example for Python.
    """
    _require_packages()
    from eve_vlm.serve.http.app import Service
    from eve_vlm.serve.http.limits import Limits
    from eve_vlm.serve.http.running import bound, make_server, require_key, url_of

    limits = Limits(
        max_body=max_body * MIB,
        max_pictures=max_pictures,
        max_picture_bytes=max_picture * MIB,
        max_fetched_bytes=max_body * MIB,
        max_pixels=round(max_megapixels * 1e6),
        max_text=max_text,
        max_tokens=max_tokens,
        default_tokens=min(default_tokens, max_tokens),
        max_answers=max_answers,
        queue=queue,
        seconds=time_limit,
        fetch=fetch,
    )
    folder, keys = model or default_model(), api_key or []
    with bound(host, port) as sock:  # before minutes of loading
        require_key(sock, keys, without_key=without_key)
        engine = open_engine(
            folder,
            device=device,
            dtype=dtype,
            attention=attention,
            quantize=quantize,
            static_cache=static_cache,
            compile_steps=compile_steps,
            batch_size=batch_size,
            keep_tokens=keep_tokens,
        )
        service = Service(engine, name=name or public_name(folder), limits=limits)
        server = make_server(service, sock, keys=keys, hosts=allow_host or [], grace=grace)
        _announce(service, url_of(sock), with_key=bool(keys))
        with suppress(KeyboardInterrupt):  # uvicorn repeats the signal when all is done
            server.run(sockets=[sock])


def _require_packages() -> None:
    from eve_vlm.serve.http.running import lacking_packages

    if lacking := lacking_packages():
        raise ValueError(
            f"eve serve needs {', '.join(lacking)}, which is not installed; run: pip install "
            "'eve-vlm[serve]'."
        )


def _announce(service: "Service", url: str, *, with_key: bool) -> None:
    """What is served and where, and a line to try."""
    from eve_vlm.image_processing_eve import num_image_tokens

    engine = service.engine
    square = engine.processor.image_processor.square_grid()
    question = {
        "model": service.name,
        "messages": [{"role": "user", "content": "Who are you?"}],
        "max_tokens": 32,
    }
    key = ' -H "Authorization: Bearer $EVE_API_KEY"' if with_key else ""
    typer.echo(
        f"{service.name}: {engine.model.num_parameters():,} parameters in "
        f"{str(engine.model.dtype).removeprefix('torch.')} on {engine.model.device}, "
        f"{engine.max_length:,} positions; a large square picture takes "
        f"{num_image_tokens(square.rows, square.cols):,} tokens.\n"
        f"Up to {engine.batch_size} answers are made together, {service.limits.queue} more may "
        "wait.\n"
        f"Listens on {url}/v1, asks for {'a' if with_key else 'no'} key. Try:\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d {shlex.quote(json.dumps(question))}"
    )


__all__ = ["serve"]
