"""Pictures that strangers send: hostile files in data URIs, hostile URLs, and their limits.

Everything goes through the real endpoint. One thing a reader would get wrong: that an URL is refused
is not enough; the tests also see that no connection was asked for.
"""

import base64
import socket
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

import tiny
from eve_vlm.serve import fetch
from eve_vlm.serve.http import reading
from serving import data_uri, refusal, running, with_picture

HOSTILE = Path(__file__).parent / "fixtures" / "hostile_urls.txt"


@pytest.fixture(scope="module")
def server():
    with running(max_pixels=10_000) as made:
        yield made


def png_of(width, height, data=b""):
    """A PNG whose header says this size, whatever follows."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))  # fmt: skip

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")  # fmt: skip


def as_uri(content, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


BOMB = png_of(60_000, 60_000, zlib.compress(bytes(10_000_000)))
HOSTILE_DATA = {
    "bomb": as_uri(BOMB),
    "above the limit": data_uri(tiny.picture(101, 100)),
    "no pixels": as_uri(png_of(0, 0)),
    "cut": as_uri(png_of(20, 20, zlib.compress(b"\0" * 30))),
    "damaged": as_uri(png_of(20, 20, b"no zlib")),
    "no picture": as_uri(b"hello"),
    "empty": "data:image/png;base64,",
    "SVG": as_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"),
    "EPS": as_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n", "eps"),
    "no base64": "data:image/png;base64,@@@@",
    "base64 with breaks": "data:image/png;base64,aGVs\nbG8=",
    "no padding": "data:image/png;base64,aGVsbG8",
    "not base64": "data:image/png,hello",
    "a text": "data:text/html;base64,aGVsbG8=",
    "nothing behind it": "data:",
    "capitals": "DATA:image/png;base64,aGVsbG8=",
}


@pytest.mark.parametrize("name", HOSTILE_DATA)
def test_hostile_pictures(server, name):
    error = refusal(server.post(with_picture(HOSTILE_DATA[name])), 400)
    assert error["code"] == "invalid_image"
    assert error["param"] == "messages[0].content[0].image_url"


# --- pictures by URL ------------------------------------------------------------------------------

ADDRESSES = {
    "inside.test": ["10.0.0.7"],
    "both.test": ["93.184.216.34", "127.0.0.1"],
    "metadata.test": ["169.254.169.254"],
    "localhost": ["127.0.0.1"],
}
URLS = [
    *HOSTILE.read_text(encoding="utf-8").splitlines(),
    *(f"https://{name}/cat.png" for name in ADDRESSES),
    *(
        f"https://{address}/"
        for address in (
            *("127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
            *("100.64.0.1", "224.0.0.1", "[::1]", "[::]", "[fe80::1]", "[fc00::1]", "localhost"),
            *("[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
        )
    ),
]


@pytest.fixture
def connections(monkeypatch):
    """Connections that `fetch` asks for; none is made, and names are not asked of the network."""
    seen = []

    def getaddrinfo(host, port, **_):
        found = ADDRESSES.get(host, [host])
        for address in found:  # or OSError, as for a name that is not there
            socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
        return [(0, 0, 0, "", (address, port)) for address in found]

    def create_connection(address, *_):
        seen.append(address)
        raise OSError("no network in tests")

    own = SimpleNamespace(
        getaddrinfo=getaddrinfo, create_connection=create_connection, SOCK_STREAM=1
    )
    monkeypatch.setattr(fetch, "socket", own)
    return seen


def test_hostile_urls_are_refused_before_any_connection(server, connections):
    assert len(URLS) > 90
    for url in URLS:
        error = refusal(server.post(with_picture(url)), 400)
        assert error["code"] == "invalid_image", url
    assert connections == []
    # The other side of it: a public address would be visited.
    refusal(server.post(with_picture("https://93.184.216.34/")), 400)
    assert connections == [("93.184.216.34", 443)]


def test_pictures_by_url(monkeypatch):
    """What was fetched is answered about; all files together have a limit, and so has the time."""
    picture = tiny.picture(20, 32)
    png = base64.b64decode(data_uri(picture).partition(",")[2])
    seen = []

    def fetched(url, *, max_bytes, timeout):
        seen.append((url, max_bytes, timeout))
        if len(png) > max_bytes:
            raise ValueError(f"The picture at {url} is not fetched: it is too large.")
        return png

    monkeypatch.setattr(reading, "fetch_picture_bytes", fetched)
    url = "https://pictures.test/cat.png"
    with running(max_fetched_bytes=2 * len(png) + 9, fetch_seconds=3) as server:
        by_url = server.post(with_picture(url, data_uri(picture), url, max_tokens=6)).json()
        by_data = server.post(with_picture(*[data_uri(picture)] * 3, max_tokens=6)).json()
        assert by_url["choices"] == by_data["choices"] and by_url["usage"] == by_data["usage"]
        assert [most for _, most, _ in seen] == [2 * len(png) + 9, len(png) + 9]
        assert {seconds for *_, seconds in seen} == {3}
        error = refusal(server.post(with_picture(url, url, url)), 400)
        assert error["param"] == "messages[0].content[2].image_url"
    with running(fetch=False) as server:
        seen.clear()
        assert "switched off" in refusal(server.post(with_picture(url)), 400)["message"]
        assert not seen
        assert server.post(with_picture(data_uri(picture))).status_code == 200
