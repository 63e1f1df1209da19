"""Malformed requests and slow clients: every answer is a 4xx, and healthy clients do not notice."""

import random
import socket
import subprocess
import sys
import time

import httpx
import pytest
from helpers.server import MODEL, running
from serve_faults import PATHS, good, malformed

from llama import Llama

N_REQUESTS = 1500
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\n"
)


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(max_seq_len=128, max_batch_size=4, mode="fast", device="cpu")


def test_malformed_requests_never_fail_the_server(url: str) -> None:
    rng = random.Random(7)
    statuses: dict[int, int] = {}
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(N_REQUESTS):
            path = rng.choice(PATHS)
            response = client.post(
                path,
                content=malformed(rng, path, MODEL),
                headers={"content-type": "application/json"},
            )
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            assert response.status_code < 500, response.text
            if response.status_code != 200 and "stream" not in response.headers["content-type"]:
                assert response.json()["error"]["message"]
        assert statuses[400] > N_REQUESTS // 2
        for path, body in good(MODEL).items():
            assert client.post(path, json=body).status_code == 200
        assert client.get("/health").json() == {"status": "ok", "open_requests": 0}


def raw(url: str, data: bytes) -> bytes:
    """Send bytes on a socket of their own; what comes back until the server closes or waits."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except TimeoutError:
            pass
    return received


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GARBAGE\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: x\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 99999999999\r\n\r\n{}", b"413"),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", b"403"),
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", b"400"),
        (b"GET /" + b"x" * 10_000 + b" " + HEAD[21:] + b"\r\n", b"404"),
    ],
    ids=["garbage", "length", "too long", "host", "no host", "head"],
)
def test_malformed_http(url: str, data: bytes, status: bytes) -> None:
    assert raw(url, data).split(b" ")[1] == status


def test_a_body_that_does_not_come(llama: Llama) -> None:
    with running(llama, read=0.3) as (_, url):
        start = time.monotonic()
        answer = raw(url, HEAD + b"Content-Length: 10\r\n\r\n{")
        assert answer.split(b" ")[1] == b"408"
        assert time.monotonic() - start < 8


def test_slow_sockets_do_not_stop_healthy_clients(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(200)]
    try:
        for connection in slow:
            connection.sendall(b"POST /v1/comp")
        for _ in range(5):
            response = httpx.post(
                f"{url}/v1/completions", json=good(MODEL)["/v1/completions"], timeout=10
            )
            assert response.status_code == 200
    finally:
        for connection in slow:
            connection.close()


def test_the_apis_own_description(url: str) -> None:
    """schemathesis makes requests from it, right and wrong ones, and checks the answers.

    A right one may be refused, because a schema does not know how many tokens a text has.
    """
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
    command += ["--exclude-checks", "positive_data_acceptance", "--max-examples", "15"]
    command += ["--seed", "1", "--request-timeout", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "6 selected / 6 total" in done.stdout
    assert httpx.get(f"{url}/health").status_code == 200
