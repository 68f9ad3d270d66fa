"""Fetches pictures that strangers name by URL, from nowhere that only this machine can reach.

A server that fetches any URL can be sent to addresses that only it can reach: its own ports, its
neighbours, the machine's cloud metadata.  So each name is resolved here once, every address that it
has must be public, and the connection goes to exactly the address that was checked; redirects are
followed by hand, each checked anew.  Easy to get wrong: a check before a client that resolves the
name again checks nothing, because a second answer can differ from the first.

The standard library's reading of HTTP answers is used and none of its connecting.  Proxies named
in the environment are ignored, since a proxy would resolve the name itself.
"""

import binascii
import functools
import io
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from PIL import Image

MAX_BYTES = 20 * 2**20  # of a fetched or sent picture, unless told otherwise
MAX_REDIRECTS = 5
MAX_URL = 8192  # characters; signed URLs of cloud storage have up to about 2000
SLACK = 2**18  # bytes of headers and of chunk sizes beside the picture's own bytes
REDIRECTS = (301, 302, 303, 307, 308)
DEFAULT_PORTS = {"https": 443, "http": 80}
_QUOTED_ALREADY = "!#$%&'()*+,/:;=?@[]~"
HEADERS = "User-Agent: eve-vlm\r\nAccept: image/*\r\nAccept-Encoding: identity\r\nConnection: close"

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# How a network with IPv6 alone reaches an IPv4 address, which is the last 32 bits, and decides.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# All that is given out to the public; 6to4 and Teredo lie inside and are named below, mapped IPv4
# and local addresses lie outside.
_UNICAST6 = ipaddress.ip_network("2000::/3")
# What `is_global` of some supported version of Python takes for public.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(text)
    for text in (
        "168.63.129.16/32",  # a public address by name, but Azure's own service for each machine
        "192.0.0.0/24",  # has the metadata service of Oracle's cloud
        "192.88.99.0/24",  # to 6to4
        "2001::/23",  # Teredo and other special uses
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
)
# The same words for a private address, for one that does not answer and for a name that is not
# there, so that nobody can find out by asking which machines there are behind this one.
_UNREACHABLE = "no public address answers for it; check the URL, or give the picture itself"


class _Refused(Exception):
    """Why a picture is not fetched, to end a sentence."""


class _Place(NamedTuple):
    """Where a URL leads."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """Host and port, as a URL and a request have them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, as this machine resolves it.

    Raises:
        OSError: if there is no such name.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Whether anybody on the internet could reach this address.

    >>> is_public("93.184.216.34"), is_public("127.0.0.1"), is_public("::ffff:10.0.0.1")
    (True, False, False)
    """
    if not _is_address(address):
        return False
    ip = ipaddress.ip_address(address)
    if ip in _NAT64:
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    unicast = ip.version == 4 or ip in _UNICAST6
    special = ip.is_multicast or any(ip in network for network in _NOT_PUBLIC)
    return ip.is_global and unicast and not special


def fetch_picture_bytes(
    url: str,
    *,
    max_bytes: int = MAX_BYTES,
    timeout: float = 10.0,
    allow_http: bool = False,
    ports: Collection[int] = (),
    networks: Collection[Network] = (),
    resolve: Callable[[str, int], list[str]] = resolve,
    ssl_context: ssl.SSLContext | None = None,
) -> bytes:
    """Fetches the bytes that an https URL names, from public addresses only.

    Blocks for at most `timeout`; a server calls it in a thread.

    Args:
        max_bytes: the connection is dropped as soon as more arrive.
        timeout: seconds for all of it: names, connections, redirects and bytes.
        allow_http: takes http URLs too; a redirect never leads from https to http.
        ports: ports to allow beside the scheme's own.
        networks: networks to allow although they are not public.
        resolve: gives all addresses of a name, or raises OSError.
        ssl_context: who is trusted; this machine's certificate authorities unless told otherwise.

    Raises:
        ValueError: if the URL is refused, or what it names cannot be fetched within the limits.
    """
    deadline, here = time.monotonic() + timeout, url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            place = _place_of(here, allow_http=allow_http, ports=ports)
            addresses = _checked_addresses(place, deadline, networks, resolve)
            with _connected(place, addresses, deadline, ssl_context) as sock:
                answer = _answer_of(sock, place, deadline, max_bytes)
            if isinstance(answer, bytes):
                return answer
            here = answer
            allow_http = allow_http and place.scheme == "http"
        raise _Refused(f"it redirects more than {MAX_REDIRECTS} times; give the final URL")
    except _Refused as refusal:
        reason = str(refusal)
    except TimeoutError:
        reason = f"it takes longer than {timeout:g} s; give the picture itself"
    raise ValueError(f"The picture at {_shown(url)} is not fetched: {reason}.")


def picture_bytes_of_data_uri(uri: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes inside a `data:image/...;base64,...` URI; their number is checked before decoding.

    >>> picture_bytes_of_data_uri("data:image/png;base64,aGVsbG8=")
    b'hello'

    Raises:
        ValueError: if it is no such URI, has too many bytes, or its base64 is not strict.
    """
    # The comma is near, since a type and its parameters are short.
    header, comma, content = uri[:256].partition(",")
    if not comma or not re.fullmatch(r"data:image/[^,\s]+;base64", header, re.IGNORECASE):
        raise ValueError(
            "A picture's data URI must begin with data:image/TYPE;base64, as in "
            "data:image/png;base64,iVBORw0KGgo."
        )
    content = uri[len(header) + 1 :]
    if len(content) // 4 * 3 - content.count("=", -2) > max_bytes:
        raise ValueError(
            f"A picture's data URI has more than {max_bytes:,} bytes; make the picture smaller."
        )
    try:
        return binascii.a2b_base64(content, strict_mode=True)
    except ValueError as error:
        raise ValueError(
            f"A picture's data URI is not strict base64 ({error}); encode it without line breaks "
            "and with padding."
        ) from None


