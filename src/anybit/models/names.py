"""From the name of a parameter in our skeleton to the tensors of a checkpoint that make it up.

Checkpoints of one architecture differ in three harmless ways: the name of the base model in front or not, tied weights
stored once, experts stored one by one or fused. Each parameter gets a `Plan` that says which bytes to read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from anybit.errors import InputError
from anybit.models.shards import Entry

BLOCKS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}
"""What model families call the number of their blocks in config.json."""
_EXPERT = re.compile(r"(?P<list>.+)\.(?P<index>\d+)\.(?P<part>gate_up|down)\.weight")
# (gate, up), down as separate checkpoints call them; each row is one naming scheme in the wild
_EXPERT_SCHEMES = ((("gate_proj", "up_proj"), "down_proj"), (("w1", "w3"), "w2"))

# names that changed between versions of transformers; files keep the old ones: Mixtral's block, GPT-NeoX's head
_RENAMED = ((".mlp.", ".block_sparse_moe."), ("lm_head.", "embed_out."), ("embed_out.", "lm_head."))


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or slice `index` of its first axis."""

    key: str
    index: int | None = None


@dataclass(frozen=True)
class Plan:
    """A parameter is the concatenation of its pieces along axis 0, transposed at the end when `transpose`."""

    pieces: tuple[Piece, ...]
    transpose: bool = False


def plan_parameters(
    model: nn.Module, entries: Mapping[str, Entry], transposed: frozenset[str], prefix: str
) -> dict[str, Plan]:
    """A plan for every parameter of the normalized skeleton `model`, and for each buffer the checkpoint stores.

    `transposed` names the parameters that came from a Conv1D, `prefix` is the `base_model_prefix` of the class.
    Raises InputError when a tensor is missing or has another shape.
    """
    plans: dict[str, Plan] = {}
    by_identity: dict[int, Plan] = {}
    missing: list[str] = []
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters:
        plan = _find(name, entries, transposed, prefix)
        if plan is not None:
            by_identity.setdefault(id(parameter), plan)
    for name, parameter in parameters:
        if id(parameter) not in by_identity:
            missing.append(name)
            continue
        plans[name] = by_identity[id(parameter)]
        _check_shape(name, tuple(parameter.shape), plans[name], entries)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"the checkpoint lacks {missing[0]}{more}: config.json describes another model, or a shard is gone"
        )
    stored = model.state_dict().keys() - plans.keys()
    found = ((name, _find(name, entries, transposed, prefix)) for name in sorted(stored))
    return plans | {name: plan for name, plan in found if plan is not None}


def _find(name: str, entries: Mapping[str, Entry], transposed: frozenset[str], prefix: str) -> Plan | None:
    for alias in _aliases(name, prefix):
        if alias in entries:
            return Plan((Piece(alias),), name in transposed)
        if match := _EXPERT.fullmatch(alias):
            pieces = _expert_pieces(match, entries)
            if pieces is not None:
                return Plan(pieces)
    return None


def _aliases(name: str, prefix: str) -> Iterator[str]:
    """Names the checkpoint may use for `name`, likeliest first."""
    for spelled in (name, *(name.replace(new, old) for new, old in _RENAMED if new in name)):
        yield spelled
        if prefix and spelled.startswith(f"{prefix}."):
            yield spelled.removeprefix(f"{prefix}.")
        elif prefix:
            yield f"{prefix}.{spelled}"


def _expert_pieces(match: re.Match[str], entries: Mapping[str, Entry]) -> tuple[Piece, ...] | None:
    experts, index, part = match["list"], match["index"], match["part"]
    if (fused := f"{experts}.{part}_proj") in entries:
        return (Piece(fused, int(index)),)
    for gate_up, down in _EXPERT_SCHEMES:
        parts = gate_up if part == "gate_up" else (down,)
        keys = [f"{experts}.{index}.{p}.weight" for p in parts]
        if all(key in entries for key in keys):
            return tuple(Piece(key) for key in keys)
    return None


def _check_shape(name: str, shape: tuple[int, ...], plan: Plan, entries: Mapping[str, Entry]) -> None:
    parts = [entries[p.key].shape[0 if p.index is None else 1 :] for p in plan.pieces]
    stored = parts[0] if len(parts) == 1 else (sum(s[0] for s in parts), *parts[0][1:])
    if plan.transpose:
        stored = stored[::-1]
    if stored != shape:
        keys = " + ".join(piece.key for piece in plan.pieces)
        raise InputError(
            f"{entries[plan.pieces[0].key].file}: {keys} has shape {list(stored)}, "
            f"config.json wants {list(shape)} for {name}: they belong to different models"
        )
