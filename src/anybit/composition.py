"""Which stages of a recipe go together: every pair is allowed unless a rule here says why not.

`reason` is asked for all pairs of a recipe before any work, and for all pairs there are to write docs/composition.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TypeVar

from anybit.methods.abq import ABQ
from anybit.methods.activations import ActivationMethod
from anybit.methods.any_precision import AnyPrecision
from anybit.methods.anybcq import AnyBCQ
from anybit.methods.base import Method
from anybit.methods.grid import AffineGrid
from anybit.methods.tune_tables import TuneTables
from anybit.transforms.base import Transform
from anybit.transforms.rotate import Rotate

Step = Transform | ABQ | Method | ActivationMethod
"""What an entry of a stage becomes; compensations are methods too."""

TABLED = (AnyPrecision, AnyBCQ)
"""Methods whose codes stand for float tables."""

First = TypeVar("First")
Second = TypeVar("Second")


def conflicts(steps: Sequence[Step]) -> list[str]:
    """The reasons against each pair of `steps`, given in the order of the recipe's stages; without doubles.

    Tables are tuned where there are some: one method that makes them is enough.
    """
    distinct = [step for at, step in enumerate(steps) if step not in steps[:at]]
    tables = any(isinstance(step, TABLED) for step in distinct)
    pairs = [
        (first, second)
        for first, second in combinations(distinct, 2)
        if not (tables and isinstance(second, TuneTables))
    ]
    return list(dict.fromkeys(filter(None, (reason(first, second) for first, second in pairs))))


def reason(first: Step, second: Step) -> str:
    """Why `second` cannot follow `first` in a recipe; empty when it can."""
    if isinstance(second, Rotate) and isinstance(first, Transform):
        return "rotate comes once and first, since other transforms measure the stream it turns"
    if (found := _pair(first, second, Transform, Method)) and found[1].gradients:
        return f"{found[1].name}: gradients are those of the untransformed model; drop the transform, or use hessian"
    if (learned := _pair(first, second, ABQ, Method)) and not isinstance(learned[1], AffineGrid):
        return "abq learns for affine grids; use rtn or gptq"
    if (inputs := _pair(first, second, ABQ, ActivationMethod)) and inputs[1].needs:
        return "abq learns with dynamic activations; static scales are measured after it"
    if (tuned := _pair(first, second, TuneTables, Method)) and not isinstance(
        tuned[1], (*TABLED, TuneTables, Transform)
    ):
        return "tune-tables trains float tables of codes; any-precision and anybcq make some"
    return ""


def _pair(a: Step, b: Step, first: type[First], second: type[Second]) -> tuple[First, Second] | None:
    """The two steps as (`first`, `second`), whichever comes first in the recipe; None when they are something else."""
    for one, other in ((a, b), (b, a)):
        if isinstance(one, first) and isinstance(other, second) and not isinstance(other, first):
            return one, other
    return None
