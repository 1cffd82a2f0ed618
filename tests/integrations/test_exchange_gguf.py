"""GGUF: every block type against the package's own dequantizer, files against transformers' own reader."""

from __future__ import annotations

import json
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import anybit
from anybit.errors import InputError
from anybit.formats.terms import load_terms
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.foreign import affine_layer
from anybit.integrations.exchange.grid import Grid
from anybit.integrations.gguf.read import CODES, _blocked
from anybit.integrations.gguf.write import EXACT
from anybit.layers.linear import product
from exchange_case import config_of, same_values, values_of
from tiny_checkpoints import quantize_tiny

ROWS = 5


def random_blocks(kind: Type, columns: int = 512) -> np.ndarray:
    """Bytes of any codes and steps with scales that are numbers, two of them 0."""
    draw = np.random.default_rng(int(kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = draw.integers(0, 256, (ROWS, columns // block, size), dtype=np.uint8)
    floats = {Type.Q6_K: [208], Type.Q8_0: [0], Type.Q4_0: [0], Type.Q5_0: [0]}.get(kind, [0, 2])
    for at in floats:
        values = draw.normal(0, 0.02, data.shape[:2]).astype("<f2")
        values[0, 0] = 0
        data[:, :, at : at + 2] = values[..., None].view(np.uint8)
    return data.reshape(ROWS, -1)


def decoded(kind: Type, data: np.ndarray):
    unpack, bits, size, block = CODES[kind]
    found = unpack(data)
    if found.step is None and found.offset is None:
        zero = torch.full(found.scale.shape, 2 ** (bits - 1))
        return affine_layer("x", (bits, size), found.codes, found.scale.float(), zero, Account("anybit", False))
    return _blocked(found, bits, size, block)


@pytest.mark.parametrize("kind", CODES)
def test_blocks_decode_as_gguf_does(kind):
    data = random_blocks(kind)
    (term,) = load_terms(*decoded(kind, data))
    assert torch.equal(term.dense(), torch.from_numpy(gguf.dequantize(data, kind)))


@pytest.mark.parametrize("kind", [kind for kind in CODES if kind.name.endswith(("_1", "_K"))])
def test_block_scales_run_on_the_kernels(kind):
    (term,) = load_terms(*decoded(kind, random_blocks(kind)))
    again = term.decoder.encode(term.dense())
    assert torch.equal(term.decoder.decode(again), term.dense())
    for tokens in (1, 40):
        x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(0))
        exact = x.double() @ term.dense().double().T
        scale = float((x.double().abs() @ term.dense().double().abs().T).max())
        assert float((product(term)(x) - exact).abs().max()) < 2e-6 * scale


def grid(bits: int, size: int, zero: int | None, columns: int = 512, seed: int = 0) -> Grid:
    draw = torch.Generator().manual_seed(seed)
    table = (ROWS, columns // size)
    codes = torch.randint(0, 2**bits, (ROWS, columns), generator=draw).to(torch.uint8)
    scale = torch.rand(table, generator=draw).mul(0.1).add(0.01).half().float()
    zeros = torch.randint(0, 2**bits, table, generator=draw).float() if zero is None else torch.full(table, float(zero))
    return Grid(bits, size, codes, scale, zeros)


CHOICES = {
    Type.Q4_0: grid(4, 64, 8),
    Type.Q4_K: grid(4, 256, None),
    Type.Q4_1: grid(4, 32, 0),
    Type.Q5_0: grid(4, 32, None),
    Type.Q6_K: grid(6, 512, 32),
    Type.Q8_0: grid(6, 32, 32),
}


@pytest.mark.parametrize("kind", CHOICES)
def test_the_smallest_type_that_is_exact_is_taken(kind):
    found = CHOICES[kind]
    chosen, data = next((k, data) for k, pack in EXACT if (data := pack(found)) is not None)
    assert chosen == kind
    assert np.array_equal(gguf.dequantize(data, kind), found.values().numpy())
    for other, pack in EXACT:
        if (data := pack(found)) is not None:  # whoever says it, says it exactly
            assert np.array_equal(gguf.dequantize(data, other), found.values().numpy())


def test_what_no_type_says_is_not_packed():
    fractional = grid(4, 32, 8)
    fractional = Grid(4, 32, fractional.codes, fractional.scale, fractional.zero + 1 / 3)
    assert all(pack(each) is None for _, pack in EXACT for each in (fractional, grid(8, 32, None), grid(4, 16, 8)))


def with_a_merge(directory):
    """Readers of GGUF want merges: the last token becomes "he"."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary["he"] = vocabulary.pop(last)
    tokenizer["model"]["merges"] = [["h", "e"]]
    path.write_text(json.dumps(tokenizer))
    return directory


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mistral"])
def pair(request, tmp_path_factory):
    where = tmp_path_factory.mktemp(request.param)
    source = with_a_merge(
        quantize_tiny(request.param, where, overrides=["weights.group_size=32"], config={"sliding_window": None})
    )
    result = anybit.export(source, to="gguf", out=where / "model.gguf")
    return source, where / "model.gguf", result


def test_a_file_there_and_back_is_the_same_model(pair, tmp_path):
    source, file, result = pair
    assert result["lossless"]
    assert anybit.import_checkpoint(file, out=tmp_path / "back")["lossless"]
    back = values_of(tmp_path / "back")
    assert same_values(back, values_of(source))
    assert anybit.load(tmp_path / "back")


def test_transformers_reads_the_file_as_the_same_model(pair):
    source, file, _ = pair
    if "qwen3" in str(source):
        pytest.skip("transformers does not read the head width of a Qwen3 GGUF file")
    options = {"gguf_file": file.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, **options).eval()
    expected = values_of(source)
    found = {name: tensor for name, tensor in theirs.state_dict().items() if name in expected}
    assert len(found) >= len(expected) - 1
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = AutoTokenizer.from_pretrained(source)
    assert tokenizer("Hello there, 42 of the others!").input_ids == ours("Hello there, 42 of the others!").input_ids


def test_a_window_of_attention_is_a_loss(tmp_path):
    source = quantize_tiny("mistral", tmp_path)
    with pytest.raises(InputError, match="attention within 16 tokens"):
        anybit.export(source, to="gguf", out=tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
    assert not anybit.export(source, to="gguf", out=tmp_path / "x.gguf", allow_loss=True)["lossless"]


def test_a_nested_checkpoint_at_four_bits_needs_a_rounded_minimum(tmp_path):
    source = with_a_merge(quantize_tiny("llama", tmp_path, recipe="pmpd"))
    with pytest.raises(InputError, match="no GGUF type has their scales, zeros and groups"):
        anybit.export(source, to="gguf", out=tmp_path / "x.gguf", precision=4)
    result = anybit.export(source, to="gguf", out=tmp_path / "x.gguf", precision=4, allow_loss=True)
    assert not result["lossless"]
    assert any("minima" in note for note in result["notes"])
    anybit.import_checkpoint(tmp_path / "x.gguf", out=tmp_path / "back")
    found, expected = values_of(tmp_path / "back"), values_of(source, 4)
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0 < float((found[name] - expected[name]).abs().max()) < 2e-3 * float(expected[name].abs().max())


def _overwrite(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


def _put(path, key, value):
    reader = gguf.GGUFReader(path, "r+")
    architecture = reader.get_field("general.architecture").contents()
    reader.get_field(f"{architecture}.{key}").parts[-1][0] = value
    reader.data.flush()


def test_scaled_rotary_frequencies_are_refused(pair, tmp_path):
    """Two keys of 64 bytes in front of the others: where tensors begin stays aligned."""
    data, architecture = (
        pair[1].read_bytes(),
        b"qwen2" if "qwen2" in str(pair[1]) else b"qwen3" if "qwen3" in str(pair[1]) else b"llama",
    )
    key = architecture + b".rope.scaling.type"
    text = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 6) + b"linear"
    filler = struct.pack("<Q", 2) + b"zz" + struct.pack("<IB", 0, 7)
    count = int.from_bytes(data[16:24], "little") + 2
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "model.gguf"
    path.write_bytes(data[:16] + count.to_bytes(8, "little") + text + filler + data[24:])
    with pytest.raises(InputError, match=r"rotary frequencies \(linear\)"):
        anybit.import_checkpoint(path, out=tmp_path / "out")


HOSTILE = {
    "empty": lambda p: p.write_bytes(b""),
    "not GGUF": lambda p: _overwrite(p, 0, b"PK"),
    "version 99": lambda p: _overwrite(p, 4, b"\x63"),
    "a trillion tensors": lambda p: _overwrite(p, 8, (10**12).to_bytes(8, "little")),
    "a trillion keys": lambda p: _overwrite(p, 16, (10**12).to_bytes(8, "little")),
    "noise for keys": lambda p: _overwrite(p, 24, b"\xff" * 64),
    "half of it": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "a trillion blocks": lambda p: _put(p, "block_count", 2**31),
    "a head of 2^31": lambda p: _put(p, "attention.key_length", 2**31),
    "rows that are no pairs": lambda p: _put(p, "attention.head_count", 3),
    "NaN everywhere": lambda p: _overwrite(p, p.stat().st_size - 20000, b"\xff\x7e" * 10000),
}


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.filterwarnings("ignore")
def test_hostile_files_are_one_clear_error(how, pair, tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "model.gguf"
    path.write_bytes(pair[1].read_bytes())
    HOSTILE[how](path)
    with pytest.raises(InputError):
        anybit.import_checkpoint(path, out=tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_forms_of_blocks_are_checked(tmp_path):
    source = with_a_merge(quantize_tiny("llama", tmp_path, recipe="pmpd"))
    anybit.export(source, to="gguf", out=tmp_path / "x.gguf", precision=4, allow_loss=True)
    anybit.import_checkpoint(tmp_path / "x.gguf", out=tmp_path / "back")
    (part,) = config_of(tmp_path / "back")["layers"]["model.layers.0.mlp.up_proj"]["terms"]
    sizes = {"group_size": 32, "block_size": 32, "offset": True}
    assert part == {"term": "code", "columns": [0, 64], "kind": "blocked", "bits": 4, **sizes}
