"""A linear layer whose weight is a sum of terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from anybit.formats.activation import ActivationSpec, Codes, restore_activations
from anybit.formats.blocked import Blocked
from anybit.formats.decoder import Form, by_group
from anybit.formats.dual_grained import DualGrained
from anybit.formats.tender import TenderActivations
from anybit.formats.terms import CodeTerm, Term, load_terms, tensor_specs
from anybit.kernels import native
from anybit.kernels.linear_integer import op as linear_integer
from anybit.kernels.linear_w_a16 import op as linear_w_a16
from anybit.kernels.linear_w_a16.weight import Weight, of_decoder
from anybit.layers import integer
from anybit.layers.inputs import apply_inputs
from anybit.layers.precision import Precision, width_read
from anybit.layers.tender import TenderProduct

Product = Callable[[Tensor], Tensor]


class Terms(nn.Module):
    """Holds the tensors of a form as parameters named as on disk (`weight` = the planes, `scale`, `zero`, ...).

    Attributes:
        form: how the weight is written.
        precision: of the model this layer is in, shared by all its layers; None: nested weights are read at full width.
    """

    def __init__(self, form: Form) -> None:
        """Empty tensors on the default device; a checkpoint fills them."""
        super().__init__()
        self.form = form
        for name, (shape, dtype) in tensor_specs(form).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
        self.precision: Precision | None = None
        self._cached: list[Term] | None = None
        self._products: dict[int | None, Product] = {}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put real tensors in place of the empty ones; shapes and dtypes are checked when `terms()` is next asked."""
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.forget()

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
        if torch.compiler.is_compiling():  # a graph reads the parameters themselves; nothing traced may be kept
            return self._load()
        if self._cached is None:
            self._cached = self._load()
        return self._cached

    def _load(self) -> list[Term]:
        tracing = torch.compiler.is_compiling()
        return load_terms(self.form, {n: p if tracing else p.data for n, p in self.named_parameters(recurse=False)})

    def multiply(self, x: Tensor) -> Tensor:
        """x float [..., K], after the form's input operations, through every term, added up in order: [..., N] in the dtype of x;
        errors of `terms()`.

        Nested terms are read at the precision of the model. A compiled graph holds one precision and guards it: it is traced
        anew for another one, and found again afterwards.
        """
        x = apply_inputs(x, self.form.get("inputs", ()))
        bits = None if self.precision is None else self.precision.bits
        if torch.compiler.is_compiling():
            return self._product(bits)(x)
        if bits not in self._products:
            self._products[bits] = self._product(bits)
        return self._products[bits](x)

    def dense(self) -> Tensor:
        """The weight float32 [N, K] as it is read now: nested terms at the precision of the model."""
        bits = None if self.precision is None else self.precision.bits
        total = torch.zeros(self.out_features, self.in_features)
        for term in self.terms():
            if isinstance(term, CodeTerm) and bits is not None:
                total += term.dense(width_read(term.decoder.precisions, bits))
            else:
                total += term.dense()
        return total

    def _product(self, bits: int | None) -> Product:
        spec = restore_activations(self.form)
        if spec is not None:
            return quantized_product(
                self.terms(), spec, {name: self.get_parameter(name).data for name in self._static()}, bits
            )
        first, *rest = [product(term, bits) for term in self.terms()]

        def apply(x: Tensor) -> Tensor:
            total = first(x)
            for each in rest:
                total = total + each(x)
            return total

        return apply

    def _static(self) -> list[str]:
        """Names of the tensors of the activation scheme."""
        spec = restore_activations(self.form)
        return [] if spec is None else list(spec.specs(self.in_features))

    def forget(self) -> None:
        """Drop what was derived from the parameters; it is made again when it is next needed."""
        self._cached, self._products = None, {}

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # Moving a model may replace parameters, and casting one must not touch codes, scales or tables: not even there
        # and back, float16 to bfloat16 to float16 loses three bits of every scale.
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        self.forget()
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


def product(term: Term, bits: int | None = None) -> Product:
    """The map x float [..., K] -> x @ W^T [..., N] in the dtype of x: codes run on a kernel where their decoder has one,
    everything else is decoded to float and multiplied. Nested codes are read at `bits` (`width_read`), default: all."""
    if not isinstance(term, CodeTerm):
        return lambda x: nn.functional.linear(x, term.dense().to(x.dtype))
    width = term.decoder.bits if bits is None else width_read(term.decoder.precisions, bits)
    kernel = _kernel(term, width)
    if kernel is None:
        return lambda x: nn.functional.linear(x, term.dense(width).to(x.dtype))
    start, stop = term.columns
    return kernel if stop - start == term.shape[1] else lambda x: kernel(x[..., start:stop])


