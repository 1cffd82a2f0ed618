"""Tiny checkpoints there and back, for the tests of other engines' formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anybit.formats.terms import dense, load_terms, tensor_specs


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Every tensor of all shards."""
    return {name: t for file in sorted(Path(directory).glob("*.safetensors")) for name, t in load_file(file).items()}


def config_of(directory: Path) -> dict[str, Any]:
    """The quantization_config."""
    return json.loads((Path(directory) / "config.json").read_text())["quantization_config"]


def values_of(directory: Path, precision: int | None = None) -> dict[str, Tensor]:
    """Every weight of an anybit checkpoint as floats, by module name."""
    tensors, forms = tensors_of(directory), config_of(directory)["layers"]
    found = {}
    for name, form in forms.items():
        nested = any(len(part.get("precisions", ())) > 1 for part in form["terms"])
        terms = load_terms(form, {key: tensors.pop(f"{name}.{key}") for key in tensor_specs(form)})
        found[f"{name}.weight"] = dense(terms, precision if nested else None)
    return found | {name: tensor.float() for name, tensor in tensors.items()}


def same_values(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bit for bit, the same names."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def alter(directory: Path, name: str, change: Any) -> None:
    """Put `change(tensor)` in place of a tensor; None drops it."""
    for file in sorted(Path(directory).glob("*.safetensors")):
        tensors = load_file(file)
        if name in tensors:
            found = change(tensors.pop(name))
            save_file(tensors | ({} if found is None else {name: found}), file, metadata={"format": "pt"})
            return
    raise KeyError(name)


def alter_config(directory: Path, **changes: Any) -> None:
    """Change the quantization_config."""
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
