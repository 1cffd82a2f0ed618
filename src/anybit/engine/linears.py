"""Layers of a checkpoint as native `Linear`s: which forms those take, and how weights, schemes and sides are handed over."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anybit.engine.memory import Memory
from anybit.engine.tensors import Array, Tensors
from anybit.formats.form import MAX_BITS, Form
from anybit.kernels import native
from anybit.kernels.hadamard.matrices import matrix
from anybit.kernels.linear_side.tiles import tile_side
from anybit.kernels.linear_w_a8 import stored, tiles
from anybit.kernels.linear_w_a8.nested import tile_nested
from anybit.layers.precision import width_read

Forms = Mapping[str, Form]
Tiled = tiles.Tiled[Array]
_TABLES = {"dual_grained": ("channel_scale", "group_scale", "group_zero")}
_STATIC = ("input_scale", "input_offset")


def refusal(form: Form | None) -> str:
    """Why a native Linear cannot run this form; empty when it can."""
    if form is None:
        return "is kept in float"
    activations, terms = form.get("activations"), form["terms"]
    codes = [part for part in terms if part["term"] == "code"]
    others = {part["term"] for part in terms} - {"code"}
    if activations is None and len(terms) != 1:
        return "is more than one code term"
    if activations is not None and activations["kind"] != "int":
        return "has float activations, which only the torch engine emulates"
    if len(codes) != 1 or others - {"columns"}:
        return f"is not one code term{' and float columns' if activations else ''}"
    part, columns = codes[0], form["shape"][1]
    if part["kind"] not in stored.KINDS + (("nested_affine",) if activations is None else ()):
        return f"has {part['kind']} codes" + (" and quantized activations" if activations else "")
    if part["columns"] != [0, columns]:
        return "has codes for some of its columns only"
    if reason := _rotation_refusal(form.get("inputs", []), columns):
        return reason
    return stored.nesting_refusal(part, columns, reach(form) or columns)


def _rotation_refusal(inputs: Sequence[Mapping[str, Any]], columns: int) -> str:
    if not inputs:
        return ""
    if len(inputs) > 1 or set(inputs[0]) != {"op", "sizes"} or inputs[0]["op"] != "hadamard":
        return f"changes its input by {', '.join(str(op.get('op')) for op in inputs)} in a way the native decoder does not know"
    order, power = inputs[0]["sizes"]
    if power < 1 or power & (power - 1) or order < 1 or columns % (order * power):
        return f"has a Hadamard transform of sizes {order} x {power} for {columns} columns"
    return ""


def reach(form: Form) -> int | None:
    """Columns per scale of a layer's quantized input, at most K; None where it is not quantized."""
    activations, columns = form.get("activations"), int(form["shape"][1])
    if activations is None:
        return None
    return min(activations["group_size"], columns) if activations["granularity"] == "group" else columns


def code_part(form: Form) -> Form:
    """The form of a layer's one code term."""
    return next(part for part in form["terms"] if part["term"] == "code")


def agreeing(forms: Sequence[Form]) -> bool:
    """Whether layers that read the same input are written alike but for their rows."""
    first, *rest = [{**form, "shape": form["shape"][1]} for form in forms]
    return all(form == first for form in rest)


