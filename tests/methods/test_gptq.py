"""GPTQ against its spec's checks (methods/gptq.md section 7): identities, a brute-force oracle, invariances."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from anybit.errors import CalibrationError
from anybit.formats.terms import dense
from anybit.methods.base import InputStats, relative_output_error
from anybit.methods.column_solver import factor, prepare, solve
from anybit.methods.gptq import GPTQ, block_stops, column_order
from anybit.methods.rtn import RTN

MODES = [("natural", True), ("natural", False), ("activation", True), ("group", True), ("group", False)]


def layer(rows=24, columns=96, tokens=400, seed=0):
    """A weight and the statistics of correlated inputs whose channels differ a lot in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, columns, generator=generator)
    x = torch.randn(tokens, 12, generator=generator) @ mix + 0.3 * torch.randn(tokens, columns, generator=generator)
    x = x * torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), InputStats(tokens, 2 / tokens * x.t() @ x)


def half_trace(delta, hessian):
    """1/2 tr(D H D^T) in float64."""
    return float(((delta.double() @ hessian.double()) * delta.double()).sum() / 2)


@pytest.mark.parametrize(("order", "static"), MODES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_column_losses_add_up_to_half_the_trace(order, static, bits):
    weight, stats = layer(seed=bits)
    method = GPTQ(bits=bits, group_size=20, order=order, static_groups=static)
    solution, grid = method.solve(weight, stats)
    damped = stats.hessian + solution.damping * stats.hessian.diagonal().mean() * torch.eye(96)
    assert solution.loss == pytest.approx(half_trace(weight - grid.decode(solution.codes), damped), rel=1e-4)


def naive_gptq(weight, hessian, grid, order):
    """Column by column with a fresh inverse of what remains: slow, obvious, in float64."""
    rest, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    left = order.tolist()
    while left:
        column = left[0]
        codes[:, column] = grid.encode(rest.float())[:, column]
        value = grid.decode(codes)[:, column].double()
        inverse = torch.linalg.inv(hessian.double()[left][:, left])
        rest[:, left] -= ((rest[:, column] - value) / inverse[0, 0])[:, None] * inverse[0]
        left.pop(0)
    return codes


@pytest.mark.parametrize("order", ["natural", "activation", "group"])
def test_equals_the_naive_oracle(order):
    weight, stats = layer(rows=6, columns=40)
    method = GPTQ(bits=4, group_size=16, order=order, block=7)
    solution, grid = method.solve(weight, stats)
    damped = stats.hessian + solution.damping * stats.hessian.diagonal().mean() * torch.eye(40)
    oracle = naive_gptq(weight, damped, grid, column_order(order, stats.hessian.diagonal(), 16))
    # float32 against float64 may break a tie differently and everything after it: allow one row of six.
    assert int((solution.codes != oracle).any(1).sum()) <= 1


@pytest.mark.parametrize(("order", "static"), MODES)
def test_block_size_does_not_matter(order, static):
    weight, stats = layer()
    codes = [
        GPTQ(bits=3, group_size=32, order=order, static_groups=static, block=b).solve(weight, stats)[0].codes
        for b in (1, 32, 128)
    ]
    # Blocks change the order of float additions, so a rare near-tie may flip.
    assert all(float((c != codes[0]).float().mean()) < 0.01 for c in codes)


def test_rows_of_u_hold_the_inverses_of_what_remains():
    _, stats = layer(columns=30)
    upper, damping = factor(stats.hessian, 0.01)
    damped = (stats.hessian + damping * stats.hessian.diagonal().mean() * torch.eye(30)).double()
    for i in (0, 7, 29):
        assert float(upper[i, i] ** 2) == pytest.approx(float(torch.linalg.inv(damped[i:, i:])[0, 0]), rel=1e-3)
    assert torch.equal(upper, upper.triu())


def test_diagonal_hessian_is_round_to_nearest():
    weight, _ = layer()
    stats = InputStats(10, torch.diag(torch.rand(96) + 0.5))
    assert torch.equal(dense(GPTQ(bits=3).quantize(weight, stats)), dense(RTN(bits=3).quantize(weight, stats)))


def test_error_along_a_dominant_direction_is_far_below_rounding():
    weight, _ = layer()
    direction = torch.randn(96)
    stats = InputStats(10, 100 * torch.outer(direction, direction) + torch.eye(96))
    lost = [((weight - dense(m.quantize(weight, stats))) @ direction).norm() for m in (GPTQ(bits=4), RTN(bits=4))]
    assert float(lost[0]) < 0.1 * float(lost[1])


@pytest.mark.parametrize(("bits", "order"), [(4, "natural"), (4, "activation"), (3, "activation"), (2, "activation")])
def test_better_than_rounding_on_the_layer(bits, order):
    weight, stats = layer()
    errors = [
        relative_output_error(weight, dense(m.quantize(weight, stats)), stats)
        for m in (GPTQ(bits=bits, order=order), RTN(bits=bits))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_loss_is_bounded_when_nothing_clips():
    weight, stats = layer()
    upper, _ = factor(stats.hessian, 0.01)
    step = 0.05

    def unbounded(rest, i):
        return torch.zeros(24, dtype=torch.uint8), (rest[i] / step).round() * step

    _, loss = solve(weight, upper, unbounded, [96])
    bound = 24 * float((step**2 / (8 * upper.diagonal().double() ** 2)).sum())
    assert 0.1 * bound < float(loss.sum()) <= bound


def test_dead_inputs_become_zero_and_do_not_widen_the_grid():
    weight, stats = layer()
    hessian = stats.hessian.clone()
    hessian[5], hessian[:, 5] = 0, 0
    weight[:, 5] = 1000.0
    clean, fixed = prepare(weight, hessian)
    assert float(fixed[5, 5]) == 1
    assert not bool(clean[:, 5].any())
    assert not bool(dense(GPTQ(bits=4).quantize(weight, InputStats(1, hessian)))[:, 5].any())
    assert float(weight[0, 5]) == 1000.0


def test_rank_deficient_hessian_climbs_the_damping_ladder_and_nan_is_refused():
    weight = torch.randn(4, 32)
    few = torch.randn(2, 32)
    solution, _ = GPTQ(bits=4).solve(weight, InputStats(2, few.t() @ few))
    assert 0.01 <= solution.damping <= 1
    with pytest.raises(CalibrationError, match="factored"):
        factor(torch.full((4, 4), float("nan")), 0.01)


def test_activation_order_without_static_groups_is_refused():
    with pytest.raises(ValidationError, match="static_groups"):
        GPTQ(order="activation", static_groups=False)


def test_dynamic_groups_are_never_split_between_blocks():
    assert block_stops([0] * 5 + [1] * 5 + [2] * 3, 4, whole_groups=True) == [5, 10, 13]
    assert block_stops([0] * 5 + [1] * 5 + [2] * 3, 4, whole_groups=False) == [4, 8, 12, 13]


def test_two_bit_clip_search_beats_min_max():
    weight, stats = layer(rows=64)
    plain, searched = (dense(RTN(bits=2, clip=c).quantize(weight, stats)) for c in ("none", "mse"))
    assert float((searched - weight).abs().pow(2.4).sum()) < 0.8 * float((plain - weight).abs().pow(2.4).sum())
