"""QoQ's two-level weights against its spec's checks (methods/qoq_qserve.md section 7): bounds, exact integers, search, GPTQ."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from anybit.formats.decoder import by_group
from anybit.formats.terms import dense, save_terms
from anybit.methods.base import InputStats, relative_output_error
from anybit.methods.qoq import QoQ
from anybit.methods.two_level import group_blocks, group_loss, rounded
from dual_case import accumulated, products


def layer(rows=24, columns=200, tokens=400, seed=0):
    """A weight with rows of very different size and a few spikes, and statistics of correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, columns, generator=draw)
    x = torch.randn(tokens, 12, generator=draw) @ mix + 0.3 * torch.randn(tokens, columns, generator=draw)
    x = x * torch.exp(torch.randn(columns, generator=draw))
    weight = torch.randn(rows, columns, generator=draw) * 10 ** (2 * torch.rand(rows, 1, generator=draw) - 1)
    weight[::3, ::17] *= 9
    return weight, InputStats(tokens, 2 / tokens * x.t() @ x)


def overshoot(protect):
    """Largest |scale * (code - zero)| over all integer ranges within +-protect, values at both ends of each."""
    ends = torch.arange(protect + 1.0)
    low, high = (end.flatten() for end in torch.meshgrid(-ends, ends, indexing="ij"))
    scale = ((high - low) / 15).round().clamp_min(1)
    zero = (-low / scale).round().clamp(0, 15)
    codes = [((end / scale).round() + zero).clamp(0, 15) for end in (low, high)]
    return max(float((scale * (code - zero)).abs().max()) for code in codes)


def test_the_protective_range_is_119():
    assert overshoot(119) == 121
    assert overshoot(120) == 128
    assert overshoot(127) == 132


def test_within_119_no_code_needs_a_clamp_whatever_scale_and_zero():
    values = torch.arange(-119, 119.25, 0.25).view(-1, 1, 1)
    scale, zero = torch.arange(1.0, 17).view(-1, 1), torch.arange(16.0)
    codes = rounded(values * 1.5, scale, zero, 4, 119)  # beyond the range as well
    free = ((values * 1.5).clamp(-119, 119) / scale).round().add(zero).clamp(0, 15)
    assert torch.equal(codes, free)
    assert float((scale * (codes - zero)).abs().max()) == 121


