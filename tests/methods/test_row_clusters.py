"""Weighted clustering of rows against exhaustive search: seeds, splits, and the runs nobody expects."""

from __future__ import annotations

import itertools

import pytest
import torch

from anybit.methods.row_clusters import SortedRows, seed, split
from anybit.methods.row_optimum import optimum


def rows_of(kind, rows=6, columns=40, seed=0):
    """Values and weights [N, K] of a kind, and the SortedRows of both."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weights = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    if kind == "heavy":  # Cauchy values, weights over twelve decades
        values = values / torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        weights = 10 ** (12 * weights - 6)
    if kind == "repeated":
        values = (values * 2).round() / 2
    if kind == "dead":  # most entries do not count
        weights = weights * (weights > 0.8)
    return values, weights, SortedRows(values, weights)


def run_error(x, w):
    """Weighted squared error of a few numbers about their mean, the definition."""
    if not len(x) or not float(w.sum()):
        return 0.0
    return float((w * (x - (w * x).sum() / w.sum()).square()).sum())


def clustering_error(sorted_rows, edges, row):
    x, w = sorted_rows.values[row], sorted_rows.weights[row]
    return sum(run_error(x[a:b], w[a:b]) for a, b in itertools.pairwise(edges[row].tolist()))


def exhaustive(x, w, clusters):
    """The least error over every placement of the edges."""
    cuts = itertools.combinations_with_replacement(range(len(x) + 1), clusters - 1)
    return min(sum(run_error(x[a:b], w[a:b]) for a, b in itertools.pairwise((0, *c, len(x)))) for c in cuts)


KINDS = ["plain", "heavy", "repeated", "dead"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("clusters", "columns"), [(1, 7), (2, 1), (2, 16), (3, 13), (4, 9), (4, 3)])
def test_the_programme_finds_what_exhaustive_search_finds(kind, clusters, columns):
    _, _, rows = rows_of(kind, columns=columns)
    edges, centroids = optimum(rows, clusters)
    assert bool((edges.diff(dim=1) >= 0).all())
    assert bool((centroids.diff(dim=1) >= 0).all())
    for row in range(len(edges)):
        best = exhaustive(rows.values[row], rows.weights[row], clusters)
        assert clustering_error(rows, edges, row) == pytest.approx(best, rel=1e-6, abs=1e-9)


def drawn(clusters, trials=4):
    return torch.rand(clusters, trials, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("clusters", [2, 4, 8])
def test_seeds_come_near_the_optimum(clusters):
    _, _, rows = rows_of("plain", rows=40, columns=500)
    best, found = (
        sum(clustering_error(rows, edges, row) for row in range(40))
        for edges in (optimum(rows, clusters)[0], seed(rows, clusters, drawn(clusters))[0])
    )
    assert best <= found <= 1.06 * best


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_are_fixed_points_with_weighted_means(kind):
    values, weights, rows = rows_of(kind, columns=60)
    edges, centroids = seed(rows, 8, drawn(8))
    codes = rows.codes(edges)
    assert bool((centroids.diff(dim=1) >= 0).all())
    for row, code in itertools.product(range(6), range(8)):
        own = codes[row] == code
        x, w = values[row][own], weights[row][own]
        if own.any():
            mean = (w * x).sum() / w.sum() if w.sum() > 0 else x.mean()
            assert float(centroids[row, code]) == pytest.approx(float(mean), rel=1e-6, abs=1e-9)
    distance = (values[..., None] - centroids[:, None]).abs()
    own = distance.gather(2, codes.long()[..., None])[..., 0]
    assert bool((own <= distance.min(2).values + 1e-9).all())


def test_a_row_does_not_depend_on_its_neighbours():
    values, weights, rows = rows_of("plain", rows=5)
    together = seed(rows, 4, drawn(4))
    alone = seed(SortedRows(values[3:4], weights[3:4]), 4, drawn(4))
    assert torch.equal(together[0][3:4], alone[0])
    assert torch.equal(together[1][3:4], alone[1])


def test_a_row_without_weights_counts_every_entry_alike():
    values, _, _ = rows_of("plain")
    zero, one = SortedRows(values, torch.zeros_like(values)), SortedRows(values, torch.ones_like(values))
    assert torch.equal(seed(zero, 4, drawn(4))[1], seed(one, 4, drawn(4))[1])


def whole(rows):
    """One cluster a row: edges and centroid."""
    count, columns = rows.values.shape
    edges = torch.tensor([[0, columns]]).expand(count, 2).contiguous()
    return edges, rows.means(edges[:, :1], edges[:, 1:], torch.zeros(count, 1, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [2, 3, 17, 40])
def test_the_exact_split_is_the_best_of_all_cuts(kind, columns):
    _, _, rows = rows_of(kind, columns=columns)
    edges, _ = split(rows, *whole(rows), how="exact")
    for row in range(6):
        best = exhaustive(rows.values[row], rows.weights[row], 2)
        assert clustering_error(rows, edges, row) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_the_published_split_is_the_exhaustive_one_on_unimodal_rows():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20, 400, generator=generator, dtype=torch.float64)
    rows = SortedRows(values, torch.ones_like(values))
    edges, _ = split(rows, *whole(rows))
    best, _ = split(rows, *whole(rows), how="exact")
    for row in range(20):
        assert clustering_error(rows, edges, row) <= 1.005 * clustering_error(rows, best, row)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [2, 3, 17, 40])
def test_the_published_split_is_a_fixed_point(kind, columns):
    """x[i-1] <= (left mean + right mean) / 2 <= x[i], by the definition."""
    _, _, rows = rows_of(kind, columns=columns)
    edges, centroids = split(rows, *whole(rows))
    for row in range(6):
        at = int(edges[row, 1])
        middle = float(centroids[row].mean())
        if int((rows.weights[row] > 0).sum()) == 1:
            assert at == columns
        else:
            assert rows.values[row, at - 1] - 1e-9 <= middle <= rows.values[row, at] + 1e-9


@pytest.mark.parametrize("how", ["lloyd", "exact"])
def test_special_runs(how):
    """Empty, one entry, two entries, all weight on one entry, no weight at all."""
    values = torch.tensor([[1.0, 2, 3, 10, 11, 30, 31, 40, 50]])
    weights = torch.tensor([[1.0, 1, 1, 0, 5, 0, 0, 0, 0]])
    rows = SortedRows(values, weights)
    edges, centroids = torch.tensor([[0, 1, 1, 3, 5, 9]]), torch.tensor([[1, 1.5, 2.5, 11, 37.75]], dtype=torch.float64)
    found, means = split(rows, edges, centroids, how)
    assert found.tolist() == [[0, 1, 1, 1, 1, 2, 3, 5, 5, 7, 9]]
    assert means.tolist() == [[1, 1, 1.5, 1.5, 2, 3, 11, 11, 30.5, 45]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["lloyd", "exact"])
def test_splits_down_to_single_entries(kind, how):
    """Every level: runs inside their parents, ascending tables between their children, error never above the parent's."""
    _, _, rows = rows_of(kind, columns=37)
    edges, centroids = seed(rows, 2, drawn(2))
    for _ in range(7):
        parent, codes = centroids, rows.codes(edges)
        error = [clustering_error(rows, edges, row) for row in range(6)]
        edges, centroids = split(rows, edges, centroids, how)
        assert torch.equal(rows.codes(edges) >> 1, codes)
        assert bool((centroids.diff(dim=1) >= 0).all())
        left, right = centroids[:, ::2], centroids[:, 1::2]
        assert bool(((left <= parent + 1e-9) & (parent <= right + 1e-9)).all())
        for row in range(6):
            assert clustering_error(rows, edges, row) <= error[row] * (1 + 1e-9) + 1e-12
    assert sum(error) < 1e-3 * sum(run_error(rows.values[r], rows.weights[r]) for r in range(6))
