"""A quantized weight is a sum of terms (DESIGN 1.1): W = sum of term.dense(), each [N, K].

`save_terms` and `load_terms` are the one mapping between terms and named tensors: the first code term owns `weight`
(its
planes) and its decoder's tensors; later code terms add `_1`, `_2`, ...; columns and low rank have names of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.activation import restore_activations
from anybit.formats.affine import Affine
from anybit.formats.binary_coded import BinaryCoded
from anybit.formats.bipolar import Bipolar
from anybit.formats.blocked import Blocked
from anybit.formats.codebook import Codebook
from anybit.formats.decoder import Decoder, Form, Spec
from anybit.formats.dual_grained import DualGrained
from anybit.formats.floating import Floating
from anybit.formats.form import precisions as precisions
from anybit.formats.nested_affine import NestedAffine
from anybit.formats.planes import pack, row_bytes, unpack
from anybit.formats.sparsity import check_sparsity

DECODERS: dict[str, type[Decoder]] = {
    "affine": Affine,
    "dual_grained": DualGrained,
    "codebook": Codebook,
    "binary_coded": BinaryCoded,
    "bipolar": Bipolar,
    "nested_affine": NestedAffine,
    "blocked": Blocked,
    "float": Floating,
}

Shape = tuple[int, int]


@dataclass(frozen=True)
class CodeTerm:
    """Integer codes in bit-planes and the decoder that turns them into numbers.

    Attributes:
        planes: uint8 [b, N, ceil(width/8)].
        decoder: its `bits` equals b.
        shape: (N, K) of the whole weight.
        columns: (start, stop) of the columns this term covers; (0, K) unless precision is mixed along K.
        sparsity: "2:4" when at least two of four aligned columns decode to 0, checked at load; else empty.
    """

    planes: Tensor
    decoder: Decoder
    shape: Shape
    columns: tuple[int, int]
    sparsity: str = ""

    @classmethod
    def from_codes(cls, codes: Tensor, decoder: Decoder, sparsity: str = "") -> CodeTerm:
        """A term that covers the whole weight, from codes uint8 [N, K]."""
        shape = (codes.shape[0], codes.shape[1])
        return cls(pack(codes, decoder.bits), decoder, shape, (0, codes.shape[1]), sparsity)

    def dense(self, bits: int | None = None) -> Tensor:
        """float32 [N, K] at precision `bits` (default: all planes)."""
        start, stop = self.columns
        values = torch.zeros(self.shape)
        values[:, start:stop] = self.decoder.decode(unpack(self.planes, stop - start), bits)
        return values


@dataclass(frozen=True)
class ColumnsTerm:
    """A few input columns in higher precision: index int32 [n] ascending, weight float16 [N, n]."""

    index: Tensor
    weight: Tensor
    shape: Shape

    def dense(self, bits: int | None = None) -> Tensor:
        """float32 [N, K]; `bits` does not matter."""
        values = torch.zeros(self.shape)
        values[:, self.index.long()] = self.weight.float()
        return values


@dataclass(frozen=True)
class LowRankTerm:
    """U float16 [N, r] @ V float16 [r, K]."""

    u: Tensor
    v: Tensor

    def dense(self, bits: int | None = None) -> Tensor:
        """float32 [N, K]; `bits` does not matter."""
        return self.u.float() @ self.v.float()


Term = CodeTerm | ColumnsTerm | LowRankTerm


def dense(terms: Sequence[Term], bits: int | None = None) -> Tensor:
    """The weight float32 [N, K] that `terms` stand for."""
    total = terms[0].dense(bits)
    for term in terms[1:]:
        total = total + term.dense(bits)
    return total


def row_slice(term: Term, start: int, stop: int) -> Term:
    """The term of rows start..stop-1 alone; every decoder's tensors have one entry per row. What all rows share is copied: two
    layers cannot be saved over one memory."""
    if isinstance(term, LowRankTerm):
        return LowRankTerm(term.u[start:stop], term.v.clone())
    shape = (stop - start, term.shape[1])
    if isinstance(term, ColumnsTerm):
        return ColumnsTerm(term.index.clone(), term.weight[start:stop], shape)
    form = term.decoder.form()
    rows = {name: tensor[start:stop] for name, tensor in term.decoder.tensors().items()}
    decoder = DECODERS[form["kind"]].restore(form, rows)
    return replace(term, planes=term.planes[:, start:stop], decoder=decoder, shape=shape)


def save_terms(terms: Sequence[Term], shape: Shape) -> tuple[Form, dict[str, Tensor]]:
    """Form (JSON) and named tensors of `terms`; the inverse of `load_terms`."""
    forms: list[Form] = []
    tensors: dict[str, Tensor] = {}
    codes = 0
    for term in terms:
        if isinstance(term, CodeTerm):
            suffix = f"_{codes}" if codes else ""
            sparsity = {"sparsity": term.sparsity} if term.sparsity else {}
            forms.append({"term": "code", "columns": list(term.columns), **term.decoder.form(), **sparsity})
            tensors["weight" + suffix] = term.planes
            tensors |= {name + suffix: tensor for name, tensor in term.decoder.tensors().items()}
            codes += 1
        elif isinstance(term, ColumnsTerm):
            forms.append({"term": "columns", "count": len(term.index)})
            tensors |= {"columns_index": term.index, "columns_weight": term.weight}
        else:
            forms.append({"term": "low_rank", "rank": term.u.shape[1]})
            tensors |= {"low_rank_u": term.u, "low_rank_v": term.v}
    return {"shape": list(shape), "terms": forms}, tensors


def tensor_specs(form: Form) -> dict[str, Spec]:
    """Shape and dtype of every tensor a form needs, by name; enough to build an empty layer.

    Raises:
        FormatError: a term or decoder this version does not know, or a form with a field missing.
    """
    specs: dict[str, Spec] = {}
    for part, suffix in _suffixed(form):
        rows, columns = form["shape"]
        if part["term"] == "code":
            start, stop = part["columns"]
            specs["weight" + suffix] = ((part["bits"], rows, row_bytes(stop - start)), torch.uint8)
            decoder = _decoder(part).specs(part, (rows, stop - start))
            specs |= {name + suffix: spec for name, spec in decoder.items()}
        elif part["term"] == "columns":
            specs["columns_index"] = ((part["count"],), torch.int32)
            specs["columns_weight"] = ((rows, part["count"]), torch.float16)
        else:
            specs["low_rank_u"] = ((rows, part["rank"]), torch.float16)
            specs["low_rank_v"] = ((part["rank"], columns), torch.float16)
    activations = restore_activations(form)
    return specs if activations is None else specs | activations.specs(form["shape"][1])


def load_terms(form: Form, tensors: Mapping[str, Tensor]) -> list[Term]:
    """Terms from a form and its named tensors.

    Raises:
        FormatError: a tensor is missing or has another shape or dtype than the form says.
    """
    for name, (shape, dtype) in tensor_specs(form).items():
        if name not in tensors:
            raise FormatError(f"tensor '{name}' is missing")
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise FormatError(f"tensor '{name}' is {found.dtype} {tuple(found.shape)}, its form says {dtype} {shape}")
    return [_load_term(part, suffix, form, tensors) for part, suffix in _suffixed(form)]


def stored_bits(form: Form) -> int:
    """Exact bits a form takes on disk: planes with their padding, scales, zeros, tables, columns, low rank."""
    return sum(8 * dtype.itemsize * torch.Size(shape).numel() for shape, dtype in tensor_specs(form).values())


def bits_per_weight(form: Form) -> float:
    """`stored_bits` over the number of weights N * K."""
    return stored_bits(form) / (form["shape"][0] * form["shape"][1])


def _load_term(part: Form, suffix: str, form: Form, tensors: Mapping[str, Tensor]) -> Term:
    shape: Shape = (form["shape"][0], form["shape"][1])
    if part["term"] == "columns":
        return ColumnsTerm(tensors["columns_index"], tensors["columns_weight"], shape)
    if part["term"] == "low_rank":
        return LowRankTerm(tensors["low_rank_u"], tensors["low_rank_v"])
    decoder = _decoder(part)
    start, stop = part["columns"]
    names = decoder.specs(part, (shape[0], stop - start))
    restored = decoder.restore(part, {name: tensors[name + suffix] for name in names})
    planes, sparsity = tensors["weight" + suffix], part.get("sparsity", "")
    if sparsity:
        check_sparsity(planes, part)
    return CodeTerm(planes, restored, shape, (start, stop), sparsity)


def _suffixed(form: Form) -> list[tuple[dict[str, Any], str]]:
    """Each term's form with the suffix of its tensor names."""
    parts, codes = [], 0
    for part in form["terms"]:
        if part["term"] not in ("code", "columns", "low_rank"):
            raise FormatError(f"term '{part['term']}' is not known to this version of anybit; update anybit")
        parts.append((part, f"_{codes}" if part["term"] == "code" and codes else ""))
        codes += part["term"] == "code"
    return parts


def _decoder(part: Form) -> type[Decoder]:
    if part["kind"] not in DECODERS:
        raise FormatError(f"decoder '{part['kind']}' is not known to this version of anybit; update anybit")
    return DECODERS[part["kind"]]
