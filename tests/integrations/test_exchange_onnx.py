"""ONNX: one decoding step, through onnxruntime, against our own model."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import anybit  # noqa: E402
from anybit.integrations.exchange.account import Account  # noqa: E402
from anybit.integrations.exchange.grid import Grid  # noqa: E402
from anybit.integrations.onnx.layers import PackedEmbedding, PackedLinear  # noqa: E402
from tiny_checkpoints import quantize_tiny  # noqa: E402

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 16
IDS = torch.arange(4, 24)[None]


def step(session, ids, past, before):
    """Logits and the new cache."""
    count = ids.shape[1]
    feed = {
        "input_ids": ids.numpy(),
        "attention_mask": torch.ones(1, before + count, dtype=torch.int64).numpy(),
        "position_ids": torch.arange(before, before + count)[None].numpy(),
    }
    names = [f"past_key_values.{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]
    logits, *present = session.run(None, feed | dict(zip(names, past, strict=True)))
    return torch.from_numpy(logits), present


SOURCES = {
    "4 bits, tied": ({"overrides": ["weights.group_size=32"], "config": {"tie_word_embeddings": True}}, None),
    "3 bits in rows": ({"overrides": ["weights.bits=3", "weights.group_size=4096"]}, None),
    "nested at 3": ({"recipe": "pmpd"}, 3),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", SOURCES)
def test_onnxruntime_answers_as_we_do(which, tmp_path):
    options, precision = SOURCES[which]
    source = quantize_tiny("llama", tmp_path, **options)
    result = anybit.export(source, to="onnx", out=tmp_path / "onnx", precision=precision)
    assert result["lossless"]
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    with torch.inference_mode():
        expected = anybit.load(source, precision)(IDS).logits
    empty = [torch.zeros(1, KV_HEADS, 0, HEAD_DIM).numpy()] * (2 * LAYERS)
    whole, _ = step(session, IDS, empty, 0)
    first, cache = step(session, IDS[:, :13], empty, 0)
    second, _ = step(session, IDS[:, 13:], cache, 13)
    for found in (whole, torch.cat([first, second], 1)):
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    used = {node.op_type for node in onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.node}
    assert "MatMulNBits" in used


@pytest.mark.parametrize("size", [40, 24, 16])
def test_embedded_rows_are_those_of_the_grid(size):
    codes = torch.arange(6 * 40, dtype=torch.uint8).reshape(6, 40) % 16
    table = (6, -(-40 // size))
    found = Grid(4, size, codes, torch.rand(table) + 0.1, torch.randint(0, 16, table).float())
    ids = torch.tensor([[5, 0], [2, 2]])
    assert torch.equal(PackedEmbedding(found, 0.5)(ids), found.values()[ids] * 0.5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", ["integer", "between"])
@pytest.mark.parametrize("columns", [64, 96, 40])
def test_packed_weights_decode_to_the_grid(bits, zero, columns):
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (6, columns), generator=draw).to(torch.uint8)
    size = 32 if columns % 32 == 0 else columns
    table = (6, columns // size)
    zeros = torch.randint(0, 2**bits, table, generator=draw) + (0.0 if zero == "integer" else 0.25)
    found = Grid(bits, size, codes, torch.rand(table, generator=draw) + 0.1, zeros)
    packed = PackedLinear(found, None, Account("onnx", False), "x")
    block, count = packed.sizes["block_size"], packed.b.shape[1]

    def field(data, at):
        return int(data[at * bits // 8]) >> at * bits % 8 & 2**bits - 1

    for n, k in [(0, 0), (5, columns - 1), (3, 17), (2, 33)]:
        b = k // block
        z = field(packed.zero[n], b) if zero == "integer" else float(packed.zero[n, b])
        value = float(packed.scale[n].reshape(-1)[b]) * (field(packed.b[n, b], k % block) - z)
        assert value == pytest.approx(float(found.values()[n, k]), rel=1e-6)
    assert count == -(-columns // block)
