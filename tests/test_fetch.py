"""Pictures by URL: what strangers may make a server fetch, tried on a real HTTPS server.

The server runs on loopback with a certificate of the test's own authority. Every test that reaches
it says so by `networks`; without that, nothing here can connect to it. Times have a margin of a
second for slow machines; the limits themselves are a fraction of that.
"""

import base64
import contextlib
import datetime
import ipaddress
import os
import re
import socket
import socketserver
import ssl
import threading
import time
import zlib
from pathlib import Path

import pytest

import tiny
from eve_vlm.serve import fetch
from eve_vlm.serve.fetch import (
    SLACK,
    fetch_picture_bytes,
    is_public,
    picture_bytes_of_data_uri,
)

trustme = pytest.importorskip("trustme", reason="needs the extra dev")

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
HOST, PUBLIC = "pictures.test", "93.184.216.34"
PICTURE = bytes(range(256)) * 40  # any bytes; what they show is read elsewhere
MARGIN = 1.0  # seconds
FIXTURES = Path(__file__).parent / "fixtures"


# --- the server -----------------------------------------------------------------------------------


def answer(body=PICTURE, *, status="200 OK", length=None, **headers):
    """The bytes of an ordinary answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def forever(piece, pause=0.0):
    """The same bytes again and again, until the other side hangs up."""
    while True:
        yield piece
        time.sleep(pause)


def dripping(data, pause=0.05):
    for at in range(len(data)):
        yield data[at : at + 1]
        time.sleep(pause)


def chain(*parts):
    for part in parts:
        yield from (part,) if isinstance(part, bytes) else part


def chunked(*pieces):
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
OPEN = b"HTTP/1.1 200 OK\r\n\r\n"  # ends when the connection does

# What the server sends for a path: bytes, or pieces with pauses.
ANSWERS = {
    "/ok": lambda: answer(),
    "/chunked": lambda: CHUNKED + chunked(PICTURE[:1000], PICTURE[1000:]),
    "/open": lambda: OPEN + PICTURE,
    "/none": lambda: answer(b""),
    "/identity": lambda: answer(content_encoding="identity"),
    "/continued": lambda: b"HTTP/1.1 100 Continue\r\n\r\n" + answer(),
    "/too-long": lambda: answer(length=10),
    # hostile from here
    "/endless": lambda: chain(OPEN, forever(bytes(2**16))),
    "/endless-chunks": lambda: chain(CHUNKED, forever(b"10000\r\n" + bytes(2**16) + b"\r\n")),
    "/endless-chunk-extensions": lambda: chain(
        CHUNKED, forever(b"1;" + b"x" * 60_000 + b"\r\n.\r\n")
    ),
    "/endless-trailers": lambda: chain(CHUNKED, b"0\r\n", forever(b"X: y\r\n" * 1000)),
    "/negative-chunk": lambda: chain(CHUNKED, b"-1\r\n", forever(bytes(2**16))),
    "/endless-headers": lambda: chain(b"HTTP/1.1 200 OK\r\n", forever(b"X-A: b\r\n" * 1000)),
    "/endless-header": lambda: chain(b"HTTP/1.1 200 OK\r\nX: ", forever(b"y" * 2**16)),
    "/endless-status": lambda: chain(b"HTTP/1.1 200 ", forever(b"y" * 2**16)),
    "/endless-continue": lambda: forever(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "/huge-length": lambda: chain(answer(b"", length=10**12), forever(bytes(2**16), 0.2)),
    "/gzip": lambda: answer(zlib.compress(bytes(10**7)), content_encoding="gzip"),
    "/deflate": lambda: answer(zlib.compress(bytes(10**7)), content_encoding="deflate"),
    "/drip-body": lambda: chain(answer(b"", length=1000), dripping(bytes(1000))),
    "/drip-headers": lambda: dripping(answer()),
    "/drip-chunks": lambda: chain(CHUNKED, forever(b"1\r\n.\r\n", 0.05)),
    "/drip-continue": lambda: forever(b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
    "/silent": lambda: chain(forever(b"", 0.05)),
    "/short": lambda: answer(PICTURE[:100], length=1000),
    "/short-chunks": lambda: CHUNKED + b"100\r\nabc",
    "/nothing": lambda: b"",
    "/garbage": lambda: os.urandom(1000),
    "/version": lambda: b"HTTP/9 200 OK\r\n\r\n" + PICTURE,
    "/bad-chunk": lambda: CHUNKED + b"zz\r\n" + PICTURE,
    "/loop": lambda: answer(b"", status="302 Found", location="/loop"),
    "/nowhere": lambda: answer(b"", status="302 Found"),
    "/bad-location": lambda: answer(b"", status="302 Found", location="https://[::1"),
    "/slow-loop": lambda: chain(
        (b"" for _ in [time.sleep(0.15)]), answer(b"", status="302 Found", location="/slow-loop")
    ),
}


class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        server = self.server
        server.visits += 1
        with contextlib.suppress(OSError):
            self.request.settimeout(10)
            sock = self.request
            if server.context is not None:
                sock = server.context.wrap_socket(sock, server_side=True)
            request = b""
            while b"\r\n\r\n" not in request:
                request += sock.recv(2**16) or b"\r\n\r\n"
            server.requests.append(request.decode())
            path = request.split(b" ")[1].decode()
            if path.startswith("/to?"):
                reply = answer(b"", status="302 Found", location=server.goals[path[4:]])
            elif path.startswith("/status/"):
                reply = answer(status=f"{path[8:]} Any")
            elif path.startswith("/hops/"):
                hops = int(path[6:])
                goal = f"/hops/{hops - 1}"
                reply = answer(b"", status="307 Go", location=goal) if hops else answer()
            else:
                reply = ANSWERS.get(path.split("?")[0], lambda: answer(path.encode()))()
            for piece in (reply,) if isinstance(reply, bytes) else reply:
                sock.sendall(piece)
                server.sent += len(piece)
                if server.stopping:
                    return
            if server.context is not None:
                sock.close()


class Server(socketserver.ThreadingTCPServer):
    """Answers by path, over TLS where there is a context, and remembers what was asked."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, context):
        super().__init__(("127.0.0.1", 0), Handler)
        self.context, self.stopping, self.goals = context, False, {}
        self.forget()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def forget(self):
        self.visits = self.sent = 0
        self.requests, self.names = [], []

    @property
    def port(self):
        return self.server_address[1]

    def stop(self):
        self.stopping = True
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        pass


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def trusted(authority):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def server_context(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@pytest.fixture(scope="module")
def secure_server(authority):
    names = (HOST, "*.pictures.test", "xn--bcher-kva.test", "127.0.0.1")
    context = server_context(authority.issue_cert(*names))
    server = Server(context)
    context.sni_callback = lambda _sock, name, _context: server.names.append(name)
    yield server
    server.stop()


@pytest.fixture
def server(secure_server):
    secure_server.forget()
    return secure_server


@pytest.fixture(scope="module")
def plain_server():
    server = Server(None)
    yield server
    server.stop()


class Names:
    """A resolver with answers of the test's own; several lists are given one after the other."""

    def __init__(self, **answers):
        self.answers, self.asked = {"default": ["127.0.0.1"]} | answers, []

    def __call__(self, host, port):
        self.asked.append(host)
        found = self.answers.get(host.replace(".", "_"), self.answers["default"])
        if found and isinstance(found[0], list):
            found = found.pop(0) if len(found) > 1 else found[0]
        if not found:
            raise socket.gaierror(-2, "Name or service not known")
        return found


@pytest.fixture
def get(server, trusted):
    """Fetches a path or URL from the server, with loopback allowed for this call."""

    def get(url, **settings):
        if url.startswith("/"):
            url = f"https://{HOST}:{server.port}{url}"
        usual = {
            "ports": [server.port],
            "networks": LOOPBACK,
            "resolve": Names(),
            "ssl_context": trusted,
            "timeout": 10.0,
            "max_bytes": 2**20,
        }
        return fetch_picture_bytes(url, **(usual | settings))

    return get


@pytest.fixture
def dialled(monkeypatch):
    """The addresses that were connected to, in order."""
    addresses, connect = [], socket.create_connection

    def recorded(address, *arguments, **settings):
        addresses.append(address[0])
        return connect(address, *arguments, **settings)

    monkeypatch.setattr(socket, "create_connection", recorded)
    return addresses


@pytest.fixture
def no_connection(monkeypatch):
    """Fails the test when anything connects or asks the system for a name."""
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, lambda *_, **__: pytest.fail("it reached the network"))


