"""A linear layer whose weight is a sum of terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from anybit.formats.affine import Affine
from anybit.formats.decoder import Form
from anybit.formats.terms import CodeTerm, Term, load_terms, tensor_specs
from anybit.kernels.linear_w_a16 import op as linear_w_a16

Product = Callable[[Tensor], Tensor]


class Terms(nn.Module):
    """Holds the tensors of a form as parameters named as on disk (`weight` = the planes, `scale`, `zero`, ...)."""

    def __init__(self, form: Form) -> None:
        """Empty tensors on the default device; a checkpoint fills them."""
        super().__init__()
        self.form = form
        for name, (shape, dtype) in tensor_specs(form).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
        self._cached: list[Term] | None = None
        self._products: list[Product] | None = None

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put real tensors in place of the empty ones; shapes and dtypes are checked when `terms()` is next asked."""
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._cached = self._products = None

    @property
    def out_features(self) -> int:
        """N."""
        return int(self.form["shape"][0])

    @property
    def in_features(self) -> int:
        """K."""
        return int(self.form["shape"][1])

    def terms(self) -> list[Term]:
        """The terms over the current parameters.

        Raises:
            FormatError: a parameter no longer has the shape or dtype its form says (a cast of the whole model, for
            one).
        """
        if self._cached is None:
            self._cached = load_terms(self.form, {name: p.data for name, p in self.named_parameters(recurse=False)})
        return self._cached

    def multiply(self, x: Tensor) -> Tensor:
        """x float [..., K] through every term, added up in order: [..., N] in the dtype of x; errors of `terms()`."""
        if self._products is None:
            self._products = [product(term) for term in self.terms()]
        total = self._products[0](x)
        for apply in self._products[1:]:
            total = total + apply(x)
        return total

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # Moving a model may replace parameters, and casting one must not touch codes, scales or tables: not even there
        # and back, float16 to bfloat16 to float16 loses three bits of every scale.
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        self._cached = self._products = None
        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        """Shape and form for `print(model)`."""
        parts = [f"{t.get('kind', t['term'])}{t.get('bits', '')}" for t in self.form["terms"]]
        return f"{self.in_features}, {self.out_features}, form={'+'.join(parts)}"


class QuantLinear(Terms):
    """y = sum over terms(term(x)) + bias; x float [..., K] -> y [..., N] in the dtype of x."""

    def __init__(self, form: Form, bias: bool) -> None:
        super().__init__(form)
        self.bias = nn.Parameter(torch.empty(form["shape"][0]), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def product(term: Term) -> Product:
    """The map x float [..., K] -> x @ W^T [..., N] in the dtype of x: affine codes run on the kernel, everything else is
    decoded to float and multiplied."""
    if not isinstance(term, CodeTerm) or not isinstance(term.decoder, Affine):
        return lambda x: nn.functional.linear(x, term.dense().to(x.dtype))
    start, stop = term.columns
    affine = term.decoder
    kernel = linear_w_a16.Prepared(term.planes, affine.scale, affine.zero, affine.group_size, stop - start)
    return kernel if stop - start == term.shape[1] else lambda x: kernel(x[..., start:stop])


def kernel_name(form: Form, tokens: int) -> str:
    """Which implementation `Terms.multiply` uses here for a form and number of tokens; for the ledger and `inspect`."""
    kinds = {part.get("kind", part["term"]) for part in form["terms"]}
    return linear_w_a16.choose(tokens) if kinds == {"affine"} else "reference"