def quantized_product(
    terms: Sequence[Term], spec: ActivationSpec, tensors: Mapping[str, Tensor], bits: int | None = None
) -> Product:
    """The map x float [..., K] -> [..., N] of a layer whose activations are quantized by `spec` with its static `tensors`: on the
    integer kernel where that can (`integer.refusal`), else in float on dequantized numbers."""

    def encode(x: Tensor) -> Codes:
        return spec.encode(x, tensors, integer.bypassed(terms))

    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    if torch.compiler.is_compiling() or integer.refusal(terms, spec):
        apply: Product = integer.fake(terms, encode, bits)
    elif isinstance(spec, TenderActivations):
        apply = TenderProduct(terms, spec, tensors)
    else:
        apply, dtypes = integer.IntegerProduct(terms, spec, tensors), linear_integer.DTYPES

    def run(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return apply(rows if x.dtype in dtypes else rows.float()).view(*x.shape[:-1], -1).to(x.dtype)

    return run


def _kernel(term: CodeTerm, width: int) -> Product | None:
    """The product with columns [start, stop) of x alone, read at `width` bits; None for decoders that no kernel reads."""
    columns = term.columns[1] - term.columns[0]
    if isinstance(term.decoder, DualGrained):
        return _dual_grained(term, term.decoder, columns)
    if isinstance(term.decoder, Blocked):
        return _blocked(term, term.decoder, columns)
    weight = of_decoder(term.planes, term.decoder, columns, width)
    return linear_w_a16.Prepared(weight) if weight else None


def _dual_grained(term: CodeTerm, decoder: DualGrained, columns: int) -> Product:
    """Integer scales are exact in float16: an affine weight whose outputs are scaled per channel."""
    weight = Weight(term.planes, decoder.group_scale.half(), decoder.group_zero, decoder.group_size, columns)
    kernel, channel = linear_w_a16.Prepared(weight), decoder.channel_scale[:, 0].float()
    return lambda x: (kernel(x.float()) * channel).to(x.dtype)


SHIFT = 2.0**12


def _blocked(term: CodeTerm, decoder: Blocked, columns: int) -> Product | None:
    """A scale of a block times a step has up to 18 bits: what float16 leaves of it is a second weight over the same planes,
    whose scales are moved up to where float16 is dense. Offsets take the sum of x over each group."""
    scales, offsets = decoder.scales(), decoder.offsets()
    zero = None if offsets is None else torch.zeros(scales.shape, dtype=torch.uint8)
    high = scales.half()
    if torch.compiler.is_compiling() or not bool(high.isfinite().all()):
        return None
    low = ((scales - high.float()) * SHIFT).half()

    def over(scale: Tensor) -> linear_w_a16.Prepared:
        return linear_w_a16.Prepared(Weight(term.planes, scale, zero, decoder.group_size, columns))

    coarse, fine = over(high), over(low) if bool((low != 0).any()) else None

    def apply(x: Tensor) -> Tensor:
        rows = x.reshape(-1, columns).float()
        y = coarse(rows)
        if fine is not None:
            y = y + fine(rows) / SHIFT
        if offsets is not None:
            y = y - by_group(rows, decoder.group_size).sum(-1) @ offsets.T
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    return apply


# The kind of kernel weight that each decoder becomes.
_KERNEL_KINDS = dict.fromkeys(("affine", "dual_grained", "blocked"), "affine")
_KERNEL_KINDS |= {kind: kind for kind in ("bipolar", "binary_coded", "codebook")} | {"nested_affine": "fractional"}


def kernel_name(form: Form, tokens: int) -> str:
    """Which implementation `Terms.multiply` uses here for a form and number of tokens; for the ledger and `inspect`."""
    spec = restore_activations(form)
    if spec is not None:
        exact = not native.refusal() and not integer.form_refusal(form, spec)
        return f"linear_w_a8{integer.layout(form, spec)}" if exact else "reference"
    kinds = {_KERNEL_KINDS.get(part.get("kind", part["term"])) for part in form["terms"]}
    names = {linear_w_a16.choose(tokens, kind=kind) if kind else "reference" for kind in kinds}
    return names.pop() if len(names) == 1 else "reference"
