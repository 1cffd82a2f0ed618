"""Speed of checkpoints with quantized activations beside weight-only ones and torch bfloat16, in turns; ratios within a turn.

Run: python benchmarks/activations_speed.py FLOAT_MODEL NAME=CHECKPOINT... [--rounds N] [--torch] [--json FILE]
Results of several runs with one FILE are put together: a short run disturbs a shared machine less than a long one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from anybit.evaluate.ours import open_ours
from anybit.evaluate.rivals.contract import Contestant, RivalFailed, Speed
from anybit.evaluate.rivals.torch_bf16 import TorchBf16
from anybit.evaluate.rounds import ratios, spread, take_turns
from anybit.machine import machine

PROMPT, NEW = 512, 16


def main() -> None:
    """Measure, put the rounds beside those of earlier runs, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoints", nargs="+", help="name=directory; the first is what ratios are of")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch", action="store_true", help="torch bfloat16 too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    named = dict(each.split("=", 1) for each in options.checkpoints)
    players: dict[str, Contestant] = {name: open_ours(Path(path), options.threads) for name, path in named.items()}
    labels = {name: player.label for name, player in players.items()}
    if slow := [name for name, label in labels.items() if label != "anybit native"]:
        raise SystemExit(f"{slow[0]} does not run in the native decoder")
    if options.torch:
        players["torch-bf16"] = TorchBf16().start(options.model, options.threads)
    calls = {name: (lambda player=player: player.measure(PROMPT, NEW)) for name, player in players.items()}
    found = take_turns(calls, options.rounds, lambda name, error: print(name, error), RivalFailed)
    runs = [*_earlier(options.json), {name: [asdict(speed) for speed in speeds] for name, speeds in found.items()}]
    report = {
        "prompt": PROMPT,
        "threads": options.threads,
        "megabytes": {name: round(player.weight_bytes / 1e6) for name, player in players.items()},
        "machine": machine(),
        **_summary(runs),
        "runs": runs,
    }
    print(json.dumps({key: value for key, value in report.items() if key != "runs"}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    for player in players.values():
        player.close()


def _earlier(path: Path | None) -> list[dict[str, list[dict[str, float]]]]:
    return list(json.loads(path.read_text())["runs"]) if path and path.exists() else []


def _summary(runs: list[dict[str, list[dict[str, float]]]]) -> dict[str, object]:
    """Medians in tokens a second, and ratios of every pair that ran in the same rounds."""
    names = list(dict.fromkeys(name for run in runs for name in run))
    out: dict[str, object] = {}
    for part in Speed.__dataclass_fields__:
        speeds = {name: [one[part] for run in runs for one in run.get(name, [])] for name in names}
        pairs = {}
        for name in names:
            for other in names:
                both = [(run[name], run[other]) for run in runs if name in run and other in run]
                if name != other and both:
                    mine, theirs = ([one[part] for pair in both for one in pair[i]] for i in (0, 1))
                    pairs[f"{name} / {other}"] = asdict(ratios(mine, theirs))
        out[part] = {"tokens_per_second": {n: asdict(spread(v)) for n, v in speeds.items()}, "ratios": pairs}
    return out


if __name__ == "__main__":
    main()
