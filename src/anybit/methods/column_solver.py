"""The shared second-order core: quantize columns in order, push each column's error onto the columns still to come.

methods/gptq.md sections 2 and 7. min ||X (W - Q)^T||^2 over grid points Q: rows of W are independent and share the
Hessian
H = 2/T X^T X. With H^-1 = U^T U (U upper triangular), row i of U holds all that OBQ's repeated downdates would give:
    err = (w_i - q_i) / U_ii;   w_j -= err * U_ij  for j > i;   loss += err^2 / 2.
The sum of these losses is exactly 1/2 tr((W - Q) H (W - Q)^T), whatever the grid; `tests/methods/test_gptq.py` holds
it to that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.errors import CalibrationError

# A column quantizer: (weights as updated so far float32 [K, N], column i) -> (codes uint8 [N], grid values float32
# [N]).
Quantizer = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Solution:
    """codes uint8 [N, K] in natural order, the loss above in float64, and the relative damping that was needed."""

    codes: Tensor
    loss: float
    damping: float


def prepare(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of both with dead inputs (H_jj = 0) neutralised: H_jj = 1 and column j of the weight 0 (step 2)."""
    weight, hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    return weight, hessian


def factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """U float32 [K, K] upper with H_damped^-1 = U^T U, and the damping used (steps 4 and 5).

    The damping, a share of mean(diag H), climbs by 0.01 until the Cholesky factorisation succeeds. H = R R^T with R
    upper comes from the flipped matrix, so U = R^-1 costs one factorisation and one triangular inverse, no full
    inverse.

    Raises:
        CalibrationError: not even damping 1 helps, so the statistics are not a covariance (NaN, for one).
    """
    mean = hessian.diagonal().mean()
    identity = torch.eye(hessian.shape[0])
    while damping <= 1:
        flipped = hessian.flip(0, 1)
        flipped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not int(failed):
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return upper.contiguous(), damping
        damping += 0.01
    raise CalibrationError("the Hessian cannot be factored at any damping; use more, and more varied, calibration text")


def solve(weight: Tensor, upper: Tensor, quantizer: Quantizer, stops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K] and each row's loss float64 [N] for weight float32 [N, K] in solver order (step 6).

    `stops` are the ends of the blocks whose errors reach later columns in one delayed update; the codes do not depend
    on them as long as the quantizer looks only at columns of the block it is in.
    """
    columns = weight.shape[1]
    # Transposed, so that a column and its rank-one update are contiguous rows.
    rest = weight.t().contiguous()
    codes = torch.empty(columns, weight.shape[0], dtype=torch.uint8)
    losses = torch.zeros(weight.shape[0], dtype=torch.float64)
    for start, stop in itertools.pairwise((0, *stops)):
        errors = torch.empty(stop - start, weight.shape[0])
        for i in range(start, stop):
            codes[i], value = quantizer(rest, i)
            error = (rest[i] - value) / upper[i, i]
            errors[i - start] = error
            losses += error.double().square() / 2
            rest[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
        rest[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return codes.t().contiguous(), losses
