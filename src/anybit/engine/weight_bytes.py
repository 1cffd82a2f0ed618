"""Bytes of weights that a pass of the native decoder reads: what its own count (`NativeModel.weight_bytes`) must equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from anybit.engine.architectures import Config, architecture
from anybit.engine.build import head_name, linear_names
from anybit.engine.linears import agreeing, code_part, reach
from anybit.formats.form import Form, groups, precisions
from anybit.kernels.linear_w_a8 import stored
from anybit.kernels.linear_w_a8.tiles import COLUMNS, LINE, ROWS
from anybit.layers.precision import width_read


class WeightBytes(NamedTuple):
    """Planes in use with the padding of their tiles, scales and zeros; of embedding rows, as they are saved.

    Attributes:
        layers: of all decoder layers.
        head: of the output head.
        embedding: of the rows that were looked up.
    """

    layers: int
    head: int
    embedding: int


def planned_bytes(config: Config, bits: int, offsets: Sequence[int] | None = None, tokens: int = 1) -> WeightBytes:
    """What one pass of `tokens` rows reads, some of them wanting output.

    Args:
        config: the checkpoint's config.json.
        bits: the precision in use.
        offsets: of each layer, see `NativeModel.set_offsets`.
        tokens: rows, few enough for one pass (`pass_rows`).
    """
    facts, forms = architecture(config), config["quantization_config"]["layers"]
    layers = sum(
        _linear_bytes([forms[name] for name in names], bits + (offsets[index] if offsets else 0))
        for index in range(facts.layers)
        for names in linear_names(facts, index)
    )
    head = forms.get(head_name(facts))
    head_bytes = 2 * facts.vocab * facts.hidden if head is None else _linear_bytes([head], bits)
    return WeightBytes(layers, head_bytes, tokens * _row_bytes(config, forms.get("model.embed_tokens")))


def _linear_bytes(forms: Sequence[Form], bits: int) -> int:
    """Layers that read the same input: their rows are joined where the forms agree, and padded once."""
    rows = [form["shape"][0] for form in forms]
    joined = [sum(rows)] if agreeing(forms) else rows
    return sum(_tiled_bytes(count, form, bits) for count, form in zip(joined, forms, strict=False))


def _tiled_bytes(rows: int, form: Form, bits: int) -> int:
    part, columns, size = code_part(form), form["shape"][1], reach(form)
    blocks, zero = -(-rows // ROWS), _zero_bytes(part)
    width, tables = width_read(precisions(form), bits), 0
    if part["kind"] != "dual_grained":
        tables = groups(columns, stored.common_group(part, columns, size or columns)) * (2 * ROWS + zero)
    elif stored.in_planes(part, columns, size):
        tables = groups(columns, part["group_size"]) * (ROWS + zero) + 2 * ROWS
    else:  # as bytes
        width, tables = 8, groups(columns, size or columns) * 2 * ROWS
    chunks = -(-columns // COLUMNS)
    lines = width * -(-chunks // 2) + chunks if stored.in_pairs(part, columns, size) else width * chunks
    return blocks * (lines * LINE + tables + _side_bytes(form))


def _side_bytes(form: Form) -> int:
    """Of 16 rows: sums of float32 for every scale of activations with offsets, columns of float16."""
    size, columns = reach(form), form["shape"][1]
    if size is None:
        return 0
    offsets = 0 if form["activations"]["symmetric"] else groups(columns, size)
    return ROWS * (4 * offsets + 2 * sum(part["count"] for part in form["terms"] if part["term"] == "columns"))


def _zero_bytes(part: Mapping[str, object]) -> int:
    """Of a group of 16 rows."""
    if part["kind"] == "nested_affine":
        return ROWS
    if part["kind"] not in ("affine", "dual_grained") or part.get("symmetric"):
        return 0
    return ROWS // 2 if int(str(part["bits"])) <= 4 else ROWS


def _row_bytes(config: Config, form: Form | None) -> int:
    """One row of the embedding, at full width."""
    hidden = config["hidden_size"]
    if form is None:
        return int(hidden * (4 if config["dtype"] == "float32" else 2))
    part = form["terms"][0]
    tables = 2 if part.get("symmetric") else 3
    return int(part["bits"] * -(-hidden // 8) + groups(hidden, part["group_size"]) * tables)
