"""AnyBCQ against its spec's checks (methods/any_precision.md section 7, items 2 and 7)."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError

from anybit.formats.planes import unpack
from anybit.formats.terms import dense, precisions, save_terms
from anybit.methods.anybcq import AnyBCQ, Groups, normalised
from anybit.methods.base import InputStats
from anybit.methods.rtn import RTN


def layer(rows=10, columns=200, seed=0):
    """Weights with one large column, and a diagonal Hessian over four decades."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[:, 7] *= 3
    return weight, InputStats(10, torch.diag(torch.exp(2 * torch.randn(columns, generator=generator))))


def signs_of(term, columns):
    codes = unpack(term.planes, columns)
    bits = term.decoder.bits
    return torch.stack([((codes >> (bits - 1 - i)) & 1).double() * 2 - 1 for i in range(bits)])


@pytest.mark.parametrize("weighting", ["none", "hessian"])
@pytest.mark.parametrize("offset", [True, False])
def test_scales_are_the_least_squares_of_their_planes(weighting, offset):
    """At every precision the gradient of the weighted error by each scale and offset vanishes; short last group included."""
    weight, stats = layer()
    (term,) = AnyBCQ(bits=6, group_size=64, weighting=weighting, offset=offset).quantize(weight, stats)
    signs = signs_of(term, 200)
    importance = stats.hessian.diagonal().double() if weighting == "hessian" else torch.ones(200).double()
    for p in range(2, 7):
        residual = (weight.double() - term.dense(p).double()) * importance
        for start in range(0, 200, 64):
            run = slice(start, start + 64)
            limit = 2e-3 * float((weight[:, run].abs() * importance[run]).sum(1).mean())  # float16 scales
            for plane in range(p):
                assert float((residual[:, run] * signs[plane][:, run]).sum(1).abs().max()) < limit
            if offset:
                assert float(residual[:, run].sum(1).abs().max()) < limit


def lstsq(fit):
    """The scales by the definition, float64, group by group."""
    found = []
    for planes, target, importance in zip(fit.planes, fit.target, fit.importance, strict=True):
        root = importance.double().sqrt()
        found.append(torch.linalg.lstsq((planes.double() * root).t(), (target * root)[:, None].double()).solution[:, 0])
    return torch.stack(found)


def test_solve_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    fit = Groups(torch.randn(5, 48, generator=generator), torch.rand(5, 48, generator=generator), offset=True)
    for _ in range(4):
        fit.expand()
        torch.testing.assert_close(fit.scales.double(), lstsq(fit), rtol=1e-4, atol=1e-5)


def test_assign_takes_the_nearest_level():
    generator = torch.Generator().manual_seed(0)
    fit = Groups(torch.randn(3, 40, generator=generator), torch.ones(3, 40), offset=True)
    fit.greedy(3)
    fit.assign(3)
    combinations = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
    for group in range(3):
        levels = fit.scales[group, 0] + combinations @ fit.scales[group, 1:]
        nearest = (fit.target[group][:, None] - levels).abs().min(1).values
        own = fit.left()[group].abs()
        torch.testing.assert_close(own, nearest)


def test_the_last_plane_is_the_best_for_its_scales():
    generator = torch.Generator().manual_seed(0)
    fit = Groups(torch.randn(3, 40, generator=generator), torch.ones(3, 40), offset=True)
    fit.greedy(2)
    fit.expand()
    fit.reassign_last()
    kept = fit.left().abs()
    fit.planes[:, -1] *= -1
    assert bool((kept <= fit.left().abs() + 1e-6).all())


def test_of_two_fits_each_group_keeps_the_better():
    generator = torch.Generator().manual_seed(0)
    target, importance = torch.randn(2, 60, 48, generator=generator)
    fits = [Groups(target, start.square(), offset=True) for start in (importance, torch.ones(60, 48))]
    for fit in fits:
        fit.greedy(2)
        fit.importance = importance.square()
        fit.solve()
    errors = [(importance.square() * fit.left().square()).sum(1) for fit in fits]
    assert 10 < int((errors[1] < errors[0]).sum()) < 50
    fits[0].take_better(fits[1])
    kept = (importance.square() * fits[0].left().square()).sum(1)
    torch.testing.assert_close(kept, torch.minimum(*errors))


