"""What precision schedules are worth on a real nested checkpoint: `python benchmarks/schedules.py DIR [--prompts 112]`.

Prompts of the four local tasks, new text generated freely by every schedule, compared with the float model's own text, paired
over prompts. Texts are kept in the cache directory: a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from anybit.engine.lanes import LaneFeatures
from anybit.engine.schedule import BitsAccount, FixedSchedule
from anybit.engine.schedulers.confidence import ConfidenceSchedule
from anybit.engine.schedulers.head import Head
from anybit.engine.schedulers.learned import LearnedSchedule
from anybit.engine.schedulers.static import PARTS, candidates, grid, static
from anybit.evaluate.bootstrap import paired_bootstrap
from anybit.evaluate.schedules.batch import bits_of, run_scheduled
from anybit.evaluate.schedules.divergence import Plan, mean_divergence
from anybit.evaluate.schedules.labels import label_prompts
from anybit.evaluate.schedules.subject import Prompts, Runs, Subject
from anybit.evaluate.schedules.train import LOCAL, Settings, train_pair
from anybit.evaluate.schedules.tune import spell
from anybit.evaluate.tasks.find import find_task
from anybit.machine import machine

OUT = Path(__file__).parent / "results" / "schedules-smollm2.json"
CLASSES = range(PARTS + 1)


def tell(stage: str, done: int, total: int) -> None:
    """A line whenever a stage is done."""
    if done == total:
        print(f"{time.strftime('%H:%M:%S')} {stage}: {total}", file=sys.stderr, flush=True)


def mixed(subject: Subject, split: str, count: int, length: int) -> Prompts:
    """Prompts of all local tasks in equal shares, in a random order."""
    parts = [subject.prompts(find_task(name), split, count // len(LOCAL), length, progress=tell) for name in LOCAL]
    pairs = [(part, at) for part in parts for at in range(len(part.ids))]
    random.Random(0).shuffle(pairs)
    columns = ([getattr(part, name)[at] for part, at in pairs] for name in ("ids", "references", "reference_ids"))
    return Prompts(*columns, length)


def plans(chains: Sequence[tuple[int, int]], top: int, length: int) -> dict[str, Plan]:
    """Every fixed schedule that is run, by name: precision of the prompt, then of the decode steps."""
    found: dict[str, Plan] = {}

    def add(schedule: FixedSchedule, prefill: int) -> None:
        found[name(schedule, prefill)] = schedule, prefill

    add(static([top], []), top)
    for high, low in chains:
        for schedule in (*candidates((high, low), length), *halves(high, low, length)):
            add(schedule, high)
        add(static([low], []), low)
        add(static([high], []), low)
    if len(chains) > 1:
        for schedule in candidates(tuple(dict.fromkeys(itertools.chain(*chains))), length):
            add(schedule, chains[0][0])
    return found


def name(schedule: FixedSchedule, prefill: int) -> str:
    """`4 | 4@0,3@32`: prompt | decode steps."""
    return f"{prefill} | {spell(schedule)}"


def halves(high: int, low: int, length: int) -> tuple[FixedSchedule, FixedSchedule]:
    """High precision in the first half, and in the second: the same bits. Rising is only allowed here."""
    steps = length - 1
    return FixedSchedule(((0, high), (steps // 2, low))), FixedSchedule(((0, low), (steps - steps // 2, high)))


def row(subject: Subject, prompts: Prompts, runs: Runs, kl: Sequence[float] | None = None) -> dict[str, Any]:
    """JSON of one schedule: means, and the interval of ROUGE-L over prompts. Mixtures by chance have no texts."""
    zero = [0.0] * len(runs.rouge)
    spread = paired_bootstrap(runs.rouge, zero)
    steps = [[account.steps[t] for account in runs.bits if t < len(account.steps)] for t in range(prompts.length - 1)]
    return {
        "bits": runs.mean_bits,
        "bits_paper": runs.mean_bits_paper,
        "rouge": spread.mean,
        "rouge_low": spread.low,
        "rouge_high": spread.high,
        "tokens": float(np.mean(runs.tokens)),
        "vectors": float(np.mean(subject.vectors(prompts, runs))) if runs.texts else None,
        "kl": None if kl is None else float(np.mean(kl)),
        "bits_per_step": [round(float(np.mean(bits)), 3) for bits in steps if bits],
    }


def compare(what: str, a: Runs, b: Runs, kls: tuple[Sequence[float], Sequence[float]] | None = None) -> dict[str, Any]:
    """JSON of a - b, for every measure."""
    found = {"rouge": paired_bootstrap(a.rouge, b.rouge), "tokens": paired_bootstrap(a.tokens, b.tokens)}
    if kls is not None:
        found["kl"] = paired_bootstrap(*kls)
    numbers = {measure: asdict(d) | {"significant": d.significant} for measure, d in found.items()}
    return {"what": what, "bits": [a.mean_bits, b.mean_bits], **numbers}


def chosen(classes: Sequence[int], by_class: Sequence[Runs]) -> Runs:
    """The runs that a choice of class for every prompt gives."""
    pick = [by_class[c] for c in classes]
    parts = ([getattr(runs, part)[at] for at, runs in enumerate(pick)] for part in ("texts", "rouge", "tokens", "bits"))
    return Runs(*parts)


def expected(shares: Sequence[float], by_class: Sequence[Runs]) -> Runs:
    """What drawing classes by chance gives on average: exact, without drawing. Bits are repeated in proportion."""
    weights = np.asarray(shares) / np.sum(shares)
    rouge = sum(w * np.asarray(runs.rouge) for w, runs in zip(weights, by_class, strict=True))
    tokens = sum(w * np.asarray(runs.tokens) for w, runs in zip(weights, by_class, strict=True))
    bits = [account for w, runs in zip(weights, by_class, strict=True) for account in runs.bits * round(100 * w)]
    return Runs([], list(rouge), list(tokens), bits)


def learn(subject: Subject, prompts: Prompts, pair: tuple[int, int]) -> tuple[LearnedSchedule, dict[str, Any]]:
    """A trained schedule of one pair, and how training went."""
    examples = label_prompts(
        subject.lanes, prompts.ids, prompts.references, pair=pair, prefill=pair[0], limit=prompts.length,
        decode=subject.decode, progress=tell,
    )  # fmt: skip
    fitted = train_pair(examples, Settings(), trials=0)
    prior = [sum(example.label == c for example in examples) / len(examples) for c in CLASSES]
    return LearnedSchedule(pair, (Head.restore(fitted.tensors),), pair[0]), fitted.facts | {"prior": prior}


def classes_of(subject: Subject, prompts: Prompts, schedule: LearnedSchedule) -> list[int]:
    """What a trained schedule decides for each prompt."""
    found = []
    for ids in prompts.ids:
        subject.lanes.read(0, ids, schedule.prefill)
        found.append(schedule.start(LaneFeatures(subject.lanes, 0), prompts.length).data["classes"][0])
    return found


def confident(subject: Subject, prompts: Prompts, pair: tuple[int, int]) -> Runs:
    """The confidence baseline, one text at a time."""
    texts, bits = [], []
    for done, ids in enumerate(prompts.ids, start=1):
        text, state = run_scheduled(subject.lanes, ids, ConfidenceSchedule(pair), pair[0], prompts.length)
        texts.append(text)
        bits.append(BitsAccount(bits_of(text, state)))
        tell(f"confidence {pair}", done, len(prompts.ids))
    return subject.judge(prompts, texts, bits)


def tuned_class(subject: Subject, validation: Prompts, pair: tuple[int, int]) -> int:
    """The cheapest switch point that loses at most 2 % of ROUGE-L on the validation split."""
    top = subject.run(validation, static(pair[:1], []), pair[0], tell)
    for c in CLASSES:
        runs = subject.run(validation, at_class(pair, c, validation.length), pair[0], tell)
        if np.mean(runs.rouge) >= 0.98 * np.mean(top.rouge):
            return c
    return PARTS


def at_class(pair: tuple[int, int], c: int, length: int) -> FixedSchedule:
    """The static schedule of a class."""
    return static(pair[:1], []) if c == PARTS else static(pair, [grid(length)[c]])


def adaptive(
    subject: Subject, pair: tuple[int, int], train: Prompts, validation: Prompts, test: Prompts
) -> tuple[dict[str, Runs], dict[str, Any]]:
    """Learned, static, random, oracle and confidence of one pair on the test prompts, and facts of training."""
    by_class = [subject.run(test, at_class(pair, c, test.length), pair[0], tell) for c in CLASSES]
    schedule, facts = learn(subject, train, pair)
    classes = classes_of(subject, test, schedule)
    share = [classes.count(c) for c in CLASSES]
    best = [min(CLASSES, key=lambda c, at=at: (-by_class[c].rouge[at], c)) for at in range(len(test.ids))]  # type: ignore[misc]
    static_class = tuned_class(subject, validation, pair)
    runs = {
        "learned": chosen(classes, by_class),
        "static": by_class[static_class],
        "random uniform": expected([1] * len(CLASSES), by_class),
        "random prior": expected(facts["prior"], by_class),
        "random as learned": expected(share, by_class),
        "oracle": chosen(best, by_class),
        "confidence": confident(subject, test, pair),
        "always high": by_class[PARTS],
    }
    facts |= {
        "pair": list(pair),
        "test_classes": share,
        "static_class": static_class,
        "oracle_classes": [best.count(c) for c in CLASSES],
    }
    return runs, facts


def phase_comparisons(
    pair: tuple[int, int], length: int, runs: Mapping[str, Runs], kl: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """The questions about where precision goes."""
    high, low = pair
    early, late = (name(schedule, high) for schedule in halves(high, low, length))
    questions = [
        (f"prompt {high} decode {low}, against {low} throughout", f"{high} | {low}", f"{low} | {low}"),
        (f"prompt {low} decode {high}, against {low} throughout (control)", f"{low} | {high}", f"{low} | {low}"),
        (f"{high} in the first half, against {high} in the second", early, late),
        (
            f"prompt {high} decode {low}, against {high} throughout (one bit less)",
            f"{high} | {low}",
            f"{high} | {high}",
        ),
        (
            f"{high} for a third then {low}, against {high} throughout",
            name(at_class(pair, 1, length), high),
            f"{high} | {high}",
        ),
    ]
    return [compare(what, runs[a], runs[b], (kl[a], kl[b])) for what, a, b in questions]


def measure(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """Everything."""
    low = sorted((bits for bits in subject.lanes.precisions if bits <= 4), reverse=True)
    pairs = list(itertools.pairwise(low))
    length = options.length
    train, validation, test = (
        mixed(subject, split, count, length)
        for split, count in (("train", options.train), ("validation", options.validation), ("test", options.prompts))
    )
    todo = plans(pairs, max(subject.lanes.precisions), length)
    runs = {key: subject.run(test, schedule, prefill, tell, key) for key, (schedule, prefill) in todo.items()}
    part = slice(options.kl_prompts)
    kl = mean_divergence(subject.lanes, subject.float_model, test.ids[part], test.reference_ids[part], todo, tell)
    rows = [{"name": key, "group": "fixed", **row(subject, test, found, kl[key])} for key, found in runs.items()]
    comparisons, trained = [], []
    for pair in pairs:
        comparisons += phase_comparisons(pair, length, runs, kl)
        smart, facts = adaptive(subject, pair, train, validation, test)
        trained.append(facts)
        word = f"{pair[0]} to {pair[1]}"
        rows += [
            {"name": f"{kind}, {word}", "group": kind, **row(subject, test, found)} for kind, found in smart.items()
        ]
        comparisons += [
            compare(f"{word}: learned against {kind}", smart["learned"], found)
            for kind, found in smart.items()
            if kind != "learned"
        ]
    return {"prompts": len(test.ids), "kl_prompts": len(test.ids[part]), "train": len(train.ids), "length": length,
            "rows": rows, "comparisons": comparisons, "learned": trained}  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    for flag, default in (("prompts", 112), ("kl-prompts", 112), ("train", 160), ("validation", 48), ("length", 96)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    started = time.perf_counter()
    found = measure(Subject(options.directory), options)
    about = {
        "what": "schedules on " + ", ".join(LOCAL),
        "reference": "the float model's own greedy text",
        "machine": machine(),
    }
    about |= {"seconds": round(time.perf_counter() - started), "command": "python benchmarks/schedules.py DIR"}
    options.out.write_text(json.dumps(about | found, indent=1) + "\n")
    for line in found["comparisons"]:
        r = line["rouge"]
        interval = f"{r['mean']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]"
        print(f"{line['what']}: ROUGE-L {interval}, bits {line['bits'][0]:.2f} / {line['bits'][1]:.2f}")


if __name__ == "__main__":
    main()
