"""An embedding whose table is a sum of terms, and the output head that shares it when a model ties the two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anybit.formats.affine import Affine
from anybit.formats.decoder import Form
from anybit.formats.nested_affine import NestedAffine
from anybit.formats.planes import unpack
from anybit.formats.terms import DECODERS, CodeTerm
from anybit.kernels.embedding import op
from anybit.layers.linear import Terms


class QuantEmbedding(Terms):
    """Rows of a quantized table [V, H] times `output_scale` (Gemma multiplies by sqrt(H)); only asked rows are
    decoded."""

    def __init__(self, form: Form, output_scale: float = 1.0, padding_idx: int | None = None) -> None:
        super().__init__(form)
        self.output_scale, self.padding_idx = output_scale, padding_idx
        # The dtype rows come out in; transformers casts it with the model, codes and scales stay as they are.
        self.dtype_of_output: Tensor
        self.register_buffer("dtype_of_output", torch.empty(0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int [...] -> float [..., H]."""
        rows = sum(_rows(term, ids.reshape(-1).long()) for term in self.terms())
        assert isinstance(rows, Tensor)
        return (rows * self.output_scale).to(self.dtype_of_output.dtype).view(*ids.shape, self.in_features)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self.dtype_of_output = fn(torch.empty(0, dtype=self.dtype_of_output.dtype))
        return self


def _rows(term: object, ids: Tensor) -> Tensor:
    """Rows `ids` [n] of a term: float32 [n, H]."""
    if not isinstance(term, CodeTerm):
        raise NotImplementedError(f"embeddings hold code terms only, got {type(term).__name__}")
    start, stop = term.columns
    # Rows are few bytes: a nested table is read at full width, whatever the model runs at.
    decoder = term.decoder.full() if isinstance(term.decoder, NestedAffine) else term.decoder
    if isinstance(decoder, Affine) and stop - start == term.shape[1]:
        return op.embed(ids, term.planes, decoder.scale, decoder.zero, decoder.group_size, term.shape[1])
    form = term.decoder.form()
    # Every decoder's tensors have one entry per row, so a decoder of some rows is the same decoder.
    picked = DECODERS[form["kind"]].restore(form, {name: t[ids] for name, t in term.decoder.tensors().items()})
    values = torch.zeros(len(ids), term.shape[1])
    values[:, start:stop] = picked.decode(unpack(term.planes[:, ids], stop - start))
    return values


class TiedHead(nn.Module):
    """Logits from the quantized embedding table: x [..., H] -> [..., V]. Owns no tensor of its own.

    `weight` is the embedding's planes under the name by which transformers ties heads; it is not read here.
    """

    def __init__(self, embedding: QuantEmbedding) -> None:
        super().__init__()
        self._table = [embedding]  # in a list, so that it is not a second owner of the parameters
        self.weight = embedding.weight
        self.out_features, self.in_features = embedding.out_features, embedding.in_features

    @property
    def table(self) -> QuantEmbedding:
        """Whose rows are read."""
        return self._table[0]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the head."""
        return self._table[0].multiply(x)
