"""DGQ's two-phase search against its spec's checks (methods/dgq.md section 7): guard, exact integers, search, static ranges."""

from __future__ import annotations

import pytest
import torch

from anybit.errors import CalibrationError
from anybit.formats.decoder import by_group
from anybit.formats.dual_grained import DualGrained
from anybit.formats.terms import CodeTerm, dense, save_terms
from anybit.methods.activations import IntInputs
from anybit.methods.base import InputStats, relative_output_error
from anybit.methods.dgq import DGQ
from anybit.methods.rtn import RTN
from anybit.methods.two_level import group_blocks, group_loss, rounded
from dual_case import accumulated, products

ROUNDING = {"group_steps": 0, "channel_steps": 0}


def layer(rows=24, columns=200, seed=0, spread=1.0):
    """A weight and the statistics of correlated inputs whose channels differ in size."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, columns, generator=draw)
    x = torch.randn(400, 12, generator=draw) @ mix + 0.3 * torch.randn(400, columns, generator=draw)
    x = x * torch.exp(spread * torch.randn(columns, generator=draw))
    return torch.randn(rows, columns, generator=draw), InputStats(400, 2 / 400 * x.t() @ x)


def quadratic(errors, hessian):
    """d H d^T of every row of errors [N, K], float64."""
    return ((errors.double() @ hessian.double()) * errors.double()).sum(1)


def lost(method, weight, stats):
    return quadratic(dense(method.quantize(weight, stats)) - weight, stats.hessian)


def test_the_guard_holds_for_every_scale_and_zero_and_is_attained():
    values = torch.cat([torch.linspace(-400, 400, 801), torch.tensor([-127.0, 127.0])]).view(-1, 1, 1)
    scale, zero = torch.arange(1.0, 128).view(-1, 1), torch.arange(16.0)
    codes = rounded(values, scale, zero, 4, 127)
    assert float(codes.min()) == 0
    assert float(codes.max()) == 15
    products = scale * (codes - zero)
    assert float(products.abs().max()) == 127
    nearest = (values.clamp(-127, 127) / scale).round().add(zero).clamp(0, 15)
    within = (scale * (nearest - zero)).abs() <= 127
    assert torch.equal(codes[within], nearest[within])
    assert not bool(within.all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("most", [127, 16])
def test_tensors_are_integers_within_their_bounds(bits, most):
    weight, stats = layer(seed=bits)
    weight[:, 64:128] = weight[:, 64:128].abs() + 3  # a group to one side of 0
    weight[4, 10] = 60  # a group far wider than its row's others
    method = DGQ(bits=bits, group_size=64, most=most, channel_steps=10)
    (term,) = method.quantize(weight, stats)
    assert int(products(term).abs().max()) <= 127
    assert 1 <= int(term.decoder.group_scale.min()) <= int(term.decoder.group_scale.max()) <= most
    missed = (dense([term]) - weight)[:4, 64:128].norm() / weight[:4, 64:128].norm()
    assert float(missed) < 0.6 / 2**bits + 0.02 or most * (2**bits - 1) < 127  # fewer levels than a row may need
    assert method.plan((24, 200)) == save_terms([term], (24, 200))[0]


def test_no_steps_are_two_level_rounding():
    """Written out for one row and group at a time."""
    weight, stats = layer(rows=6)
    found = dense(DGQ(group_size=64, **ROUNDING).quantize(weight, stats))
    for n in range(6):
        channel = (weight[n].abs().max() / 127).half().float()
        for start in range(0, 200, 64):
            part = weight[n, start : start + 64]
            low, high = part.min().clamp_max(0), part.max().clamp_min(0)
            step = (high - low) / 15
            scale, zero = (step / channel).round().clamp_min(1), (-low / step).round()
            codes = ((part / channel).clamp(-127, 127) / scale).round().clamp(-(127 // scale), 127 // scale)
            expected = ((codes + zero).clamp(0, 15) - zero) * scale * channel
            assert torch.allclose(found[n, start : start + 64], expected, rtol=1e-6)


@pytest.mark.parametrize("group", [64, 128])
def test_no_step_of_the_search_loses_against_rounding(group):
    weight, stats = layer()
    blocks, parts = group_blocks(stats.hessian, group), by_group(weight, group)

    def phase_one(steps):
        scale, zero = (t[..., None] for t in DGQ(group_size=group, group_steps=steps).groups(parts, blocks))
        return group_loss((parts / scale).round().clamp(-zero, 15 - zero) * scale - parts, blocks)

    assert bool((phase_one(20) <= phase_one(0) * 1.00001).all())
    assert float(phase_one(20).sum()) < 0.95 * float(phase_one(0).sum())
    first = lost(DGQ(group_size=group, channel_steps=0), weight, stats)
    both = lost(DGQ(group_size=group), weight, stats)
    assert bool((both <= first * 1.00001).all())
    assert float(both.sum()) < 0.98 * float(first.sum())


def test_two_phases_are_near_the_joint_search():
    """4 x 256 with statistics that are blocks, so that given a channel scale every group can be searched alone."""
    weight, stats = layer(rows=4, columns=256)
    blocks = group_blocks(stats.hessian, 64)
    method, parts, hessian = DGQ(group_size=64), by_group(weight, 64), torch.block_diag(*blocks)
    best = torch.full((4,), torch.inf)
    low, high = parts.amin(-1), parts.amax(-1)
    for i in range(81):
        channel = weight.abs().amax(1, keepdim=True) * (1.02 - 0.82 * i / 80) / 127
        least = torch.full((4, 4), torch.inf)
        for j in range(21):
            step = (high - low) * (1.02 - 0.22 * j / 20) / 15
            zero, scale = (
                (-low * 15 / (high - low)).round()[..., None],
                (step / channel).round().clamp_min(1)[..., None],
            )
            limited = (parts / channel[..., None]).clamp(-127, 127)
            codes = (limited / scale).round().clamp(-zero, 15 - zero).clamp(-(127 // scale), 127 // scale)
            least = torch.minimum(least, group_loss(codes * scale * channel[..., None] - parts, blocks))
        best = torch.minimum(best, least.sum(1))
    ratio = lost(method, weight, InputStats(400, hessian)).sum() / best.double().sum()
    assert 0.999 < float(ratio) < 1.06


def test_between_float_group_scales_and_one_scale_a_row():
    draw = torch.Generator().manual_seed(0)
    weight, eye = torch.randn(64, 1024, generator=draw), torch.eye(1024)
    method, parts = DGQ(), by_group(weight, 128)
    scale, zero = (t[..., None] for t in method.groups(parts, group_blocks(eye, 128)))
    floating = ((parts / scale).round().clamp(-zero, 15 - zero) * scale - parts).square().sum()
    found = lost(method, weight, InputStats(1, eye)).sum()
    rows = (dense(RTN(group_size=-1).quantize(weight, InputStats())) - weight).square().sum()
    assert float(floating) <= float(found) < 1.1 * float(floating)
    assert float(found) < 0.7 * float(rows)


def test_better_than_rounding_on_the_layer_and_zeros_nearby_help():
    weight, stats = layer()
    methods = [DGQ(group_size=64, **ROUNDING), DGQ(group_size=64), DGQ(group_size=64, zeros=1)]
    errors = [relative_output_error(weight, dense(m.quantize(weight, stats)), stats) for m in methods]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < errors[1]


def test_feedback_keeps_both_levels_and_lowers_the_error():
    weight, stats = layer(rows=32)
    options = {"group_size": 64, "channel_steps": 8, "damping": 0.01}
    (nearest,), (walked,) = (DGQ(**options, feedback=on).quantize(weight, stats) for on in (False, True))
    for name in ("channel_scale", "group_scale", "group_zero"):
        assert torch.equal(getattr(nearest.decoder, name), getattr(walked.decoder, name))
    assert not torch.equal(nearest.dense(), walked.dense())
    before, after = (quadratic(term.dense() - weight, stats.hessian) for term in (nearest, walked))
    assert float(after.sum()) < 0.7 * float(before.sum())
    assert torch.isfinite(dense(DGQ(feedback=True).quantize(weight, stats))).all()  # undamped: GPTQ's least


def test_rows_and_groups_of_zeros_and_dead_inputs():
    weight, stats = layer()
    hessian = stats.hessian.clone()
    hessian[5], hessian[:, 5] = 0, 0
    weight[3], weight[:, 5], weight[:, 64:128] = 0, 1000.0, 0
    found = dense(DGQ(group_size=64).quantize(weight, InputStats(1, hessian)))
    assert bool(found.isfinite().all())
    assert not bool(found[3].any() or found[:, 5].any() or found[:, 64:128].any())


def test_the_kernel_accumulates_exactly_with_scales_up_to_127():
    """K = 28672: the kernel's int32, the int8 weight in int64, and groups added up in int32 that wraps."""
    draw = torch.Generator().manual_seed(0)
    scale = torch.randint(1, 128, (4, 224), generator=draw)
    zero = torch.randint(0, 16, scale.shape, generator=draw)
    values = torch.randint(-127, 128, (4, 28672), generator=draw).float()
    values[0] = 127
    tables = [t.repeat_interleave(128, 1).float() for t in (scale, zero)]
    codes = rounded(values, *tables, 4, 127).to(torch.uint8)
    decoder = DualGrained(4, 128, torch.ones(4, 1).half(), scale.to(torch.uint8), zero.to(torch.uint8))
    term = CodeTerm.from_codes(codes, decoder)
    x = torch.randint(-127, 128, (3, 28672), generator=draw)
    x[0] = 127 * products(term)[0].sign()
    exact = x @ products(term).t()
    assert torch.equal(accumulated(term, x.to(torch.int8)), exact)
    inner = torch.einsum("tgk,ngk->tng", *(by_group(t.double(), 128) for t in (x, codes))).long()
    sums = by_group(x, 128).sum(-1)
    wrapped = torch.zeros(3, 4, dtype=torch.int32)
    for g in range(224):
        wrapped += (scale[:, g] * (inner[..., g] - zero[:, g] * sums[:, g : g + 1])).to(torch.int32)
    assert torch.equal(wrapped.long(), exact)


def test_a_spike_in_one_sample_does_not_widen_a_recurring_static_range():
    maxima = torch.rand(5, 64, generator=torch.Generator().manual_seed(0)) + 1
    spiked = torch.cat([maxima, torch.full((1, 64), 1.5)])
    spiked[5, 7] = 1000
    method = IntInputs(static=True, granularity="tensor", recurring=True)
    before, after = (method.tensors(InputStats(9, sample_max=m), 64)["input_scale"] for m in (maxima, spiked))
    assert float(before) == pytest.approx(float(maxima.amin(0).max()) / 127)
    assert float(after) <= float(before)
    plain = IntInputs(static=True, granularity="tensor").tensors(InputStats(9, sample_max=spiked), 64)
    assert float(plain["input_scale"]) == pytest.approx(1000 / 127)
    with pytest.raises(CalibrationError, match="calibration tokens"):
        method.tensors(InputStats(0), 64)