@pytest.mark.parametrize("size", [5, 32, 100, 2048])
def test_signed_sums_of_normalised_weights_are_exact_in_float32(size):
    generator = torch.Generator().manual_seed(0)
    importance = torch.exp(4 * torch.randn(1, 20, size, generator=generator))
    importance[0, 3] = 0
    real = torch.ones(1, 20, size)
    real[0, -1, 3:] = 0
    each = normalised(importance * real, real)
    assert torch.equal(each[0, 3], torch.ones(size))
    torch.testing.assert_close(each.sum(-1) / real.sum(-1), torch.ones(1, 20), rtol=1e-4, atol=1e-4)
    signs = torch.randn(8, 20, size, generator=generator).sign()
    assert torch.equal((each * signs).sum(-1).double(), (each.double() * signs.double()).sum(-1))


def test_planes_of_fewer_bits_are_the_first_planes_of_more():
    weight, stats = layer()
    longer = AnyBCQ(bits=7, base_bits=2).quantize(weight, stats)[0]
    for bits in (2, 3, 5):
        (shorter,) = AnyBCQ(bits=bits, base_bits=2).quantize(weight, stats)
        assert torch.equal(shorter.planes, longer.planes[:bits])
        assert torch.equal(shorter.dense(), longer.dense(bits))


@pytest.mark.parametrize("weighting", ["none", "hessian"])
@pytest.mark.parametrize("group_size", [-1, 100, 32])
def test_error_falls_with_every_bit(weighting, group_size):
    weight, stats = layer()
    importance = stats.hessian.diagonal() if weighting == "hessian" else 1
    (term,) = AnyBCQ(bits=8, base_bits=1, group_size=group_size, weighting=weighting).quantize(weight, stats)
    errors = [float((importance * (weight - term.dense(p)).square()).sum()) for p in range(1, 9)]
    assert all(b < 0.75 * a for a, b in itertools.pairwise(errors))


def test_weighting_lowers_the_weighted_error_and_alternation_lowers_both():
    weight, stats = layer(rows=40)
    h = stats.hessian.diagonal()

    def error(**options):
        lost = (weight - dense(AnyBCQ(bits=3, group_size=100, **options).quantize(weight, stats))).square()
        return float(lost.sum()), float((h * lost).sum())

    plain, weighted, greedy = error(), error(weighting="hessian"), error(iterations=0)
    assert weighted[1] < 0.95 * plain[1]
    assert plain[0] < weighted[0]
    assert plain[0] < 0.95 * greedy[0]


def test_two_bits_beat_rounding_by_far():
    weight, stats = layer(rows=40)
    ours, rounded = (
        dense(m.quantize(weight, stats)) for m in (AnyBCQ(bits=2, group_size=100), RTN(bits=2, group_size=100))
    )
    assert float((weight - ours).square().sum()) < 0.5 * float((weight - rounded).square().sum())


def test_groups_that_are_constant_dead_or_short():
    """A constant group has many least squares; weights of dead inputs still get numbers; the last group has 8 columns."""
    weight, stats = layer(columns=72)
    weight[:, :32] = 0.25
    hessian = stats.hessian.clone()
    hessian[32:64] = 0
    for weighting in ("none", "hessian"):
        (term,) = AnyBCQ(bits=4, group_size=32, weighting=weighting).quantize(weight, InputStats(1, hessian))
        for p in (2, 3, 4):
            values = term.dense(p)
            assert bool(torch.isfinite(values).all())
            torch.testing.assert_close(values[:, :32], weight[:, :32], rtol=1e-3, atol=1e-4)
            assert float((values - weight)[:, 32:64].norm() / weight[:, 32:64].norm()) < 0.6


def test_form_and_pieces(monkeypatch):
    weight, stats = layer()
    method = AnyBCQ(bits=6, precisions=[2, 3, 6], group_size=64)
    (term,) = method.quantize(weight, stats)
    form, _ = save_terms([term], (10, 200))
    assert form == method.plan((10, 200))
    assert precisions(form) == (2, 3, 6)
    monkeypatch.setattr("anybit.methods.anybcq.BLOCK_WEIGHTS", 3 * 200)
    (pieces,) = method.quantize(weight, stats)
    # Other shapes of batched products may round differently: a sign at a border may flip, no more.
    assert float((pieces.planes != term.planes).float().mean()) < 0.01


@pytest.mark.parametrize(
    ("options", "text"),
    [({"bits": 1}, "base_bits"), ({"precisions": [2, 3]}, "base_bits"), ({"group_size": 0}, "group_size")],
)
def test_options_that_do_not_fit(options, text):
    with pytest.raises(ValidationError, match=text):
        AnyBCQ(**options)
