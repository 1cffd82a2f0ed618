"""Drafting changes no token, and how much faster it is: many prompts for the first, few and longer ones for the second.

    python benchmarks/drafting.py CHECKPOINT [--nested] [--prompts 2000] [--timed 24] [--out FILE]

Half of the prompts are openings of wiki articles, half ask for copies: quotes, lists that go on, code with one name changed. The
identity run counts tokens that differ from plain decoding, greedy for even prompts and sampled for odd ones. The timed run makes
the same text in turn with each drafter and reports the median over prompts of plain time / drafted time.
`--nested` measures `self` on a nested checkpoint, against plain decoding at its highest precision.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anybit.calibration.text import read_documents
from anybit.engine.generate import GenerationResult, generate
from anybit.engine.open import open_engine
from anybit.machine import machine

KINDS = ("open", "copy")
SHORT, LONG, ROUNDS = 24, 96, 3


def prompts(count: int, seed: int, length: int = 40) -> list[tuple[str, str]]:
    """(kind, prompt), kinds in turn; `length`: words there are to copy."""
    draw, articles = random.Random(seed), read_documents("wiki")
    return [
        (KINDS[at % 2], _open(draw, articles) if at % 2 == 0 else _copy(draw, articles, length)) for at in range(count)
    ]


def _words(draw: random.Random, articles: Sequence[str], count: int) -> str:
    words = draw.choice(articles).split()
    first = draw.randrange(max(1, len(words) - count))
    return " ".join(words[first : first + count])


def _open(draw: random.Random, articles: Sequence[str]) -> str:
    return _words(draw, articles, draw.randrange(8, 40))


def _copy(draw: random.Random, articles: Sequence[str], length: int) -> str:
    passage = _words(draw, articles, length)
    kind = draw.randrange(3)
    if kind == 0:
        begun = " ".join(passage.split()[:8])
        return f'Here is a text:\n"{passage}"\n\nHere is the same text, quoted word for word:\n"{begun}'
    if kind == 1:
        items = passage.split()[: length // 3]
        lines = "\n".join(f"{at + 1}. The word is {word}." for at, word in enumerate(items))
        return f"{lines}\n\nThe same list again:\n1. The word is {items[0]}.\n2. The word is"
    names = [word.strip(".,()'\"").lower() or "item" for word in passage.split()[: length // 8]]
    body = "\n".join(f"    total = total + load_{name}(path, size)" for name in names)
    return (
        f"def first(path, size):\n    total = 0\n{body}\n    return total\n\ndef second(path, size):\n    total = 0\n"
    )


class Bench:
    """One checkpoint with the drafters it can have."""

    def __init__(self, directory: Path, drafts: Sequence[str]) -> None:
        self.model, self.tokenizer = open_engine(directory, "native")
        self.drafts = drafts

    def run(self, prompt: str, draft: str, tokens: int, **sampling: Any) -> GenerationResult:
        """One text."""
        return generate(self.model, self.tokenizer, prompt, max_new_tokens=tokens, draft=draft, **sampling)

    def identity(self, asked: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Tokens that differ from plain decoding, and what was accepted at each place of a guess."""
        rows = {draft: {"differing_tokens": 0, "drafted": 0, "accepted": 0, "places": []} for draft in self.drafts}
        total = 0
        for at, (_, prompt) in enumerate(asked):
            sampling = {"temperature": 0.8 * (at // 2 % 2), "seed": at}  # of both kinds
            plain = self.run(prompt, "none", SHORT, **sampling).token_ids
            total += len(plain)
            for draft, row in rows.items():
                result = self.run(prompt, draft, SHORT, **sampling)
                same = sum(a == b for a, b in zip(plain, result.token_ids, strict=False))
                row["differing_tokens"] += max(len(plain), len(result.token_ids)) - same
                row["drafted"] += result.drafted
                row["accepted"] += result.accepted
                row["places"] = _added(row["places"], result.accepted_at)
        return {"prompts": len(asked), "tokens": total, "drafts": rows}

    def speed(self, asked: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """Median over prompts of plain time / drafted time, the best of some rounds each, in turn."""
        rows = []
        for kind in KINDS:
            found: dict[str, list[float]] = {draft: [] for draft in self.drafts}
            passes: dict[str, list[float]] = {draft: [] for draft in self.drafts}
            for _, prompt in (one for one in asked if one[0] == kind):
                times: dict[str, list[float]] = {draft: [] for draft in ("none", *self.drafts)}
                for _ in range(ROUNDS):
                    for draft in times:
                        result = self.run(prompt, draft, LONG)
                        if result.tokens > 1:
                            times[draft].append(1 / result.decode_tokens_per_second)
                            if draft != "none":
                                passes[draft].append((result.tokens - 1) / result.passes)
                for draft in self.drafts:
                    if times[draft]:
                        found[draft].append(min(times["none"]) / min(times[draft]))
            rows += [_row(kind, draft, found[draft], passes[draft]) for draft in self.drafts if found[draft]]
        return rows


def _row(kind: str, draft: str, ratios: list[float], passes: list[float]) -> dict[str, Any]:
    return {
        "kind": kind,
        "draft": draft,
        "prompts": len(ratios),
        "speed_up": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "below_0.98": sum(ratio < 0.98 for ratio in ratios),
        "tokens_per_pass": round(statistics.mean(passes), 3),
    }


def _added(places: Sequence[Sequence[int]], more: Sequence[tuple[int, int]]) -> list[list[int]]:
    if not places:
        return [list(pair) for pair in more]
    return [[a[0] + b[0], a[1] + b[1]] for a, b in zip(places, more, strict=True)]


def main() -> None:
    """Measure, print, and write or complete the JSON: each part replaces the same part of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--nested", action="store_true", help="draft with lower bits of the same checkpoint, too")
    parser.add_argument("--prompts", type=int, default=2000, help="of the identity run; 0 leaves it out")
    parser.add_argument("--timed", type=int, default=24, help="prompts of the timed run; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/drafting-smollm2.json"))
    asked = parser.parse_args()
    bench = Bench(asked.checkpoint, ["self"] if asked.nested else ["ngram", "lookup"])
    part: dict[str, Any] = {"machine": machine()}
    if asked.prompts:
        part["identity"] = bench.identity(prompts(asked.prompts, 0))
    if asked.timed:
        part["speed"] = bench.speed(prompts(asked.timed, 1, length=LONG))
    print(json.dumps(part, indent=1))
    data = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    name = "self" if asked.nested else "copying"
    data[name] = data.get(name, {}) | part
    asked.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
