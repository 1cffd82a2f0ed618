"""Clients that people have: OpenAI's, LangChain's, a browser; a fuzzer; and the command itself, stopped under load."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="tests of the server need httpx")

from tiny_checkpoints import quantize_tiny  # noqa: E402

BODY = {"prompt": "The quick", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def expected(server):
    return httpx.post(f"{server.url}/v1/completions", json=BODY).json()["choices"][0]["text"]


def test_the_openai_client(server, expected):
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.completions.create(model="tiny", **BODY).choices[0].text == expected
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
    answer = client.chat.completions.create(**chat, logprobs=True, top_logprobs=1, n=2)
    text = answer.choices[0].message.content
    assert answer.choices[1].message.content == text
    assert len(answer.choices[0].logprobs.content) == 8
    assert answer.usage.completion_tokens == 16
    chunks = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == 8
    low = client.chat.completions.create(**chat, extra_body={"schedule": "8@0,4@2", "draft": "ngram"})
    assert low.model_extra["anybit"]["bits"] == {"8": 3, "4": 5}
    with pytest.raises(openai.BadRequestError, match="this checkpoint holds"):
        client.chat.completions.create(**chat, extra_body={"precision": 7})
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.completions.create(**BODY | {"model": "gpt"})


def test_langchain(server):
    langchain = pytest.importorskip("langchain_openai", reason="LangChain's OpenAI client is not installed")
    chat = langchain.ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="tiny", temperature=0, max_tokens=8)
    said = chat.invoke("Hi").content
    assert said
    assert "".join(chunk.content for chunk in chat.stream("Hi")) == said


def test_no_request_breaks_the_server(server):
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/completions", "/v1/chat/completions", "/v1/models"}
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
        def ask(case):
            answer = case.call(timeout=60)
            assert answer.status_code < 500, answer.text

        ask()


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    out = quantize_tiny("llama", tmp_path_factory.mktemp("command"), config={"max_position_embeddings": 2048})
    site = ["-S"] if sys.flags.no_site else []
    return [
        sys.executable,
        *site,
        "-m",
        "anybit.cli",
        "serve",
        str(out),
        "--port",
        "0",
        "--name",
        "tiny",
        "--threads",
        "1",
    ]


@pytest.fixture(scope="module")
def process(command):
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    line = server.stderr.readline()
    assert "serving tiny" in line, line
    yield server, re.search(r"http://\S+", line)[0]
    server.kill()
    server.communicate()


def test_stopping_loses_nothing_that_was_accepted(process):
    server, url = process
    answers = []

    def ask(seed):
        body = {"prompt": f"{seed} fox", "max_tokens": 1200, "temperature": 0, "stream": seed % 2 == 0}
        answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(20)]
    for thread in threads:
        thread.start()
    accepted = 0.0
    while accepted < 20:  # on a busy machine the first may be answered before the last has come
        answered, metrics = len(answers), httpx.get(f"{url}/metrics").text
        running = sum(float(v) for v in re.findall(r"^anybit_(?:running|waiting) (\S+)$", metrics, re.MULTILINE))
        accepted = running + answered
    assert running > 0, "the texts are too short for this test"
    server.send_signal(signal.SIGTERM)
    while httpx.get(f"{url}/health").status_code == 200:
        assert len(answers) < 20, "the texts are too short for this test"
    late = httpx.post(f"{url}/v1/completions", json=BODY)
    assert (late.status_code, late.headers["retry-after"]) == (503, "1")
    for thread in threads:
        thread.join()
    assert len(answers) == 20
    for answer in answers:
        assert answer.status_code == 200
        assert "data: [DONE]" in answer.text or answer.json()["usage"]["completion_tokens"] == 1200
    assert server.wait(20) == 0
    assert server.stderr.read() == ""


def test_what_the_command_refuses(command, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [*command[: command.index("serve") + 1], *arguments], capture_output=True, text=True, timeout=60
        )

    missing = run(str(tmp_path / "nothing"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = run(command[command.index("serve") + 1], "--port", str(other.getsockname()[1]))
    assert (missing.returncode, taken.returncode) == (2, 2)
    assert "no such directory" in missing.stderr
    assert "choose another" in taken.stderr
