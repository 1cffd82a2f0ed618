"""ABQ-LLM (arXiv 2408.08554): block by block, learn what makes low-bit weights *and* activations hurt least.

Learned together, by AdamW on the output of one block whose weights and inputs are rounded as they will be (straight-through):

transform    s per channel for every pair of a producer and the linears that read it (norm -> q, k, v; norm -> gate, up; v -> o;
             up -> down): producer / s, columns * s. Starts at max|x|^alpha / max|w|^(1 - alpha).
clip         per row or group the range (sigmoid(l) min w, sigmoid(u) max w), l and u from 4.
correction   in the first and last blocks, W + a b^T for the linears at the block's end (down-projection), a from 0, b from 1;
             folded into the codes: nothing is stored or run for it.

Loss of a sample, with y the block's output in the float model, y2 the float block's output on the quantized model's stream, q the
quantized block's on that stream, P and Q attention probabilities averaged over heads:

    mse(y, q) + mse(y2, q) - log|mean cos(q, y)| - log|mean cos(q, y2)| + KL(P, Q) + KL(Q, P)

`bits`, groups, symmetry and the balanced 5-level grid of W2* are those of the weights stage, activation bits those of its stage.

Different from the paper: KL is between the probabilities, per row (the published code takes a softmax of probabilities once more
and averages over everything, which all but removes the term); queries and keys keep their scale; no shift (the published
one does not shift in Llama either); the samples are this run's, not 128 x 2048. Queries, keys and values are quantized by the
stage kv, not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from anybit.formats.affine import group_range
from anybit.formats.decoder import per_column
from anybit.methods.grid import AffineGrid
from anybit.models.pairs import ScalePair

SMALLEST_SCALE = 1e-2
START = 4.0
EPSILON = 1e-6


class ABQ(BaseModel):
    """Options: `epochs` over the samples (20, and 40 for W2* and W8A8 in the shipped scripts), `batch` samples a step, learning
    rates of scales, clips and correction, `alpha` of the first scales, whether a sample's `first_token` counts in their max|x|
    (it does in the paper), whether a token's squared error is `relative` to its size (not in the paper: there the first token,
    where hidden states are hundreds of times as large, all but decides the mean), how many `first` and `last` blocks are
    corrected, and which of the parts are on."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str] = "abq"
    epochs: int = Field(default=20, ge=1)
    batch: int = Field(default=1, ge=1)
    lr_transform: float = Field(default=5e-3, gt=0)
    lr_clip: float = Field(default=1e-2, gt=0)
    lr_correction: float = Field(default=1e-2, gt=0)
    alpha: float = Field(default=0.5, ge=0, le=1)
    first_token: bool = True
    relative: bool = False
    first: int = Field(default=3, ge=0)
    last: int = Field(default=4, ge=0)
    transform: bool = True
    clip: bool = True
    correction: bool = True
    attention: bool = True

    def corrects(self, index: int, blocks: int) -> bool:
        """Whether block `index` of `blocks` gets the rank-1 correction."""
        return self.correction and (index < self.first or index >= blocks - self.last)


class Learned:
    """What is learned of one block, and the parameters it makes.

    Attributes:
        groups: leaves with their learning rates, as AdamW takes them.
    """

    def __init__(
        self,
        method: ABQ,
        parameters: Mapping[str, Tensor],
        pairs: Sequence[tuple[ScalePair, Tensor]],
        grids: Mapping[str, AffineGrid],
        corrected: Sequence[str],
    ) -> None:
        """`parameters` of the float block by name; `pairs` with their first scales [size]; `grids` of its linears by name."""
        self._start = {name: p.detach().clone() for name, p in parameters.items()}
        self._grids = grids
        self._pairs = [(pair, scale.clone().requires_grad_()) for pair, scale in pairs] if method.transform else []
        self._clips = {name: self._reaches(name) for name in grids} if method.clip else {}
        self._corrections = {name: self._rank_one(name) for name in corrected}
        clips = [leaf for pair in self._clips.values() for leaf in pair]
        corrections = [leaf for pair in self._corrections.values() for leaf in pair]
        leaves = (
            ([scale for _, scale in self._pairs], method.lr_transform),
            (clips, method.lr_clip),
            (corrections, method.lr_correction),
        )
        self.groups = [{"params": found, "lr": rate} for found, rate in leaves if found]

    def _reaches(self, name: str) -> tuple[Tensor, Tensor]:
        weight, grid = self._start[f"{name}.weight"], self._grids[name]
        low, _ = group_range(weight, grid.columns_per_group(weight.shape[1]))
        return torch.full_like(low, START, requires_grad=True), torch.full_like(low, START, requires_grad=True)

    def _rank_one(self, name: str) -> tuple[Tensor, Tensor]:
        rows, columns = self._start[f"{name}.weight"].shape
        return torch.zeros(rows, 1, requires_grad=True), torch.ones(1, columns, requires_grad=True)

    def float_parameters(self) -> dict[str, Tensor]:
        """The parameters after transform and correction, before clipping and rounding; a graph to the leaves."""
        made = dict(self._start)
        for pair, raw in self._pairs:
            _rescale(made, pair, away_from_zero(raw))
        for name, (left, right) in self._corrections.items():
            made[f"{name}.weight"] = made[f"{name}.weight"] + left @ right
        return made

    def clipped(self, name: str, weight: Tensor) -> Tensor:
        """`weight` [N, K] of linear `name` clamped to the learned ranges: min-max rounding of it gives the learned codes."""
        low, high, size = self._range(name, weight)
        ends = (per_column(end, weight.shape[1], size) for end in (low, high))
        return torch.clamp(weight, *ends)

    def _range(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor, int]:
        size = self._grids[name].columns_per_group(weight.shape[1])
        low, high = group_range(weight, size)
        if name in self._clips:
            lower, upper = self._clips[name]
            low, high = low * lower.sigmoid(), high * upper.sigmoid()
        if self._grids[name].symmetric:
            high = torch.maximum(-low, high)
            low = -high
        return low, high, size

    def rounded(self) -> dict[str, Tensor]:
        """The parameters as the quantized block has them; gradients pass straight through every rounding."""
        made = self.float_parameters()
        for name in self._grids:
            weight = made[f"{name}.weight"]
            low, high, size = self._range(name, weight)
            made[f"{name}.weight"] = fake_round(weight, low, high, self._grids[name], size)
        return made


