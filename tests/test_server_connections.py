"""What arrives on a connection and is no honest request: no key or one for another path, too much, too slowly."""

import hmac
import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from server_helpers import CAPITAL, DUMMY, KEY, SMALL, Running, refused, talk

from pagedjax.llm import LLM
from pagedjax.server import guard
from pagedjax.server.guard import Limits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MAX_BODY, SECONDS = 100_000, 1.0
HEADERS = {"Authorization": f"Bearer {KEY}"}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
ALLOWED = f"Authorization: Bearer {KEY}\r\n".encode()


@pytest.fixture(scope="module")
def server(small_smollm2: str) -> Iterator[Running]:
    llm = LLM(small_smollm2, **DUMMY, **SMALL)
    with Running(llm, Limits(api_keys=("another", KEY), max_body=MAX_BODY, receive_timeout=SECONDS)) as running:
        yield running


@pytest.fixture
def raw(server: Running) -> Iterator[httpx.Client]:
    """A client; in the end an ordinary request is answered as before, and no connection is left but its own."""
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:
        server.answers(client)
        yield client
        server.answers(client)
    server.idle()
    deadline = time.monotonic() + 10
    while server.server.server_state.connections:
        assert time.monotonic() < deadline, "a connection stays"
        time.sleep(0.02)


def test_without_a_key_nothing_is_served_but_health(server: Running, raw: httpx.Client):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer"}):
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Hi"}, headers=headers)
        refused(answer, 401, "API key")
        assert answer.json()["error"]["type"] == "AuthenticationError"
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_every_key_is_compared_in_constant_time(server: Running, raw: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    """Also after one has matched, and however little of one is right."""
    calls: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: calls.append((a, b)) or real(a, b))
    for key, status in ((KEY, 200), ("another", 200), ("anothe", 401), ("\xe9", 401)):
        calls.clear()
        headers = [(b"Authorization", f"Bearer {key}".encode("latin-1"))]
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == status
        assert calls == [(key.encode("latin-1"), known) for known in (b"another", KEY.encode())]


TARGETS = [
    "/v1/completions",
    "//health",
    "/health/",
    "/health/../v1/completions",
    "/v1/completions/",
    "//v1/completions",
    "/v1//completions",
    "/v1%2Fcompletions",
    "/%76%31/completions",
    "/health%2F..%2Fv1%2Fcompletions",
    "/v1/completions%3F/health",
    "/v1/completions?/health",
    "/v1/completions;/health",
    "http://a/health",
    "http://a/v1/completions",
    "http://a/health/v1/completions",
    "/V1/Completions",
]
HOSTS = ["a", "a/health", "health", "/health", "a:80/health?", "a#/health"]


def test_no_spelling_of_a_path_and_no_host_gets_around_the_key(server: Running, raw: httpx.Client):
    body = json.dumps({"prompt": "Hi", "max_tokens": 1}).encode()
    more = b"Content-Type: application/json\r\nX-Forwarded-Prefix: /health\r\nX-Original-URL: /health\r\n"
    more += b"X-Rewrite-URL: /health\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    asked = [(target, "a") for target in TARGETS] + [("/v1/completions", host) for host in HOSTS]
    for target, host in asked:
        got = talk(server, f"POST {target} HTTP/1.1\r\nHost: {host}\r\n".encode() + more + body)
        statuses = [b"401", b"400"] + ([b"405"] if target == "http://a/health" else [])  # which is /health itself
        assert got.split(b" ", 2)[1] in statuses and b"choices" not in got, (target, host, got)
    for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"):
        assert httpx.request(method, f"{server.url}/v1/completions").status_code == 401


def test_no_redirect_goes_where_the_host_header_says(raw: httpx.Client):
    answer = raw.post("/v1/completions/", json={"prompt": "Hi"}, headers={"Host": "elsewhere.example"})
    refused(answer, 404)
    assert "location" not in answer.headers and "elsewhere" not in answer.text


def test_a_websocket_is_no_way_in(server: Running, raw: httpx.Client):
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    upgrade += b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    got = talk(server, b"GET /v1/completions HTTP/1.1\r\nHost: a\r\n" + upgrade)
    assert got.startswith(b"HTTP/1.1 401 ")


