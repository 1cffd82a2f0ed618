"""An anybit checkpoint as the native decoder's structures: tensors are read, tiled and let go of, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anybit.engine import architectures, linears
from anybit.engine.architectures import Architecture, Config
from anybit.engine.linears import Forms, LinearBuilder
from anybit.engine.memory import Memory
from anybit.engine.rope import frequencies
from anybit.engine.tensors import BFLOAT16, Array, Tensors
from anybit.errors import FormatError
from anybit.kernels import native

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
    groups = [names for index in range(facts.layers) for names in linear_names(facts, index)]
    head = forms.get(head_name(facts))
    if head is not None:
        groups.append([head_name(facts)])
        if "inputs" in head or "activations" in head:
            return "the head changes its input in a way the native decoder does not know"
    elif config.get("dtype") != "bfloat16":
        return f"the head is kept in {config.get('dtype')}; quantize it, or start from a bfloat16 model"
    for names in groups:
        for name in names:
            if reason := linears.refusal(forms.get(name)):
                return f"layer '{name}' {reason}"
            if forms[name].get("inputs") != forms[names[0]].get("inputs"):
                return f"layers '{names[0]}' and '{name}' read the same input but change it differently"
    embedding = forms.get("model.embed_tokens")
    if embedding and [part.get("kind") for part in embedding["terms"]] not in (["affine"], ["nested_affine"]):
        return "the embedding is not one affine code term"
    return ""


def head_name(facts: Architecture) -> str:
    """The module whose weight is the output head."""
    return "model.embed_tokens" if facts.tied else "lm_head"


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
        builder = LinearBuilder(tensors, self.forms, self.memory, self.kept)
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
            model.add_layer(self._layer(tensors, builder, index, ropes.index(facts.rope_types[index])))
            tensors.release()
        model.set_final_norm(self._norm(tensors, "model.norm"))
        if head_name(facts) in self.forms:
            model.head = builder.build([head_name(facts)])
        else:
            model.set_float_head(self._float_head(tensors))
        tensors.release()
        return model

    def _layer(self, tensors: Tensors, builder: LinearBuilder, index: int, rope: int) -> Any:
        layer, block = native.loaded().decoder.Layer(), f"model.layers.{index}"
        layer.qkv, layer.output, layer.gate_up, layer.down = (
            builder.build(names) for names in linear_names(self.facts, index)
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
