"""The server's answers against the engine alone, and its refusals."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

httpx = pytest.importorskip("httpx", reason="tests of the server need httpx")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from anybit.engine.generate import generate  # noqa: E402
from anybit.engine.native import NativeModel  # noqa: E402
from anybit.engine.tokenizer import open_tokenizer  # noqa: E402

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def alone(nested_checkpoint):
    model = NativeModel.open(nested_checkpoint, verify=False, max_tokens=512)
    model.end_ids = frozenset()
    tokenizer = open_tokenizer(nested_checkpoint)
    tokenizer.eos_token_id = None
    return lambda prompt, count, **options: generate(model, tokenizer, prompt, max_new_tokens=count, **options)


def post(server, path="completions", **body):
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)


def events(server, path="completions", **body):
    with httpx.stream("POST", f"{server.url}/v1/{path}", json=body | {"stream": True}, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def until(condition, seconds=20):
    """Wait for something that other threads bring about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.001)


@pytest.mark.parametrize("options", [{}, {"draft": "ngram"}, {"schedule": "8@0,4@7,3@20"}, {"precision": 4}])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 11}])
def test_an_answer_is_what_the_engine_says_alone(options, sampling, server, alone):
    wanted = dict(options)
    if "precision" in wanted:
        wanted = {"prefill_precision": 4, "schedule": "4"}
    expected = alone(PROMPT, 40, **wanted, **sampling)
    body = {"prompt": PROMPT, "max_tokens": 40, **options, **sampling}
    answer = post(server, **body).json()
    assert answer["choices"][0]["text"] == expected.text
    assert answer["usage"]["completion_tokens"] == 40
    assert answer["usage"]["prompt_tokens"] == expected.prompt_tokens
    histogram = {str(bits): count for bits, count in expected.bits.histogram.items()}
    first = str(wanted.get("prefill_precision", 8))
    histogram[first] = histogram.get(first, 0) + 1
    assert answer["anybit"]["bits"] == histogram
    streamed = events(server, **body, stream_options={"include_usage": True})
    assert "".join(event["choices"][0]["text"] for event in streamed[:-1]) == expected.text
    assert streamed[-1]["usage"]["completion_tokens"] == 40
    assert sum(len(event["anybit"]["bits"]) for event in streamed[:-1]) == 40


def test_a_conversation(server, alone):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    text = "<system>Be kind.<user>Hi<assistant>"
    expected = alone(text, 20).text
    body = {"messages": messages, "max_completion_tokens": 20, "temperature": 0}
    answer = post(server, "chat/completions", **body, logprobs=True, top_logprobs=2).json()
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["content"]) == 20
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] < 0 for entry in choice["logprobs"]["content"])
    chunks = [event["choices"][0] for event in events(server, "chat/completions", **body)]
    assert chunks[0]["delta"]["role"] == "assistant"
    assert "".join(chunk["delta"]["content"] for chunk in chunks) == expected
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_stop_strings_are_never_seen(server, alone):
    text = alone(PROMPT, 40).text
    for stop in [text[12:15], text[5], [text[20:23], text[9:12]], text[-2:], "never said"]:
        stops = [stop] if isinstance(stop, str) else stop
        cut = min((place for one in stops if (place := text.find(one)) >= 0), default=len(text))
        body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stop": stop}
        choice = post(server, **body).json()["choices"][0]
        assert choice["text"] == text[:cut]
        assert choice["finish_reason"] == ("length" if cut == len(text) else "stop")
        assert "".join(event["choices"][0]["text"] for event in events(server, **body)) == text[:cut]
    assert server.idle().running == 0


def test_several_prompts_and_choices(server, alone):
    body = {"prompt": [PROMPT, "jumps over"], "n": 2, "seed": 5, "temperature": 0.8, "max_tokens": 10}
    choices = post(server, **body).json()["choices"]
    expected = [alone(prompt, 10, temperature=0.8, seed=seed).text for prompt in body["prompt"] for seed in (5, 6)]
    assert [choice["text"] for choice in choices] == expected
    streamed = {}
    for event in events(server, **body):
        choice = event["choices"][0]
        streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
    assert [streamed[at] for at in range(4)] == expected
    ids = [open_tokenizer(server.service.directory)(prompt)["input_ids"] for prompt in body["prompt"]]
    assert [c["text"] for c in post(server, **body | {"prompt": ids}).json()["choices"]] == expected


def test_a_prompt_counts_as_cached_if_it_was_before_the_request(start):
    """Choices that share one count it once, so what they find of each other's does not count."""
    fresh = start()
    body = {"prompt": "seven words that nobody has said before " * 6, "max_tokens": 2, "n": 3}
    usages = [post(fresh, **body).json()["usage"] for _ in range(2)]
    assert usages[0]["prompt_tokens"] == usages[1]["prompt_tokens"] > 64
    assert usages[0]["prompt_tokens_details"]["cached_tokens"] == 0
    assert 0 < usages[1]["prompt_tokens_details"]["cached_tokens"] < usages[1]["prompt_tokens"]


