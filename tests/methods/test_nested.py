"""The uniform nested quantizer against brute force, plain GPTQ, and the identities its steps promise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from anybit.formats.nested_affine import NestedAffine
from anybit.formats.terms import bits_per_weight, dense
from anybit.methods.base import InputStats
from anybit.methods.gptq import GPTQ
from anybit.methods.nested import Nested
from anybit.methods.nested_choice import Levels
from anybit.methods.nested_refit import descend, refit, weighted_losses


def case(rows=24, columns=96, tokens=400, seed=0):
    """Heavy-tailed weights, correlated inputs with a few large channels and a mean."""
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * torch.rand(rows, 1).add(0.2) + (torch.rand(rows, columns) > 0.97) * 2
    mixing = torch.eye(columns) + torch.randn(columns, columns) * 0.15
    inputs = torch.randn(tokens, columns) @ mixing * torch.rand(columns).mul(3).exp() / 5 + 0.2
    return weight, InputStats(tokens, 2 / tokens * inputs.t() @ inputs)


def damped(stats, damping=0.01):
    hessian = stats.hessian.clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    return hessian


def quadratic(error, hessian):
    return float(((error.double() @ hessian.double()) * error.double()).sum())


def random_grid(bits, widths, rows, groups=1, group_size=1):
    draw = lambda low, high: torch.randint(low, high, (rows, groups)).to(torch.uint8)  # noqa: E731
    ratios = {t: draw(90, 180) for t in widths if t != bits}
    scale = torch.rand(rows, groups).add(0.5).half()
    return NestedAffine(bits, group_size, widths, scale, {t: draw(0, 2**bits) for t in widths}, ratios)


@pytest.mark.parametrize(
    ("bits", "emphasis"),
    [(8, {2: 0.1, 3: 1, 4: 0.5, 8: 0.01}), (8, {2: 0.3, 6: 0.5}), (8, {4: 1}), (8, {8: 1}), (5, {1: 1, 2: 1, 5: 0.3})],
)
def test_the_chosen_code_is_the_best_of_all(bits, emphasis):
    torch.manual_seed(bits + len(emphasis))
    widths, rows = tuple(sorted({*emphasis, bits})), 300
    grid = random_grid(bits, widths, rows)
    targets = torch.randn(len(emphasis), rows) * 2**bits / 3
    codes, values = Levels(grid, emphasis, torch.zeros(1, dtype=torch.long)).choose(targets, 0)
    costs = torch.stack([
        sum(emphasis[w] * (targets[i] - grid.decode(torch.full((rows, 1), code, dtype=torch.uint8), w)[:, 0]) ** 2
            for i, w in enumerate(emphasis))
        for code in range(2**bits)
    ])  # fmt: skip
    chosen = costs.gather(0, codes.long()[None])[0]
    assert torch.allclose(chosen, costs.amin(0), rtol=1e-5)
    assert torch.equal(values, torch.stack([grid.decode(codes[:, None], w)[:, 0] for w in emphasis]))


@pytest.mark.parametrize("clip", ["none", "hessian"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_one_width_is_plain_gptq(bits, clip):
    weight, stats = case()
    plain, grid = GPTQ(bits=bits, group_size=16, clip=clip).solve(weight, stats)
    options = {"precisions": (bits,), "tables": (bits,), "weights": {bits: 1.0}, "refit": 0}
    codes, nested, loss = Nested(bits=bits, group_size=16, clip=clip, **options).solve(weight, stats)
    assert torch.equal(codes, plain.codes)
    assert torch.equal(nested.decode(codes), grid.decode(plain.codes))
    assert loss[bits] == pytest.approx(plain.loss, rel=1e-6)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_with_all_weight_on_one_width_it_is_as_good_as_gptq_there(width):
    weight, stats = case(rows=64)
    plain = quadratic(weight - dense(GPTQ(bits=width).quantize(weight, stats)), stats.hessian)
    rest = 1e-6
    weights = {p: 1.0 if p == width else rest for p in (2, 3, 4, 8)}
    alone = Nested(weights=weights, refit=0).quantize(weight, stats)
    fitted = Nested(weights=weights, refit=2).quantize(weight, stats)
    # Without refit the grid is the 8-bit one, whose slices end a half step inside the range.
    assert quadratic(weight - dense(alone, width), stats.hessian) < 1.35 * plain
    assert quadratic(weight - dense(fitted, width), stats.hessian) < 0.95 * plain


def test_the_loss_of_the_walk_is_that_of_every_width():
    weight, stats = case()
    codes, grid, loss = Nested(refit=0, weights={2: 1, 3: 1, 4: 1, 8: 0.1}).solve(weight, stats)
    assert sorted(loss) == [2, 3, 4, 8]
    for width, value in loss.items():
        assert value == pytest.approx(quadratic(weight - grid.decode(codes, width), damped(stats)) / 2, rel=1e-4)


def test_feedback_of_its_own_beats_the_mean_where_slices_suffer():
    weight, stats = case(rows=64)
    lost = {}
    for feedback in ("own", "mean"):
        terms = Nested(feedback=feedback, refit=0).quantize(weight, stats)
        lost[feedback] = {p: quadratic(weight - dense(terms, p), stats.hessian) for p in (2, 3, 4, 8)}
    ratios = [lost["own"][p] / lost["mean"][p] for p in (2, 3, 4, 8)]
    assert math.prod(ratios) < 0.8


def test_refit_is_the_least_squares_optimum_before_it_is_stored():
    """One group, one width: its (scale, zero) against a dense solve, up to the rounding of the stored form."""
    weight, stats = case(rows=8, columns=32)
    hessian, emphasis = damped(stats), {3: 1.0}
    method = Nested(weights={3: 1.0}, refit=0, precisions=(3, 8), tables=(3, 8))
    codes, grid, _ = method.solve(weight, stats)
    new = refit(weight, hessian, codes, grid, emphasis)
    middles = (codes >> 5).double() * 32 + 15.5
    root = torch.linalg.cholesky(hessian.double()).t()
    for row in range(8):
        basis = root @ torch.stack([middles[row], torch.ones(32, dtype=torch.double)], 1)
        best = torch.linalg.lstsq(basis, (root @ weight[row].double())[:, None]).solution[:, 0]
        least = quadratic(weight[row : row + 1] - (middles[row] * best[0] + best[1])[None], hessian)
        found = quadratic(weight[row : row + 1] - new.decode(codes, 3)[row : row + 1], hessian)
        start = quadratic(weight[row : row + 1] - grid.decode(codes, 3)[row : row + 1], hessian)
        assert least * 0.999 <= found <= least + 0.1 * (start - least) + 1e-3 * start


def test_neither_step_makes_any_row_worse():
    weight, stats = case(columns=80)  # a short last group
    hessian, emphasis = damped(stats), Nested().emphasis()
    codes, grid, _ = Nested(refit=0).solve(weight, stats)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    losses = [weighted_losses(weight, hessian, codes, grid, emphasis)]
    for _ in range(3):
        grid = refit(weight, hessian, codes, grid, emphasis)
        losses.append(weighted_losses(weight, hessian, codes, grid, emphasis))
        levels = Levels(grid, emphasis, order // grid.group_size)
        codes = descend(weight, hessian, codes, grid, levels, order, 16)
        losses.append(weighted_losses(weight, hessian, codes, grid, emphasis))
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-4)).all())
    assert float(losses[-1].sum()) < 0.8 * float(losses[0].sum())


def test_a_sweep_does_not_depend_on_its_blocks():
    weight, stats = case()
    codes, grid, _ = Nested(refit=0).solve(weight, stats)
    order = torch.arange(96).flip(0)
    levels = Levels(grid, Nested().emphasis(), order // grid.group_size)
    found = [descend(weight, damped(stats), codes, grid, levels, order, block) for block in (1, 7, 96)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_all_codes_of_a_group_equal_is_no_harm():
    weight, stats = case(rows=4)
    weight[:, 32:64] = 0.25
    terms = Nested().quantize(weight, stats)
    for bits in (2, 3, 4, 8):
        assert bool(dense(terms, bits).isfinite().all())


def test_size_and_plan():
    weight, stats = case()
    method = Nested()
    form = method.plan((24, 96))
    assert bits_per_weight(form) == 8 + 0.75 + 3 * 0.5
    term = method.quantize(weight, stats)[0]
    assert {"term": "code", "columns": [0, 96], **term.decoder.form()} == form["terms"][0]
    assert torch.equal(dense([term], 8), term.decoder.decode(method.solve(weight, stats)[0]))


@pytest.mark.parametrize(
    "options",
    [
        {"tables": (2, 4)},
        {"precisions": (8, 4)},
        {"weights": {}},
        {"weights": {7: 1.0}},
        {"weights": {4: 0.0}},
        {"stream": 7},
    ],
)
def test_widths_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match=r"precisions|tables|weights"):
        Nested(**options)
