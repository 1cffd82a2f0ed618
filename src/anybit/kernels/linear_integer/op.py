"""A layer on integers in one call: activations to codes, codes times codes, and the side, for some hundreds of tokens at a time.

Bit for bit what `quantize_activations`, `linear_w_a8` and `linear_side` give one after the other (reference.py); rows may be
bfloat16, which is what models come in, and then nothing of float32 is written to memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.activation import IntActivations
from anybit.formats.decoder import groups
from anybit.kernels import native
from anybit.kernels.linear_side.tiles import Side
from anybit.kernels.linear_w_a8.op import Tiled
from anybit.kernels.quantize_activations.encode import facts

DTYPES = (torch.float32, torch.bfloat16)


class IntegerLinear:
    """One weight with its scheme of activations."""

    def __init__(
        self,
        weight: Tiled,
        spec: IntActivations,
        side: Side | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        bypass: Tensor | None = None,
    ) -> None:
        """
        Args:
            weight: [N, K]; its groups divide those of `spec`.
            spec: how a row of activations becomes codes.
            side: sums of rows for offsets of activations, then float columns; `linear_side.tiles`.
            tensors: static scales, those of `spec.specs(K)`.
            bypass: int [n], ascending, the columns of `side`, which get no codes.

        Raises:
            FormatError: a side that is not as wide as the scheme's. KernelUnavailable: anybit._native is not built.
        """
        offsets = 0 if spec.symmetric else groups(weight.columns, spec.columns_per_group(weight.columns))
        wide, wanted = 0 if side is None else side.width, offsets + (0 if bypass is None else len(bypass))
        if wide != wanted:
            raise FormatError(f"{wanted} numbers beside a row's codes, and {wide} to multiply them with")
        known = {name: (tensors or {})[name].float().contiguous() for name in spec.specs(weight.columns)}
        index = None if bypass is None else bypass.to(torch.int32).contiguous()
        static = [known.get(name) for name in ("input_scale", "input_offset")]
        addresses = [0 if t is None else t.data_ptr() for t in (*static, index, weight.zero, weight.grain, weight.mask)]
        zero, *tables = addresses[3:]
        self._layer = native.loaded().IntegerLayer(
            weight.planes.data_ptr(), weight.scale.data_ptr(), zero, weight.sizes, weight.factors, *tables
        )
        self._layer.set_scheme(facts(spec, weight.columns), *addresses[:3], 0 if index is None else len(index))
        if side is not None:
            self._layer.set_side(*side.pointers)
        self._alive = (weight, side, static, index)
        self._rows, self._columns = weight.rows, weight.columns

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 or bfloat16 [T, K] -> [T, N] in the dtype of x. Each row depends on its own alone, bit for bit.

        Raises:
            FormatError: x has another shape or dtype.
        """
        if x.ndim != 2 or x.shape[1] != self._columns or x.dtype not in DTYPES:
            raise FormatError(
                f"need float32 or bfloat16 [tokens, {self._columns}], got {str(x.dtype)[6:]} {list(x.shape)}"
            )
        x = x.contiguous()
        y = torch.empty(len(x), self._rows, dtype=x.dtype)
        self._layer.multiply(x.data_ptr(), y.data_ptr(), len(x), x.dtype == torch.bfloat16)
        return y
