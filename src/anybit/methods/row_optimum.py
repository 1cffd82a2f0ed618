"""The exact weighted one-dimensional k-means of many rows, by dynamic programming.

D_c[j] = min over i <= j of D_{c-1}[i] + error(i, j): the least error of the first j sorted entries in c clusters. The best i
grows with j (the error of a run satisfies the quadrangle inequality), so the middle position is solved first and bounds
the search of both halves: O(C K log K) a row instead of O(C K^2). All rows go through each level of halving together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.methods.row_clusters import SortedRows


def optimum(rows: SortedRows, clusters: int) -> tuple[Tensor, Tensor]:
    """Edges int64 [N, C + 1] and centroids float64 [N, C] with the least weighted squared error."""
    count, columns = rows.values.shape
    at = torch.arange(columns + 1).expand(count, columns + 1)
    least = rows.error(torch.zeros_like(at), at)
    choices = []
    for _ in range(clusters - 1):
        least, choice = _layer(rows, least)
        choices.append(choice)
    edges = [torch.full((count, 1), columns)]
    for choice in reversed(choices):
        edges.append(choice.gather(1, edges[-1]))
    edges.append(torch.zeros(count, 1, dtype=torch.int64))
    found = torch.cat(edges[::-1], 1)
    start, stop = found[:, :-1], found[:, 1:]
    # An empty cluster (fewer distinct values than clusters) takes the value where it lies, so tables stay monotone.
    return found, rows.means(start, stop, rows.values.gather(1, start.clamp_max(columns - 1)))


def _layer(rows: SortedRows, before: Tensor) -> tuple[Tensor, Tensor]:
    """One more cluster: D_c and the lowest best i, both [N, K + 1], from D_{c-1}."""
    count, size = before.shape
    least = before.clone()
    choice = torch.zeros(count, size, dtype=torch.int64)
    stride = 1 << ((size - 1).bit_length() - 1)
    while stride:
        at = torch.arange(stride, size, 2 * stride)
        above = at + stride
        high = torch.where(above < size, choice[:, above.clamp_max(size - 1)], at)
        low, high = choice[:, at - stride], torch.minimum(high, at)
        least[:, at], choice[:, at] = _search(rows, before, at.expand(count, -1), low, high)
        stride //= 2
    return least, choice


def _search(rows: SortedRows, before: Tensor, at: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """min and argmin over low <= i <= high of before[i] + error(i, at), for all positions `at` [N, M] at once."""
    count, many = at.shape
    spans = high - low + 1
    # Row by row one flat list of (position, candidate) pairs, padded to the longest row so that gathers stay 2-D.
    longest = int(spans.sum(1).max())
    ends = spans.cumsum(1)
    flat = torch.arange(longest).expand(count, longest).contiguous()
    owner = torch.searchsorted(ends, flat, right=True).clamp_max(many - 1)
    candidate = low.gather(1, owner) + flat - (ends - spans).gather(1, owner)
    candidate = torch.minimum(candidate, high.gather(1, owner))
    value = before.gather(1, candidate) + rows.error(candidate, at.gather(1, owner))
    least = torch.full(at.shape, torch.inf, dtype=torch.float64).scatter_reduce(1, owner, value, "amin")
    tied = torch.where(value == least.gather(1, owner), candidate, before.shape[1])
    best = torch.full(at.shape, before.shape[1]).scatter_reduce(1, owner, tied, "amin")
    return least, best
