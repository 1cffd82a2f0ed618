"""Dual-grained terms in plain integers, and what the integer kernel accumulates for them."""

from __future__ import annotations

import torch

from anybit.formats.planes import unpack
from anybit.kernels.linear_w_a8 import op
from anybit.kernels.linear_w_a8.dual_grained import as_bytes


def products(term):
    """scale * (code - zero) of a term by its tables, int64 [N, K]."""
    decoder, columns = term.decoder, term.shape[1]
    tables = (decoder.group_scale, decoder.group_zero)
    scale, zero = (t.long().repeat_interleave(decoder.group_size, 1)[:, :columns] for t in tables)
    return scale * (unpack(term.planes, columns).long() - zero)


def accumulated(term, codes):
    """Exact sums of activation codes int8 [T, K] times the int8 weight, int64 [T, N], from the kernel's int32."""
    saved = {"weight": term.planes, **term.decoder.tensors()}
    columns = term.shape[1]
    planes, scale, _ = as_bytes({key: t.numpy() for key, t in saved.items()}, term.decoder.group_size, columns)
    tiled = op.tile(torch.from_numpy(planes), torch.from_numpy(scale), None, columns, columns)
    padded = op.quantize(torch.zeros(codes.shape), columns)
    padded.codes[:, :columns] = codes
    return op.sums(padded, tiled)[:, 0].long() - 128 * codes.long().sum(1, keepdim=True)
