"""Any-Precision LLM (Park et al., arXiv 2402.10517): one weight image, every width between a seed and a parent.

Each output row is clustered on its own, entries weighted by their sensitivity F: 2^seed_bits clusters by k-means, then
every cluster is cut in two, again and again, up to 2^bits. A cut appends one least significant bit to the codes of its
entries, so the p-bit codes are the first p bits of the parent's and each width has its own table of centroids (float16).

sensitivity   "gradient": F = sum over calibration sequences of (d loss / d W)^2, the paper's; a backward pass through the
              whole model, which must fit into memory with its gradients (`calibration/fisher.py`).
              "hessian": F_nk = H_kk, the layer's own input energy; costs nothing more than calibration.
seed_method   "kmeans": greedy k-means++ and Lloyd, the paper's; "dp": the exact optimum.
split         "lloyd": the first fixed point a binary search meets, the paper's; "exact": the best of all cuts.

The published code gives weights that are exactly 0 no say, because its optional sparse part has taken them out; here they
are weights like others.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from anybit.formats.codebook import Codebook
from anybit.formats.decoder import Form
from anybit.formats.terms import CodeTerm, Term
from anybit.methods.base import InputStats, Method
from anybit.methods.row_clusters import SortedRows, seed, split
from anybit.methods.row_optimum import optimum

BLOCK_WEIGHTS = 1 << 17  # weights clustered at a time, so that sums and temporaries stay in the cache


class AnyPrecision(Method):
    """Options: `bits` of the parent, `seed_bits`, `precisions` that get a table (None: all from seed to parent), and those
    explained above; `random_seed` of the k-means++ draws."""

    name: ClassVar[str] = "any-precision"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    bits: int = Field(default=8, ge=1, le=8)
    seed_bits: int = Field(default=3, ge=1, le=8)
    precisions: tuple[int, ...] | None = None
    sensitivity: Literal["gradient", "hessian"] = "gradient"
    seed_method: Literal["kmeans", "dp"] = "kmeans"
    split: Literal["lloyd", "exact"] = "lloyd"
    random_seed: int = 0

    @model_validator(mode="after")
    def _seed_to_parent(self) -> Self:
        if self.seed_bits > self.bits:
            raise ValueError(f"seed_bits {self.seed_bits} is above bits {self.bits}")
        tables = self.tables()
        if list(tables) != sorted(set(tables)) or tables[0] < self.seed_bits or tables[-1] != self.bits:
            raise ValueError(
                f"precisions must ascend from seed_bits ({self.seed_bits}) or more to bits ({self.bits}), got {list(tables)}"
            )
        return self

    @property
    def gradients(self) -> bool:
        """See `Method`."""
        return self.sensitivity == "gradient"

    def tables(self) -> tuple[int, ...]:
        """The precisions with a table, ascending."""
        return self.precisions or tuple(range(self.seed_bits, self.bits + 1))

    def plan(self, shape: tuple[int, int]) -> Form:
        """One codebook term over all columns."""
        part = {"kind": "codebook", "bits": self.bits, "precisions": list(self.tables())}
        return {"shape": list(shape), "terms": [{"term": "code", "columns": [0, shape[1]], **part}]}

    def quantize(self, weight: Tensor, stats: InputStats) -> list[Term]:
        """One codebook code term."""
        step = max(1, BLOCK_WEIGHTS // weight.shape[1])
        importance = self._importance(weight, stats)
        parts = [self._cluster(w, f) for w, f in zip(weight.split(step), importance.split(step), strict=True)]
        tables = {p: torch.cat([part[1][p] for part in parts]) for p in self.tables()}
        return [CodeTerm.from_codes(torch.cat([codes for codes, _ in parts]), Codebook(self.bits, tables))]

    def _importance(self, weight: Tensor, stats: InputStats) -> Tensor:
        """F float32 [N, K]."""
        if self.sensitivity == "gradient":
            assert stats.fisher is not None
            return stats.fisher
        assert stats.hessian is not None
        return stats.hessian.diagonal().expand_as(weight)

    def _cluster(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Parent codes uint8 [N, K] and the tables float16 [N, 2^p] of a few rows."""
        rows, clusters = SortedRows(weight, importance), 2**self.seed_bits
        if self.seed_method == "dp":
            edges, centroids = optimum(rows, clusters)
        else:
            generator = torch.Generator().manual_seed(self.random_seed)
            trials = 2 + int(math.log(clusters))
            edges, centroids = seed(
                rows, clusters, torch.rand(clusters, trials, generator=generator, dtype=torch.float64)
            )
        levels = {self.seed_bits: centroids}
        for bits in range(self.seed_bits + 1, self.bits + 1):
            edges, centroids = split(rows, edges, centroids, self.split)
            levels[bits] = centroids
        return rows.codes(edges), {p: levels[p].to(torch.float16) for p in self.tables()}
