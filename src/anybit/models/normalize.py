"""One shape for every model: after `normalize` each quantizable weight is the `weight [N, K]` of an `nn.Linear`.

Two things are not: GPT-2's `Conv1D` (a linear with a transposed weight) and the fused experts of a mixture of experts
(one 3-D parameter for all experts). Both are rewritten in place, on meta or with real weights.
"""

from __future__ import annotations

import copy
import inspect

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from anybit.errors import StructureError


class Expert(nn.Module):
    """One gated feed-forward expert: `down(act(gate) * up)` with gate and up in one linear [2I, H], gate rows first."""

    def __init__(self, gate_up: Tensor, down: Tensor, act_fn: nn.Module) -> None:
        super().__init__()
        # Not `down_proj`: transformers would take `experts.*.down_proj.weight` in a checkpoint for its own to fuse.
        self.gate_up = _linear(gate_up, None)
        self.down = _linear(down, None)
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        gate, up = self.gate_up(hidden_states).chunk(2, dim=-1)
        out: Tensor = self.down(self.act_fn(gate) * up)
        return out


class LoopedExperts(nn.ModuleList):
    """Experts as a list: children "0", "1", ... are `Expert`; called like the fused module it replaces."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index int64 [T, k] and top_k_weights [T, k] -> [T, H].

        An index equal to the number of experts marks a slot that is handled elsewhere and adds nothing.
        """
        out = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            if index >= len(self):
                continue
            token, slot = torch.where(top_k_index == index)
            part = self[index](hidden_states[token]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, part.to(out.dtype))
        return out


def normalize(model: nn.Module) -> None:
    """Rewrites `model` in place. Raises StructureError for fused experts whose forward is not the gated one above."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, _linear(module.weight.detach().T.contiguous(), module.bias))
        elif any(p.dim() == 3 for p in module.parameters(recurse=False)):
            model.set_submodule(name, _split_experts(name, module))


def is_normal(model: nn.Module) -> bool:
    """Whether `normalize` would change nothing, so that names and shapes are those of transformers."""
    found = (isinstance(m, Conv1D) or any(p.dim() == 3 for p in m.parameters(recurse=False)) for m in model.modules())
    return not any(found)


def conv1d_weights(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that `normalize` will transpose."""
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D))


def _linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear.eval()


def _split_experts(name: str, fused: nn.Module) -> LoopedExperts:
    shapes = {key: tuple(p.shape) for key, p in fused.named_parameters(recurse=False)}
    gate_up, down = shapes.get("gate_up_proj"), shapes.get("down_proj")
    known = set(shapes) == {"gate_up_proj", "down_proj"} and isinstance(getattr(fused, "act_fn", None), nn.Module)
    if not known or gate_up is None or down is None or not _is_gated(gate_up, down):
        raise StructureError(
            f"{name}: fused experts {type(fused).__name__} with parameters {shapes}; "
            "known: gate_up_proj [E, 2I, H] and down_proj [E, H, I], no bias"
        )
    _check_forward(name, fused)
    return _looped(fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj"), _activation(fused))


def _is_gated(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Whether the shapes are [E, 2I, H] and [E, H, I]; the transposed layout [E, H, 2I] fails here."""
    return len(gate_up) == len(down) == 3 and gate_up == (down[0], 2 * down[2], down[1])


def _looped(gate_up: Tensor, down: Tensor, act_fn: nn.Module) -> LoopedExperts:
    pairs = zip(gate_up.detach().unbind(0), down.detach().unbind(0), strict=True)
    return LoopedExperts(Expert(first.clone(), second.clone(), act_fn) for first, second in pairs).eval()


def _activation(fused: nn.Module) -> nn.Module:
    return fused.get_submodule("act_fn")


def _check_forward(name: str, fused: nn.Module) -> None:
    """Runs the fused forward on tiny weights beside ours: equal shapes do not prove an equal formula (clamps, ...)."""
    with torch.device("cpu"), torch.no_grad():  # transformers loads models inside a meta device context
        _compare_forwards(name, fused)


def _compare_forwards(name: str, fused: nn.Module) -> None:
    count, tokens = int(fused.get_parameter("gate_up_proj").shape[0]), 4
    draw = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(count, 32, 16, generator=draw), torch.randn(count, 16, 16, generator=draw)
    probe = copy.copy(fused)  # shares the attributes, gets its own tiny parameters
    probe._parameters = {"gate_up_proj": nn.Parameter(gate_up), "down_proj": nn.Parameter(down)}
    hidden = 4.0 * torch.randn(tokens, 16, generator=draw)
    picks = torch.arange(tokens)[:, None].add(torch.tensor([[0, count // 2]])).remainder(count)
    weights = torch.rand(tokens, 2, generator=draw)
    try:
        with torch.no_grad():
            theirs = inspect.unwrap(type(fused).forward)(probe, hidden, picks, weights)
            ours = _looped(gate_up, down, _activation(fused))(hidden, picks, weights)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise StructureError(
            f"{name}: experts {type(fused).__name__} do not take (hidden, index, weights): {reason}"
        ) from error
    if not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4):
        raise StructureError(
            f"{name}: experts {type(fused).__name__} compute something other than down(act(gate) * up)"
        )
