"""A ledger as a checkpoint has it, and a way to run a command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from anybit.cli import main


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def anybit(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`anybit("recipes", "--json")` runs the command and returns exit code, stdout and stderr."""

    def run(*words: str | Path) -> Done:
        code = main([str(word) for word in words])
        return Done(code, *capfd.readouterr())

    return run


def ledger_row(name: str, bits: int = 4) -> dict[str, Any]:
    return {
        "name": name,
        "planned": f"affine{bits}g32",
        "actual": f"affine{bits}g32",
        "shape": [6, 40],
        "bits": bits,
        "group_size": 32,
        "bits_per_weight": bits + 1.2,
        "stored_bytes": bits * 6 * 5 + 36,
        "calibration_tokens": 4096,
        "error": 0.0625,
        "kernel": "native-lookup",
        "sha256": {},
        "notes": [],
    }


@pytest.fixture
def ledger() -> dict[str, Any]:
    rows = [ledger_row(f"model.layers.{block}.{kind}") for block in (0, 1) for kind in ("mlp.up_proj", "mlp.down_proj")]
    rows.append(ledger_row("model.embed_tokens", 8) | {"shape": [100, 40]})
    return {
        "version": 1,
        "model": "demo",
        "recipe": "gptq-w4",
        "bits_per_weight": 5.2,
        "size_bytes": 5200,
        "float_bytes": 32000,
        "identity": {},
        "tensors": rows,
        "float_tensors": {},
    }


@pytest.fixture
def checkpoint(tmp_path: Path, ledger: dict[str, Any]) -> Path:
    directory = tmp_path / "smol-w4"
    directory.mkdir()
    (directory / "ledger.json").write_text(json.dumps(ledger))
    return directory