def test_echo_gives_the_prompt_its_probabilities(server):
    body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 1}
    found = post(server, **body).json()["choices"][0]
    ids = server.tokenizer(PROMPT)["input_ids"]
    logprobs = found["logprobs"]
    assert found["text"].startswith(PROMPT)
    assert len(logprobs["tokens"]) == len(ids) + 3 == len(logprobs["text_offset"])
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    prompt_only = post(server, **body | {"max_tokens": 0}).json()["choices"][0]
    assert prompt_only["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][: len(ids)]
    only = post(server, prompt=PROMPT, max_tokens=0, echo=True).json()
    assert (only["choices"][0]["text"], only["choices"][0]["logprobs"]) == (PROMPT, None)
    assert only["usage"]["total_tokens"] == len(ids)
    for bad in (-1, 10**9, 2**40):
        refused = post(server, prompt=[bad], max_tokens=0, echo=True)
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("completions", {"prompt": PROMPT, "model": "gpt-4"}, 404, "not served here"),
        ("completions", {"prompt": PROMPT, "max_tokens": 4000}, 400, "exceed the context of 512"),
        ("completions", {"prompt": ""}, 400, "prompt is empty"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": [10**9]}, 400, "is not one of this model's"),
        ("completions", {"prompt": PROMPT, "precision": 7}, 400, "this checkpoint holds"),
        ("completions", {"prompt": PROMPT, "schedule": "2@0,4@9"}, 400, "may only fall"),
        ("completions", {"prompt": PROMPT, "schedule": "task:../../x"}, 400, "not tuned here"),
        ("completions", {"prompt": PROMPT, "schedule": "/etc/passwd.json"}, 400, "opens no files"),
        ("completions", {"prompt": PROMPT, "draft": "self"}, 400, "draft"),
        ("completions", {"prompt": PROMPT, "suffix": "x"}, 400, "suffix"),
        ("completions", {"prompt": PROMPT, "best_of": 3}, 400, "best_of"),
        ("completions", {"prompt": PROMPT, "n": 99}, 400, "n:"),
        ("completions", {"prompt": PROMPT, "min_p": 0.1}, 400, "min_p: Extra inputs are not permitted; remove it"),
        ("completions", {"prompt": PROMPT, "logit_bias": {"a": 1}}, 400, "token ids"),
        ("completions", {"prompt": PROMPT, "temperature": -1}, 400, "temperature"),
        ("completions", {}, 400, "prompt: Field required"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, 400, "role"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 600}]}, 400, "context is 512"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, 400, "logprobs: true"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}],
                              "response_format": {"type": "json_object"}}, 400, "response_format"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said(path, body, status, words, stream, server):
    answer = post(server, path, **body, stream=stream)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("completions", {}, "prompt", "required"),
        ("completions", {"prompt": 3}, "prompt", "valid"),
        ("completions", {"prompt": []}, "prompt", "at least 1 item"),
        ("completions", {"prompt": [[1, 2], [1, "a"]]}, "prompt.1.1", "valid integer"),
        ("completions", {"prompt": "a", "stop": ["x", ""]}, "stop.1", "at least 1 character"),
        ("completions", {"prompt": "a", "stop": ["x"] * 9}, "stop", "at most 8 items"),
        ("completions", {"prompt": "a", "min_p": 1}, "min_p", "remove it"),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "valid"),
        ("chat/completions", {"messages": [{"content": "x"}]}, "messages.0.role", "required"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
         "messages.0.content.0.type", "'text'"),
    ],
)  # fmt: skip
def test_the_field_that_is_wrong_is_named(path, body, param, words, server):
    error = post(server, path, **body).json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"prompt": "\\ud800"}', b'{"prompt": "a", "\\udc00": 1}', b"\xff\xfe", b"1" * 100],
)
def test_bytes_that_are_no_request(body, server):
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["message"]


