"""Any-precision against its spec's checks (methods/any_precision.md section 7, items 1 and 2)."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError

from anybit.formats.planes import unpack
from anybit.formats.terms import dense, precisions, save_terms
from anybit.methods.any_precision import AnyPrecision
from anybit.methods.base import InputStats
from anybit.methods.rtn import RTN


def heavy_layer(rows=12, columns=320, seed=0):
    """Student-t weights (3 degrees of freedom) and positive squared gradients over several decades."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, rows, columns, generator=generator)
    weight = normal[0] / normal[1:].square().mean(0).sqrt()
    fisher = torch.exp(2 * torch.randn(rows, columns, generator=generator))
    return weight, InputStats(tokens=10, fisher=fisher)


@pytest.fixture(scope="module", params=[{}, {"split": "exact", "seed_method": "dp"}], ids=["paper", "ours"])
def quantized(request):
    weight, stats = heavy_layer()
    method = AnyPrecision(bits=8, seed_bits=2, **request.param)
    (term,) = method.quantize(weight, stats)
    return weight, stats, term


def test_tables_ascend_and_lie_between_their_children(quantized):
    _, _, term = quantized
    for p in range(2, 8):
        parent, child = term.decoder.tables[p].float(), term.decoder.tables[p + 1].float()
        assert bool((parent.diff(dim=1) >= 0).all())
        assert bool((child[:, ::2] <= parent).all())
        assert bool((parent <= child[:, 1::2]).all())
    assert bool((term.decoder.tables[8].float().diff(dim=1) >= 0).all())


def test_every_centroid_is_the_weighted_mean_of_its_entries_and_of_its_children(quantized):
    weight, stats, term = quantized
    codes, f = unpack(term.planes, weight.shape[1]).long(), stats.fisher.double()
    for p in range(2, 9):
        size = torch.zeros(12, 2**p, dtype=torch.float64).scatter_add_(1, codes >> (8 - p), f)
        total = torch.zeros(12, 2**p, dtype=torch.float64).scatter_add_(1, codes >> (8 - p), f * weight.double())
        table = term.decoder.tables[p].double()
        filled = size > 0
        torch.testing.assert_close(table[filled], (total / size)[filled], rtol=1e-3, atol=1e-5)
        if p < 8:
            child = torch.zeros(12, 2 ** (p + 1), dtype=torch.float64).scatter_add_(1, codes >> (7 - p), f)
            tables = term.decoder.tables[p + 1].double() * child
            mean = (tables[:, ::2] + tables[:, 1::2]) / size
            torch.testing.assert_close(mean[filled], table[filled], rtol=2e-3, atol=1e-4)


def test_codes_ascend_with_the_weight(quantized):
    weight, _, term = quantized
    codes = unpack(term.planes, weight.shape[1]).long().gather(1, weight.argsort(dim=1))
    assert bool((codes.diff(dim=1) >= 0).all())


def test_error_falls_with_every_bit_and_beats_rounding(quantized):
    weight, stats, term = quantized
    errors = [float((stats.fisher * (weight - term.dense(p)).square()).sum()) for p in range(2, 9)]
    assert all(b < 0.6 * a for a, b in itertools.pairwise(errors))
    for p, error in enumerate(errors, start=2):
        plain = dense(RTN(bits=p, group_size=-1).quantize(weight, stats))
        assert error < 0.5 * float((stats.fisher * (weight - plain).square()).sum())


def test_fewer_tables_are_the_same_tables(quantized):
    weight, stats, _ = quantized
    few = AnyPrecision(bits=4, seed_bits=2, precisions=[2, 4])
    (short,) = few.quantize(weight, stats)
    form, _ = save_terms([short], (12, 320))
    assert form == few.plan((12, 320))
    assert precisions(form) == (2, 4)
    whole = AnyPrecision(bits=8, seed_bits=2).quantize(weight, stats)[0]
    assert torch.equal(short.planes, whole.planes[:4])
    assert all(torch.equal(short.dense(p), whole.dense(p)) for p in (2, 4))


def test_a_higher_seed_is_better_at_its_own_width():
    weight, stats = heavy_layer()
    errors = [
        float(
            (stats.fisher * (weight - dense(AnyPrecision(bits=4, seed_bits=s).quantize(weight, stats))).square()).sum()
        )
        for s in (1, 4)
    ]
    assert errors[1] < 0.95 * errors[0]


def test_hessian_sensitivity_is_its_diagonal_in_every_row():
    weight, _ = heavy_layer()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, 320, generator=generator) * torch.exp(torch.randn(320, generator=generator))
    hessian = x.t() @ x
    with_hessian = AnyPrecision(bits=4, sensitivity="hessian")
    assert not with_hessian.gradients
    assert AnyPrecision().gradients
    own = dense(with_hessian.quantize(weight, InputStats(64, hessian)))
    same = InputStats(64, fisher=hessian.diagonal().expand(12, 320))
    assert torch.equal(own, dense(AnyPrecision(bits=4).quantize(weight, same)))
    assert not torch.equal(
        own, dense(AnyPrecision(bits=4).quantize(weight, InputStats(64, fisher=torch.ones(12, 320))))
    )


def test_rows_in_pieces_are_the_rows(monkeypatch):
    weight, stats = heavy_layer()
    whole = AnyPrecision(bits=5).quantize(weight, stats)[0]
    monkeypatch.setattr("anybit.methods.any_precision.BLOCK_WEIGHTS", 5 * 320)
    pieces = AnyPrecision(bits=5).quantize(weight, stats)[0]
    assert torch.equal(pieces.planes, whole.planes)
    assert all(torch.equal(pieces.decoder.tables[p], whole.decoder.tables[p]) for p in (3, 4, 5))


@pytest.mark.parametrize(
    "options",
    [{"bits": 2}, {"precisions": [2, 8]}, {"precisions": [3, 6]}, {"precisions": [4, 3, 8]}, {"seed_bits": 9}],
)
def test_options_that_do_not_fit(options):
    with pytest.raises(ValidationError, match="seed_bits"):
        AnyPrecision(**options)
