"""Semi-structured zeros: "2:4" says that of four aligned columns of a row at least two decode to exactly 0.

The mask is nowhere stored: it is the codes that are the zero of their grid, so a damaged or mislabelled weight is found at load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anybit.errors import FormatError


def check_sparsity(planes: Tensor, part: Mapping[str, Any]) -> None:
    """Compare planes uint8 [b, N, ceil(K/8)] with what the form of their term says.

    Raises:
        FormatError: sparsity that this version does not know, on codes without a fixed zero, or not kept.
    """
    if part["sparsity"] != "2:4":
        raise FormatError(f"sparsity '{part['sparsity']}' is not known to this version of anybit; update anybit")
    if part.get("kind") != "affine" or not part["symmetric"] or part["columns"][0] % 4:
        raise FormatError("2:4 sparsity needs symmetric affine codes that start at a multiple of four columns")
    if torch.compiler.is_compiling():
        return
    used = torch.zeros(256, dtype=torch.uint8)
    for four in range(16):
        if four.bit_count() > 2:
            used[four << 4 : (four + 1) << 4] = 1
            used[four::16] = 1
    filled = nonzero(planes)
    if width := (part["columns"][1] - part["columns"][0]) % 8:  # unused bits of the last byte are 0, that is: filled
        filled[:, -1] &= (1 << width) - 1
    if bool(used[filled.long()].any()):
        raise FormatError(
            "a weight that says 2:4 has more than two values in four columns; restore it or quantize again"
        )


def nonzero(planes: Tensor) -> Tensor:
    """Which columns do not decode to 0, a bit each in the order of the planes: uint8 [N, ceil(K/8)].

    The zero of a symmetric code of b bits is 2^(b-1): its first plane is 1, all others 0.
    """
    found = ~planes[0]
    for plane in planes[1:]:
        found = found | plane
    return found
