"""The precision of a model: one shared cell that every layer reads (DESIGN 1.3). Switching writes one integer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from anybit.errors import InputError
from anybit.formats.decoder import Form
from anybit.formats.terms import precisions


class Precision:
    """Bits in use by every nested weight of a model; weights that store one width only do not follow it.

    Attributes:
        available: widths that all nested weights of the model offer, ascending; one where nothing is nested.
        cell: int32 [1], what kernels read.
    """

    def __init__(self, available: Sequence[int]) -> None:
        """Starts at the highest width."""
        self.available = tuple(sorted(available))
        self.cell: NDArray[np.int32] = np.full(1, self.available[-1], np.int32)
        self._bits = self.available[-1]

    @property
    def bits(self) -> int:
        """The width in use."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        if bits not in self.available:
            raise InputError(f"precision {bits} is not in this checkpoint; it holds {list(self.available)}")
        self._bits = bits
        self.cell[0] = bits


def width_read(offered: Sequence[int], bits: int) -> int:
    """The width at which a weight that offers some, ascending, is read in a model that runs at `bits`: the narrowest that is
    no narrower, or the widest."""
    return next((width for width in offered if width >= bits), offered[-1])


def available_precisions(forms: Iterable[Form]) -> tuple[int, ...]:
    """Widths a model of such layers can run at, ascending: what its nested layers have in common; where none is nested,
    the width that most of them store (layers of one width run at it whatever the cell says).

    Raises:
        InputError: nested layers without a width in common.
    """
    offered = [precisions(form) for form in forms]
    nested = [set(widths) for widths in offered if len(widths) > 1]
    if not nested:
        count = Counter(widths[-1] for widths in offered if widths)
        return (max(count, key=lambda width: (count[width], width), default=16),)
    common = set.intersection(*nested)
    if not common:
        raise InputError("the nested layers of this checkpoint have no precision in common; quantize it again")
    return tuple(sorted(common))