def fake_round(weight: Tensor, low: Tensor, high: Tensor, grid: AffineGrid, size: int) -> Tensor:
    """weight [N, K] on the min-max grid of [low, high] [N, G], in groups of `size` columns, as `Affine` would round it."""
    steps, columns = grid.steps, weight.shape[1]
    if grid.symmetric:
        # A symmetric grid has no code for its own largest value, so what is clamped there matters to where it lands.
        weight = torch.clamp(weight, *(per_column(end, columns, size) for end in (low, high)))
        reach = torch.maximum(-low, high).clamp_min(1e-8)
        scale, zero = half(2 * reach / steps), torch.full_like(reach, float(2 ** (grid.bits - 1)))
    else:
        scale = half((high - low).clamp_min(1e-8) / steps)
        zero = through(-low / scale, torch.round).clamp(0, steps)
    scale, zero = per_column(scale, columns, size), per_column(zero, columns, size)
    codes = (through(weight / scale, torch.round) + zero).clamp(0, steps)
    return (codes - zero) * scale


def through(x: Tensor, function: object) -> Tensor:
    """function(x), with the gradient of x."""
    assert callable(function)
    return x + (function(x) - x).detach()


def half(x: Tensor) -> Tensor:
    """x as float16 keeps it, with the gradient of x."""
    return through(x, lambda value: value.half().float())


def first_scales(pair: ScalePair, max_abs: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """max|x|^alpha / max|w|^(1 - alpha) of each channel [size]; `max_abs` [K] of the consumers' input, `weights` [N_i, K]."""
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    start = (max_abs.clamp_min(1e-5).pow(alpha) / largest.clamp_min(1e-5).pow(1 - alpha)).clamp_min(1e-5)
    spread = start.reshape(-1, pair.repeat, pair.run) if pair.repeat > 1 else start.reshape(-1, 1, pair.run)
    return spread.amax(1).reshape(-1)


def away_from_zero(scale: Tensor) -> Tensor:
    """Scales with a magnitude below `SMALLEST_SCALE` moved there, their sign kept; the gradient passes."""
    small = scale.detach().abs() < SMALLEST_SCALE
    moved = torch.where(scale.detach() < 0, -SMALLEST_SCALE, SMALLEST_SCALE)
    return torch.where(small, scale + (moved - scale).detach(), scale)


def block_loss(out: Tensor, targets: Sequence[Tensor], relative: bool) -> Tensor:
    """Mean squared error and double logarithm of the cosine to each of `targets`, all [1, T, H].

    With `relative` the error of a token is divided by its target's mean square.
    """
    total = out.new_zeros(())
    for target in targets:
        cosine = torch.nn.functional.cosine_similarity(out, target, dim=-1).mean()
        error = (out - target).square().mean(-1)
        if relative:
            error = error / target.square().mean(-1).clamp_min(EPSILON)
        total = total + error.mean() - cosine.abs().clamp_min(EPSILON).log()
    return total


def attention_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL both ways between attention maps [T, S], each row a distribution; mean over rows."""
    p, q = theirs.clamp_min(EPSILON), ours.clamp_min(EPSILON)
    return ((p - q) * (p.log() - q.log())).sum(-1).mean()


def _rescale(made: dict[str, Tensor], pair: ScalePair, s: Tensor) -> None:
    """`models.pairs.apply_scale` on a dictionary, differentiable in s."""
    start, stop = pair.rows
    key = f"{pair.producer}.weight"
    weight = made[key]
    whole = torch.ones(weight.shape[0])
    whole = torch.cat([whole[:start], s, whole[stop:]])
    divisor = whole if weight.dim() == 1 else whole[:, None]
    made[key] = (1 + weight) / divisor - 1 if pair.producer_kind == "norm1p" else weight / divisor
    bias = f"{pair.producer}.bias"
    if bias in made:
        made[bias] = made[bias] / whole
    for name in pair.consumers:
        made[f"{name}.weight"] = made[f"{name}.weight"] * pair.columns(s)
