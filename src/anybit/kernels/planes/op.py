"""Codes to bit-planes and back, native where possible; same results as the definition, `formats/planes.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.errors import KernelUnavailable
from anybit.formats import planes as reference
from anybit.kernels import native

IMPLEMENTATIONS = ("native", "reference")


def pack(codes: Tensor, bits: int, impl: str | None = None) -> Tensor:
    """Codes uint8 [N, K], each in 0..2^bits-1, to planes uint8 [bits, N, ceil(K/8)]: high bit first, padding bits 0.

    Raises:
        FormatError: wrong shape or dtype, `bits` outside 1..8, or a code that needs more than `bits` bits.
        KernelUnavailable: the forced `impl` cannot run here.
    """
    if _choose(impl, codes) == "reference":
        return reference.pack(codes, bits)
    reference.check_codes(codes, bits)
    rows, columns = codes.shape
    codes = codes.contiguous()
    planes = torch.empty(bits, rows, reference.row_bytes(columns), dtype=torch.uint8)
    native.loaded().pack_planes(codes.data_ptr(), planes.data_ptr(), bits, rows, columns)
    return planes


def unpack(planes: Tensor, columns: int, impl: str | None = None) -> Tensor:
    """Planes uint8 [b, N, ceil(columns/8)] to codes uint8 [N, columns]; padding bits are ignored.

    Raises:
        FormatError: wrong shape or dtype for this number of columns.
        KernelUnavailable: the forced `impl` cannot run here.
    """
    if _choose(impl, planes) == "reference":
        return reference.unpack(planes, columns)
    reference.check_planes(planes, columns)
    bits, rows, _ = planes.shape
    planes = planes.contiguous()
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    native.loaded().unpack_planes(planes.data_ptr(), codes.data_ptr(), bits, rows, columns)
    return codes


def _choose(impl: str | None, tensor: Tensor) -> str:
    if impl not in (None, *IMPLEMENTATIONS):
        raise KernelUnavailable(f"planes has no implementation '{impl}'; known: {', '.join(IMPLEMENTATIONS)}")
    reason = native.refusal(tensor)
    if impl == "native" and reason:
        raise KernelUnavailable(f"planes 'native' cannot run: {reason}")
    return impl or ("reference" if reason else "native")
