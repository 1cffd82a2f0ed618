"""Percentile smoothing (methods/dgq.md section 7): exact identity, which channels move, what it gives static activations."""

from __future__ import annotations

import pytest
import torch

from anybit.calibration.parallel import workers
from anybit.calibration.statistics import collect
from anybit.formats.activation import IntActivations
from anybit.transforms.percentile_smooth import PercentileSmooth
from tiny_models import FAMILIES
from transform_case import case


@pytest.mark.parametrize("family", FAMILIES)
def test_output_stays(family, tmp_path):
    found = case(family, tmp_path)
    before = {n: p.clone() for n, p in found.call.block.named_parameters()}
    with workers(1) as pool:
        notes = PercentileSmooth(share=0.1).apply(found.call, found.graph, found.source, pool)
    assert found.error() < 1e-4
    assert notes
    assert any(not torch.equal(p, before[n]) for n, p in found.call.block.named_parameters())


def test_channels_above_the_mth_end_at_it(tmp_path):
    found = case("llama", tmp_path)

    def reach(name):
        with workers(1) as pool:
            return collect(found.call, found.source, [name], frozenset({"max_abs"}), pool)[name].max_abs

    names = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
    before = [reach(name) for name in names]
    with workers(1) as pool:
        PercentileSmooth(share=0.05).apply(found.call, found.graph, found.source, pool)
    for name, old in zip(names, before, strict=True):
        m, new = int(0.05 * len(old) + 1.5), reach(name)
        top = old.sort(descending=True).values[m - 1]
        moved = (new - old).abs() > 1e-4 * old
        assert int(moved.sum()) == m - 1 > 1
        assert torch.allclose(new[moved], top.expand(m - 1), rtol=1e-4)
        assert bool((old[moved] > top).all())


def test_the_count_is_that_of_the_paper():
    reach = torch.arange(1.0, 4097)
    assert int((PercentileSmooth().scales(reach, torch.ones(4096)) > 1).sum()) == 20
    reach = torch.arange(1.0, 11009)
    assert int((PercentileSmooth().scales(reach, torch.ones(11008)) > 1).sum()) == 55


def test_dead_and_broken_inputs_are_left_alone():
    ones = torch.ones(512)
    assert torch.equal(PercentileSmooth().scales(torch.cat([torch.tensor([3.0]), torch.zeros(511)]), ones), ones)
    assert torch.equal(PercentileSmooth().scales(torch.cat([torch.tensor([torch.inf]), ones[1:]]), ones), ones)


def test_the_cap_bounds_the_growth_of_weights():
    reach, spans = torch.ones(512), torch.ones(512)
    reach[3], reach[9], spans[9] = 1000, 1000, 0.01
    s = PercentileSmooth(cap=16).scales(reach, spans)
    assert float(s[3]) == 16
    assert float(s[9]) == 1000
    assert float(PercentileSmooth().scales(reach, spans)[3]) == 1000


def test_static_activations_gain_where_outlier_channels_are_planted():
    draw = torch.Generator().manual_seed(0)
    x, outliers = torch.randn(500, 1024, generator=draw), torch.tensor([5, 100, 700])
    x[:, outliers] *= 50
    s = PercentileSmooth().scales(x.abs().amax(0), torch.ones(1024))

    def lost(values):
        spec = IntActivations(static=True, granularity="tensor")
        scale = {"input_scale": values.abs().max().view(1) / 127}
        return (spec.encode(values, scale).values() - values).square().mean()

    assert float(lost(x / s)) < float(lost(x)) / 5
