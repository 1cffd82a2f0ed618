"""A layer's form as a compressed-tensors scheme, and back."""

from __future__ import annotations

from typing import Any

from anybit.errors import FormatError
from anybit.formats.activation import FloatActivations, IntActivations
from anybit.formats.decoder import Form
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.foreign import setting

PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
MIXED = "mixed-precision"
Scheme = dict[str, Any]


def scheme(name: str, form: Form, bits: int, account: Account) -> Scheme:
    """A config group without targets, for one code term read at `bits`.

    Raises:
        InputError: something no scheme can say.
    """
    part, columns = form["terms"][0], form["shape"][1]
    size = min(part.get("group_size", columns), columns)
    if columns % size:
        raise account.refuse(f"groups of {size} that do not divide {columns} columns", name)
    is_float = part["kind"] == "float"
    if is_float and part["type"] != "e4m3":
        raise account.refuse(f"{part['type']} numbers with a scale per group", name)
    symmetric = is_float or (part["kind"] == "affine" and part["symmetric"])
    inputs = _inputs(name, form, account)
    weights = _arguments(bits, "float" if is_float else "int", symmetric, size if size < columns else 0)
    integer = bits == 8 and symmetric and size == columns and inputs is not None and inputs["type"] == "int"
    kind = FLOAT if is_float else INTEGER if integer else PACKED
    return {"format": kind, "weights": weights, "input_activations": inputs, "output_activations": None}


def _arguments(bits: int, kind: str, symmetric: bool, group_size: int) -> Scheme:
    strategy: Scheme = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    return {"num_bits": bits, "type": kind, "symmetric": symmetric, "dynamic": False, **strategy}


def _inputs(name: str, form: Form, account: Account) -> Scheme | None:
    """`input_activations` of a form."""
    spec = form.get("activations")
    if spec is None:
        return None
    if spec["kind"] not in ("int", "float"):
        raise account.refuse(f"{spec['kind']} activations", name)
    if spec["kind"] == "float" and spec["type"] != "e4m3":
        raise account.refuse(f"{spec['type']} activations", name)
    symmetric = spec.get("symmetric", True)
    if spec["static"] and (not symmetric or spec["granularity"] == "group"):
        raise account.refuse("static activations with offsets or per group of columns", name)
    if not symmetric and not spec["rounded_zero"]:
        account.lose("activation ranges without 0; readers widen them to hold it", name)
    if spec.get("clip", 1.0) != 1.0:
        account.lose("clipped activation ranges; readers take the whole range", name)
    account.note(
        "activations: the reader's own arithmetic (transformers divides the largest by 127.5, vLLM and anybit by 127)"
        if spec["kind"] == "int"
        else "activations: the reader's own float8 arithmetic"
    )
    strategy: Scheme = {"strategy": {"token": "token", "group": "group", "tensor": "tensor"}[spec["granularity"]]}
    if spec["granularity"] == "group":
        strategy["group_size"] = min(spec["group_size"], form["shape"][1])
    common = {"num_bits": spec.get("bits", 8), "type": spec["kind"], "symmetric": symmetric}
    return {**common, "dynamic": not spec["static"], **strategy}


def activations(name: str, inputs: Any, columns: int) -> Scheme | None:
    """`form["activations"]` of `input_activations`, for a layer with so many columns. Raises FormatError for what anybit
    has no word for."""
    if inputs is None:
        return None
    found = {"type": "int", "symmetric": True, "dynamic": False} | (inputs if isinstance(inputs, dict) else {})
    strategy, static = found.get("strategy"), not setting(found, "dynamic", bool)
    symmetric, kind = setting(found, "symmetric", bool), setting(found, "type", str, among=("int", "float"))
    bits = setting(found, "num_bits", int, among=(8,) if kind == "float" else range(2, 9))
    fits = (strategy, static) in (("token", False), ("group", False), ("tensor", True)) and (symmetric or not static)
    if not fits:
        raise FormatError(f"{name}: input_activations {inputs!r} are not read; per token or static per tensor are")
    granularity: Scheme = {"granularity": strategy, "static": static}
    if strategy == "group":
        granularity["group_size"] = setting(found, "group_size", int, among=range(1, columns + 1))
    if kind == "float":
        return FloatActivations(**granularity).form()
    return IntActivations(bits, symmetric, rounded_zero=not symmetric, **granularity).form()
