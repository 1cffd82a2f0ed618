"""Bytes of weights that a pass of the native decoder reads: what its own count (`NativeModel.weight_bytes`) must equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from anybit.engine.architectures import Config, architecture
from anybit.engine.build import head_name, linear_names
from anybit.formats.decoder import Form, groups
from anybit.formats.terms import precisions
from anybit.kernels.linear_w_a8.op import COLUMNS, LINE, ROWS
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
    parts = [form["terms"][0] for form in forms]
    rows = [form["shape"][0] for form in forms]
    joined = [sum(rows)] if all(part == parts[0] for part in parts) else rows
    return sum(_tiled_bytes(count, form, bits) for count, form in zip(joined, forms, strict=False))


def _tiled_bytes(rows: int, form: Form, bits: int) -> int:
    part, columns = form["terms"][0], form["shape"][1]
    blocks = -(-rows // ROWS)
    if part["kind"] == "dual_grained":  # as bytes, with one scale a row
        planes, count, zero = 8, 1, 0
    else:
        planes, count = width_read(precisions(form), bits), groups(columns, part["group_size"])
        zero = _zero_bytes(part)
    return blocks * (planes * -(-columns // COLUMNS) * LINE + count * (2 * ROWS + zero))


def _zero_bytes(part: Mapping[str, object]) -> int:
    """Of a group of 16 rows."""
    if part["kind"] == "nested_affine":
        return ROWS
    if part["kind"] != "affine" or part["symmetric"]:
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
