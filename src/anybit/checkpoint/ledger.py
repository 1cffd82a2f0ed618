"""The ledger: one row per quantized tensor, what was planned, what was done, what it cost. Checked at save and at
load."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from anybit.errors import FormatError, PromiseError
from anybit.formats.decoder import Form
from anybit.formats.terms import precisions, stored_bits

LEDGER = "ledger.json"
IMPORTED = "imported"
"""What `planned` says where nothing was planned: the codes came from another engine's checkpoint."""


class Row(BaseModel):
    """One tensor's account.

    `planned` and `actual` are words such as "affine4g32"; `error` is the relative output error on the calibration inputs (or
    the relative weight error where none were needed, then `calibration_tokens` is 0), `errors` the same at every precision
    of a nested weight; `kernel` runs it on the machine that wrote the row; `sha256` holds one hash per tensor on disk;
    `precisions` are the widths it can be read at; `settled` is the form where statistics decided on another than was planned
    before any work. `planned` is "imported" where the codes came from elsewhere; nothing is compared then, and `error` is 0.
    """

    model_config = ConfigDict(extra="forbid")
    name: str
    planned: str
    actual: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    bits_per_weight: float
    stored_bytes: int
    calibration_tokens: int
    error: float
    errors: dict[int, float] = {}
    kernel: str
    sha256: dict[str, str]
    notes: list[str] = []
    precisions: list[int] = []
    settled: dict[str, Any] = {}


class Ledger(BaseModel):
    """The whole account of a checkpoint.

    `bits_per_weight` counts every stored bit over every weight of the model; `identity` is what the bytes were made
    from: model,
    recipe and data; `float_tensors` maps what stayed float to its sha256. `precisions` gives a nested checkpoint's
    perplexity on held-out text at every width, and that of its "float" original; `kv` is how keys and values are to be cached:
    scheme, bits per element, where ranges come from (`KVSpec.account`); `warnings` says what is odd.
    """

    model_config = ConfigDict(extra="forbid")
    version: int = 1
    model: str
    recipe: str
    bits_per_weight: float
    size_bytes: int
    float_bytes: int
    identity: dict[str, Any]
    tensors: list[Row]
    float_tensors: dict[str, str]
    precisions: dict[str, float] = {}
    kv: dict[str, Any] = {}
    warnings: list[str] = []

    def write(self, directory: Path) -> None:
        """Write `ledger.json`."""
        (directory / LEDGER).write_text(json.dumps(self.model_dump(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Ledger:
        """Read `ledger.json`.

        Raises:
            FormatError: missing or damaged.
        """
        path = directory / LEDGER
        if not path.is_file():
            raise FormatError(
                f"{directory} has no {LEDGER}; quantize it again, or save it with anybit.save, not save_pretrained"
            )
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise FormatError(
                f"{path} is damaged at '{where}': {first['msg']}; restore the file or quantize again"
            ) from None


def form_word(form: Form) -> str:
    """A form in one word: `affine4g32`, `codebook3`, `affine4g32+columns8`."""
    words = []
    for part in form["terms"]:
        if part["term"] == "code":
            group = f"g{part['group_size']}" if "group_size" in part else ""
            sign = "s" if part.get("symmetric") else ""
            words.append(f"{part['kind']}{part['bits']}{group}{sign}")
        else:
            words.append(f"{part['term']}{part.get('count', part.get('rank'))}")
    return "+".join(words) + activation_word(form)


def activation_word(form: Form) -> str:
    """What the layer makes of its input: `@int8`, `@hadamard36x16@int6g128`, `@e4m3`; empty where it is read as it is."""
    ops = "".join(f"@{op['op']}{'x'.join(map(str, op.get('sizes', [])))}" for op in form.get("inputs", []))
    spec = form.get("activations")
    if spec is None:
        return ops
    group = f"g{spec['group_size']}" if spec.get("granularity") == "group" else ""
    return (
        f"{ops}@{spec.get('type') or spec['kind'] + str(spec['bits'])}{group}{'static' if spec.get('static') else ''}"
    )


def row(name: str, planned: str, form: Form, tensors: dict[str, Tensor], **facts: Any) -> Row:
    """The row of a tensor that is about to be saved, after checking that what is saved is what was planned.

    Raises:
        PromiseError: another form than planned, NaN or zero scales, an error that is not a number.
    """
    actual = form_word(form)
    if actual != planned:
        raise PromiseError(f"{name}: planned {planned} but got {actual}")
    check_numbers(name, tensors)
    if not math.isfinite(facts["error"]):
        raise PromiseError(f"{name}: the error is not a number; the weight or its calibration inputs are damaged")
    code = next(part for part in form["terms"] if part["term"] == "code")
    bits = stored_bits(form)
    rows, columns = form["shape"]
    return Row(
        name=name,
        planned=planned,
        actual=actual,
        shape=(rows, columns),
        bits=code["bits"],
        group_size=code.get("group_size", columns),
        bits_per_weight=bits / (rows * columns),
        stored_bytes=bits // 8,
        sha256={key: tensor_sha256(tensor) for key, tensor in tensors.items()},
        precisions=list(precisions(form)),
        **facts,
    )


def reworded(row: Row, form: Form, tensors: dict[str, Tensor], kernel: str) -> Row:
    """`row` after its activations were decided: form words, hashes, size and kernel anew.

    Raises:
        PromiseError: NaN, infinity or zero among the scales.
    """
    check_numbers(row.name, tensors)
    bits, shape = stored_bits(form), form["shape"]
    word = activation_word(form)
    sizes = {"bits_per_weight": bits / (shape[0] * shape[1]), "stored_bytes": bits // 8}
    hashes = {key: tensor_sha256(tensor) for key, tensor in tensors.items()}
    words = {"planned": row.planned + word, "actual": row.actual + word, "kernel": kernel, "sha256": hashes}
    return row.model_copy(update=words | sizes)


def check_numbers(name: str, tensors: dict[str, Tensor]) -> None:
    """Raise PromiseError when a float tensor holds NaN or infinity, or a scale is zero."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise PromiseError(f"{name}.{key} holds NaN or infinity")
        if key.startswith(("scale", "input_scale")) and bool((tensor == 0).any()):
            raise PromiseError(f"{name}.{key} holds a zero scale")


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes in row-major order."""
    flat = tensor.detach().contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()
