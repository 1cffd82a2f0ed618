"""An online Hadamard transform of chosen linears' inputs (QuaRot, arXiv 2404.00456; SpinQuant's R4, arXiv 2405.16406).

W x = (W H) (H^T x): the weight's columns are turned once, the input at every call, and outliers of x spread over all
columns. The order is the largest m 2^k that divides the columns (`kernels/hadamard/orders.py`); where no Hadamard matrix
has the order of all columns, blocks of columns are turned one by one.
"""

from __future__ import annotations

import fnmatch
from functools import partial
from typing import ClassVar

import torch

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall
from anybit.errors import RecipeError
from anybit.kernels.hadamard.orders import sizes_for
from anybit.kernels.hadamard.reference import factored
from anybit.layers.inputs import Op, apply_inputs
from anybit.models.graph import BlockGraph
from anybit.transforms.base import Transform

DOWN = ("*down_proj", "*.fc2", "fc2", "*dense_4h_to_h", "*mlp.c_proj", "*.experts.*.down")
"""What the second linear of a feed-forward part is called, across model families."""


class Hadamard(Transform):
    """Options: `linears`, patterns on full module names (default: the paper's, the second linear of
    the feed-forward part)."""

    name: ClassVar[str] = "hadamard"
    linears: tuple[str, ...] = DOWN

    def inputs(self, linear: str, columns: int) -> list[Op]:
        """One operation for the chosen linears."""
        chosen = any(fnmatch.fnmatchcase(linear, pattern) for pattern in self.linears)
        return [{"op": "hadamard", "sizes": list(sizes_for(columns))}] if chosen else []

    def apply(self, call: BlockCall, graph: BlockGraph, source: Activations, pool: Workers) -> list[str]:
        """Turn the weights and attach the operation.

        Raises:
            RecipeError: some but not all linears that read one tensor are chosen: they share their statistics.
        """
        notes = []
        for group in graph.groups:
            found = {
                n: self.inputs(call.full_name(n), call.block.get_parameter(f"{n}.weight").shape[1])
                for n in group.linears
            }
            names = [name for name, ops in found.items() if ops]
            if names and len(names) < len(group.linears):
                missing = next(name for name, ops in found.items() if not ops)
                raise RecipeError(
                    f"transform: hadamard has {names[0]} but not {missing}, which reads the same input; add it"
                )
            for name in names:
                weight, ops = call.block.get_parameter(f"{name}.weight"), found[name]
                sizes = (ops[0]["sizes"][0], ops[0]["sizes"][1])
                with torch.no_grad():
                    weight.copy_(factored(weight.double(), sizes))
                call.attach(name, partial(apply_inputs, ops=ops))
                notes.append(f"{name}: input turned by Hadamard blocks of {sizes[0]} x {sizes[1]}")
        return notes
