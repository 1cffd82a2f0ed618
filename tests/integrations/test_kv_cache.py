"""transformers with a quantized cache: what it holds, what attention sees, and that the native decoder sees the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from anybit.checkpoint.ledger import Ledger
from anybit.engine.native import NativeModel
from anybit.errors import InputError
from anybit.formats.kv import KVSpec
from anybit.layers.kv_cache import KVCache, KVLayer, cache_as
from tiny_checkpoints import quantize_tiny

SPECS = ["8", "k4v8", "4-rotated", "4-channel", "k2v4-channel-sink64-window64-rotated", "4-sink64", "k16v4-window64"]
TOKENS = 330


def random(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def rotation(size: int) -> torch.Tensor:
    """By its definition: (-1)^(bits that i and j have in common), float64."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


def coded(x: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Float64 x after codes of `bits` with one range along `axis`; ranges rounded outward to float16."""
    if bits == 16:
        return x.half().double()
    low = x.amin(axis, keepdim=True).numpy()
    minimum = low.astype(np.float16)
    minimum = np.where(minimum > low, np.nextafter(minimum, np.float16(-np.inf)), minimum).astype(np.float16)
    exact = (x.amax(axis, keepdim=True).numpy() - minimum.astype(np.float64)) / (2**bits - 1)
    scale = exact.astype(np.float16)
    scale = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale).astype(np.float64)
    codes = np.rint((x.numpy() - minimum) / np.where(scale == 0, 1, scale)).clip(0, 2**bits - 1)
    return torch.from_numpy(minimum + scale * codes)


def oracle(spec: KVSpec, keys: torch.Tensor, values: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the token at `position` sees of float64 keys and values [T, D], itself included."""
    turn = rotation(keys.shape[1]) if spec.rotated else torch.eye(keys.shape[1], dtype=torch.float64)
    keys, values = keys[: position + 1] @ turn, values[: position + 1]
    if not spec.seals:
        return coded(keys, spec.key_bits, 1) @ turn, coded(values, spec.value_bits, 1)
    seen_keys, seen_values = keys.half().double(), values.half().double()
    for start in range(spec.sink, position + 1, 64):
        if start + 64 + spec.window > position:
            break
        page = slice(start, start + 64)
        seen_keys[page] = coded(keys[page].half().double(), spec.key_bits, 0 if spec.keys == "channel" else 1)
        seen_values[page] = coded(values[page].half().double(), spec.value_bits, 1)
    return seen_keys @ turn, seen_values


@pytest.mark.parametrize("word", SPECS)
def test_every_token_sees_what_its_position_says(word):
    spec, layer = KVSpec.parse(word), KVLayer(KVSpec.parse(word))
    keys, values = random(2, 1, 2, TOKENS, 32)
    keys[..., 3] *= 20
    for t in range(TOKENS):
        seen = layer.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        if t % 64 in (0, 1, 63) or t > TOKENS - 3:
            for head in range(2):
                want = oracle(spec, keys[0, head].double(), values[0, head].double(), t)
                for got, expected in zip(seen, want, strict=True):
                    assert got.shape == (1, 2, t + 1, 32)
                    error = (got[0, head].double() - expected).abs()
                    assert error.median() < 1e-5  # a code at a tie may differ by one: rotations sum in another order
                    assert (error > 1e-4).double().mean() < 2e-3
    held = sum(x.numel() * x.element_size() for codes in layer._codes for x in codes.held)
    pages = layer._sealed - (spec.sink if spec.seals else 0)
    assert held == pages * 2 * 32 * sum(spec.bits_per_element(32)) / 8


@pytest.mark.parametrize("word", SPECS)
def test_forgetting_tokens_leaves_no_trace(word):
    spec = KVSpec.parse(word)
    keys, values = random(2, 1, 2, TOKENS, 32)

    def feed(layer, begin, end):
        return [layer.update(keys[:, :, t : t + 1], values[:, :, t : t + 1]) for t in range(begin, end)][-1]

    for length, back in ((130, 3), (192, 1), (193, 5), (200, 60), (257, 2)):
        plain, layer = KVLayer(spec), KVLayer(spec)
        feed(plain, 0, length - back)
        feed(layer, 0, length)
        layer.crop(-back)
        assert layer.get_seq_length() == length - back
        for a, b in zip(feed(layer, length - back, 300), feed(plain, length - back, 300), strict=True):
            assert torch.equal(a, b)
    if spec.seals:
        with pytest.raises(InputError, match="sealed"):
            layer.crop(-150)
    layer.crop(-300)
    assert layer.get_seq_length() == 0
    feed(layer, 0, 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    options = ["key_bits=4", "value_bits=4", "keys=channel"]
    directory = tmp_path_factory.mktemp("kv")
    (directory / "recipe.yaml").write_text(
        "name: small\npaper: none\nsummary: a test\nweights: rtn\nkv: 4 bits\nstages:\n"
        "  weights: [{name: rtn, options: {bits: 8, group_size: 32}}]\n"
        "  embeddings: [{name: rtn, targets: [embedding, head], options: {bits: 8}}]\n"
        f"  kv: [{{name: kv, options: {{{', '.join(o.replace('=', ': ') for o in options)}}}}}]\n"
    )
    return quantize_tiny("llama", directory, str(directory / "recipe.yaml"))


def test_the_recipe_reaches_config_ledger_and_both_engines(checkpoint):
    spec = KVSpec(4, 4, "channel")
    saved = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["kv"]
    assert KVSpec.read(saved) == spec
    account = Ledger.read(checkpoint).kv
    assert account["scheme"] == spec.word
    assert account["key_bits_per_element"] == 4.5
    assert NativeModel.open(checkpoint, max_tokens=64).kv == spec
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    out = model(input_ids=torch.arange(4, 24)[None])
    assert isinstance(out.past_key_values, KVCache)
    text = model.generate(torch.arange(4, 24)[None], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert text.past_key_values.layers[0].get_seq_length() == 23
    other = DynamicCache()
    other.update(*torch.zeros(2, 1, 2, 1, 16), 0)
    with pytest.raises(InputError, match="leave past_key_values out"):
        model(input_ids=torch.arange(4, 24)[None], past_key_values=other)


@pytest.mark.parametrize("word", ["16", "8", "4-channel", "k4v4-sink64", "4-channel-rotated"])
def test_torch_and_native_caches_hold_the_same(checkpoint, word):
    """Token by token, through every sealing; float activations here and bytes there leave a difference in the numbers that go
    in, so what is compared is the last layer's cache and the logits, against the same distance with 16 bits."""
    ids = torch.randint(4, 200, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    spec = KVSpec.parse(word)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    cache_as(model, spec)
    native = NativeModel.open(checkpoint, kv=spec, max_tokens=256, verify=False)
    native.forward([(i, 0) for i in ids], [])
    cache = None
    with torch.inference_mode():
        for i in ids:
            cache = model(input_ids=torch.tensor([[i]]), past_key_values=cache).past_key_values
    wanted = [x[0].numpy() for x in cache.layers[-1].read()]
    step = {16: 0.0, 8: 1 / 255, 4: 1 / 15}[spec.key_bits]
    for got, want in zip(native.last_keys_values(), wanted, strict=True):
        spread = want.max(-1) - want.min(-1)
        if spec.keys == "channel" or spec.rotated:
            spread = np.full_like(spread, want.max() - want.min())
        assert got.shape == want.shape
        assert (np.abs(got - want) <= (1.05 * step * (4 if spec.rotated else 1) + 0.06) * spread[..., None]).all()
        assert np.abs(got - want).mean() <= 0.02 * np.abs(want).mean() + step / 4 * spread.mean()
