"""Embedding rows: equal to the definition bit for bit, for every width, odd shapes, and ids in any order."""

from __future__ import annotations

import pytest
import torch

from anybit.errors import FormatError, InputError, KernelUnavailable
from anybit.formats.planes import pack
from anybit.kernels.embedding import op, reference
from anybit.kernels.native import set_threads

IDS = torch.tensor([30, 0, 7, 7, 19])


def table(bits, columns, group, symmetric=False, rows=31):
    generator = torch.Generator().manual_seed(bits * 1000 + columns)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    groups = -(-columns // group)
    scale = (torch.rand(rows, groups, generator=generator) + 0.01).half()
    zero = None if symmetric else torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=generator)
    return codes, (pack(codes, bits), scale, zero, group, columns)


def one_by_one(ids, codes, scale, zero, group, middle, multiplier):
    """Exact until the last two roundings, column by column."""
    out = torch.empty(len(ids), codes.shape[1])
    for t, n in enumerate(ids.tolist()):
        for k in range(codes.shape[1]):
            z = middle if zero is None else int(zero[n, k // group])
            out[t, k] = (int(codes[n, k]) - z) * scale[n, k // group].float() * multiplier
    return out


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_reference_is_the_definition(bits):
    for symmetric in (False, True):
        codes, args = table(bits, 21, 8, symmetric)
        want = one_by_one(IDS, codes, args[1], args[2], 8, 2 ** (bits - 1), 3.3)
        assert torch.equal(reference.embed(IDS, *args, 3.3), want)


@pytest.mark.parametrize("bits", range(1, 9))
def test_native_equals_the_reference(isa, bits):
    for columns in (1, 7, 8, 31, 64, 65, 576, 1023, 1024, 1025, 2500):
        for group in {min(group, columns) for group in (3, 32, 128, columns)}:
            for symmetric, multiplier in ((False, 1.0), (True, 24.3)):
                _, args = table(bits, columns, group, symmetric)
                found = op.embed(IDS, *args, multiplier, impl="native")
                assert torch.equal(found, reference.embed(IDS, *args, multiplier)), (columns, group)


def test_dirty_padding_views_and_threads(isa):
    _, args = table(4, 67, 32)
    planes = args[0].clone()
    planes[..., -1] |= 0xF8
    ids = torch.arange(31).repeat(400)[::3]
    want = reference.embed(ids, *args, 2.0)
    for threads in (1, 2, 5):
        set_threads(threads)
        assert torch.equal(op.embed(ids, planes, *args[1:], 2.0, impl="native"), want)


def test_the_registered_operator():
    _, args = table(4, 67, 32)
    torch.library.opcheck(op.embed_op, (IDS, *args, 2.0))
    compiled = torch.compile(lambda ids: op.embed(ids, *args) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IDS), reference.embed(IDS, *args, 1.0) + 1)


def test_wrong_input_is_refused():
    _, args = table(4, 64, 32)
    for bad in (-1, 31):
        with pytest.raises(InputError, match=f"id {bad} is not in a table of 31 rows"):
            op.embed(torch.tensor([3, bad]), *args)
    with pytest.raises(FormatError, match="ids must be int64"):
        op.embed(IDS.float(), *args)
    with pytest.raises(FormatError, match="scale must be float16"):
        op.embed(IDS, args[0], args[1].float(), *args[2:])
    with pytest.raises(KernelUnavailable, match="known: native, reference"):
        op.embed(IDS, *args, impl="magic")
    assert op.embed(IDS[:0], *args).shape == (0, 64)
