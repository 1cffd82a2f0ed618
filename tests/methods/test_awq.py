"""AWQ against its spec's checks (methods/smoothing_rotation.md section 7, items 6 and 7)."""

from __future__ import annotations

import torch

from anybit.formats.terms import dense
from anybit.methods.awq import AWQ
from anybit.methods.base import InputStats
from anybit.methods.rtn import RTN
from anybit.transforms.awq_scale import AWQScale


def salient_layer(seed=0):
    """A layer where two input channels carry most of the signal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 64, generator=generator)
    x[:, [3, 40]] *= 30
    return x, torch.randn(32, 64, generator=generator)


def output_loss(x, weight):
    return lambda replacements: float((x @ (replacements[0] - weight).t()).square().mean())


def test_chosen_scales_are_centred_and_never_worse_than_none():
    x, weight = salient_layer()
    method = AWQScale(bits=3, group_size=32)
    loss = output_loss(x, weight)
    scales = method.search(x.abs().mean(0), [weight], loss)
    assert abs(float(scales.max() * scales.min()) - 1) < 1e-4
    scaled = RTN(bits=3).fit(weight * scales)
    after = loss([scaled.decode(scaled.encode(weight * scales)) / scales])
    before = loss([dense(RTN(bits=3).quantize(weight, InputStats()))])
    assert after < 0.5 * before
    assert bool((scales[[3, 40]] > scales.median()).all())


def test_nothing_to_gain_means_no_scaling():
    x, weight = salient_layer()
    scales = AWQScale().search(torch.ones(64), [weight], output_loss(x, weight))
    assert torch.equal(scales, torch.ones(64))


def test_clip_lowers_every_groups_output_error_and_skips_query_and_key():
    x, weight = salient_layer()
    weight[0, 0], weight[1, 33] = 8.0, -9.0
    x[:, [0, 33]] *= 0.01
    method = AWQ(bits=3, group_size=32)
    stats = InputStats(len(x), None, x, None, "model.layers.0.mlp.up_proj")
    clipped, plain = dense(method.quantize(weight, stats)), dense(RTN(bits=3).quantize(weight, stats))
    for group in (slice(0, 32), slice(32, 64)):
        lost = [(x[:, group] @ (w - weight)[:, group].t()).square().sum(0) for w in (clipped, plain)]
        assert bool((lost[0] <= lost[1] * (1 + 1e-4)).all())
    assert float((x @ (clipped - weight).t()).norm()) < 0.9 * float((x @ (plain - weight).t()).norm())
    query = InputStats(len(x), None, x, None, "model.layers.0.self_attn.q_proj")
    assert torch.equal(dense(method.quantize(weight, query)), plain)
