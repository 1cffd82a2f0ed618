"""What a causal language model is made of, found by structure: no table of architectures.

The decoder blocks are the outermost `ModuleList` whose items hold weights, next to the input embedding; embedding and
head are what transformers says they are; the final norm is the norm beside the blocks; the rest is `pre`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from anybit.errors import StructureError


@dataclass(frozen=True)
class Geometry:
    """Sizes of the text model: `heads` query heads share `kv_heads` key/value heads of `head_dim` channels."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


@dataclass(frozen=True)
class Structure:
    """Module names, from the root. `pre`: every other module with parameters or buffers outside the blocks (position
    embeddings, embedding norm, rotary); a forward pass needs them resident."""

    blocks: tuple[str, ...]
    pre: tuple[str, ...]
    final_norm: str | None
    embedding: str
    head: str
    tied: bool
    geometry: Geometry


def find_structure(model: nn.Module) -> Structure:
    """The structure of `model` (real or on meta). Raises StructureError: what was found and what is missing."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = _ends(model, names)
    blocks = _block_list(model, embedding)
    parent_name = blocks.rpartition(".")[0]
    final_norm = _final_norm(model.get_submodule(parent_name), parent_name, blocks)
    named = {blocks, embedding, head, final_norm}
    tied = model.get_submodule(head).weight is model.get_submodule(embedding).weight
    config: Any = model.config
    return Structure(
        blocks=tuple(f"{blocks}.{index}" for index in range(len(_items(model, blocks)))),
        pre=tuple(name for name in _outside(model, parent_name) if name not in named),
        final_norm=final_norm,
        embedding=embedding,
        head=head,
        tied=tied or bool(getattr(config.get_text_config(), "tie_word_embeddings", False)),
        geometry=_geometry(config.get_text_config()),
    )


def _items(model: nn.Module, name: str) -> list[nn.Module]:
    return list(model.get_submodule(name).children())


def _ends(model: nn.Module, names: dict[int, str]) -> tuple[str, str]:
    """Names of the input embedding and the output head."""
    kind = type(model).__name__
    found = []
    for what, getter in (("input embedding", "get_input_embeddings"), ("output head", "get_output_embeddings")):
        module = getattr(model, getter)() if hasattr(model, getter) else None
        if module is None or id(module) not in names:
            raise StructureError(
                f"{kind}: no {what} ({getter} gives {type(module).__name__}); need a causal language model"
            )
        found.append(names[id(module)])
    return found[0], found[1]


def _block_list(model: nn.Module, embedding: str) -> str:
    """The outermost ModuleList of weight-bearing items: the one nearest to the embedding, then the longest."""
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and _is_block_list(m)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise StructureError(f"{type(model).__name__}: no ModuleList of decoder blocks; found {_children(model)}")
    return max(outer, key=lambda name: (_shared_parents(name, embedding), len(_items(model, name))))


def _is_block_list(module: nn.ModuleList) -> bool:
    return len(module) > 0 and all(any(is_matrix(m) for m in item.modules()) for item in module)


def _shared_parents(first: str, second: str) -> int:
    pairs = zip(first.split("."), second.split("."), strict=False)
    shared = 0
    for left, right in pairs:
        if left != right:
            break
        shared += 1
    return shared


def is_matrix(module: nn.Module) -> bool:
    """Whether the module owns a weight of two or more axes and is not an embedding."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() >= 2 and not isinstance(module, nn.Embedding)


def is_norm(module: nn.Module) -> bool:
    """Whether the module owns a 1-D `weight`: the gain of a layer norm or RMS norm."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def _final_norm(parent: nn.Module, parent_name: str, blocks: str) -> str | None:
    """The norm beside the blocks: the last one registered after them, else the only one before (OPT)."""
    before: list[str] = []
    after: list[str] = []
    side = before
    for child, module in parent.named_children():
        if child == blocks.rpartition(".")[2]:
            side = after
        elif is_norm(module):
            side.append(f"{parent_name}.{child}" if parent_name else child)
    if after:
        return after[-1]
    if len(before) > 1:
        raise StructureError(f"{parent_name}: which of the norms {', '.join(before)} is the final one is unclear")
    return before[0] if before else None


def _outside(model: nn.Module, parent_name: str) -> list[str]:
    """Children with parameters or buffers of every module on the way from the root to the parent of the blocks."""
    path = parent_name.split(".") if parent_name else []
    way = [".".join(path[:depth]) for depth in range(len(path) + 1)]
    found = []
    for name in way:
        for child, module in model.get_submodule(name).named_children():
            full = f"{name}.{child}" if name else child
            stateful = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
            if stateful and full not in way:
                found.append(full)
    return found


def _geometry(config: Any) -> Geometry:
    heads = int(config.num_attention_heads)
    hidden = int(config.hidden_size)
    return Geometry(
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(config, heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        vocab=int(config.vocab_size),
    )


def _kv_heads(config: Any, heads: int) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    return int(getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads)


def _children(model: nn.Module) -> str:
    return ", ".join(f"{name} ({type(module).__name__})" for name, module in model.named_children()) or "no children"
