"""`anybit serve` under load: many clients that stream at once, each answer compared with what it is alone.

    python benchmarks/serving.py CHECKPOINT [--clients 64] [--seconds 300] [--tokens 64] [--out FILE]

Starts the server as a process. First every one of 64 questions is asked alone, one after the other, which gives the expected
answers and the speed of one at a time; then the clients ask them for `--seconds`, each its own in a shuffled order. Reported:
streams that were lost, incomplete or differ; first-token and token-to-token times (median, 99 %); memory of the server after a
fifth of the time and at the end; tokens a second beside one at a time, measured before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from anybit.calibration.text import read_documents
from anybit.machine import machine

QUESTIONS = 64


@dataclass
class Seen:
    """What the clients saw."""

    tokens: int = 0
    streams: int = 0
    wrong: int = 0
    lost: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


def questions() -> list[str]:
    """Openings of articles, of different lengths."""
    draw, articles = random.Random(0), read_documents("wiki-test")
    return [" ".join(draw.choice(articles).split()[: draw.randrange(8, 96)]) for _ in range(QUESTIONS)]


async def ask(client: httpx.AsyncClient, prompt: str, tokens: int, seen: Seen) -> str:
    """One streamed answer."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    began = last = time.perf_counter()
    text, ended = "", False
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if not line:
                continue
            if line == "data: [DONE]":
                ended = True
                continue
            now, event = time.perf_counter(), json.loads(line.removeprefix("data: "))
            (seen.first if last == began else seen.gaps).append(now - last)
            last, text = now, text + event["choices"][0]["text"]
            seen.tokens += len(event["anybit"]["bits"])
    seen.lost += not ended
    seen.streams += 1
    return text


async def alone(url: str, prompts: list[str], tokens: int) -> tuple[list[str], float]:
    """The answers one after the other, and tokens a second."""
    seen, began = Seen(), time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        answers = [await ask(client, prompt, tokens, seen) for prompt in prompts]
    return answers, seen.tokens / (time.perf_counter() - began)


async def crowd(
    url: str, prompts: list[str], expected: list[str], asked: argparse.Namespace, pid: int
) -> dict[str, Any]:
    """Many clients at once."""
    seen, end = Seen(), time.perf_counter() + asked.seconds
    memory: list[int] = []

    async def client(number: int) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            while time.perf_counter() < end:
                at = draw.randrange(len(prompts))
                seen.wrong += await ask(client, prompts[at], asked.tokens, seen) != expected[at]

    async def watch() -> None:
        while time.perf_counter() < end:
            memory.append(resident(pid))
            await asyncio.sleep(1)

    began = time.perf_counter()
    await asyncio.gather(watch(), *(client(number) for number in range(asked.clients)))
    rate = seen.tokens / (time.perf_counter() - began)
    percent = {f"{name}_p{p}_ms": round(1000 * quantile(found, p / 100), 1)
               for name, found in (("first_token", seen.first), ("between_tokens", seen.gaps)) for p in (50, 99)}  # fmt: skip
    early = max(memory[: max(1, len(memory) // 5)])
    return {"streams": seen.streams, "wrong": seen.wrong, "lost": seen.lost, "tokens_per_second": round(rate, 1), **percent,
            "resident_mb": {"first_fifth": early >> 20, "end": memory[-1] >> 20}}  # fmt: skip


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def resident(pid: int) -> int:
    """Bytes of memory a process holds."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) << 10 if found else 0


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    command = [sys.executable, "-m", "anybit.cli", "serve", str(asked.checkpoint), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr
    line = server.stderr.readline()
    url, prompts = re.findall(r"http://\S+", line)[0], questions()
    try:
        expected, before = asyncio.run(alone(url, prompts, asked.tokens))
        found = asyncio.run(crowd(url, prompts, expected, asked, server.pid))
        again, after = asyncio.run(alone(url, prompts, asked.tokens))
    finally:
        server.terminate()
    one = statistics.mean((before, after))
    result = {"what": f"{asked.clients} clients, {asked.seconds:g} s, {asked.tokens} tokens an answer", **found}
    result |= {
        "one_at_a_time": [round(before, 1), round(after, 1)],
        "over_one": round(found["tokens_per_second"] / one, 2),
    }
    result |= {"same_alone_afterwards": again == expected, "exit_code": server.wait(), "machine": machine()}
    result |= {"command": "python benchmarks/serving.py CHECKPOINT", "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    print(json.dumps(result, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
