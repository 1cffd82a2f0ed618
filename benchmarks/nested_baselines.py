"""Quality of the published nested quantizers at every precision, on held-out text: one JSON in benchmarks/results/.

    python benchmarks/nested_baselines.py --out benchmarks/results/nested-baselines-smollm2.json NAME=CHECKPOINT ...

Each checkpoint (`anybit quantize demo --recipe any-precision --out CHECKPOINT`) is read at each of its precisions: the
decoded weights go into the float model, so no kernel is involved. Sizes count a checkpoint that holds only the planes up to
that precision and only its table beside the whole one. Resumable: rows already in the file are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybit.calibration.text import read_documents
from anybit.calibration.tokens import evaluation_windows
from anybit.checkpoint.layout import read_config
from anybit.checkpoint.ledger import Ledger
from anybit.engine.tensors import Tensors
from anybit.evaluate.perplexity import paired_difference, scored_logits, summarize, token_nll, window_batches
from anybit.formats.terms import dense, load_terms, precisions, stored_bits, tensor_specs
from anybit.machine import machine
from anybit.models.source import open_model

WINDOWS = 24
CTX = 512
MODEL = "demo"


def forms_of(directory: Path) -> dict[str, Any]:
    """The form of every quantized layer, by module name."""
    layers: dict[str, Any] = read_config(directory)["quantization_config"]["layers"]
    return layers


def put(model: nn.Module, directory: Path, bits: int) -> None:
    """Decoded weights of `directory` at `bits` into the float `model`; tables of one precision as they are."""
    tensors = Tensors(directory)
    for name, form in forms_of(directory).items():
        found = {key: torch.from_numpy(tensors.get(f"{name}.{key}").copy()) for key in tensor_specs(form)}
        nested = len(precisions(form)) > 1
        model.get_parameter(f"{name}.weight").data.copy_(dense(load_terms(form, found), bits if nested else None))


def log_likelihoods(model: Any, windows: Tensor) -> Tensor:
    """Negative log-likelihoods [W, ctx - 1] of every scored token."""
    parts = window_batches(model, windows)
    return torch.cat([token_nll(scored_logits(model, w), w[:, 1:].flatten()).view(len(w), -1) for w in parts])


def sizes(directory: Path, bits: int) -> dict[str, float]:
    """Bits per quantized linear weight: stored over all, of what a pass at `bits` reads, and of tables over all."""
    forms = [form for form in forms_of(directory).values() if len(precisions(form)) > 1]
    weights = sum(form["shape"][0] * form["shape"][1] for form in forms)
    stored = sum(stored_bits(form) for form in forms)
    read = sum(stored_bits(only(form, bits)) for form in forms)
    planes = sum(8 * torch.Size(tensor_specs(form)["weight"][0]).numel() for form in forms)
    return {"stored_bits": stored / weights, "read_bits": read / weights, "table_bits": (stored - planes) / weights}


def only(form: dict[str, Any], bits: int) -> dict[str, Any]:
    """The form of a checkpoint of precision `bits` alone, cut out of this one."""
    part = form["terms"][0] | {"bits": bits, "precisions": [bits]}
    return form | {"terms": [part]}


def measure(name: str, directory: Path, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row for each precision of a checkpoint that is not in `rows` yet, as soon as it is measured."""
    source = open_model(MODEL)
    windows = evaluation_windows(source.tokenizer(), read_documents("wiki-test"), CTX, WINDOWS * CTX)
    model = source.skeleton()
    source.load_into(model, "")
    with torch.no_grad():
        baseline = log_likelihoods(model, windows)
        ledger = Ledger.read(directory)
        widths = sorted(
            {p for form in forms_of(directory).values() for p in precisions(form) if len(precisions(form)) > 1}
        )
        for bits in widths:
            if any((row["name"], row["bits"]) == (name, bits) for row in rows):
                continue
            put(model, directory, bits)
            nll = log_likelihoods(model, windows)
            pair = paired_difference(baseline, nll)
            facts = {"name": name, "bits": bits, "perplexity": summarize(nll).perplexity}
            facts |= {"baseline_perplexity": summarize(baseline).perplexity, "perplexity_ratio": pair.ratio}
            facts |= {"perplexity_ratio_low": pair.ratio_low, "perplexity_ratio_high": pair.ratio_high}
            stages = ledger.identity["recipe"]["stages"]
            facts |= {"stages": {k: stages[k] for k in ("weights", "compensate") if stages.get(k)}}
            facts |= {"data": ledger.identity["data"], "size_bytes": ledger.size_bytes, **sizes(directory, bits)}
            print(f"{name:20} {bits} bits: {facts['perplexity']:10.3f}  x{pair.ratio:.3f}", flush=True)
            yield facts


def main() -> None:
    """Measure what is missing, write after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    options = parser.parse_args()
    table = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": []}
    table |= {"what": f"{MODEL} on wiki-test, {WINDOWS} windows of {CTX} tokens", "machine": machine()}
    table |= {"command": "python benchmarks/nested_baselines.py", "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    for spec in options.checkpoints:
        name, _, directory = spec.partition("=")
        for row in measure(name, Path(directory), list(table["rows"])):
            table["rows"].append(row)
            options.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
