"""Sealed pages: ranges per channel, mixed widths, open pages among them; all against float64 over what is stored."""

from __future__ import annotations

import pytest
import torch

from anybit.errors import FormatError
from anybit.kernels.attention import op, reference
from anybit.kernels.attention.op import Look, PagedCache
from anybit.kernels.attention.shape import KvShape
from anybit.kernels.native import loaded, set_threads

FORMS = [
    (4, 4, True),
    (2, 2, True),
    (8, 8, True),
    (8, 4, False),
    (4, 8, False),
    (4, 16, True),
    (16, 4, False),
    (2, 4, True),
]
HEADS = [(9, 3, 64), (8, 1, 80), (32, 4, 64), (2, 2, 16), (4, 1, 256)]
TOKENS = 1200
LOUD = 20.0


def random(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def filled(shape: KvShape, sinks: int = 0, open_from: int = 17, impl: str = "native") -> PagedCache:
    """Scattered pages; the first `sinks` and those from `open_from` on stay open. Two channels of the keys are loud."""
    pages = -(-TOKENS // 64)
    opened = torch.full((pages, shape.opened.page_bytes), 0xFF, dtype=torch.uint8)
    sealed = torch.full((pages, shape.page_bytes), 0xFF, dtype=torch.uint8)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).tolist()
    cache = PagedCache(shape, sealed, [[pages + number for number in order]], opened)
    keys, values = random(2, TOKENS, shape.kv_heads, shape.head_dim)
    keys[:, :, [1, 7]] *= LOUD
    op.write(cache, [Look(0, 0, t) for t in range(TOKENS)], keys.bfloat16(), values.bfloat16() + 0.5, impl=impl)
    for index, number in enumerate(order):
        if sinks <= index < open_from:
            op.seal(shape, opened[number], sealed[number], impl=impl)
            opened[number] = 0xFF  # NaN: nobody may look here any more
            cache.tables[0][index] = number
    return cache


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [16, 80])
def test_sealed_as_the_reference_within_half_a_step(isa, dim, form):
    shape = KvShape(2, 2, dim, *form)
    opened = torch.zeros(1, shape.opened.page_bytes, dtype=torch.uint8)
    keys, values = random(2, 64, 2, dim)
    keys[:, 0, 3] *= 1000
    keys[:, 1, 5] = -0.375  # constant channels and tokens come back exactly
    values[9] = 1.0
    open_cache = PagedCache(shape.opened, opened, [[0]])
    op.write(open_cache, [Look(0, 0, t) for t in range(64)], keys, values)
    sealed = [torch.full((shape.page_bytes,), fill, dtype=torch.uint8) for fill in (0xFF, 0x00)]
    op.seal(shape, opened[0], sealed[0], impl="native")
    op.seal(shape, opened[0], sealed[1], impl="reference")
    was, got = reference.read_page(opened[0], shape.opened), reference.read_page(sealed[0], shape)
    assert all(torch.equal(a, b) for a, b in zip(got, reference.read_page(sealed[1], shape), strict=True))
    for before, after, bits, axis in zip(was, got, form[:2], (0 if form[2] else -1, -1), strict=True):
        if bits == 16:
            assert torch.equal(before, after)
            continue
        low, high = before.amin(axis, keepdim=True), before.amax(axis, keepdim=True)
        step = (high - low + before.abs().amax(axis, keepdim=True) * 2.0**-9) / (2**bits - 1) * (1 + 2.0**-9)
        assert ((before - after).abs() <= step / 2 + 1e-6 * before.abs()).all()
    assert torch.equal(got[1][9], was[1][9])
    if form[2]:
        assert torch.equal(got[0][:, 1, 5], was[0][:, 1, 5])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", HEADS)
def test_equals_softmax_in_float64(isa, heads, form):
    shape = KvShape(*heads, *form)
    cache, scaling = filled(shape, sinks=1), heads[2] ** -0.5 / LOUD
    looks = [Look(0, first, t) for t in (0, 63, 64, 700, 1023, 1024, 1088, TOKENS - 1) for first in (0, max(0, t - 70))]
    q = random(len(looks), shape.heads, shape.head_dim, seed=7).bfloat16().float()
    want = op.attend(cache, looks, q, scaling, impl="reference")
    plain = op.attend(cache, looks, q, scaling, impl="native")
    prompt = op.attend(cache, looks, q, scaling, impl="native", prompt=True)
    exact = 2e-5  # float32 sums of numbers up to 4
    halves = 0.05 if form[2] else 0.03  # weights rounded to bfloat16; with channels also queries times scales
    assert (plain - want).abs().max() <= (halves if isa == "amx" and min(form[:2]) <= 4 else exact)
    assert (prompt - want).abs().max() <= (halves if isa == "amx" else exact)
    assert isa != "amx" or (prompt - want).square().mean().sqrt() <= 0.006


