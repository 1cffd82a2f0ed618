"""What a layer does to its input before anything else: `form["inputs"]`, a list of operations in order.

    {"op": "hadamard", "sizes": [m, 2^k]}    x times blocks of H_m (x) H_2^k / sqrt(m 2^k); the weight was turned the same way

The weight of such a layer means nothing without them, so they are part of its form and an unknown one is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anybit.errors import FormatError
from anybit.kernels.hadamard.op import hadamard

Op = dict[str, Any]


def apply_inputs(x: Tensor, ops: Sequence[Op]) -> Tensor:
    """x float [..., K] after all of `ops`, in its dtype.

    Raises:
        FormatError: an operation that this version does not know.
    """
    for op in ops:
        if op["op"] != "hadamard":
            raise FormatError(f"input operation '{op['op']}' is not known to this version of anybit; update anybit")
        x = hadamard(x, (op["sizes"][0], op["sizes"][1]))
    return x
