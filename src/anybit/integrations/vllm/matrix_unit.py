"""Products of models in bfloat16 on processors with a bfloat16 matrix unit (AMX).

The model's numbers are bfloat16 already, so a kernel that multiplies them as such loses nothing of them; weights are rounded
once, on the way into the unit, as vLLM's own formats do. Models in float32 never come here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from anybit.formats.terms import CodeTerm, save_terms
from anybit.integrations.vllm.part import Shard
from anybit.kernels.linear_w_a8 import stored
from anybit.kernels.linear_w_a8.nested import tile_nested
from anybit.kernels.linear_w_a8.op import Tiled, of_numpy
from anybit.kernels.linear_w_a8.tiles import refusal as shape_refusal
from anybit.kernels.linear_w_bf16 import op
from anybit.layers.precision import width_read

FEW_TOKENS = 1
"""Up to so many tokens, looking sums up in tables (linear_w_a16) is faster."""
KINDS = ("affine", "bipolar", "nested_affine")


def refusal(shard: Shard) -> str:
    """Why a shard cannot be multiplied so; empty when it can."""
    if reason := op.refusal():
        return reason
    if shard.inputs:
        return "changes its input, which then is no longer bfloat16"
    term = shard.terms[0]
    if shard.spec is not None or len(shard.terms) != 1 or not isinstance(term, CodeTerm):
        return "is not one code term with float activations"
    if term.decoder.kind not in KINDS or term.columns != (0, term.shape[1]):
        return f"has {term.decoder.kind} codes, or codes for some of its columns"
    return shape_refusal(term.shape[1], min(term.decoder.form()["group_size"], term.shape[1]))


def products(shard: Shard, asked: Sequence[int]) -> dict[int, Callable[[Tensor], Tensor]]:
    """For each precision asked of the model, x bfloat16 [T, K] -> [T, N]; for a shard without `refusal`. The tiles
    are a second copy of the codes, which all precisions share."""
    (term,) = [term for term in shard.terms if isinstance(term, CodeTerm)]
    form, tensors = save_terms([term], term.shape)
    part, columns = form["terms"][0], term.shape[1]
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    if part["kind"] == "nested_affine":
        tiles = tile_nested([arrays], part, columns)
    else:
        tiles = {part["bits"]: stored.tile(part, [arrays], columns, None)}
    weights = {bits: of_numpy(tiled) for bits, tiled in tiles.items()}
    return {bits: _product(weights[width_read(sorted(weights), bits)]) for bits in asked}


def _product(weight: Tiled) -> Callable[[Tensor], Tensor]:
    return lambda x: op.linear(x, weight)
