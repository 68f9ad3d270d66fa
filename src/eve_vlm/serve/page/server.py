"""Serves the page of `eve demo`: a web application around it, safe by default.

Gradio's own `launch` asks itself for a page through whatever proxy is set, and may offer a public
link; here uvicorn serves the page on a socket that is bound already.  Easy to get wrong: Gradio
counts its users, keeps a record of what they did, and puts their pictures into a folder that others
can read, unless its environment says otherwise before it is imported.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Any

from eve_vlm.serve.http.gate import LOOPBACK
from eve_vlm.serve.http.running import is_loopback
from eve_vlm.serve.page.page import Page
from eve_vlm.serve.page.parts import LIMITS, Example
from eve_vlm.serve.worker import Worker

STYLE = Path(__file__).with_name("page.css")
QUEUE = 64  # answers that may wait


@contextmanager
def page_app(
    worker: Worker,
    *,
    name: str,
    examples: Sequence[Example] = (),
    hosts: Sequence[str] | None = None,
) -> Iterator[Any]:
    """The page as an ASGI application; visitors' pictures are in a folder that goes with it.

    Args:
        name: of the model.
        examples: what a newcomer can begin with.
        hosts: names that a request may call this machine by; None allows all.  Without this check,
            a web page whose name is made to point at 127.0.0.1 could talk to the page there.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    with tempfile.TemporaryDirectory(prefix="eve-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        import gradio as gr
        from fastapi import FastAPI
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        app: Any = FastAPI(openapi_url=None)
        if hosts is not None:
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
        page = Page(worker, name=name, examples=examples, folder=Path(folder))
        page.blocks.queue(max_size=QUEUE)
        yield gr.mount_gradio_app(
            app,
            page.blocks,
            path="/",
            # The browser's own fonts; Gradio's default asks for others.
            theme=gr.themes.Default(
                font=[gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")],
                font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
            ).set(  # its grey for small words is too light to read
                block_info_text_color="*neutral_500", input_placeholder_color="*neutral_500"
            ),
            css_paths=STYLE,
            footer_links=[],
            max_file_size=LIMITS.max_picture_bytes,
            show_error=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
        )


def make_server(app: Any, *, on_start: Callable[[], None]) -> Any:
    """A uvicorn server; `run(sockets=[sock])` serves until a signal.

    Args:
        on_start: called when the page can be opened.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            on_start()

    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="on",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=1,  # open pages keep a connection for as long as they are open
    )
    return Server(config)


def allowed_hosts(sock: socket) -> list[str] | None:
    """Names for a page that only this machine reaches; None where others may, by any name."""
    return [*LOOPBACK, sock.getsockname()[0]] if is_loopback(sock) else None


__all__ = ["allowed_hosts", "make_server", "page_app"]
