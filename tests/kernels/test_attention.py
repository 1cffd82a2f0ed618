"""Attention over a paged cache equals softmax in float64 over what is stored, and no blocking or threading changes a bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from anybit.errors import FormatError, KernelUnavailable
from anybit.kernels.attention import op, reference
from anybit.kernels.attention.op import Look, PagedCache
from anybit.kernels.attention.shape import KvShape
from anybit.kernels.native import loaded, set_threads

HEADS = [(1, 1, 16), (9, 3, 64), (8, 1, 80), (6, 2, 96), (3, 3, 128), (20, 2, 16), (4, 1, 256)]
EDGES = (0, 1, 15, 16, 31, 32, 33, 62, 63, 64, 65, 95, 127, 128, 129, 1022, 1023, 1024, 1025, 1087, 1088, 1099)
BITS = (16, 8, 4, 2)
EPS = 2.0**-24


def random(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def empty(shape: KvShape, pages: int, fill: int = 0xFF) -> torch.Tensor:
    """0xFF everywhere is NaN in every float16: an unused slot that mattered would show."""
    return torch.full((pages, shape.page_bytes), fill, dtype=torch.uint8)


def filled(shape: KvShape, tokens: int, seed: int = 0, fill: int = 0xFF, table: list[int] | None = None) -> PagedCache:
    table = table or list(range(-(-tokens // 64)))
    cache = PagedCache(shape, empty(shape, max(table) + 1, fill), [table])
    keys, values = random(2, tokens, shape.kv_heads, shape.head_dim, seed=seed)
    keys[:, :, 0] += 4.0  # a loud channel, as real keys have
    keys, values = (
        keys.bfloat16(),
        (values + 0.5).bfloat16(),
    )  # 16 bits keep them whole, also on their way to a matrix unit
    op.write(cache, [Look(0, 0, t) for t in range(tokens)], keys, values, impl="native")
    return cache


def queries(shape: KvShape, tokens: int, loud: float = 1.0) -> torch.Tensor:
    return random(tokens, shape.heads, shape.head_dim, seed=7) * loud


def bound(cache: PagedCache, q: torch.Tensor, scaling: float, tokens: int) -> float:
    """The largest error that float32 may leave: terms of a score are q m and q s code, together at most 3 |q| max|x|.

    A score is off by at most (D + 8) roundings of their sum; a weight by twice that (its own score and the maximum) and the
    exponential's 4e-7; the two sums over positions by one rounding a position and a few for pages and splits.
    """
    dim = cache.shape.head_dim
    keys, values = reference.read_table(cache.pages, cache.tables[0], cache.shape)
    loudest = 3 * keys[:tokens].abs().max().item() * q.abs().sum(-1).max().item() * scaling
    largest = 3 * values[:tokens].abs().max().item()
    return 2 * largest * (2 * (dim + 8) * EPS * loudest + 4e-7 + (tokens + 64) * EPS)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("heads", HEADS)
def test_equals_softmax_in_float64(isa, heads, bits):
    if isa == "amx" and bits <= 4:
        pytest.skip("always with bfloat16 weights, as prompts below")
    shape = KvShape(*heads, bits)
    cache, scaling = filled(shape, 1100), heads[2] ** -0.5
    looks = [Look(0, 0, t) for t in EDGES]
    for loud in (0.3, 3.0):  # flat weights, then nearly one position each
        q = queries(shape, len(EDGES), loud)
        want = op.attend(cache, looks, q, scaling, impl="reference")
        got = op.attend(cache, looks, q, scaling, impl="native")
        assert (got - want).abs().max() <= bound(cache, q, scaling, 1100)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("heads", HEADS)
def test_prompts_round_their_weights_to_bfloat16(isa, heads, bits):
    """Queries are whole in bfloat16 here, so what is left are weights, off by 2^-8 of themselves, times a value's distance from
    the middle code: at most half a range (all of it at 16 bits). The exponential is within 5e-6 instead of 4e-7."""
    shape = KvShape(*heads, bits)
    cache, scaling = filled(shape, 1100), heads[2] ** -0.5
    looks = [Look(0, max(0, t - window + 1), t) for t in EDGES for window in (70, 1100)]
    _, values = reference.read_table(cache.pages, cache.tables[0], shape)
    values = values[:1100]
    spread = (
        values.abs().max()
        if bits == 16
        else (values.amax(-1) - values.amin(-1)).max() * {8: 0.52, 4: 0.6, 2: 0.7}[bits]
    )
    for loud, softcap in ((0.3, 0.0), (3.0, 0.0), (1.0, 5.0)):
        q = queries(shape, len(looks), loud).bfloat16().float()
        plain = op.attend(cache, looks, q, scaling, softcap, impl="native")
        got = op.attend(cache, looks, q, scaling, softcap, impl="native", prompt=True)
        if isa != "amx" or bits <= 4:
            assert torch.equal(got, plain)
        if isa != "amx":
            continue
        want = op.attend(cache, looks, q, scaling, softcap, impl="reference")
        assert (got - want).abs().max() <= 2.0**-8 * spread + bound(cache, q, scaling, 1100) + 3e-5 * values.abs().max()


@pytest.mark.parametrize("bits", BITS)
def test_windows_and_softcap(isa, bits):
    shape = KvShape(6, 2, 32, bits)
    cache = filled(shape, 1300)
    lasts = (0, 63, 64, 100, 700, 1023, 1024, 1100, 1299)
    looks = [Look(0, max(0, t - window + 1), t) for t in lasts for window in (1, 33, 64, 65, 1000)]
    q = queries(shape, len(looks), 2.0).bfloat16().float()
    halves = (
        2.0**-7 * 8 if isa == "amx" and bits <= 4 else 0.0
    )  # weights rounded to bfloat16, times the range of values
    for softcap in (0.0, 5.0):
        want = op.attend(cache, looks, q, 0.5, softcap, impl="reference")
        got = op.attend(cache, looks, q, 0.5, softcap, impl="native")
        # tanh is bounded by 1 with an error of a few roundings: softcap adds at most 8 EPS softcap to a score.
        assert (got - want).abs().max() <= bound(cache, q, 0.5, 1300) + 64 * EPS * softcap + halves
    alone = [i for i, look in enumerate(looks) if look.first == look.last]
    _, values = reference.read_table(cache.pages, cache.tables[0], shape)
    for i in alone:  # one visible position: its value, whatever the score
        own = values[looks[i].last].repeat_interleave(3, 0)
        torch.testing.assert_close(got[i].double(), own, rtol=1e-6, atol=1e-6 + halves)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("heads", [(9, 3, 64), (8, 1, 80), (2, 2, 16)])
@pytest.mark.parametrize("prompt", [False, True])
def test_neither_neighbours_nor_threads_change_a_bit(isa, heads, bits, prompt):
    if prompt and isa != "amx":
        pytest.skip("the same code as without")
    shape = KvShape(*heads, bits)
    tokens = 1100
    cache = filled(shape, tokens)
    q = queries(shape, tokens)
    for window in (tokens, 70):
        looks = [Look(0, max(0, t - window + 1), t) for t in range(tokens)]
        whole = op.attend(cache, looks, q, 0.2, prompt=prompt)
        for threads in (1, 2, 3):
            set_threads(threads)
            for step in (tokens, 333, 7):
                ends = range(0, tokens, step) if step > 7 else (0, 56, 1015, 1022)
                for begin in ends:
                    some = slice(begin, begin + step)
                    part = op.attend(cache, looks[some], q[some], 0.2, prompt=prompt)
                    assert torch.equal(part, whole[some]), (threads, step, begin)
            for t in EDGES:
                one = op.attend(cache, [looks[t]], q[t : t + 1], 0.2, prompt=prompt)
                assert torch.equal(one[0], whole[t]), (threads, t)


@pytest.mark.parametrize("bits", BITS)
def test_many_splits_merge_in_one_order(isa, bits):
    """One thread takes the splits of a long context one after the other, several take them side by side."""
    shape = KvShape(4, 2, 16, bits)
    cache = filled(shape, 5000)
    looks = [Look(0, first, last) for first in (0, 1100, 3000) for last in (4095, 4999)]
    q = queries(shape, len(looks))
    set_threads(1)
    whole = op.attend(cache, looks, q, 0.5)
    want = op.attend(cache, looks, q, 0.5, impl="reference")
    assert (whole - want).abs().max() <= bound(cache, q, 0.5, 5000)
    for threads in (2, 3):
        set_threads(threads)
        for t, look in enumerate(looks):
            assert torch.equal(op.attend(cache, [look], q[t : t + 1], 0.5)[0], whole[t]), (threads, look)


@pytest.mark.parametrize("bits", BITS)
def test_a_batch_of_sequences_equals_each_alone(isa, bits):
    shape = KvShape(6, 3, 48, bits)
    lengths, tables = (1, 64, 65, 200, 1100), []
    free = torch.randperm(64, generator=torch.Generator().manual_seed(3)).tolist()
    for length in lengths:
        tables.append([free.pop() for _ in range(-(-length // 64))])
    many = PagedCache(shape, empty(shape, 64), tables)
    alone = [filled(shape, length, seed=i) for i, length in enumerate(lengths)]
    for table, one in zip(tables, alone, strict=True):
        many.pages[table] = one.pages
    looks = [Look(i, 0, t) for i, length in enumerate(lengths) for t in {length - 1, length // 2}]
    looks = looks[::2] + looks[1::2]  # neighbours belong to different sequences
    q = queries(shape, len(looks))
    together = op.attend(many, looks, q, 0.3)
    for i, look in enumerate(looks):
        one = op.attend(alone[look.sequence], [Look(0, look.first, look.last)], q[i : i + 1], 0.3)
        assert torch.equal(one[0], together[i]), look


@pytest.mark.parametrize("bits", BITS)
def test_unused_slots_do_not_matter(isa, bits):
    shape = KvShape(9, 3, 64, bits)
    for tokens in (1, 31, 32, 33, 63, 65, 100):
        looks = [Look(0, max(0, t - 40), t) for t in range(tokens)]
        q = queries(shape, tokens)
        for prompt in (False, True):
            caches = [filled(shape, tokens, fill=fill) for fill in (0xFF, 0x00, 0x7C)]
            results = [op.attend(cache, looks, q, 0.1, prompt=prompt) for cache in caches]
            assert results[0].isfinite().all()
            assert all(torch.equal(results[0], other) for other in results[1:]), tokens
    # A window's page may hold slots that were never written below it, too.
    cache = PagedCache(shape, empty(shape, 2), [[0, 1]])
    keys, values = random(2, 20, 3, 64)
    op.write(cache, [Look(0, 0, 60 + t) for t in range(20)], keys, values)
    assert op.attend(cache, [Look(0, 60, 79)] * 3, queries(shape, 3), 0.1).isfinite().all()


def hard_vectors(dim: int) -> torch.Tensor:
    """[T, D]: constants, tiny and huge ranges, a large offset (where a float16 zero point would have no resolution left)."""
    x = random(40, dim, seed=11)
    constant = torch.ones(dim)
    rows = [0 * constant, constant, 0.1 * constant, -1234.567 * constant, 1000 + 0.01 * x[0], -3000 + x[1], 1e-7 * x[2]]
    rows += [1e-4 * x[3], 20000 * x[4].clamp(-3, 3), x[5].abs(), -x[6].abs(), x[7] + 1e5 * (torch.arange(dim) == 3)]
    return torch.stack([*rows, *x[8:]])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [16, 80])
def test_stored_as_the_reference_and_within_half_a_step(isa, dim, bits):
    shape = KvShape(2, 2, dim, bits)
    x = hard_vectors(dim)
    tokens = len(x)
    keys, values = torch.stack([x, x.flip(0)], 1), torch.stack([x.flip(1), 2 - x], 1)
    caches = [PagedCache(shape, empty(shape, 2), [[1, 0]]) for _ in range(2)]
    looks = [Look(0, 0, 25 + t) for t in range(tokens)]
    for cache, impl in zip(caches, ("native", "reference"), strict=True):
        op.write(cache, looks, keys, values, impl=impl)
        op.write(
            cache, looks[::3], keys[::3].flip(0), values[::3].flip(0), impl=impl
        )  # overwritten: nothing old shines through
        op.write(cache, looks[::3], keys[::3], values[::3], impl=impl)
    assert torch.equal(caches[0].pages, caches[1].pages)
    read = reference.read_table(caches[0].pages, [1, 0], shape)
    for wanted, got in zip((keys, values), read, strict=True):
        inside = wanted.abs().amax(-1) <= 65504
        error = (wanted.double() - got[25 : 25 + tokens]).abs()
        if bits == 16:
            limit = wanted.double().abs() * 2.0**-11 + 2.0**-25
        else:
            _, scale, _ = reference.quantize(wanted, bits)
            limit = (scale.double() / 2)[..., None] * (1 + 1e-6) + wanted.double().abs() * 2 * EPS
            step = (
                wanted.amax(-1) - wanted.amin(-1) + wanted.abs().amax(-1) * 2.0**-10
            )  # and the step is no larger than it must be
            assert (scale <= (step / (2**bits - 1)) * (1 + 2.0**-9) + 2.0**-23)[inside].all()
        assert (error <= limit)[inside].all()
        assert got.isfinite()[25 : 25 + tokens].all()


def test_constants_that_float16_holds_are_exact(isa):
    for bits, value in itertools.product(BITS, (0.0, 1.0, -0.375)):
        shape = KvShape(1, 1, 16, bits)
        cache = PagedCache(shape, empty(shape, 1), [[0]])
        same = torch.full((3, 1, 16), value)
        op.write(cache, [Look(0, 0, t) for t in range(3)], same, same)
        assert torch.equal(op.attend(cache, [Look(0, 0, 2)], same[:1], 0.25), same[:1])


def test_page_bytes():
    assert KvShape(9, 3, 64, 16).page_bytes == 3 * 2 * 64 * 64 * 2
    assert KvShape(9, 3, 64, 8).page_bytes == 3 * (2 * 64 * 64 + 4 * 64 * 2)
    assert KvShape(9, 3, 64, 4).page_bytes == 3 * (2 * 64 * 32 + 4 * 64 * 2)
    for heads, bits in itertools.product(HEADS, BITS):
        shape = KvShape(*heads, bits)
        assert loaded().kv_page_bytes(shape.sizes) == shape.page_bytes
        assert shape.page_bytes % 64 == 0


def test_wrong_input_is_refused():
    shape = KvShape(2, 1, 16, 8)
    cache = PagedCache(shape, empty(shape, 2), [[0, 1]])
    q = torch.zeros(1, 2, 16)
    for sizes, message in [
        ((3, 2, 16, 8), "share 2 kv heads"),
        ((2, 1, 24, 8), "multiple of 16"),
        ((2, 1, 16, 5), "16, 8, 4 or 2"),
    ]:
        with pytest.raises(FormatError, match=message):
            KvShape(*sizes)
    with pytest.raises(FormatError, match="page 2 is not one of the 2"):
        PagedCache(shape, empty(shape, 2), [[0, 2]])
    with pytest.raises(FormatError, match=f"uint8 .P, {shape.page_bytes}"):
        PagedCache(shape, empty(KvShape(2, 1, 16, 4), 2), [[0]])
    for look in (Look(0, 0, 128), Look(0, 5, 4), Look(0, -1, 4)):
        with pytest.raises(FormatError, match=r"hold 0\.\.127"):
            op.attend(cache, [look], q, 1.0)
    with pytest.raises(FormatError, match="sequence 1 of 1"):
        op.attend(cache, [Look(1, 0, 0)], q, 1.0)
    with pytest.raises(FormatError, match=r"q must be float \[1, 2, 16\], got float32 \[1, 1, 16\]"):
        op.attend(cache, [Look(0, 0, 0)], q[:, :1], 1.0)
    with pytest.raises(KernelUnavailable, match="known: native, reference"):
        op.attend(cache, [Look(0, 0, 0)], q, 1.0, impl="magic")
