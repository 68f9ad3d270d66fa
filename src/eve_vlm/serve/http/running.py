"""Starts and stops the server: where it listens, who is let in, and how uvicorn is set.

Easy to get wrong: a port is bound before the model is loaded, so that a taken one is told at once,
but nobody is let in before the model is there; and what anybody could reach needs a key, unless it
was said aloud that it does not.
"""

import ipaddress
import socket
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

from .app import Service, make_app
from .gate import LOOPBACK

NEEDED = ("fastapi", "uvicorn", "openai", "prometheus_client")  # of the extra `serve`
KEEP_ALIVE = 75  # seconds; longer than clients keep idle connections, so that they close first


def lacking_packages() -> list[str]:
    """Packages of the extra `serve` that are not installed."""
    return [package for package in NEEDED if find_spec(package) is None]


def bound(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet.

    Raises:
        ValueError: if the place cannot be had.
    """
    sock = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        return sock
    except OSError as error:
        if sock is not None:
            sock.close()
        raise ValueError(
            f"The server cannot listen on {host} port {port} ({error.strerror}); give another "
            "--host or --port."
        ) from None


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def url_of(sock: socket.socket) -> str:
    """What a client calls it."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def require_key(sock: socket.socket, keys: Collection[str], *, without_key: bool) -> None:
    """Refuses to let everybody in by mistake.

    Raises:
        ValueError: if others than this machine reach the server and no key is asked for.
    """
    if not (keys or without_key or is_loopback(sock)):
        raise ValueError(
            "Others than this machine reach this server, so it needs a key; give --api-key (or "
            "EVE_API_KEY), or --without-key if everybody may ask."
        )
    if not all(key.strip() and key.isascii() for key in keys):
        raise ValueError("An API key is empty or not in plain letters; give another one.")


def make_server(
    service: Service,
    sock: socket.socket,
    *,
    keys: Collection[str] = (),
    hosts: Collection[str] = (),
    grace: float = 30.0,
    **settings: Any,
) -> Any:
    """A uvicorn server; `run(sockets=[sock])` serves until a signal, then closes the service.

    Args:
        hosts: names to answer to beside the usual ones, if only this machine reaches the server.
        grace: seconds that running answers have to finish after a signal.
        settings: of `uvicorn.Config`.
    """
    import uvicorn

    allowed = {*LOOPBACK, sock.getsockname()[0], *hosts} if is_loopback(sock) or hosts else None
    config = uvicorn.Config(
        make_app(service, keys=keys, hosts=allowed),
        http="h11",  # it gives up on headers that go on and on; httptools does not
        ws="none",
        lifespan="on",
        # A proxy's word for who asks is not used, so nobody can forge it.
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(grace)),
        **settings,
    )
    return uvicorn.Server(config)


__all__ = ["bound", "is_loopback", "lacking_packages", "make_server", "require_key", "url_of"]
