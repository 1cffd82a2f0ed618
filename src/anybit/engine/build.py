"""An anybit checkpoint as the native decoder's structures: tensors are read, tiled and let go of, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from anybit.engine import architectures
from anybit.engine.architectures import Architecture, Config
from anybit.engine.memory import Memory
from anybit.engine.rope import frequencies
from anybit.engine.tensors import BFLOAT16, Array, Tensors
from anybit.errors import FormatError
from anybit.formats.form import MAX_BITS, Form
from anybit.kernels import native
from anybit.kernels.linear_w_a8 import tiles
from anybit.kernels.linear_w_a8.dual_grained import as_bytes
from anybit.kernels.linear_w_a8.nested import tile_nested
from anybit.layers.precision import width_read

Forms = Mapping[str, Form]
Tiled = tiles.Tiled[Array]
_FLOAT_ROWS = {"F32": 1, BFLOAT16: 2, "F16": 3}
"""Dtypes of a float embedding, as native/decoder/model.h numbers them."""


def refusal(config: Config, forms: Forms) -> str:
    """Why this model cannot run in the native decoder; empty when it can.

    Args:
        config: its config.json.
        forms: how each quantized layer is written, `quantization_config["layers"]`.
    """
    if reason := native.refusal() or architectures.refusal(config):
        return reason
    facts = architectures.architecture(config)
    linears = [name for index in range(facts.layers) for group in linear_names(facts, index) for name in group]
    if head_name(facts) in forms:
        linears.append(head_name(facts))
    elif config.get("dtype") != "bfloat16":
        return f"the head is kept in {config.get('dtype')}; quantize it, or start from a bfloat16 model"
    for name in linears:
        if reason := _cannot_multiply(forms.get(name)):
            return f"layer '{name}' {reason}"
    embedding = forms.get("model.embed_tokens")
    if embedding and [part.get("kind") for part in embedding["terms"]] not in (["affine"], ["nested_affine"]):
        return "the embedding is not one affine code term"
    return ""


def head_name(facts: Architecture) -> str:
    """The module whose weight is the output head."""
    return "model.embed_tokens" if facts.tied else "lm_head"


def _cannot_multiply(form: Form | None) -> str:
    """Why linear_w_a8 cannot run this form; empty when it can."""
    if form is None:
        return "is kept in float"
    if "inputs" in form or "activations" in form:
        return "quantizes its input in a way the native decoder does not know yet"
    if len(form["terms"]) != 1 or form["terms"][0]["term"] != "code":
        return "is more than one code term"
    part, columns = form["terms"][0], form["shape"][1]
    if part["kind"] not in ("affine", "bipolar", "dual_grained", "nested_affine"):
        return f"has {part['kind']} codes"
    if part["columns"] != [0, columns]:
        return "has codes for some of its columns only"
    return tiles.refusal(columns, columns if part["kind"] == "dual_grained" else part["group_size"])


def linear_names(facts: Architecture, index: int) -> list[list[str]]:
    """Names of a layer's linears, grouped by the input they read: qkv, output, gate and up, down."""
    block = f"model.layers.{index}"
    inner = (["qkv"], ["gate_up"]) if facts.family.fused else (["q", "k", "v"], ["gate", "up"])
    return [
        [f"{block}.self_attn.{name}_proj" for name in inner[0]],
        [f"{block}.self_attn.o_proj"],
        [f"{block}.mlp.{name}_proj" for name in inner[1]],
        [f"{block}.mlp.down_proj"],
    ]


