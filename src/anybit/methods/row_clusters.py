"""Weighted one-dimensional clustering of many rows at once: seeds by k-means++ and Lloyd, and two-way splits.

A sorted row's clusters are runs, so a clustering is its edges int64 [N, C + 1] (cluster c of row n: sorted positions
edges[n, c] .. edges[n, c + 1] - 1), and prefix sums give any run's weight, mean and error at once. All float64.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

MAX_LLOYD = 50


class SortedRows:
    """Rows of `values` [N, K] ascending with their weights and prefix sums.

    Attributes:
        values, weights: float64 [N, K], sorted by value.
        order: int64 [N, K], the original column of each sorted position.
    """

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        """values float [N, K]; weights float [N, K], >= 0 (a row that is all 0 counts every entry alike)."""
        self.values, self.order = values.double().sort(dim=1, stable=True)
        self.weights = weights.double().gather(1, self.order)
        self.weights = torch.where(self.weights.sum(1, keepdim=True) > 0, self.weights, 1.0)
        self._weight = _prefix(self.weights)
        self._first = _prefix(self.weights * self.values)
        self._second = _prefix(self.weights * self.values.square())
        self._plain = _prefix(self.values)
        self._heavy = _prefix((self.weights > 0).double())

    def means(self, start: Tensor, stop: Tensor, empty: Tensor) -> Tensor:
        """Weighted means of the runs [start, stop) [N, C]; plain where the weight is 0, `empty` [N, C] where nothing is."""
        weight, first = _over(self._weight, start, stop), _over(self._first, start, stop)
        plain = _over(self._plain, start, stop) / (stop - start).clamp_min(1)
        mean = torch.where(weight > 0, first / weight.clamp_min(1e-300), plain)
        # Prefix sums lose a run that weighs 1e-16 of its row; inside its own values nothing can go wrong.
        last = self.values.shape[1] - 1
        low, high = self.values.gather(1, start.clamp_max(last)), self.values.gather(1, (stop - 1).clamp_min(0))
        return torch.where(stop > start, torch.minimum(torch.maximum(mean, low), high), empty)

    def error(self, start: Tensor, stop: Tensor) -> Tensor:
        """Weighted squared error of runs [N, C] about their means."""
        weight, first = _over(self._weight, start, stop), _over(self._first, start, stop)
        return (_over(self._second, start, stop) - first.square() / weight.clamp_min(1e-300)).clamp_min(0)

    def heavy(self, start: Tensor, stop: Tensor) -> Tensor:
        """How many entries of runs [N, C] have weight."""
        return _over(self._heavy, start, stop)

    def codes(self, edges: Tensor) -> Tensor:
        """The cluster of every entry in original column order, uint8 [N, K]."""
        rows, columns = self.values.shape
        at = torch.arange(columns).expand(rows, columns).contiguous()
        found = torch.searchsorted(edges[:, 1:-1].contiguous(), at, right=True).to(torch.uint8)
        return torch.empty_like(found).scatter_(1, self.order, found)


def seed(rows: SortedRows, clusters: int, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Edges and centroids float64 [N, C] by greedy k-means++ and at most `MAX_LLOYD` Lloyd iterations.

    `draws` float64 [C, trials], uniform in [0, 1): the randomness, the same for every row so that rows do not depend on
    their neighbours.
    """
    centroids = _plus_plus(rows, clusters, draws).sort(dim=1).values
    edges = _nearest(rows, centroids)
    for _ in range(MAX_LLOYD):
        centroids = rows.means(edges[:, :-1], edges[:, 1:], centroids)
        moved = _nearest(rows, centroids)
        if torch.equal(moved, edges):
            break
        edges = moved
    return edges, rows.means(edges[:, :-1], edges[:, 1:], centroids)


def split(
    rows: SortedRows, edges: Tensor, centroids: Tensor, how: Literal["lloyd", "exact"] = "lloyd"
) -> tuple[Tensor, Tensor]:
    """Every cluster in two: edges [N, 2C + 1] and centroids [N, 2C] of children 2c and 2c + 1.

    "lloyd" finds a fixed point of Lloyd's iteration by binary search, as the paper; "exact" tries every cut. A cluster with
    one entry, or with all its weight on one, is not cut: both children have its centroid and the left one its entries.
    """
    start, stop = edges[:, :-1], edges[:, 1:]
    whole = (stop - start < 2) | (rows.heavy(start, stop) == 1)
    cut = _fixed_point(rows, start, stop) if how == "lloyd" else _best_cut(rows, edges)
    cut = torch.where(whole, stop, cut)
    left = rows.means(start, cut, centroids)
    left = torch.where(rows.heavy(start, stop) == 1, rows.means(start, stop, centroids), left)
    right = rows.means(cut, stop, left)
    columns = torch.stack([start, cut], 2).flatten(1)
    return torch.cat([columns, edges[:, -1:]], 1), torch.stack([left, right], 2).flatten(1)