def refused(action):
    return tiny.refused(action, end=".")


# --- what is fetched ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/ok", "/chunked", "/open", "/identity", "/continued"])
def test_a_picture_is_fetched(get, path):
    assert get(path) == PICTURE


def test_what_is_asked(get, server):
    """Name, port and path of the URL, and nothing about the user."""
    get("/some/path?size=2&q=%20x#part")
    lines = server.requests[-1].split("\r\n")
    assert lines[0] == "GET /some/path?size=2&q=%20x HTTP/1.1"
    assert f"Host: {HOST}:{server.port}" in lines and "Accept-Encoding: identity" in lines
    fields = {line.split(":")[0].lower() for line in lines[1:] if line}
    assert fields == {"host", "user-agent", "accept", "accept-encoding", "connection"}
    assert server.names == [HOST]


def test_urls_beyond_ascii(get, server):
    names = Names()
    url = f"https://bücher.test:{server.port}/größe/猫.png?a=ä&b=%C3%A4"
    assert get(url, resolve=names)
    assert names.asked == server.names == ["xn--bcher-kva.test"]
    path = server.requests[-1].split(" ")[1]
    assert path == "/gr%C3%B6%C3%9Fe/%E7%8C%AB.png?a=%C3%A4&b=%C3%A4"


def test_upper_case_and_a_last_dot(get, server):
    assert get(f"HTTPS://Pictures.TEST.:{server.port}/ok") == PICTURE
    assert server.names == [HOST]


