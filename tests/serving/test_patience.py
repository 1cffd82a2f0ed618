"""Clients that send nothing, read nothing or send very much harm nobody; a server that ends says so."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

httpx = pytest.importorskip("httpx", reason="tests of the server need httpx")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

PROMPT = "The quick brown fox"


def connect(server, sent=b""):
    client = socket.create_connection(("127.0.0.1", server.port))
    client.settimeout(10)
    client.sendall(sent)
    return client


def closed(client, seconds=5):
    """Whether the server hangs up in so long."""
    client.settimeout(seconds)
    with client:
        try:
            while client.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True


def head(body):
    lines = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{lines}\r\n\r\n".encode() + body


@pytest.fixture
def impatient(start, monkeypatch):
    monkeypatch.setattr("anybit.serving.connection.PATIENCE", 0.4)
    return start


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "])
def test_a_client_without_a_request_is_hung_up_on(sent, impatient):
    assert closed(connect(impatient(), sent))


def test_a_kept_connection_that_begins_a_request_and_stops_is_hung_up_on(impatient):
    server = impatient()
    client = connect(server, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert b"200 OK" in client.recv(1000)
    client.sendall(b"GET /hea")
    assert closed(client)


def test_many_silent_clients_make_room_for_others(impatient, monkeypatch):
    monkeypatch.setattr("anybit.serving.run.CONNECTIONS", 8)
    server = impatient()
    silent = [connect(server) for _ in range(8)]
    assert httpx.get(f"{server.url}/health").status_code == 503
    deadline = time.monotonic() + 5
    while httpx.get(f"{server.url}/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert all(map(closed, silent))


def slowed(server, seconds=0.004):
    """A server whose model takes at least so long for a turn."""
    turn = server.engine._turn

    def late():
        time.sleep(seconds)
        turn()

    server.engine._turn = late
    return server


def test_whoever_waits_for_the_model_is_not_hung_up_on(impatient):
    server, body = slowed(impatient(slots=1), 0.008), {"prompt": PROMPT, "max_tokens": 200, "temperature": 0}
    threads = [threading.Thread(target=httpx.post, args=(f"{server.url}/v1/completions",), kwargs={"json": body, "timeout": 60})
               for _ in range(2)]  # fmt: skip
    for thread in threads:
        thread.start()
    while server.engine.stats().running + server.engine.stats().waiting < 2:
        time.sleep(0.001)
    waited = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    for thread in threads:
        thread.join()
    assert waited.json()["usage"]["completion_tokens"] == 200


def reluctant(server, choices=4):
    """A client that asks for megabytes and reads none of them."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    body = {"prompt": [PROMPT] * 4, "n": choices, "max_tokens": 480, "stream": True, "logprobs": 20}
    client.sendall(head(json.dumps(body).encode()))
    while not server.engine.stats().generated_tokens:
        time.sleep(0.001)
    return client


def test_a_client_that_does_not_read_is_forgotten(impatient):
    server = slowed(impatient())
    client = reluctant(server)
    assert server.idle(60).generated_tokens < 16 * 480
    client.close()


def test_a_long_text_stops_no_other(server):
    worst, over = 0.0, threading.Event()

    def watch():
        nonlocal worst
        with httpx.Client() as client:
            while not over.is_set():
                began = time.monotonic()
                assert client.get(f"{server.url}/health").status_code == 200
                worst = max(worst, time.monotonic() - began)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    long = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT * 100_000}, timeout=120)
    seconds = time.monotonic() - began
    over.set()
    watcher.join()
    assert long.status_code == 400
    assert "exceed the context" in long.json()["error"]["message"]
    assert worst < max(0.5, seconds / 3)


def test_while_it_drains_what_is_new_is_refused_and_what_was_accepted_is_answered(start):
    server = slowed(start())
    body = {"prompt": PROMPT, "max_tokens": 480, "temperature": 0}
    streamed = []

    def stream():
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=60) as answer:
            streamed.extend(line for line in answer.iter_lines() if line)

    reader = threading.Thread(target=stream)
    reader.start()
    while not server.engine.stats().generated_tokens:
        time.sleep(0.001)
    server.end()
    while server.engine.accepting:
        time.sleep(0.001)
    late = httpx.post(f"{server.url}/v1/completions", json=body)
    health = httpx.get(f"{server.url}/health")
    reader.join()
    assert (late.status_code, health.status_code) == (503, 503)
    assert late.headers["retry-after"]
    assert late.json()["error"]["code"] == "unavailable"
    assert health.json()["status"] == "draining"
    assert streamed[-1] == "data: [DONE]"
    assert server.engine.stats().generated_tokens == 480
    assert server.ended()


def test_a_client_that_does_not_read_cannot_keep_it_from_ending(start, monkeypatch):
    monkeypatch.setattr("anybit.serving.run.READ_SECONDS", 1)
    monkeypatch.setattr("anybit.serving.connection.PATIENCE", 600)
    server = start(tokens=16384, slots=16)
    client = reluctant(server)
    server.end()
    assert server.ended(60)
    client.close()


def test_a_second_signal_waits_for_nobody(start, caplog):
    server = slowed(start(), 0.3)  # the loop is closed before a turn is over
    client = connect(server, head(json.dumps({"prompt": PROMPT, "max_tokens": 480}).encode()))
    while not server.engine.stats().generated_tokens:
        time.sleep(0.001)
    server.end()
    server.end()
    assert server.ended(5)
    server.engine.close()
    assert server.engine.stats().generated_tokens < 480
    assert "receiver failed" not in caplog.text
    client.close()


def test_the_address_that_is_told_takes_connections_at_once(nested_checkpoint):
    site = ["-S"] if sys.flags.no_site else []
    command = [
        sys.executable,
        *site,
        "-m",
        "anybit.cli",
        "serve",
        str(nested_checkpoint),
        "--port",
        "0",
        "--threads",
        "1",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        assert httpx.get(f"{re.search('http://[^ ]+', line)[0]}/health", timeout=30).status_code == 200
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stderr.close()


def test_an_empty_key_is_refused(nested_checkpoint, capsys):
    from anybit.cli import main

    assert main(["serve", str(nested_checkpoint), "--port", "0", "--api-key", ""]) == 2
    assert "is empty" in capsys.readouterr().err