@pytest.mark.parametrize("form", [(4, 4, True), (2, 8, True), (8, 8, False)])
def test_small_whole_numbers_are_exact(isa, form):
    """Codes, queries and scales that bfloat16 holds: one visible position gives its value, to the bit."""
    shape = KvShape(4, 2, 16, *form)
    opened = torch.zeros(1, shape.opened.page_bytes, dtype=torch.uint8)
    cache = PagedCache(shape, torch.zeros(1, shape.page_bytes, dtype=torch.uint8), [[0]])
    top = 2 ** form[0] - 1, 2 ** form[1] - 1
    keys, values = (
        (torch.arange(64 * 2 * 16).reshape(64, 2, 16) * 7 + 3 * torch.arange(64)[:, None, None]) % (t + 1) for t in top
    )
    values[:, :, 0], values[:, :, 1] = 0, top[1]
    keys[:, :, 0], keys[:, :, 1] = 0, top[0]
    keys[0], keys[1] = 0, top[0]  # every channel and token spans all codes: its step is 1
    keys[0, :, 1], keys[1, :, 0] = top[0], 0
    op.write(PagedCache(shape.opened, opened, [[0]]), [Look(0, 0, t) for t in range(64)], keys.float(), values.float())
    op.seal(shape, opened[0], cache.pages[0])
    q = random(64, 4, 16).mul(2).round()
    alone = op.attend(cache, [Look(0, t, t) for t in range(64)], q, 0.5, impl="native")
    rounding = 2.0**-8 if isa == "amx" and min(form[:2]) <= 4 else 0.0  # of a weight, exp(0) within 5e-6
    assert torch.allclose(alone, values.float().repeat_interleave(2, 1), rtol=0, atol=rounding * top[1] / 2)
    got = op.attend(cache, [Look(0, 0, 63)], q[:1], 0.0, impl="native")  # all positions alike
    assert torch.allclose(got[0], values.float().mean(0).repeat_interleave(2, 0), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_neither_neighbours_nor_threads_change_a_bit(isa, form):
    shape = KvShape(9, 3, 64, *form)
    cache = filled(shape, sinks=1)
    looks = [Look(0, max(0, t - window + 1), t) for t in range(1000, TOKENS) for window in (TOKENS, 70)][::2]
    q = random(len(looks), 9, 64, seed=3)
    for prompt in (False, True):
        set_threads(1)
        whole = op.attend(cache, looks, q, 0.02, prompt=prompt)
        for threads, step in ((1, 1), (2, 1), (2, 7), (3, 64)):
            set_threads(threads)
            for begin in (0, 23, 24, 87, 88):
                some = slice(begin, begin + step)
                assert torch.equal(op.attend(cache, looks[some], q[some], 0.02, prompt=prompt), whole[some])


def test_loud_channels_want_ranges_of_their_own():
    """Of planted outliers, a range per channel leaves at most a fifth of the error that one per token leaves."""
    errors = {}
    for channels in (False, True):
        shape = KvShape(3, 3, 64, 4, 4, channels)
        keys = torch.zeros(1, shape.opened.page_bytes, dtype=torch.uint8)
        x = random(64, 3, 64)
        x[..., [1, 7]] *= LOUD
        op.write(PagedCache(shape.opened, keys, [[0]]), [Look(0, 0, t) for t in range(64)], x, x)
        page = torch.zeros(shape.page_bytes, dtype=torch.uint8)
        op.seal(shape, keys[0], page)
        was, got = reference.read_page(keys[0], shape.opened)[0], reference.read_page(page, shape)[0]
        quiet = [d for d in range(64) if d not in (1, 7)]
        errors[channels] = (was - got)[..., quiet].square().mean().sqrt().item()
    assert errors[False] >= 5 * errors[True]


def test_folding_ranges_into_queries_and_weights_is_exact():
    """score = (q s) . code + q . m; values: sum (p s) code + sum p m. In float64 these are the dequantized products."""
    shape = KvShape(2, 2, 32, 4, 4, True)
    cache = filled(shape, open_from=1)
    view = reference._Block(cache.pages[cache.tables[0][0]].view(2, -1)[0], shape)
    codes = reference._unpack(view.keys, 4).double()
    q, p = random(32, seed=4).double(), random(64, seed=5).double()
    scale, minimum = view.key_ranges.double()
    keys, values = reference.read_page(cache.pages[cache.tables[0][0]], shape)
    torch.testing.assert_close((q * scale) @ codes + q @ minimum, keys[:, 0] @ q, rtol=1e-12, atol=1e-12)
    scale, minimum = view.value_ranges.double()
    folded = (p * scale) @ reference._unpack(view.values, 4).double() + p @ minimum
    torch.testing.assert_close(folded, p @ values[:, 0], rtol=1e-12, atol=1e-12)


def test_bytes_of_a_page():
    for heads in HEADS:
        for form in FORMS:
            shape = KvShape(*heads, *form)
            key, value, channels = form
            bits = key + value + (32 / (64 if channels else heads[2]) if key < 16 else 0)
            bits += 32 / heads[2] if value < 16 else 0
            assert shape.page_bytes == heads[1] * 64 * heads[2] * bits / 8
            assert loaded().kv_page_bytes(shape.sizes) == shape.page_bytes
            assert shape.page_bytes % 64 == 0


def test_single_tokens_do_not_go_into_pages_sealed_by_channel():
    shape = KvShape(2, 1, 16, 4, 4, True)
    cache = PagedCache(shape, torch.zeros(1, shape.page_bytes, dtype=torch.uint8), [[0]])
    with pytest.raises(FormatError, match="whole page"):
        op.write(cache, [Look(0, 0, 0)], *torch.zeros(2, 1, 1, 16))
    with pytest.raises(FormatError, match="16-bit keys have no ranges"):
        KvShape(2, 1, 16, 16, 4, True)