def test_an_address_as_host(get, server):
    names = Names()
    assert get(f"https://127.0.0.1:{server.port}/ok", resolve=names) == PICTURE
    assert names.asked == []


def test_usual_ports_are_allowed_alone(dialled):
    for scheme, settings in (("https", {}), ("http", {"allow_http": True})):
        # Nothing listens there, so this fails after the checks.
        def visit(scheme=scheme, settings=settings):
            fetch_picture_bytes(
                f"{scheme}://{HOST}/", networks=LOOPBACK, resolve=Names(), timeout=2, **settings
            )

        refused(visit)
    assert dialled == ["127.0.0.1"] * 2


def test_the_connection_goes_to_the_address_that_was_checked(trusted, server, monkeypatch):
    """A public address, with nothing allowed beside; the wire is then led to the test's server."""
    connect, dialled = socket.create_connection, []

    def diverted(address, *arguments, **settings):
        dialled.append(address)
        return connect(("127.0.0.1", server.port), *arguments, **settings)

    monkeypatch.setattr(socket, "create_connection", diverted)
    names = Names(default=[PUBLIC])
    assert fetch_picture_bytes(f"https://{HOST}/ok", resolve=names, ssl_context=trusted) == PICTURE
    assert dialled == [(PUBLIC, 443)] and names.asked == [HOST] and server.names == [HOST]


def test_an_address_that_does_not_answer_is_passed_over(get, dialled):
    names = Names(default=["127.0.0.9", "127.0.0.1"])  # nothing listens at the first
    assert get("/ok", resolve=names) == PICTURE
    assert dialled == ["127.0.0.9", "127.0.0.1"]


def test_a_silent_address_leaves_time_for_the_next(get, monkeypatch):
    connect, given = socket.create_connection, []

    def silent(address, timeout, **settings):
        given.append(timeout)
        if address[0] == "127.0.0.9":
            raise TimeoutError
        return connect(address, timeout, **settings)

    monkeypatch.setattr(socket, "create_connection", silent)
    names = Names(default=["127.0.0.9", "127.0.0.1"])
    assert get("/ok", resolve=names, timeout=8.0) == PICTURE
    assert 3 < given[0] <= 4 and 4 < given[1] <= 8  # half of it, then all that is left