def test_key_host_and_size(start):
    closed = start(key="s3cret", body_bytes=2000, body_seconds=0.3)
    body = {"prompt": PROMPT, "max_tokens": 2}
    assert post(closed, **body).status_code == 401
    for path in ("/v1/models", "/metrics"):
        assert httpx.get(closed.url + path).status_code == 401
        assert httpx.get(closed.url + path, headers={"Authorization": "Bearer s3cret"}).status_code == 200
    assert httpx.get(f"{closed.url}/health").status_code == 200
    bearer = {"Authorization": "Bearer s3cret"}
    assert httpx.get(f"{closed.url}/health", headers={"Host": "evil.example"}).status_code == 403
    large = httpx.post(f"{closed.url}/v1/completions", json=body | {"prompt": "x" * 3000}, headers=bearer)
    assert large.status_code == 413

    def chunks():
        for _ in range(30):
            yield b"x" * 100

    assert httpx.post(f"{closed.url}/v1/completions", content=chunks(), headers=bearer).status_code == 413
    with socket.create_connection(("127.0.0.1", closed.port)) as slow:
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer s3cret\r\nContent-Length: 50\r\n\r\n{"
        slow.sendall(head.encode())
        assert b"408" in slow.recv(1000)
    assert httpx.post(f"{closed.url}/v1/completions", json=body, headers=bearer).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_forgotten(stream, server):
    before = server.idle().generated_tokens
    body = json.dumps({"prompt": PROMPT, "max_tokens": 480, "temperature": 0, "stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + body)
        while server.engine.stats().generated_tokens < before + 5:
            time.sleep(0.001)
    stats = server.idle()
    assert stats.generated_tokens < before + 480


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_while_it_waits_keeps_no_place(stream, start):
    """Its stream has not begun."""
    small = start(slots=1)
    long = {"prompt": PROMPT, "max_tokens": 450, "temperature": 0}
    first = threading.Thread(target=lambda: post(small, **long))
    first.start()
    until(lambda: small.engine.stats().running)
    body = json.dumps(long | {"stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", small.port)) as client:
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        until(lambda: small.engine.stats().waiting)
    until(lambda: not small.engine.stats().waiting)
    assert small.engine.stats().running, "the text before it is too short for this test"
    first.join()
    assert small.idle().generated_tokens == 450


def test_a_bug_is_an_error_of_the_same_shape_and_counted(start, monkeypatch, caplog):
    broken = start()
    monkeypatch.setattr(type(broken.service), "request", lambda *_, **__: 1 / 0)
    answer = post(broken, prompt=PROMPT)
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "the server failed; see its log", "type": "server_error", "param": None, "code": None
    }  # fmt: skip
    assert "ZeroDivisionError" in caplog.text
    assert 'status="500"} 1.0' in httpx.get(f"{broken.url}/metrics").text


def test_what_a_template_cannot_do_with_a_conversation_is_the_clients_error(start, monkeypatch):
    server = start()
    monkeypatch.setattr(
        server.tokenizer, "chat_template", "{% for k, v in tools[0].function.parameters|items %}{% endfor %}"
    )
    tool = {"type": "function", "function": {"name": "x", "parameters": 5}}
    answer = post(server, "chat/completions", messages=[{"role": "user", "content": "x"}], tools=[tool])
    assert answer.status_code == 400
    assert "refuses this conversation" in answer.json()["error"]["message"]


def test_too_many_wait(start):
    small = start(slots=1, max_waiting=2)
    statuses, kinds, lock = [], set(), threading.Lock()

    def ask():
        answer = post(small, prompt=PROMPT, max_tokens=400, temperature=0)
        with lock:
            statuses.append((answer.status_code, answer.headers.get("retry-after")))
            if answer.status_code == 429:
                kinds.add((answer.json()["error"]["type"], answer.json()["error"]["code"]))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {(200, None), (429, "1")}
    assert statuses.count((200, None)) >= 3
    assert kinds == {("requests", "rate_limit_exceeded")}
    small.idle()


def test_models_health_metrics(server):
    models = httpx.get(f"{server.url}/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["tiny"]
    assert httpx.get(f"{server.url}/v1/models/tiny").json()["anybit"]["context"] == 512
    assert httpx.get(f"{server.url}/v1/models/other").status_code == 404
    assert httpx.get(f"{server.url}/nothing").json()["error"]["message"] == "Not Found"
    post(server, prompt=PROMPT, max_tokens=3, precision=4)
    text = httpx.get(f"{server.url}/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines["anybit_generated_tokens_total"]) == server.engine.stats().generated_tokens
    assert float(lines['anybit_tokens_by_bits_total{bits="4"}']) >= 3
    assert float(lines['anybit_answers_total{route="/v1/models",status="200"}']) >= 1
    assert float(lines["anybit_first_token_seconds_count"]) >= 1


def test_tools(server):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "temperature": 0}
    with_tool = post(server, "chat/completions", **body, tools=[tool]).json()
    assert (
        with_tool["usage"]["prompt_tokens"]
        == post(server, "chat/completions", **body).json()["usage"]["prompt_tokens"] + 9
    )
    assert events(server, "chat/completions", **body, tools=[tool])


def test_arguments_of_earlier_tool_calls_reach_the_template_as_objects():
    from anybit.serving.schemas import Message

    def seen(arguments):
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        message = Message(role="assistant", content=None, tool_calls=[call])
        return message.as_template()["tool_calls"][0]["function"]["arguments"]

    assert seen('{"city": "Köln"}') == {"city": "Köln"}
    assert seen({"city": "Köln"}) == {"city": "Köln"}
    assert seen("{broken") == "{broken"
