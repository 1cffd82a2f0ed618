"""Linear by integer arithmetic: bit-plane weights of 1 to 8 bits times int8 activations.

Sums of products are exact int32 per group; float appears once, in a fixed order (cpu.cpp), so that a result depends
neither on the instruction set (multiply-adds are fused everywhere), nor on the number of tokens or threads.
Weights are repacked once (`tile`) from the saved planes; a weight of b planes runs at p < b bits by reading p planes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from anybit.kernels import native
from anybit.kernels.linear_w_a8 import tiles
from anybit.kernels.quantize_activations import op as quantize_activations

Tiled = tiles.Tiled[Tensor]
"""A weight in PyTorch's hands."""


@dataclass(frozen=True)
class Quantized:
    """Activations [T, K] as `quantize_activations` gives them: codes int8 [T, stride], scale and sums float32 [T, G]."""

    codes: Tensor
    scale: Tensor
    sums: Tensor


def tile(planes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int) -> Tiled:
    """Affine planes uint8 [b, N, ceil(K/8)], scale float16 [N, G], zero uint8 [N, G] or None (2^(b-1)) as tiles.

    Raises:
        FormatError: shapes or dtypes that do not fit together, or a shape that `tiles.refusal` names.
    """
    part = (planes.numpy(), scale.numpy(), None if zero is None else zero.numpy())
    return of_numpy(tiles.tile_joined([part], group_size, columns))


def of_numpy(made: tiles.Tiled[tiles.Array]) -> Tiled:
    """The same memory as PyTorch's."""
    zero = None if made.zero is None else torch.from_numpy(made.zero)
    arrays = (torch.from_numpy(made.planes), torch.from_numpy(made.scale), zero)
    grain, mask = (None if table is None else torch.from_numpy(table) for table in (made.grain, made.mask))
    return Tiled(*arrays, made.bits, made.rows, made.columns, made.group_size, *made.factors, grain, mask)


def quantize(x: Tensor, group_size: int) -> Quantized:
    """x float32 [T, K] to int8 codes with one scale per token and group (kernels/quantize_activations)."""
    return Quantized(*quantize_activations.quantize(x, group_size))


def sums(x: Quantized, w: Tiled) -> Tensor:
    """The exact sums of codes times codes, int32 [T, G, N]; dual-grained: of codes times inner products, [T, 1, N]."""
    out = torch.empty(len(x.codes), 1 if w.grain is not None else w.sizes[4], w.rows, dtype=torch.int32)
    tables = (_address(x.sums), _address(w.zero), _address(w.grain), _address(w.mask))
    native.loaded().linear_w_a8_sums(
        x.codes.data_ptr(), len(x.codes), w.planes.data_ptr(), w.sizes, out.data_ptr(), *tables
    )
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def linear_quantized(x: Quantized, w: Tiled) -> Tensor:
    """Quantized activations times w: float32 [T, N]."""
    y = torch.empty(len(x.codes), w.rows)
    prepared(x, w, y)()
    return y


def prepared(x: Quantized, w: Tiled, y: Tensor) -> Callable[[], None]:
    """The native call that fills y, float32 [T, N], its arguments taken from the tensors beforehand: what remains is the
    kernel and its threads, as for a caller in C++. The tensors must outlive it."""
    return partial(
        native.loaded().linear_w_a8,
        *(x.codes.data_ptr(), x.scale.data_ptr(), x.sums.data_ptr(), len(x.codes)),
        *(w.planes.data_ptr(), w.scale.data_ptr(), _address(w.zero), w.sizes, w.factors),
        *(y.data_ptr(), _address(w.grain), _address(w.mask)),
    )
