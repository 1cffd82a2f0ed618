"""Damage is found before a damaged file runs."""

import json
import shutil

import pytest

from anybit.engine.native import NativeModel
from anybit.engine.open import open_engine
from anybit.engine.tensors import Tensors
from anybit.errors import FormatError, PromiseError
from anybit.kernels import native
from tiny_checkpoints import quantize_tiny

pytestmark = pytest.mark.skipif(native.native() is None, reason="anybit._native is not built")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return quantize_tiny("llama", tmp_path_factory.mktemp("sound"))


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "copy")


def flip(directory, name):
    """Flip one bit of a tensor where its file holds it."""
    path = directory / Tensors(directory).files[name]
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + size])[name]["data_offsets"]
    data[8 + size + (begin + end) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.scale", "model.norm.weight"]
)
def test_one_flipped_bit_is_found(name, copy):
    flip(copy, name)
    with pytest.raises(FormatError, match=f"{name} in model-.* was altered"):
        open_engine(copy, "native")
    NativeModel.open(copy, max_tokens=64, verify=False)


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
def test_the_canary_is_asked_and_forgotten(kv_bits, copy):
    model = NativeModel.open(copy, kv=kv_bits, max_tokens=64)
    assert model.length() == 0
    canary = json.loads((copy / "canary.json").read_text())
    canary["top_ids"] = canary["top_ids"][::-1]  # as a model with other weights would answer
    canary["top_logits"] = [value + 3 * canary["spread"] for value in canary["top_logits"]]
    (copy / "canary.json").write_text(json.dumps(canary))
    with pytest.raises(PromiseError, match="canary logits off by"):
        NativeModel.open(copy, kv=kv_bits, max_tokens=64)
    NativeModel.open(copy, max_tokens=8)  # too few tokens to ask


@pytest.mark.parametrize(
    ("file", "message"), [("ledger.json", "ledger.json is missing"), ("canary.json", "canary.json")]
)
def test_missing_records(file, message, copy):
    (copy / file).unlink()
    with pytest.raises(FormatError, match=message):
        NativeModel.open(copy, max_tokens=64)


def test_a_tensor_the_ledger_does_not_know(copy):
    ledger = json.loads((copy / "ledger.json").read_text())
    del ledger["float_tensors"]["model.norm.weight"]
    (copy / "ledger.json").write_text(json.dumps(ledger))
    with pytest.raises(FormatError, match=r"disagree about 'model\.norm\.weight'"):
        NativeModel.open(copy, max_tokens=64)
