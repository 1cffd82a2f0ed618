"""The product with one shard: native kernels on the CPU, Triton on a GPU, at the precision of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anybit.errors import KernelUnavailable
from anybit.formats.terms import CodeTerm, Term
from anybit.integrations.vllm import matrix_unit
from anybit.integrations.vllm.part import Shard
from anybit.integrations.vllm.policy import Widths
from anybit.layers.inputs import apply_inputs
from anybit.layers.linear import product, quantized_product

Product = Callable[[Tensor], Tensor]


def multiplier(shards: Sequence[Shard], widths: Widths, device: torch.device, dtype: torch.dtype) -> Product:
    """x [T, K] of `dtype` -> [T, N] of the same: the rows of all shards side by side.

    Every width the policy may ask for is prepared here, so that a request cannot fail later and the saved tensors are let go
    where a kernel has its own form of them.

    Raises:
        KernelUnavailable: a shard that nothing can multiply on that device.
    """
    if device.type == "cuda":
        products = [_on_gpu(shard, widths, device) for shard in shards]
    else:
        products = [_on_cpu(shard, widths, dtype) for shard in shards]
    if len(products) == 1:
        return products[0]
    return lambda x: torch.cat([each(x) for each in products], -1)


def _on_cpu(shard: Shard, widths: Widths, dtype: torch.dtype) -> Product:
    asked = widths.asked if _nested(shard.terms) else widths.asked[:1]
    exact = {bits: _at(shard, bits) for bits in asked}
    unit = dtype == torch.bfloat16 and not matrix_unit.refusal(shard)
    many = matrix_unit.products(shard, asked) if unit else exact

    def apply(x: Tensor) -> Tensor:
        products = exact if len(x) <= matrix_unit.FEW_TOKENS else many
        run = products[widths.bits if len(products) > 1 else asked[0]]
        if shard.inputs or (shard.spec is None and products is exact):
            # These take float32 whatever x is; converted once, they take their shortest way in.
            return run(apply_inputs(x.float().contiguous(), shard.inputs)).to(x.dtype)
        return run(x)

    return apply


def _at(shard: Shard, bits: int) -> Product:
    if shard.spec is not None:
        return quantized_product(shard.terms, shard.spec, shard.static, bits)
    first, *rest = [product(term, bits) for term in shard.terms]

    def apply(x: Tensor) -> Tensor:
        total = first(x)
        for each in rest:
            total = total + each(x)
        return total

    return apply


def _nested(terms: Sequence[Term]) -> bool:
    return any(isinstance(term, CodeTerm) and len(term.decoder.precisions) > 1 for term in terms)


def _on_gpu(shard: Shard, widths: Widths, device: torch.device) -> Product:
    if reason := gpu_refusal(shard):
        raise KernelUnavailable(f"no GPU kernel multiplies a layer that {reason}; serve it on the CPU")
    from anybit.kernels.linear_w_a16 import triton
    from anybit.kernels.linear_w_a16.gpu_weight import gpu_weight

    (term,) = [term for term in shard.terms if isinstance(term, CodeTerm)]
    weight = gpu_weight(term.planes, term.decoder, term.shape[1]).to(device)
    cell = widths.cell(weight.precisions, device)
    return lambda x: triton.linear(x.contiguous(), weight, cell).to(x.dtype)


def gpu_refusal(shard: Shard) -> str:
    """Why the GPU kernel cannot multiply by a shard; empty when it can."""
    if shard.spec is not None:
        return "has quantized activations"
    if shard.inputs:
        return f"changes its input first ({shard.inputs[0]['op']})"
    term = shard.terms[0]
    if len(shard.terms) != 1 or not isinstance(term, CodeTerm) or term.columns != (0, term.shape[1]):
        return "is not one code term"
    if term.decoder.kind in ("dual_grained", "float", "blocked"):
        return f"has {term.decoder.kind} codes"
    return ""