def _plus_plus(rows: SortedRows, clusters: int, draws: Tensor) -> Tensor:
    """Centroids [N, C] in the order drawn: the first by weight, each next the best of a few drawn by weight * distance^2."""
    values, weights, last = rows.values, rows.weights, rows.values.shape[1] - 1
    cumulative = weights.cumsum(1)
    at = torch.searchsorted(cumulative, cumulative[:, -1:] * draws[0, :1], right=True).clamp_max(last)
    found = [values.gather(1, at)]
    nearest = weights * (values - found[0]).square()
    for drawn in draws[1:]:
        cumulative = nearest.cumsum(1)
        at = torch.searchsorted(cumulative, cumulative[:, -1:] * drawn, right=True).clamp_max(last)
        candidates = values.gather(1, at)
        errors = [torch.minimum(weights * (values - c[:, None]).square(), nearest) for c in candidates.unbind(1)]
        best = torch.stack([error.sum(1) for error in errors]).argmin(0)
        nearest = torch.stack(errors)[best, torch.arange(len(best))]
        found.append(candidates.gather(1, best[:, None]))
    return torch.cat(found[:clusters], 1)


def _nearest(rows: SortedRows, centroids: Tensor) -> Tensor:
    """Edges of the clusters of the entries nearest to each of the ascending `centroids` [N, C]; ties go right."""
    middle = (centroids[:, 1:] + centroids[:, :-1]) / 2
    inner = torch.searchsorted(rows.values, middle.contiguous())
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=rows.values.shape[1])


def _fixed_point(rows: SortedRows, start: Tensor, stop: Tensor) -> Tensor:
    """A cut i with x[i-1] <= (mean left + mean right) / 2 <= x[i] for each run of two or more entries.

    The midpoint grows with i, is >= x[i-1] at the first cut and <= x[i] at the last, so halving the interval on
    "midpoint <= x[i]" ends at a cut where it holds and at whose left neighbour it does not: a fixed point.
    """
    low, high = start + 1, torch.maximum(stop - 1, start + 1)
    last = rows.values.shape[1] - 1
    empty = torch.zeros(start.shape, dtype=torch.float64)
    for _ in range(math.ceil(math.log2(last + 1)) + 1):
        cut = torch.minimum((low + high) // 2, stop)
        middle = (rows.means(start, cut, empty) + rows.means(cut, stop, empty)) / 2
        left = middle <= rows.values.gather(1, cut.clamp_max(last))
        high = torch.where(left & (low < high), cut, high)
        low = torch.where(~left & (low < high), cut + 1, low)
    return low


def _best_cut(rows: SortedRows, edges: Tensor) -> Tensor:
    """The cut [N, C] of each run with the least weighted error; the lowest of equal ones."""
    count, columns = rows.values.shape
    at = torch.arange(columns).expand(count, columns).contiguous()
    inside = torch.searchsorted(edges[:, 1:-1].contiguous(), at, right=True)
    start, stop = edges[:, :-1].gather(1, inside), edges[:, 1:].gather(1, inside)
    error = rows.error(start, at) + rows.error(at, stop)
    error = torch.where(at > start, error, torch.inf)
    least = torch.full((count, edges.shape[1] - 1), torch.inf, dtype=torch.float64)
    least = least.scatter_reduce(1, inside, error, "amin")
    candidate = torch.where((error == least.gather(1, inside)) & (at > start), at, columns)
    best = torch.full(least.shape, columns).scatter_reduce(1, inside, candidate, "amin")
    weightless = rows.heavy(edges[:, :-1], edges[:, 1:]) == 0
    return torch.where(weightless, _fixed_point(rows, edges[:, :-1], edges[:, 1:]), best)


def _prefix(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _over(prefix: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    return prefix.gather(1, stop) - prefix.gather(1, start)
