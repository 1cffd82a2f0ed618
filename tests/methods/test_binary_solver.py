"""Planes and scales solved through the Hessian, against searches and dense solves that take the definitions at their word."""

from __future__ import annotations

import itertools

import pytest
import torch

from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.planes import unpack
from anybit.formats.terms import dense, precisions, save_terms
from anybit.methods.anybcq import AnyBCQ
from anybit.methods.base import InputStats
from anybit.methods.binary_solver import BinaryLevels, refit, stages
from anybit.methods.nested_refit import descend


def case(rows=24, columns=96, seed=0):
    """Weights and the Hessian of correlated inputs over two decades, with a strong common direction."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(400, columns, generator=generator) @ mix * torch.randn(columns, generator=generator).exp()
    inputs += 3 * torch.randn(400, 1, generator=generator) * torch.randn(columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    weight[:, 5] *= 4
    return weight, InputStats(400, inputs.t() @ inputs * (2 / 400))


def lost(weight, hessian, values):
    """tr(E H E^T) by row, float64."""
    error = (weight - values).double()
    return ((error @ hessian.double()) * error).sum(1)


def coded_case(bits=4, widths=(2, 3, 4), size=32, offset=True, rows=6, columns=80):
    weight, stats = case(rows, columns)
    (term,) = AnyBCQ(bits=bits, precisions=widths, group_size=size, offset=offset, iterations=2).quantize(weight, stats)
    codes = torch.randint(0, 2**bits, weight.shape, generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    hessian = stats.hessian.clone()
    hessian.diagonal().add_(0.05 * hessian.diagonal().mean())
    return weight, hessian, codes, term.decoder


def signs_of(codes, bits, stored):
    return torch.stack([((codes >> (stored - 1 - i)) & 1).double() * 2 - 1 for i in range(bits)], -1)


@pytest.mark.parametrize("first_bits", [0, 1, 2])
def test_the_code_chosen_is_the_best_of_all(first_bits):
    weight, _, codes, coded = coded_case()
    emphasis = {3: 1.0, 4: 0.3} if first_bits else {2: 0.2, 3: 1.0, 4: 0.3}
    group = torch.arange(80) // 32
    first = (codes >> (4 - first_bits)).t().contiguous() if first_bits else None
    levels = BinaryLevels(coded, emphasis, group, first, first_bits)
    generator = torch.Generator().manual_seed(1)
    for i in (0, 31, 79):
        targets = torch.randn(len(emphasis), len(weight), generator=generator) * 1.5
        found, values = levels.choose(targets, i)
        for row in range(len(weight)):
            costs = {}
            for code in range(16):
                if first is not None and code >> (4 - first_bits) != int(first[i, row]):
                    continue
                reach = [coded.levels(width)[row, group[i], code >> (4 - width)] for width in sorted(emphasis)]
                parts = zip(sorted(emphasis), reach, targets[:, row], strict=True)
                costs[code] = (sum(emphasis[w] * float(v - t) ** 2 for w, v, t in parts), reach)
            best = min(cost for cost, _ in costs.values())
            cost, reach = costs[int(found[row])]
            assert cost <= best + 1e-5
            assert torch.equal(values[:, row], torch.stack(reach))


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("size", [32, 80])
def test_refitted_scales_are_the_least_squares_through_the_hessian(offset, size):
    """Every width against a dense float64 solve over all groups of a row at once; the last group of 32 has 16 columns."""
    weight, hessian, codes, coded = coded_case(size=size, offset=offset)
    new = refit(weight, hessian, codes, coded, {2: 1.0, 3: 1.0, 4: 1.0})
    assert all(alpha.dtype == torch.float16 for alpha in new.alphas.values())
    root = torch.linalg.cholesky(hessian.double()).t()
    for width, row in itertools.product((2, 3, 4), range(len(weight))):
        signs = signs_of(codes, width, 4)[row]
        basis = torch.cat([signs, torch.ones(80, 1)], 1) if offset else signs
        wide = torch.cat([basis * (torch.arange(80)[:, None] // size == g) for g in range(-(-80 // size))], 1)
        best = torch.linalg.lstsq(root @ wide, (root @ weight[row].double())[:, None]).solution
        least = float((root @ (weight[row].double()[:, None] - wide @ best)).square().sum())
        found = float(lost(weight, hessian, new.decode(codes, width))[row])
        start = float(lost(weight, hessian, coded.decode(codes, width))[row])
        assert least * 0.999 <= found <= least + 0.01 * (start - least)


def test_neither_step_makes_any_row_worse():
    weight, hessian, codes, coded = coded_case()
    emphasis, order = {2: 0.3, 3: 1.0, 4: 0.5}, torch.randperm(80, generator=torch.Generator().manual_seed(1))

    def total(coded, codes):
        return sum(e * lost(weight, hessian, coded.decode(codes, p)) for p, e in emphasis.items())

    losses = [total(coded, codes)]
    for _ in range(3):
        coded = refit(weight, hessian, codes, coded, emphasis)
        losses.append(total(coded, codes))
        codes = descend(weight, hessian, codes, coded, BinaryLevels(coded, emphasis, order // 32), order, 16)
        losses.append(total(coded, codes))
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-4)).all())
    assert float(losses[-1].sum()) < 0.5 * float(losses[0].sum())


def test_every_width_beats_the_published_fit_on_what_the_layer_gives():
    weight, stats = case(rows=40, columns=128)
    common = {"bits": 8, "precisions": (2, 3, 4, 6, 8), "group_size": 64}
    plain = AnyBCQ(**common).quantize(weight, stats)
    ours = AnyBCQ(**common, weights={2: 1, 3: 1, 4: 0.5, 6: 1, 8: 0.5}).quantize(weight, stats)
    errors = []
    for width, share in ((2, 0.6), (3, 0.5), (4, 0.5), (6, 0.7), (8, 0.9)):
        before, after = (float(lost(weight, stats.hessian, dense(t, width)).sum()) for t in (plain, ours))
        assert after < share * before, width
        errors.append(after)
    assert all(b < 0.5 * a for a, b in itertools.pairwise(errors))


def test_a_round_chooses_planes_anew():
    """A round is worth more than the scales alone, at the planes of the walk."""
    weight, stats = case(rows=40, columns=128)
    common = {"bits": 3, "weights": {2: 1, 3: 1}, "group_size": 64}
    walked, rounded = (AnyBCQ(**common, refit=n).quantize(weight, stats)[0] for n in (0, 1))
    codes = unpack(walked.planes, 128)
    scales = refit(weight, stats.hessian, codes, walked.decoder, {2: 1.0, 3: 1.0})
    for width in (2, 3):
        before = float(lost(weight, stats.hessian, scales.decode(codes, width)).sum())
        assert float(lost(weight, stats.hessian, rounded.dense(width)).sum()) < 0.97 * before


def test_wider_widths_leave_the_planes_of_the_narrow_ones_alone():
    weight, stats = case(columns=80)
    options = {"group_size": 32, "first_token_weight": 100}
    narrow = AnyBCQ(bits=4, weights={2: 1, 3: 1, 4: 0.5}, **options).quantize(weight, stats)[0]
    wide = AnyBCQ(bits=8, precisions=(2, 3, 4, 6, 8), weights={2: 1, 3: 1, 4: 0.5, 6: 1, 8: 1}, **options)
    (term,) = wide.quantize(weight, stats)
    assert torch.equal(narrow.planes, term.planes[:4])
    assert all(torch.equal(narrow.dense(p), term.dense(p)) for p in (2, 3, 4))
    form, _ = save_terms([term], (24, 80))
    assert form == wide.plan((24, 80))
    assert precisions(form) == (2, 3, 4, 6, 8)


def test_dead_inputs_constant_groups_and_no_tokens():
    weight, stats = case(columns=80)
    weight[:, 32:64] = 0.25
    hessian = stats.hessian.clone()
    hessian[:8], hessian[:, :8] = 0, 0
    method = AnyBCQ(bits=3, group_size=32, weights={2: 1, 3: 1})
    for given in (InputStats(400, hessian), InputStats(0)):
        terms = method.quantize(weight, given)
        for p in (2, 3):
            assert bool(dense(terms, p).isfinite().all())
    assert float((weight - dense(terms, 3)).norm() / weight.norm()) < 0.35


def test_stages():
    assert stages([2, 3, 4, 6, 8]) == [[2, 3, 4], [6, 8]]
    assert stages([2, 3]) == [[2, 3]]
    assert stages([3, 6, 8]) == [[3], [6], [8]]
    assert stages([8]) == [[8]]


def test_levels_follow_the_format():
    """`values` is what the decoder gives, for any code."""
    _, _, codes, coded = coded_case()
    assert isinstance(coded, BinaryCoded)
    levels = BinaryLevels(coded, {2: 1.0, 4: 1.0}, torch.arange(80) // 32)
    for i in range(80):
        for width, values in zip((2, 4), levels.values(codes[:, i], i), strict=True):
            torch.testing.assert_close(values, coded.decode(codes, width)[:, i])
