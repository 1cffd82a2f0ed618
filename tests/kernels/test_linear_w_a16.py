"""linear_w_a16 against a float64 oracle with a derived bound: every instruction set, width, odd shape, thread count."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from anybit.errors import FormatError, KernelUnavailable
from anybit.formats.affine import Affine
from anybit.formats.decoder import groups, per_column
from anybit.formats.planes import pack
from anybit.kernels.linear_w_a16 import op, reference
from anybit.kernels.linear_w_a16.weight import Weight
from anybit.kernels.native import set_threads

SHAPES = [
    (1, 1, 1),
    (3, 7, 3),
    (5, 9, 9),
    (17, 31, 8),
    (16, 64, 32),
    (33, 67, 5),
    (19, 130, 32),
    (8, 97, 96),
    (48, 576, 64),
]
NATIVE = ("native-lookup", "native-decode")


class Case:
    """A random weight: full-range codes, scales over six orders of magnitude, zero points anywhere in range."""

    def __init__(self, bits: int, rows: int, columns: int, group: int, symmetric: bool = False) -> None:
        g = torch.Generator().manual_seed(rows * 7919 + columns * 31 + bits)
        table = (rows, groups(columns, group))
        self.codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=g)
        self.scale = (10.0 ** (torch.rand(table, generator=g) * 6 - 5)).half()
        self.zero = None if symmetric else torch.randint(0, 2**bits, table, dtype=torch.uint8, generator=g)
        self.planes, self.group, self.columns, self.bits = pack(self.codes, bits), group, columns, bits
        self.x = torch.randn(3, columns, generator=g) * 10.0 ** (torch.rand(columns, generator=g) * 4 - 2)
        self.args = (self.planes, self.scale, self.zero, group, columns)
        self.weight = Weight(*self.args)

    def oracle(self, x: Tensor) -> Tensor:
        return x.double() @ Affine(self.bits, self.group, self.scale, self.zero).decode(self.codes).double().T

    def bound(self, x: Tensor, impl: str) -> Tensor:
        """n u sum_k |x_k| scale (2^b - 1): |code - zero| <= 2^b - 1 bounds all terms, n roundings touch a product.

        Lookup: 3 for a table entry, one per cell of a group (boundary cells included), b for Horner, 2 per group, 2 for
        scale and offset. Decode: one for the weight, K for the sum. u = 2^-24; the higher orders are below 0.1 %.
        """
        lookup = 3 + (self.group // 4 + 2) + self.bits + 2 * self.scale.shape[1] + 2
        roundings = lookup if impl == "native-lookup" else self.columns + 1
        spread = per_column(self.scale.double(), self.columns, self.group) * (2**self.bits - 1)
        return 1.001 * roundings * 2.0**-24 * (x.double().abs() @ spread.T)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("impl", NATIVE)
def test_within_the_derived_bound(isa, bits, impl):
    for (rows, columns, group), symmetric in itertools.product(SHAPES, (False, True)):
        case = Case(bits, rows, columns, group, symmetric)
        error = (op.linear(case.x, *case.args, impl=impl).double() - case.oracle(case.x)).abs()
        assert bool((error <= case.bound(case.x, impl)).all()), (rows, columns, group, symmetric)


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_decode_equals_the_format_bit_for_bit(isa, bits):
    for (rows, columns, group), symmetric in itertools.product(SHAPES, (False, True)):
        case = Case(bits, rows, columns, group, symmetric)
        assert torch.equal(op.decode(case.weight), reference.decode(case.weight)), (rows, columns, group)


def test_subnormal_and_largest_scales_survive(isa):
    codes = torch.tensor([[0, 1, 2, 3]] * 4, dtype=torch.uint8)
    scale = torch.tensor([[2.0**-24], [2.0**-14], [65504.0], [1.0]]).half()
    args = (pack(codes, 2), scale, torch.ones(4, 1, dtype=torch.uint8), 4, 4)
    assert torch.equal(op.decode(Weight(*args)), (codes.float() - 1) * scale.float())
    one = torch.eye(4)
    assert torch.equal(op.linear(one, *args, impl="native-lookup"), ((codes.float() - 1) * scale.float()).T)


@pytest.mark.parametrize("impl", NATIVE)
def test_dirty_padding_does_not_matter(isa, impl):
    case = Case(3, 19, 67, 32)
    clean = op.linear(case.x, *case.args, impl=impl)
    case.planes[..., -1] |= 0xF8
    assert torch.equal(op.linear(case.x, *case.args, impl=impl), clean)


def test_lookup_depends_on_neither_batch_nor_threads(isa):
    case = Case(4, 531, 576, 32)
    x = torch.randn(8, 576, generator=torch.Generator().manual_seed(1))
    set_threads(1)
    together = op.linear(x, *case.args, impl="native-lookup")
    for threads in (1, 2, 5):
        set_threads(threads)
        alone = torch.cat([op.linear(row[None], *case.args, impl="native-lookup") for row in x])
        assert torch.equal(alone, together), threads
        assert torch.equal(op.linear(x, *case.args, impl="native-lookup"), together), threads


@pytest.mark.parametrize("symmetric", [False, True])
def test_prepared_equals_linear_whatever_it_is_given(symmetric):
    case = Case(4, 24, 64, 32, symmetric)
    prepared = op.Prepared(case.weight)
    many = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(2))
    inputs = [case.x, case.x[0], case.x[:0], many, many[:, :3].transpose(0, 1), case.x.bfloat16(), case.x.double()]
    for x in inputs:
        y = prepared(x)
        assert torch.equal(y, op.linear(x, *case.args)), (x.dtype, x.shape)
        assert (y.dtype, y.shape) == (x.dtype, (*x.shape[:-1], 24))
    assert prepared(case.x.clone().requires_grad_()).requires_grad
    case.planes.fill_(0)  # the tensors are shared, not copied
    assert torch.equal(prepared(case.x), op.linear(case.x, *case.args))
    with pytest.raises(FormatError, match=r"x must be float \[\.\.\., 64\]"):
        prepared(case.x[:, :32].reshape(-1, 32).contiguous())
    with pytest.raises(FormatError, match="group_size must be 1 to 64"):
        op.Prepared(Weight(*case.args[:3], 0, 64))


def test_decode_in_blocks_equals_decode_at_once(monkeypatch):
    case = Case(4, 24, 64, 32)
    at_once = case.oracle(case.x)
    monkeypatch.setattr(op, "DECODE_FLOATS", 5 * 64)  # 24 rows: four blocks of five and a rest
    with torch.inference_mode():
        error = (op.linear(case.x, *case.args, impl="native-decode").double() - at_once).abs()
    assert bool((error <= case.bound(case.x, "native-decode")).all())
    op.linear(case.x, *case.args, impl="native-decode")  # scratch made in inference mode serves outside of it


@pytest.mark.parametrize("impl", NATIVE)
def test_nan_is_never_lost(isa, impl):
    case = Case(2, 20, 70, 32)
    case.x[1, 69] = float("nan")
    y = op.linear(case.x, *case.args, impl=impl)
    assert bool(y[1].isnan().all())
    assert not bool(y[[0, 2]].isnan().any())


def test_shape_dtype_and_choice():
    case = Case(4, 24, 64, 32)
    y = op.linear(case.x.view(3, 1, 64).bfloat16(), *case.args)
    assert y.shape == (3, 1, 24)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.view(3, 24), op.linear(case.x.bfloat16().float(), *case.args).bfloat16())
    assert op.linear(case.x[:0], *case.args).shape == (0, 24)
    assert op.choose(1, case.planes) == "native-lookup"
    assert op.choose(512, case.planes) == "native-decode"
    assert op.choose(1, case.planes.to("meta")) == "reference"


def test_views_are_read_where_they_are():
    case = Case(4, 24, 64, 32)
    assert case.zero is not None
    wide = torch.stack([case.x, case.x + 1], -1)[..., 0]
    views = (case.planes.repeat(1, 1, 2)[..., :8], case.scale.T.contiguous().T, case.zero.T.contiguous().T, 32, 64)
    for impl in NATIVE:
        assert torch.equal(op.linear(wide, *views, impl=impl), op.linear(case.x, *case.args, impl=impl))


def test_wrong_input_is_refused():
    case = Case(4, 24, 64, 32)
    planes, scale, zero = case.planes, case.scale, case.zero
    with pytest.raises(FormatError, match=r"scale must be float16 \(24, 2\)"):
        op.linear(case.x, planes, scale[:, :1], zero, 32, 64)
    with pytest.raises(FormatError, match="zero must be uint8"):
        op.linear(case.x, planes, scale, scale, 32, 64)
    with pytest.raises(FormatError, match="group_size must be 1 to 64"):
        op.linear(case.x, planes, scale, zero, 0, 64)
    with pytest.raises(FormatError, match=r"x must be float \[\.\.\., 64\]"):
        op.linear(case.x[:, :8], *case.args)
    with pytest.raises(KernelUnavailable, match="no implementation 'cuda'"):
        op.linear(case.x, *case.args, impl="cuda")
    moved = [t.to("meta") for t in (case.x, planes, scale, zero)]
    with pytest.raises(KernelUnavailable, match="needs CPU tensors, got meta"):
        op.multiply(moved[0], Weight(*moved[1:], 32, 64), impl="native-lookup")


def test_gradient_and_compiled_graph():
    case = Case(4, 24, 64, 32)
    x = case.x.clone().requires_grad_()
    seed = torch.randn(3, 24, generator=torch.Generator().manual_seed(3))
    op.linear(x, *case.args).backward(seed)
    torch.testing.assert_close(x.grad, seed @ reference.decode(case.weight))
    compiled = torch.compile(lambda v: op.linear(v * 2, *case.args) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(case.x), op.linear(case.x * 2, *case.args) + 1)
    torch.library.opcheck(op.linear_op, (case.x, *case.args), test_utils=("test_schema", "test_faketensor"))