@dataclass
class LinearBuilder:
    """Makes native Linears; `kept` is what their pointers point into."""

    tensors: Tensors
    forms: Forms
    memory: Memory
    kept: list[Any]

    def build(self, names: Sequence[str]) -> Any:
        """One Linear of layers that read the same input: joined when their forms and what they make of the input agree."""
        linear, forms = native.loaded().decoder.Linear(), [self.forms[name] for name in names]
        self._rotation(linear, forms[0])
        inputs = [self._input(name) for name in names]
        joined = agreeing(forms) and all(each == inputs[0] for each in inputs)
        offset, before = 0, None
        for run in [list(names)] if joined else [[name] for name in names]:
            form, reads = self.forms[run[0]], inputs[names.index(run[0])]
            views = self._views(run)
            tiled = next(iter(views.values()))
            self.kept.append(views)
            linear.add_part(
                tiled.planes.ctypes.data,
                *_tables(tiled),
                tiled.sizes,
                tiled.factors,
                offset,
                *(_address(tiled.grain), _address(tiled.mask)),
            )
            for bits in range(1, MAX_BITS + 1) if len(views) > 1 else ():
                view = views[width_read(sorted(views), bits)]
                linear.set_view(bits, *_tables(view), view.sizes, view.factors)
            if "activations" in form:
                self._scheme(linear, run, tiled, new=reads != before)
                before = reads
            offset += tiled.rows
        self._bias(linear, names)
        return linear

    def _rotation(self, linear: Any, form: Form) -> None:
        for op in form.get("inputs", []):
            order, power = op["sizes"]
            linear.set_rotation(self._address(matrix(order)), order, power)

    def _input(self, name: str) -> tuple[str, ...]:
        """What tells schemes apart: their form, static scales and columns that bypass."""
        saved = [f"{name}.{key}" for key in (*_STATIC, "columns_index") if f"{name}.{key}" in self.tensors]
        found = json.dumps(self.forms[name].get("activations"), sort_keys=True)
        return (found, *(self.tensors.get(key).tobytes().hex() for key in saved))

    def _scheme(self, linear: Any, names: Sequence[str], tiled: Tiled, new: bool) -> None:
        form, name = self.forms[names[0]], names[0]
        spec, size = form["activations"], reach(form)
        assert size is not None
        fixed = [self._floats(f"{name}.{key}") if spec["static"] else 0 for key in _STATIC]
        bypass, count = 0, 0
        if f"{name}.columns_index" in self.tensors:
            index = np.array(self.tensors.get(f"{name}.columns_index"), np.uint32)
            bypass, count = self._address(index), len(index)
        facts = (spec["bits"], spec["symmetric"], spec["rounded_zero"], spec["clip"], size)
        linear.set_scheme(facts if new else None, *fixed, bypass, count)
        columns = [self.tensors.get(f"{each}.columns_weight") for each in names] if count else []
        side = tile_side(
            None if spec["symmetric"] else stored.row_sums(tiled, size), np.concatenate(columns) if columns else None
        )
        if side is not None:
            self.kept.append(side)
            linear.set_side(*side.pointers)

    def _views(self, names: Sequence[str]) -> dict[int, Tiled]:
        """The joined weights as read at each width they offer."""
        form = self.forms[names[0]]
        part, columns = code_part(form), form["shape"][1]
        if part["kind"] == "nested_affine":
            keys = ["weight", "scale", *(f"zero{t}" for t in part["tables"])]
            keys += [f"ratio{t}" for t in part["tables"] if t != part["bits"]]
            return tile_nested(self._saved(names, keys), part, columns, self.memory.take)
        has_zero = part["kind"] == "affine" and not part["symmetric"]
        keys = ["weight", *_TABLES.get(part["kind"], ("scale", "zero") if has_zero else ("scale",))]
        return {part["bits"]: stored.tile(part, self._saved(names, keys), columns, reach(form), self.memory.take)}

    def _saved(self, names: Sequence[str], keys: Sequence[str]) -> list[dict[str, Array]]:
        return [{key: self.tensors.get(f"{name}.{key}") for key in keys} for name in names]

    def _bias(self, linear: Any, names: Sequence[str]) -> None:
        biases = [f"{name}.bias" in self.tensors for name in names]
        if any(biases):
            parts = [
                self.tensors.floats(f"{name}.bias") if has else np.zeros(self.forms[name]["shape"][0], np.float32)
                for name, has in zip(names, biases, strict=True)
            ]
            linear.set_bias(self._address(np.concatenate(parts)))

    def _floats(self, name: str) -> int:
        return self._address(self.tensors.floats(name)) if name in self.tensors else 0

    def _address(self, array: Array) -> int:
        self.kept.append(array)
        return _address(array)


def _address(array: Array | None) -> int:
    return 0 if array is None else int(array.ctypes.data)


def _tables(tiled: Tiled) -> tuple[int, int]:
    """Addresses of scale and zero."""
    return tiled.scale.ctypes.data, _address(tiled.zero)