@pytest.mark.parametrize("clip", ["none", "hessian", "output"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_weights_fit_int8_after_gptq_pushed_them_about(bits, clip):
    weight, stats = layer(seed=bits)
    (term,) = QoQ(bits=bits, group_size=64, clip=clip).quantize(weight, stats)
    assert int(products(term).abs().max()) <= (121 if bits == 4 else 127)
    assert 1 <= int(term.decoder.group_scale.min()) <= int(term.decoder.group_scale.max()) <= -(-238 // (2**bits - 1))
    assert int(term.decoder.group_zero.max()) < 2**bits
    assert torch.equal(dense([term]), products(term).float() * term.decoder.channel_scale.float())


@pytest.mark.parametrize(("group", "columns"), [(64, 200), (128, 200), (128, 100), (-1, 200), (1, 9)])
def test_the_planned_form_is_the_saved_one(group, columns):
    weight, stats = layer(columns=columns)
    method = QoQ(group_size=group)
    form, _ = save_terms(method.quantize(weight, stats), (24, columns))
    assert method.plan((24, columns)) == form
    assert form["terms"][0]["kind"] == ("affine" if group == -1 else "dual_grained")


def row_losses(levels, weight, hessian):
    return group_loss(levels.errors(by_group(weight, levels.group_size)), group_blocks(hessian, levels.group_size)).sum(
        1
    )


def test_the_search_of_each_level_loses_less():
    weight, stats = layer()
    method, hessian = QoQ(group_size=64), stats.hessian
    plain, found = QoQ(group_size=64, clip="none").fit(weight, hessian), method.fit(weight, hessian)
    assert bool((found.channel <= plain.channel).all())
    halfway = method._covering(by_group(weight, 64), found.channel)
    lost = [row_losses(levels, weight, hessian) for levels in (plain, halfway, found)]
    assert bool((lost[1] <= lost[0] * 1.00001).all())
    assert bool((lost[2] <= lost[1] * 1.00001).all())
    assert float(lost[0].sum()) > 1.03 * float(lost[1].sum()) > 1.05 * float(lost[2].sum())


@pytest.mark.parametrize(("zeros", "most"), [(0, 1.25), (1, 1.12)])
def test_level_two_is_near_the_best_of_all_integer_grids(zeros, most):
    """Brute force over all 16 x 16 scales and zeros of each group, given level 1."""
    weight, stats = layer(rows=16, columns=256)
    white = torch.diag(stats.hessian.diagonal())
    blocks, parts = group_blocks(white, 64), by_group(weight, 64)
    found = QoQ(group_size=64, zeros=zeros).fit(weight, white)
    best = torch.full(found.scale.shape, torch.inf)
    for scale in range(1, 17):
        for zero in range(16):
            codes = (parts / found.channel[..., None] / scale).round().clamp(-zero, 15 - zero)
            errors = codes * scale * found.channel[..., None] - parts
            best = torch.minimum(best, group_loss(errors, blocks))
    assert 0.9999 <= float(row_losses(found, weight, white).sum() / best.sum()) < most


def test_two_levels_cost_next_to_nothing_over_float_scales():
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    parts = by_group(weight, 128)
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = (high - low) / 15
    zero = (-low / step).round()
    free = (((parts / step).round() + zero).clamp(0, 15) - zero) * step
    two = QoQ(clip="none").fit(weight, torch.eye(4096)).errors(parts)
    ratio = two.square().mean() / (free - parts).square().mean()
    assert float(ratio) == pytest.approx(1.013, abs=0.02)


def test_diagonal_statistics_are_round_to_nearest_and_others_far_better():
    weight, stats = layer()
    white = InputStats(10, torch.diag(torch.rand(200) + 0.5))
    method = QoQ(group_size=64)
    levels = method.fit(weight, white.hessian)
    nearest = levels.codes(by_group(weight, 64)).flatten(1)[:, :200]
    assert torch.equal(dense(method.quantize(weight, white)), dense([levels.term(nearest)]))
    codes = method.fit(weight, stats.hessian).codes(by_group(weight, 64)).flatten(1)[:, :200]
    plain = relative_output_error(weight, dense([method.fit(weight, stats.hessian).term(codes)]), stats)
    assert relative_output_error(weight, dense(method.quantize(weight, stats)), stats) < 0.5 * plain


def test_rows_are_independent_and_powers_of_two_pass_through():
    weight, stats = layer()
    method = QoQ(group_size=64)
    whole = dense(method.quantize(weight, stats))
    assert torch.equal(dense(method.quantize(weight[5:7], stats)), whole[5:7])
    assert torch.equal(dense(method.quantize(weight * 8, stats)), whole * 8)


def test_rows_of_zeros_and_dead_inputs():
    weight, stats = layer()
    hessian = stats.hessian.clone()
    hessian[5], hessian[:, 5] = 0, 0
    weight[3], weight[:, 5], weight[:, 64:128] = 0, 1000.0, 0
    found = dense(QoQ(group_size=64).quantize(weight, InputStats(1, hessian)))
    assert bool(found.isfinite().all())
    assert not bool(found[3].any() or found[:, 5].any())
    assert float(found.abs().max()) < 100


def test_the_kernel_accumulates_exactly_at_the_longest_row():
    """K = 28672: the kernel's int32 are the sums of products with the int8 weight in int64."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 28672, generator=draw)
    weight[0] = torch.where(torch.rand(28672, generator=draw) < 0.5, -1.0, 1.0)
    levels = QoQ(clip="none")._fit_rows(weight, torch.zeros(224, 128, 128))
    term = levels.term(levels.codes(by_group(weight, 128)).flatten(1))
    x = torch.randint(-127, 128, (3, 28672), generator=draw)
    x[0] = 127 * weight[0]  # nearly the largest sum there is
    found = accumulated(term, x.to(torch.int8))
    assert torch.equal(found, x @ products(term).t())
    assert int(found.abs().max()) > 110 * 127 * 28672


def test_a_group_of_no_columns_is_refused():
    with pytest.raises(ValidationError, match="group a row"):
        QoQ(group_size=0)
