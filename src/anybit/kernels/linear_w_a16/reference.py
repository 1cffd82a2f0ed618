"""What `linear_w_a16` computes, in plain PyTorch: any device, any dtype, slow."""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.formats.affine import Affine
from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.bipolar import Bipolar
from anybit.formats.codebook import Codebook
from anybit.formats.decoder import per_column
from anybit.formats.planes import unpack
from anybit.kernels.linear_w_a16.weight import Weight


def decode(weight: Weight) -> Tensor:
    """The weight as float32 [N, K]: equal to the decoders of `formats` bit for bit."""
    bits, codes = weight.planes.shape[0], unpack(weight.planes, weight.columns)
    if weight.kind == "codebook":
        return Codebook(bits, {bits: weight.first}).decode(codes)
    if weight.kind == "binary_coded":
        offsets = None if weight.second is None else {bits: weight.second}
        return BinaryCoded(bits, weight.group_size, {bits: weight.first}, offsets).decode(codes)
    if weight.kind == "bipolar":
        return Bipolar(bits, weight.group_size, weight.first).decode(codes)
    if weight.kind == "fractional":
        assert weight.second is not None
        scale, zero = (per_column(t.float(), weight.columns, weight.group_size) for t in (weight.first, weight.second))
        return (codes.float() - zero) * scale
    return Affine(bits, weight.group_size, weight.first, weight.second).decode(codes)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [T, K] @ W^T as float32 [T, N]."""
    return torch.nn.functional.linear(x.float(), decode(weight))
