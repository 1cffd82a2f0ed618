"""A layer's product where its activations are quantized: integers on both sides, one float epilogue.

    y[t, n] = sum over groups(sx sw (sum of codes times codes - zero * sum of codes))    linear_w_a8, exact int32 per group
            + [offset | x_F | x V^T] @ [row sums | W_F | U]^T                            the side: one narrow float product

The offset of asymmetric activations meets the sums of a row's weights, columns that bypass meet their float weights, a low-rank
term its two factors. Weight codes are 0 in columns that bypass, so nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.activation import ActivationSpec, Codes, FloatActivations, IntActivations
from anybit.formats.affine import Affine
from anybit.formats.bipolar import Bipolar
from anybit.formats.decoder import by_group, groups
from anybit.formats.dual_grained import DualGrained
from anybit.formats.tender import TenderActivations
from anybit.formats.terms import CodeTerm, ColumnsTerm, LowRankTerm, Term, dense
from anybit.kernels import native
from anybit.kernels.linear_w_a8 import op as linear_w_a8
from anybit.kernels.linear_w_a8 import tiles
from anybit.kernels.linear_w_a8.dual_grained import as_bytes
from anybit.kernels.quantize_activations import reference as padding

Encode = Callable[[Tensor], Codes]


class IntegerProduct:
    """x float32 [T, K] -> [T, N] through one code term on the integer kernel and any number of float ones."""

    def __init__(self, terms: Sequence[Term], spec: ActivationSpec, encode: Encode) -> None:
        """`encode` quantizes by `spec`. Raises FormatError for what `refusal` names."""
        if reason := refusal(terms, spec):
            raise FormatError(f"the integer kernel cannot run this layer: it {reason}")
        (term,) = [term for term in terms if isinstance(term, CodeTerm)]
        self._encode, self._group = encode, _common_group(term, spec)
        self._weight = _tiled(term, self._group)
        self._columns = [t for t in terms if isinstance(t, ColumnsTerm)]
        self._low_rank = [t for t in terms if isinstance(t, LowRankTerm)]
        self._side = self._side_weight(term, spec)

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [T, N]; a token's result depends on its row alone up to the float side's rounding."""
        codes = self._encode(x)
        y = self._base(codes, x)
        if self._side is None:
            return y
        parts = [] if codes.offset is None else [codes.offset]
        parts += [x[:, term.index.long()] for term in self._columns]
        parts += [x @ term.v.float().t() for term in self._low_rank]
        return y + torch.cat(parts, 1) @ self._side.t()

    def _base(self, codes: Codes, x: Tensor) -> Tensor:
        """The code term's part, float32 [T, N]."""
        scale = codes.scale.repeat_interleave(codes.group_size // self._group, 1)[:, : self._groups(x)]
        return linear_w_a8.linear_quantized(self._quantized(codes.codes, scale), self._weight)

    def _groups(self, x: Tensor) -> int:
        return groups(x.shape[1], self._group)

    def _quantized(self, codes: Tensor, scale: Tensor) -> linear_w_a8.Quantized:
        """Codes int8 [T, K] as the kernel takes them."""
        tokens, columns = codes.shape
        padded = torch.zeros(tokens, padding.stride(columns), dtype=torch.int8)
        padded[:, :columns] = codes
        sums = by_group(codes.float(), self._group).sum(-1)
        return linear_w_a8.Quantized(padded, scale.contiguous(), sums)

    def _side_weight(self, term: CodeTerm, spec: ActivationSpec) -> Tensor | None:
        """What the side is multiplied with: float32 [N, width], None when there is no side."""
        parts = []
        if isinstance(spec, IntActivations) and not spec.symmetric:
            parts.append(by_group(term.dense(), spec.columns_per_group(term.shape[1])).sum(-1))
        parts += [t.weight.float() for t in self._columns] + [t.u.float() for t in self._low_rank]
        return torch.cat(parts, 1) if parts else None


def refusal(terms: Sequence[Term], spec: ActivationSpec) -> str:
    """Why the integer kernel cannot multiply such a layer; empty when it can."""
    codes = [term for term in terms if isinstance(term, CodeTerm)]
    if isinstance(spec, FloatActivations):
        return "has float activations"
    if len(codes) != 1 or codes[0].columns != (0, codes[0].shape[1]):
        return "is not one code term over all columns"
    if not isinstance(codes[0].decoder, Affine | Bipolar | DualGrained):
        return f"has {codes[0].decoder.kind} codes"
    if isinstance(spec, TenderActivations) and isinstance(codes[0].decoder, DualGrained):
        return "has two levels of weight scales under shifted activations"
    return native.refusal() or tiles.refusal(codes[0].shape[1], _common_group(codes[0], spec))


def fake(terms: Sequence[Term], encode: Encode, bits: int | None = None) -> Callable[[Tensor], Tensor]:
    """The same product in float, at precision `bits`: dequantized activations times dequantized weights, x float32 [T, K] ->
    [T, N]."""
    weight, bypass = dense(terms, bits), bypassed(terms)

    def apply(x: Tensor) -> Tensor:
        return dequantized(x, encode, bypass) @ weight.t()

    return apply


def dequantized(x: Tensor, encode: Encode, bypass: Tensor | None) -> Tensor:
    """x as the layer sees it: float32 [T, K], the columns that bypass as they are."""
    values = encode(x).values()
    if bypass is not None:
        values[:, bypass.long()] = x[:, bypass.long()]
    return values


def bypassed(terms: Sequence[Term]) -> Tensor | None:
    """The columns int32 [n] that a columns term keeps in float, or None."""
    return next((term.index for term in terms if isinstance(term, ColumnsTerm)), None)


def _common_group(term: CodeTerm, spec: ActivationSpec) -> int:
    """Columns that share both scales: the smaller group, which divides the larger (or is refused when tiled)."""
    columns = term.shape[1]
    own = columns if isinstance(term.decoder, DualGrained) else getattr(term.decoder, "group_size", columns)
    small, large = sorted((own, spec.columns_per_group(columns)))
    if large < columns and large % small:
        raise FormatError(f"groups of {own} weights and {spec.columns_per_group(columns)} activations do not nest")
    return small


def _tiled(term: CodeTerm, group: int) -> linear_w_a8.Tiled:
    decoder, columns = term.decoder, term.shape[1]
    if isinstance(decoder, DualGrained):
        saved = {"weight": term.planes, **decoder.tensors()}
        planes, scale, _ = as_bytes({key: t.numpy() for key, t in saved.items()}, decoder.group_size, columns)
        planes_t, scale_t, zero, own = torch.from_numpy(planes), torch.from_numpy(scale), None, columns
    else:
        assert isinstance(decoder, Affine | Bipolar)
        planes_t, scale_t, own = term.planes, decoder.scale, decoder.group_size
        zero = decoder.zero if isinstance(decoder, Affine) else None
    count = groups(columns, group)
    if own != group:  # finer groups of activations: each repeats its weight group's scale
        times = own // group if own < columns else count
        scale_t = scale_t.repeat_interleave(times, 1)[:, :count]
        zero = None if zero is None else zero.repeat_interleave(times, 1)[:, :count]
    tiled = linear_w_a8.tile(
        planes_t, scale_t.contiguous(), None if zero is None else zero.contiguous(), group, columns
    )
    if isinstance(decoder, Bipolar):  # 2 c - (2^b - 1) = 2 (c - (2^b - 1) / 2)
        return replace(tiled, scale_mul=2.0, zero_add=(2**decoder.bits - 1) / 2)
    return tiled