def test_a_picture_that_announces_too_much_is_not_read(get, server):
    """16 pieces of 64 kB would reach the limit without the announcement, in 3.2 s."""
    start = time.monotonic()
    assert "more than" in refused(lambda: get("/huge-length", max_bytes=2**20))
    assert time.monotonic() - start < 2


def test_http_where_the_caller_allows_it(get, plain_server):
    url = f"http://{HOST}:{plain_server.port}/ok"
    settings = {"ports": [plain_server.port]}
    assert get(url, allow_http=True, **settings) == PICTURE
    assert "must begin with https://." in refused(lambda: get(url, **settings))


def test_proxies_of_the_environment_are_ignored(get, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert get("/ok") == PICTURE


def test_more_than_promised_is_not_read(get):
    assert get("/too-long") == PICTURE[:10]


def test_exactly_the_limit(get):
    for path in ("/ok", "/chunked", "/open"):
        assert get(path, max_bytes=len(PICTURE)) == PICTURE
        assert "bytes" in refused(lambda path=path: get(path, max_bytes=len(PICTURE) - 1))


def test_many_at_once(get):
    """Nothing is shared but the context, so threads do not disturb each other."""
    results = []
    threads = [
        threading.Thread(target=lambda n=n: results.append((n, get(f"/number/{n}"))))
        for n in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [(n, f"/number/{n}".encode()) for n in range(32)]


# --- hostile URLs ---------------------------------------------------------------------------------

# Refused by the URL alone, whatever a resolver says.
BAD_URLS = [
    *(FIXTURES / "hostile_urls.txt").read_text(encoding="utf-8").splitlines(),
    "",
    " ",
    "https://pictures.test/ cat.png",
    " https://pictures.test/",
    "https://pictures.test/\tcat",
    "https://pictures.test/\r\nX-Evil: 1",
    "https://pictures.test\n/",
    "ht\ntps://pictures.test/",
    "https://pictures.test/\0",
    "https://pictures.test/\x7f",
    "https://pictures\u00a0test/",
    "https://pictures.test/\u202egnp.tac",
    "https://pictures.test/\ud800",
    "https://" + "a" * 64 + ".test/",
    "https://" + "ä" * 64 + ".test/",
    "https://pictures.test/" + "a" * 9000,
]


@pytest.mark.parametrize("url", BAD_URLS, ids=range(len(BAD_URLS)))
def test_hostile_urls(url, no_connection):
    names = Names(default=[PUBLIC])
    text = refused(lambda: fetch_picture_bytes(url, resolve=names))
    assert names.asked == [], "a name was looked up"
    assert "secret" not in text and len(text) < 300


# Refused by their address.  The second part is what a hostile or ordinary resolver would answer.
PRIVATE_HOSTS = {
    "127.0.0.1": None,
    "127.255.255.254": None,
    "127.0.0.1.": None,
    "\uff11\uff12\uff17.0.0.1": None,
    "127\u30020\u30020\u30021": None,
    "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460": None,
    "0.0.0.0": None,
    "0.0.0.1": None,
    "10.0.0.1": None,
    "172.16.0.1": None,
    "172.31.255.255": None,
    "192.168.1.1": None,
    "169.254.169.254": None,
    "169.254.170.2": None,
    "100.64.0.1": None,
    "100.100.100.200": None,
    "168.63.129.16": None,
    "192.0.0.192": None,
    "198.18.0.1": None,
    "192.0.2.1": None,
    "224.0.0.1": None,
    "239.255.255.250": None,
    "240.0.0.1": None,
    "255.255.255.255": None,
    "[::1]": None,
    "[::]": None,
    "[0:0:0:0:0:0:0:1]": None,
    "[0000::1]": None,
    "[::ffff:127.0.0.1]": None,
    "[::ffff:7f00:1]": None,
    "[::ffff:10.0.0.1]": None,
    "[::ffff:169.254.169.254]": None,
    "[::127.0.0.1]": None,
    "[64:ff9b::7f00:1]": None,
    "[64:ff9b::169.254.169.254]": None,
    "[64:ff9b:1::a00:1]": None,
    "[2002:7f00:1::]": None,
    "[2002:a9fe:a9fe::1]": None,
    "[2001:0:a00:1::1]": None,
    "[2001:db8::1]": None,
    "[fe80::1]": None,
    "[fec0::1]": None,
    "[fc00::1]": None,
    "[fd00:ec2::254]": None,
    "[ff02::1]": None,
    "[ff0e::1]": None,
    "localhost": ["127.0.0.1", "::1"],
    "LOCALHOST": ["127.0.0.1"],
    "localhost.": ["127.0.0.1"],
    "\uff4cocalhos\uff54": ["127.0.0.1"],
    "localhost.localdomain": ["127.0.0.1"],
    "app.localhost": ["127.0.0.1"],
    "ip6-localhost": ["::1"],
    "metadata.google.internal": ["169.254.169.254"],
    "kubernetes.default.svc": ["10.96.0.1"],
    "host.docker.internal": ["172.17.0.1"],
    "127.0.0.1.nip.io": ["127.0.0.1"],
    "router": ["192.168.0.1"],
    "mapped.test": ["::ffff:10.0.0.1"],
    "nat64.test": ["64:ff9b::a00:1"],
    "zone.test": ["fe80::1%eth0"],
    "mixed.test": [PUBLIC, "10.0.0.1"],
    "mixed-last.test": [PUBLIC, "2606:2800:220:1::1", "::1"],
    "odd.test": ["not an address"],
    "nobody.test": [],
}


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_private_addresses(host, no_connection):
    """The same words for each, and for a name that does not exist."""
    names = Names(default=PRIVATE_HOSTS[host])
    url = f"https://{host}/cat.png"
    text = refused(lambda: fetch_picture_bytes(url, resolve=names))
    assert text == f"The picture at {url} is not fetched: {fetch._UNREACHABLE}."
    # An address as host is never looked up.
    assert bool(names.asked) == (PRIVATE_HOSTS[host] is not None)


def test_a_public_address_that_does_not_answer_reads_the_same(trusted, monkeypatch):
    def silent(*_, **__):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", silent)
    names = Names(default=[PUBLIC])
    text = refused(lambda: fetch_picture_bytes("https://a.test/", resolve=names))
    assert text == f"The picture at https://a.test/ is not fetched: {fetch._UNREACHABLE}."


def test_loopback_is_closed_unless_allowed(server, trusted):
    """The server is there and its port allowed: only the address keeps it from being visited."""
    for host in ("127.0.0.1", HOST):
        url = f"https://{host}:{server.port}/ok"
        settings = {"ports": [server.port], "resolve": Names(), "ssl_context": trusted}
        refused(lambda url=url, settings=settings: fetch_picture_bytes(url, **settings))
    assert server.visits == 0


def test_the_systems_resolver_is_asked(monkeypatch, no_connection):
    found = [(2, 1, 6, "", (PUBLIC, 443)), (10, 1, 6, "", ("fe80::1", 443, 0, 2))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert fetch.resolve("a.test", 443) == [PUBLIC, "fe80::1"]
    assert "no public address" in refused(lambda: fetch_picture_bytes("https://a.test/"))


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "1.1.1.1", "2606:2800:220:1::1", "64:ff9b::808:808"]
)
def test_public_addresses(address):
    assert is_public(address)


def test_no_private_network_is_public():
    """First, last and a middle address of every network that is for special use (RFC 6890)."""
    special = (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        *("::/128", "::1/128", "::ffff:0:0/96", "64:ff9b:1::/48", "100::/64"),
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16"),
        *("fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
    )
    for network in map(ipaddress.ip_network, special):
        for index in (0, -1, network.num_addresses // 2):
            address = str(network[index])
            assert not is_public(address), address
            if network.version == 4:
                hidden = f"{int(network[index]):08x}"
                assert not is_public(f"64:ff9b::{hidden[:4]}:{hidden[4:]}"), address


# --- redirects and names that change --------------------------------------------------------------

GOALS = {
    "private": "https://10.0.0.1/",
    "metadata": "https://169.254.169.254/latest/meta-data/",
    "loopback-6": "https://[::1]/",
    "mapped": "https://[::ffff:127.0.0.1]/",
    "name": "https://db.internal/",
    "http": "http://pictures.test/",
    "file": "file:///etc/passwd",
    "data": "data:image/png;base64,aGVsbG8=",
    "ftp": "ftp://pictures.test/x",
    "user": "https://user:secret@pictures.test/",
    "port": "https://pictures.test:22/",
    "relative-host": "//10.0.0.1/x",
    "blank": "https://10.0.0.1 .pictures.test/",
    "decimal": "https://167772161/",
}


@pytest.mark.parametrize("goal", GOALS)
def test_redirects_are_checked_anew(get, server, dialled, goal):
    server.goals = GOALS
    names = Names(db_internal=["10.1.2.3"])
    text = refused(lambda: get(f"/to?{goal}", resolve=names))
    assert dialled == ["127.0.0.1"] and server.visits == 1
    assert "secret" not in text and "10." not in text and "internal" not in text


def test_a_redirect_tells_nothing_of_what_is_inside(get, server):
    """A private address, a name with one, and a name that does not exist read the same."""
    server.goals = {"x": "https://a.internal/"}
    texts = {
        refused(lambda found=found: get("/to?x", resolve=Names(a_internal=found)))
        for found in (["10.0.0.1"], ["fd00::1"], ["169.254.169.254"], [])
    }
    assert len(texts) == 1 and fetch._UNREACHABLE in texts.pop()


def test_redirects_that_are_followed(get, server):
    host = f"https://other.pictures.test:{server.port}"
    server.goals = {"path": "/ok", "near": "ok", "host": f"{host}/ok", "words": "/größe 猫"}
    for goal in ("path", "near", "host"):
        assert get(f"/to?{goal}") == PICTURE
    assert server.names[-1] == "other.pictures.test"
    assert get("/to?words") == b"/gr%C3%B6%C3%9Fe%20%E7%8C%AB"
    # For a browser this is the host 10.0.0.1; here it stays a path of the same host.
    server.goals = {"x": "\\\\10.0.0.1/x"}
    assert get("/to?x") == b"/%5C%5C10.0.0.1/x"


def test_at_most_five_redirects(get, server):
    assert get("/hops/5") == PICTURE
    server.forget()
    assert "more than 5 times" in refused(lambda: get("/hops/6"))
    assert server.visits == 6
    for path in ("/loop", "/nowhere"):
        assert "more than 5 times" in refused(lambda path=path: get(path))


def test_no_way_from_https_to_http(get, server, plain_server):
    server.goals = {"x": f"http://{HOST}:{plain_server.port}/ok"}
    ports = [server.port, plain_server.port]
    text = refused(lambda: get("/to?x", allow_http=True, ports=ports))
    assert "must begin with https://." in text
    plain_server.goals = {"x": f"https://{HOST}:{server.port}/ok"}
    url = f"http://{HOST}:{plain_server.port}/to?x"
    assert get(url, allow_http=True, ports=ports) == PICTURE


def test_a_name_that_changes_between_check_and_use(get, dialled):
    """It is resolved once for each visit, and the second answer is checked like the first."""
    names = Names(pictures_test=[["127.0.0.1"], ["10.0.0.1"]])
    assert get("/ok", resolve=names) == PICTURE
    assert names.asked == [HOST] and dialled == ["127.0.0.1"]
    names = Names(pictures_test=[["127.0.0.1"], ["10.0.0.1"]])
    assert fetch._UNREACHABLE in refused(lambda: get("/hops/1", resolve=names))
    assert names.asked == [HOST] * 2 and dialled == ["127.0.0.1"] * 2


# --- hostile servers ------------------------------------------------------------------------------

ENDLESS = sorted(path for path in ANSWERS if "endless" in path or "huge" in path)


@pytest.mark.parametrize("path", [*ENDLESS, "/negative-chunk"])
def test_answers_without_an_end(get, server, path):
    """Dropped at the limit: little more was sent than it allows and the buffers between hold."""
    start = time.monotonic()
    refused(lambda: get(path, max_bytes=2**20))
    assert time.monotonic() - start < 5
    time.sleep(0.05)  # the server is still busy with its last piece
    assert server.sent < 2**20 + SLACK + 8 * 2**20  # up to 6 MB in the buffers of loopback sockets


@pytest.mark.parametrize("path", sorted(p for p in ANSWERS if "drip" in p or "silent" in p))
def test_answers_that_take_very_long(get, path):
    """Each byte comes in time, but all of them would take from 5 s to for ever."""
    start = time.monotonic()
    assert "longer than 0.4 s" in refused(lambda: get(path, timeout=0.4))
    assert 0.4 <= time.monotonic() - start < 0.4 + MARGIN


def test_the_time_is_for_all_redirects_together(get, server):
    start = time.monotonic()
    assert "longer than 0.4 s" in refused(lambda: get("/slow-loop", timeout=0.4))
    assert time.monotonic() - start < 0.4 + MARGIN and server.visits >= 2


def test_a_resolver_that_takes_very_long(get):
    done = threading.Event()

    def slow(host, port):
        done.wait(30)
        return ["127.0.0.1"]

    start = time.monotonic()
    assert "longer than 0.3 s" in refused(lambda: get("/ok", resolve=slow, timeout=0.3))
    assert time.monotonic() - start < 0.3 + MARGIN
    done.set()


@pytest.mark.parametrize(
    "sent",
    [b"", b"HTTP/1.1 200 OK\r\n\r\n", os.urandom(100)],
    ids=["silence", "plain HTTP", "noise"],
)
def test_hosts_that_do_not_speak_tls(get, trusted, sent):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept():
            with contextlib.suppress(OSError):
                sock, _ = listening.accept()
                with sock:
                    sock.sendall(sent)
                    sock.recv(1) if sent else time.sleep(1.5)

        threading.Thread(target=accept, daemon=True).start()
        port = listening.getsockname()[1]
        start = time.monotonic()
        text = refused(lambda: get(f"https://{HOST}:{port}/", ports=[port], timeout=0.5))
        assert time.monotonic() - start < 0.5 + MARGIN
        assert "speak TLS" in text if sent else "longer than" in text


@pytest.mark.parametrize(
    ("path", "reason"),
    {
        "/gzip": "compressed",
        "/deflate": "compressed",
        "/short": "cut short",
        "/short-chunks": "breaks off",
        "/nothing": "breaks off",
        "/garbage": "web server",
        "/bad-chunk": "breaks off",
        "/bad-location": "web server",
        "/huge-length": "more than 1,048,576 bytes",
        "/status/204": "status 204",
        "/status/206": "status 206",
        "/status/304": "status 304",
        "/status/401": "status 401",
        "/status/404": "status 404",
        "/status/500": "status 500",
        "/status/99": "web server",
    }.items(),
)
def test_answers_that_are_no_picture(get, path, reason):
    assert reason in refused(lambda: get(path))


def test_certificates_must_fit(get, server, authority, trusted):
    text = refused(lambda: get(f"https://elsewhere.test:{server.port}/ok"))
    assert "certificate is not valid" in text and "elsewhere.test" in text
    # An address that the name has is not enough, nor is a deeper name than the certificate's.
    for host in ("127.0.0.2", "a.b.pictures.test"):
        text = refused(lambda host=host: get(f"https://{host}:{server.port}/ok"))
        assert "certificate is not valid" in text or "no public address" in text
    strangers = trustme.CA()
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    for certificate in (
        strangers.issue_cert(HOST),
        authority.issue_cert(HOST, not_before=past - datetime.timedelta(days=9), not_after=past),
    ):
        other = Server(server_context(certificate))
        try:
            url = f"https://{HOST}:{other.port}/ok"
            assert "certificate is not valid" in refused(lambda: get(url, ports=[other.port]))  # noqa: B023
            assert not other.requests
        finally:
            other.stop()


def test_the_test_authority_is_not_trusted_by_default(get):
    assert "certificate is not valid" in refused(lambda: get("/ok", ssl_context=None))


def test_messages_hide_what_may_be_secret(get):
    text = refused(lambda: get("/status/403?token=abc123&sig=xyz#part"))
    assert "/status/403 is not" in text and "abc123" not in text and "xyz" not in text
    assert len(refused(lambda: get("/status/403" + "/a" * 1000))) < 200


def test_connections_are_closed(get, server):
    """A refused answer leaves no socket behind, whatever was still on its way."""
    folder = "/proc/self/fd"
    if not os.path.isdir(folder):
        pytest.skip("needs /proc")
    get("/ok")

    def ours():
        """Sockets of this process; the server's own are in it too, so it is given time to end."""
        deadline = time.monotonic() + 5
        while (count := len(os.listdir(folder))) > before and time.monotonic() < deadline:
            time.sleep(0.05)
        return count

    time.sleep(0.3)
    before = len(os.listdir(folder))
    for path in ("/ok", "/status/404", "/gzip", "/endless", "/garbage", "/loop", "/nothing"):
        for _ in range(5):
            with contextlib.suppress(ValueError):
                get(path)
    assert ours() <= before


# --- data URIs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,",
        "DATA:IMAGE/PNG;BASE64,",
        "data:image/svg+xml;charset=utf-8;base64,",
        "data:image/jpeg;name=cat.jpg;base64,",
    ],
)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000])
def test_data_uris(head, size):
    data = os.urandom(size)
    assert picture_bytes_of_data_uri(head + base64.b64encode(data).decode()) == data


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "data:",
        "data:,",
        "data:image/png",
        "data:image/png,abc",
        "data:image/png;base64",
        "data:;base64,aGVsbG8=",
        "data:text/html;base64,aGVsbG8=",
        "data:image/;base64,aGVsbG8=",
        "data:image/png;base64;x=y,aGVsbG8=",
        "data:image/png;base64 ,aGVsbG8=",
        "data: image/png;base64,aGVsbG8=",
        " data:image/png;base64,aGVsbG8=",
        "data:image/png" + ";a=b" * 100 + ";base64,aGVsbG8=",
        "https://pictures.test/data:image/png;base64,aGVsbG8=",
        "data:image/png;base64,aGVsbG8",
        "data:image/png;base64,aGVsbG8==",
        "data:image/png;base64,aGVs bG8=",
        "data:image/png;base64,aGVs\nbG8=",
        "data:image/png;base64,aGVsbG8=\n",
        "data:image/png;base64,aGVsbG8%3D",
        "data:image/png;base64,aGVs_G8-",
        "data:image/png;base64,=aGVsbG8",
        "data:image/png;base64,aGVs=bG8",
        "data:image/png;base64,aGVsbG8=aGVsbG8=",
        "data:image/png;base64,\uff41GVs",
        "data:image/png;base64,aGV\0",
    ],
)
def test_bad_data_uris(uri):
    refused(lambda: picture_bytes_of_data_uri(uri))


def test_data_uris_are_measured_before_they_are_decoded(monkeypatch):
    for size in range(1, 12):
        uri = "data:image/png;base64," + base64.b64encode(bytes(size)).decode()
        assert picture_bytes_of_data_uri(uri, max_bytes=size) == bytes(size)
        with monkeypatch.context() as patch:
            patch.setattr(fetch.binascii, "a2b_base64", lambda *_, **__: pytest.fail("decoded"))
            text = refused(
                lambda uri=uri, size=size: picture_bytes_of_data_uri(uri, max_bytes=size - 1)
            )
        assert re.search(r"more than \d+ bytes", text)