def data_uri_of_picture(picture: Image.Image) -> str:
    """A picture as PNG in a `data:` URI, without loss."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return f"data:image/png;base64,{binascii.b2a_base64(file.getvalue(), newline=False).decode()}"


# --- where a URL leads ----------------------------------------------------------------------------


def _place_of(url: str, *, allow_http: bool, ports: Collection[int]) -> _Place:
    """Takes a URL apart, and refuses what is unusual in it, since readers of URLs differ there."""
    if len(url) > MAX_URL:
        raise _Refused(f"its URL has more than {MAX_URL} characters; give a shorter one")
    if not url.isprintable() or re.search(r"[\s\\]", url):
        raise _Refused("its URL has blanks, backslashes or control characters; quote them")
    try:
        parts = urlsplit(url)
        port = parts.port
        # Full-width digits and other dots become plain ones here, before anything is checked.
        host = (parts.hostname or "").encode("idna").decode("ascii").lower().removesuffix(".")
    except ValueError:  # UnicodeError is one
        raise _Refused("its URL has no valid host; check it") from None
    schemes = ("https", "http") if allow_http else ("https",)
    if parts.scheme not in schemes:
        raise _Refused(f"its URL must begin with {' or '.join(f'{s}://' for s in schemes)}")
    if "@" in parts.netloc:
        raise _Refused("its URL has a user name or password; leave them out")
    if not _is_plain_host(host):
        raise _Refused("its URL has no valid host; check it")
    port = DEFAULT_PORTS[parts.scheme] if port is None else port
    if port != DEFAULT_PORTS[parts.scheme] and port not in ports:
        raise _Refused(f"port {port} is not allowed; use the usual one")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _Place(parts.scheme, host, port, quote(target, safe=_QUOTED_ALREADY))


def _is_plain_host(host: str) -> bool:
    """Whether it is a name or a usual address, so neither 127.1 nor 0x7f000001 nor 2130706433."""
    if ":" in host or re.search(r"(^|\.)(\d+|0x[0-9a-f]*)$", host):
        return _is_address(host) and "%" not in host  # behind it comes a zone of this machine
    return re.fullmatch(r"([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}", host) is not None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _shown(url: str) -> str:
    """A URL for a message: without its query, which may be a signature, and without passwords."""
    url = re.sub(r"//[^/]*@", "//", re.split(r"[?#]", url, maxsplit=1)[0])
    url = "".join(letter if letter.isprintable() else "?" for letter in url)
    return url if len(url) <= 100 else f"{url[:97]}..."


# --- the connection -------------------------------------------------------------------------------


def _left(deadline: float) -> float:
    """Seconds until the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _checked_addresses(
    place: _Place,
    deadline: float,
    networks: Collection[Network],
    resolve: Callable[[str, int], list[str]],
) -> list[str]:
    """The addresses of a place; refused unless each one may be visited."""
    if _is_address(place.host):
        addresses = [place.host]
    else:
        # A thread, because the system's resolver knows no deadline and may take half a minute.
        pool = ThreadPoolExecutor(1)
        try:
            addresses = pool.submit(resolve, place.host, place.port).result(_left(deadline))
        except TimeoutError:
            raise
        except (OSError, UnicodeError):
            addresses = []
        finally:
            pool.shutdown(wait=False)
    if not addresses or not all(_is_allowed(address, networks) for address in addresses):
        raise _Refused(_UNREACHABLE)
    return addresses