def test_a_body_may_be_only_so_large_whatever_its_length_says(server: Running, raw: httpx.Client):
    refused(raw.post("/v1/completions", json={"prompt": "x" * 2 * MAX_BODY}), 413, "bodies of up to")
    refused(raw.post("/v1/completions", content=(b"x" * 1000 for _ in range(200))), 413, "bodies of up to")
    for length in (b"9" * 30, b"-1", b"1e9", b"0x10", b"1, 2"):
        got = talk(server, POST + ALLOWED + b"Content-Length: " + length + b"\r\n\r\n{}")
        assert got.startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 400 ")), (length, got)
    both = b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n"
    got = talk(server, POST + ALLOWED + both + b"%x\r\n" % (2 * MAX_BODY), b"x" * 2 * MAX_BODY + b"\r\n0\r\n\r\n")
    assert got.startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 400 ")), got


def test_no_memory_grows_with_a_body_that_never_ends(server: Running, raw: httpx.Client):
    """The server answers, then lets it run by, and hangs up before long."""
    sent, start = 0, time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(POST + ALLOWED + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):
            while time.monotonic() - start < 30:
                connection.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
                sent += 10_000
                time.sleep(0.001)
    assert sent > MAX_BODY and time.monotonic() - start < 10 * SECONDS


@pytest.mark.parametrize(
    "headers",
    [
        {"X": "y" * 200_000},
        {"X": "y" * 40_000},
        {"y" * 40_000: "x"},
        {f"X-{i}": "y" for i in range(8000)},
        {f"X-{i}": "y" for i in range(5500)},
    ],
)
def test_headers_may_be_only_so_large(raw: httpx.Client, headers: dict[str, str]):
    """The server may hang up before it has read them all."""
    with suppress(httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
        answer = raw.get("/health", headers=headers)
        assert answer.status_code in (400, 431) and len(answer.content) < 500


def test_headers_that_never_end_are_cut_off(server: Running, raw: httpx.Client):
    got = talk(server, b"GET /health HTTP/1.1\r\n", *[b"X-%d: y\r\n" % i * 1000 for i in range(200)], wait=0.001)
    assert got == b"" or got.startswith(b"HTTP/1.1 4")


def slow(server: Running, start: bytes, drip: bytes) -> tuple[bytes, float]:
    """What comes back of a request sent a few bytes at a time, and when."""
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.1) as connection:
        connection.sendall(start)
        while time.monotonic() - begin < 20:
            try:
                got = connection.recv(65536)
            except TimeoutError:
                connection.sendall(drip)
                continue
            except OSError:
                got = b""
            seconds = time.monotonic() - begin
            with suppress(OSError):  # the rest of the answer, until the server closes
                while got and (more := connection.recv(65536)):
                    got += more
            return got, seconds
    raise AssertionError("the server waits")


def test_a_request_that_comes_slowly_is_not_waited_for(server: Running, raw: httpx.Client):
    chunked = POST + ALLOWED + b"Transfer-Encoding: chunked\r\n\r\n"
    announced = POST + ALLOWED + b"Content-Length: 50000\r\n\r\n"
    for start, drip in ((chunked, b"1\r\n[\r\n"), (announced, b"["), (chunked, b"")):
        got, seconds = slow(server, start, drip)
        assert got.startswith(b"HTTP/1.1 408 ") and SECONDS - 0.2 < seconds < 4 * SECONDS
        assert b'"code":408' in got and len(got) < 2000
    silent = b""
    for start, drip in ((POST, b"X: y\r\n"), (b"P", b""), (silent, b""), (b"POST /", b"a")):
        got, seconds = slow(server, start, drip)
        assert got == b"" and SECONDS - 0.2 < seconds < 4 * SECONDS


def test_many_slow_connections_hold_nobody_up(server: Running, raw: httpx.Client):
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    for connection in idle:
        connection.sendall(POST)
    assert raw.get("/health").status_code == 200
    assert raw.post("/v1/completions", json={"prompt": CAPITAL, "max_tokens": 1}).status_code == 200
    for connection in idle:
        connection.settimeout(4 * SECONDS)
        assert connection.recv(100) == b""
        connection.close()


@pytest.mark.slow
def test_a_later_request_on_a_connection_may_take_its_own_time(raw: httpx.Client):
    """The time begins anew with each."""
    for _ in range(3):
        assert raw.post("/v1/completions", json={"prompt": CAPITAL, "max_tokens": 1}).status_code == 200
        time.sleep(0.8 * SECONDS)


@pytest.mark.slow
def test_an_answer_may_take_longer_than_a_request(raw: httpx.Client):
    body: dict[str, Any] = {"prompt": CAPITAL, "max_tokens": 60, "ignore_eos": True, "stream": True}
    with raw.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        time.sleep(1.2 * SECONDS)
        assert [line for line in lines if line][-1] == "data: [DONE]"
