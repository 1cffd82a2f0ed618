"""A layer's product where its activations are quantized: integers on both sides, one float epilogue.

    y[t, n] = sum over groups(sx sw (sum of codes times codes - zero * sum of codes))    linear_w_a8, exact int32 per group
            + [offset | x_F | x V^T] @ [row sums | W_F | U]^T                            the side: one narrow float product

The offset of asymmetric activations meets the sums of a row's weights, columns that bypass meet their float weights, a low-rank
term its two factors. Weight codes are 0 in columns that bypass, so nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.activation import ActivationSpec, Codes, FloatActivations, IntActivations
from anybit.formats.form import Form
from anybit.formats.terms import CodeTerm, ColumnsTerm, LowRankTerm, Term, dense
from anybit.kernels import native
from anybit.kernels.linear_integer.op import IntegerLinear
from anybit.kernels.linear_integer.reference import linear
from anybit.kernels.linear_side.tiles import Side, tile_side
from anybit.kernels.linear_w_a8 import op as linear_w_a8
from anybit.kernels.linear_w_a8 import stored
from anybit.kernels.linear_w_a8.tiles import Array

Encode = Callable[[Tensor], Codes]


class IntegerProduct:
    """x float32 or bfloat16 [T, K] -> [T, N] through one code term on the integer kernel and any number of float ones."""

    def __init__(
        self, terms: Sequence[Term], spec: ActivationSpec, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """`tensors` are the static scales of `spec`. Raises FormatError for what `refusal` names."""
        if reason := refusal(terms, spec):
            raise FormatError(f"the integer kernel cannot run this layer: it {reason}")
        (term,) = [term for term in terms if isinstance(term, CodeTerm)]
        self._spec, self._tensors, self._bypass = spec, dict(tensors or {}), bypassed(terms)
        columns = term.shape[1]
        reach, (part, saved) = spec.columns_per_group(columns), _stored(term)
        tiled = stored.tile(part, [saved], columns, reach)
        self._weight = linear_w_a8.of_numpy(tiled)
        self._low_rank = [(t.u.float(), t.v.float()) for t in terms if isinstance(t, LowRankTerm)]
        offset = isinstance(spec, IntActivations) and not spec.symmetric
        sums = None if not offset else stored.row_sums(tiled, reach)
        self._side = _side(sums, [t for t in terms if isinstance(t, ColumnsTerm)])
        rest = self._side, self._tensors, self._bypass
        self._codes: Callable[[Tensor], Tensor] = partial(linear, self._weight, spec, *rest)
        if isinstance(spec, IntActivations):
            self._codes = IntegerLinear(self._weight, spec, *rest)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, N] in the dtype of x; a token's result depends on its row alone, bit for bit (with a low-rank term up to its
        rounding)."""
        if self._low_rank:
            return self._with_low_rank(self._codes(x.float()), x.float()).to(x.dtype)
        return self._codes(x)

    def _with_low_rank(self, y: Tensor, x: Tensor) -> Tensor:
        for u, v in self._low_rank:
            y = y + x @ v.t() @ u.t()
        return y


def refusal(terms: Sequence[Term], spec: ActivationSpec) -> str:
    """Why the integer kernel cannot multiply such a layer; empty when it can."""
    codes = [term for term in terms if isinstance(term, CodeTerm)]
    form = {"shape": codes[0].shape if codes else (), "terms": [_part(term) for term in codes]}
    return form_refusal(form, spec) or native.refusal(codes[0].planes)


def form_refusal(form: Form, spec: ActivationSpec) -> str:
    """The same of a layer's form alone."""
    codes = [part for part in form["terms"] if part["term"] == "code"]
    if isinstance(spec, FloatActivations):
        return "has float activations"
    if len(codes) != 1 or list(codes[0]["columns"]) != [0, form["shape"][1]]:
        return "is not one code term over all columns"
    if codes[0]["kind"] not in stored.KINDS or (spec.kind == "tender" and codes[0]["kind"] == "dual_grained"):
        return f"has {codes[0]['kind']} codes"
    return stored.nesting_refusal(codes[0], form["shape"][1], spec.columns_per_group(form["shape"][1]))


def layout(form: Form, spec: ActivationSpec) -> str:
    """What the ledger says of a 2:4-sparse layer that the integer kernel runs: how its codes lie there. Empty for others."""
    (part,) = [part for part in form["terms"] if part["term"] == "code"]
    if not part.get("sparsity"):
        return ""
    columns = form["shape"][1]
    return " (2:4)" if stored.in_pairs(part, columns, spec.columns_per_group(columns)) else " (dense)"


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


def _side(sums: Array | None, terms: Sequence[ColumnsTerm]) -> Side | None:
    columns = torch.cat([term.weight for term in terms], 1).numpy() if terms else None
    return tile_side(sums, columns)


def _part(term: CodeTerm) -> Form:
    return {"term": "code", "columns": list(term.columns), **term.decoder.form(), "sparsity": term.sparsity}


def _stored(term: CodeTerm) -> tuple[Form, dict[str, Array]]:
    """The term as its form and tensors."""
    tensors = {"weight": term.planes, **term.decoder.tensors()}
    return _part(term), {name: tensor.numpy() for name, tensor in tensors.items()}