def _is_allowed(address: str, networks: Collection[Network]) -> bool:
    if is_public(address):
        return True
    return _is_address(address) and any(ipaddress.ip_address(address) in n for n in networks)


def _connected(
    place: _Place, addresses: list[str], deadline: float, context: ssl.SSLContext | None
) -> socket.socket:
    """A connection to the first of these addresses that answers, encrypted for https."""
    for index, address in enumerate(addresses):
        seconds = _left(deadline) / (len(addresses) - index)  # one that is silent leaves time
        try:
            sock = socket.create_connection((address, place.port), seconds)
        except OSError:
            continue
        if place.scheme == "http":
            return sock
        sock.settimeout(_left(deadline))
        try:
            return (context or _trusted()).wrap_socket(sock, server_hostname=place.host)
        except ssl.SSLCertVerificationError as error:
            reason = error.verify_message.rstrip(".")
            raise _Refused(f"its certificate is not valid ({reason}); use another host") from None
        except TimeoutError:
            raise
        except OSError:
            raise _Refused("its host does not speak TLS as it should; use another host") from None
    raise _Refused(_UNREACHABLE)


@functools.cache
def _trusted() -> ssl.SSLContext:
    return ssl.create_default_context()


class _Wire(io.RawIOBase):
    """Reads from a socket to a deadline and a number of bytes, whatever is sent and how slowly."""

    def __init__(self, sock: socket.socket, deadline: float, max_bytes: int):
        self._sock, self._deadline, self._bytes_left = sock, deadline, max_bytes

    def makefile(self, *_: object) -> io.BufferedReader:
        """All that the library's `HTTPResponse` asks of a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left(self._deadline))
        count = self._sock.recv_into(buffer)
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise _Refused("it sends more bytes than allowed; make the picture smaller")
        return count


def _answer_of(sock: socket.socket, place: _Place, deadline: float, max_bytes: int) -> bytes | str:
    """Asks for a place's target: the bytes of the answer, or where it redirects to."""
    request = f"GET {place.target} HTTP/1.1\r\nHost: {place.authority}\r\n{HEADERS}\r\n\r\n"
    try:
        sock.settimeout(_left(deadline))
        sock.sendall(request.encode("ascii"))
        wire = _Wire(sock, deadline, max_bytes + SLACK)
        response = HTTPResponse(wire, method="GET")  # type: ignore[arg-type]
        response.begin()
        if response.status in REDIRECTS:
            # Bytes outside ASCII are quoted, as browsers do.
            location = response.headers.get("Location", "").encode("latin-1", "replace")
            return urljoin(place.url, quote(location, safe=_QUOTED_ALREADY))
        if response.status != 200:
            raise _Refused(f"its host answers with status {response.status}; check the URL")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise _Refused("it is sent compressed although that was not asked for")
        content = bytearray()
        while piece := response.read(2**16):
            content += piece
            if len(content) + (response.length or 0) > max_bytes:
                raise _Refused(f"it has more than {max_bytes:,} bytes; make the picture smaller")
        if response.length:  # what the header promised and never came
            raise _Refused("it is cut short; try again")
        return bytes(content)
    except TimeoutError:
        raise
    except (OSError, HTTPException, ValueError):
        raise _Refused("its host breaks off or does not answer as a web server") from None


__all__ = [
    "MAX_BYTES",
    "MAX_REDIRECTS",
    "data_uri_of_picture",
    "fetch_picture_bytes",
    "is_public",
    "picture_bytes_of_data_uri",
    "resolve",
]