@dataclass
class Builder:
    """Fills a native `Model`; `kept` is what its pointers point into."""

    directory: Path
    facts: Architecture
    config: Config
    forms: Forms
    tokens: int  # longest sequence that will run
    kept: list[Any] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    def build(self) -> Any:
        """The model of `anybit._native.decoder`, without a decoder's workspace and cache."""
        facts, tensors = self.facts, Tensors(self.directory)
        model = native.loaded().decoder.Model()
        for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "epsilon", "gelu", "embedding_scale"):
            setattr(model, name, getattr(facts, name))
        model.vocabulary, model.attention_scale = facts.vocab, facts.attention_scale
        model.attention_softcap, model.logit_softcap = facts.attention_softcap, facts.logit_softcap
        ropes = list(dict.fromkeys(facts.rope_types))
        for kind in ropes:
            inverse, factor = frequencies(self.config, kind, self.tokens)
            model.add_rope(self._address(inverse), len(inverse), factor)
        self._embedding(model, tensors)
        for index in range(facts.layers):
            model.add_layer(self._layer(tensors, index, ropes.index(facts.rope_types[index])))
            tensors.release()
        model.set_final_norm(self._norm(tensors, "model.norm"))
        if head_name(facts) in self.forms:
            model.head = self._linear(tensors, [head_name(facts)])
        else:
            model.set_float_head(self._float_head(tensors))
        tensors.release()
        return model

    def _layer(self, tensors: Tensors, index: int, rope: int) -> Any:
        layer, block = native.loaded().decoder.Layer(), f"model.layers.{index}"
        layer.qkv, layer.output, layer.gate_up, layer.down = (
            self._linear(tensors, names) for names in linear_names(self.facts, index)
        )
        layer.window, layer.rope = self.facts.windows[index], rope
        after = f"{block}.post_attention_layernorm"
        mlp = [after]  # before the MLP, although its name says where it stands
        outer = ["", ""]
        if self.facts.family.gemma:
            mlp, outer = [f"{block}.pre_feedforward_layernorm"], [after, f"{block}.post_feedforward_layernorm"]
        heads = [f"{block}.self_attn.{name}_norm" if self.facts.family.head_norm else "" for name in "qk"]
        names = [f"{block}.input_layernorm", outer[0], *mlp, outer[1], *heads]
        layer.set_norms(*(self._norm(tensors, name) if name else 0 for name in names))
        return layer

    def _norm(self, tensors: Tensors, name: str) -> int:
        weight = tensors.floats(f"{name}.weight")
        return self._address(1 + weight if self.facts.family.gemma else weight)

    def _linear(self, tensors: Tensors, names: Sequence[str]) -> Any:
        """One native Linear of layers that read the same input: joined when their forms agree."""
        linear = native.loaded().decoder.Linear()
        forms = [self.forms[name]["terms"][0] for name in names]
        runs = [list(names)] if all(form == forms[0] for form in forms) else [[name] for name in names]
        offset = 0
        for run in runs:
            views = self._views(tensors, run)
            tiled = next(iter(views.values()))
            self.kept.append(views)
            linear.add_part(tiled.planes.ctypes.data, *_tables(tiled), tiled.sizes, tiled.factors, offset)
            for bits in range(1, MAX_BITS + 1) if len(views) > 1 else ():
                view = views[width_read(sorted(views), bits)]
                linear.set_view(bits, *_tables(view), view.sizes, view.factors)
            offset += tiled.rows
        biases = [f"{name}.bias" in tensors for name in names]
        if any(biases):
            parts = [
                tensors.floats(f"{name}.bias") if has else np.zeros(self.forms[name]["shape"][0], np.float32)
                for name, has in zip(names, biases, strict=True)
            ]
            linear.set_bias(self._address(np.concatenate(parts)))
        return linear

    def _views(self, tensors: Tensors, names: Sequence[str]) -> dict[int, Tiled]:
        """The joined weights as read at each width they offer."""
        part, columns = self.forms[names[0]]["terms"][0], self.forms[names[0]]["shape"][1]
        if part["kind"] != "nested_affine":
            return {part["bits"]: self._tile(tensors, names, part, columns)}
        keys = ["weight", "scale", *(f"zero{t}" for t in part["tables"])]
        keys += [f"ratio{t}" for t in part["tables"] if t != part["bits"]]
        found = [{key: tensors.get(f"{name}.{key}") for key in keys} for name in names]
        return tile_nested(found, part, columns, self.memory.take)

    def _tile(self, tensors: Tensors, names: Sequence[str], part: Form, columns: int) -> Tiled:
        if part["kind"] == "dual_grained":
            keys = ("weight", "channel_scale", "group_scale", "group_zero")
            found = [{key: tensors.get(f"{name}.{key}") for key in keys} for name in names]
            expanded = [as_bytes(saved, part["group_size"], columns) for saved in found]
            return tiles.tile_joined(expanded, columns, columns, self.memory.take)
        has_zero = part["kind"] == "affine" and not part["symmetric"]
        parts = [
            (
                tensors.get(f"{name}.weight"),
                tensors.get(f"{name}.scale"),
                tensors.get(f"{name}.zero") if has_zero else None,
            )
            for name in names
        ]
        tiled = tiles.tile_joined(parts, part["group_size"], columns, self.memory.take)
        if part["kind"] == "bipolar":  # 2 c - (2^b - 1) = 2 (c - (2^b - 1) / 2)
            return replace(tiled, scale_mul=2.0, zero_add=(2 ** part["bits"] - 1) / 2)
        return tiled

    def _embedding(self, model: Any, tensors: Tensors) -> None:
        """Rows are read from the mapped file: only those that come up ever become resident."""
        name = "model.embed_tokens"
        weight = self._address(tensors.get(f"{name}.weight"))
        if name not in self.forms:
            model.set_embedding_rows(weight, _FLOAT_ROWS[tensors.dtype(f"{name}.weight")])
            return
        part = self.forms[name]["terms"][0]
        scale = self._address(tensors.get(f"{name}.scale"))
        name += ".zero" if part["kind"] == "affine" else f".zero{part['bits']}"
        zero = 0 if part.get("symmetric") else self._address(tensors.get(name))
        model.set_embedding_planes(weight, scale, zero, part["bits"], part["group_size"])

    def _float_head(self, tensors: Tensors) -> int:
        name = f"{head_name(self.facts)}.weight"
        if tensors.dtype(name) != BFLOAT16:
            raise FormatError(
                f"the head is {tensors.dtype(name)}, config.json says bfloat16; restore the files or quantize again"
            )
        return self._address(tensors.get(name))

    def _address(self, array: Array) -> int:
        self.kept.append(array)
        return int(array.ctypes.data)


def _tables(tiled: Tiled) -> tuple[int, int]:
    """Addresses of scale and zero."""
    return tiled.scale.ctypes.data, 0 if tiled.zero is None else tiled.zero.ctypes.data
