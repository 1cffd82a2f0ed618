"""GPTQ and AWQ: packing against slow oracles, there and back, hostile files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import anybit
from anybit.errors import FormatError, InputError
from anybit.formats.terms import dense, load_terms
from anybit.integrations import gptq
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.packing import pack_words, unpack_words
from exchange_case import alter, alter_config, config_of, same_values, tensors_of, values_of
from tiny_checkpoints import quantize_tiny

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def checkpoint(where, *overrides, family="llama", **config):
    return quantize_tiny(family, where, config=config, overrides=list(overrides))


@pytest.fixture(scope="module")
def asymmetric(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("asymmetric"), "weights.group_size=32", tie_word_embeddings=True)


@pytest.fixture(scope="module", params=["gptq", "awq"])
def exported(request, asymmetric, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "out"
    anybit.export(asymmetric, to=request.param, out=out)
    return out


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 32, 45])
def test_words_are_one_stream_of_bits(bits, columns):
    codes = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack_words(codes, bits)
    for row, found in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum(code << i * bits for i, code in enumerate(row))
        assert stream == sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(found))
    assert torch.equal(unpack_words(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_says_what_a_slow_reader_understands(bits, tmp_path):
    source = checkpoint(tmp_path, f"weights.bits={bits}", "weights.group_size=32")
    anybit.export(source, to="gptq", out=tmp_path / "gptq")
    tensors, expected = tensors_of(tmp_path / "gptq"), values_of(source)
    name = "model.layers.1.mlp.up_proj"
    words, zeros, scales, order = (tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx"))

    def code(table, at):
        stream = sum((int(word) & 0xFFFFFFFF) << 32 * i for i, word in enumerate(table))
        return stream >> at * bits & 2**bits - 1

    for n, k in [(0, 0), (5, 11), (31, 33), (95, 63), (64, 31)]:
        g = int(order[k])
        value = float(scales[g, n]) * (code(words[:, n], k) - code(zeros[g], n))
        assert value == float(expected[f"{name}.weight"][n, k])
    assert order.tolist() == [k // 32 for k in range(64)]


def test_awq_says_what_a_slow_reader_understands(asymmetric, tmp_path):
    anybit.export(asymmetric, to="awq", out=tmp_path / "awq")
    tensors, expected = tensors_of(tmp_path / "awq"), values_of(asymmetric)
    name = "model.layers.0.self_attn.k_proj"
    words, zeros, scales = (tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales"))

    def code(word, n):
        return int(word) >> 4 * AWQ_ORDER.index(n % 8) & 15

    for n, k in [(0, 0), (1, 3), (7, 40), (13, 63), (31, 32)]:
        value = float(scales[k // 32, n]) * (code(words[k, n // 8], n) - code(zeros[k // 32, n // 8], n))
        assert value == float(expected[f"{name}.weight"][n, k])


def test_there_and_back_is_the_same_model(exported, asymmetric, tmp_path):
    result = anybit.import_checkpoint(exported, out=tmp_path / "back")
    assert result["lossless"]
    back = values_of(tmp_path / "back")
    assert same_values(back, values_of(asymmetric))
    model = anybit.load(tmp_path / "back")  # hashes and canary
    ids = torch.arange(4, 24)[None]
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, anybit.load(asymmetric)(ids).logits, atol=1e-4)


def test_symmetric_codes_stay_symmetric(tmp_path):
    source = checkpoint(tmp_path, "weights.symmetric=true", "weights.group_size=32")
    anybit.export(source, to="gptq", out=tmp_path / "gptq")
    assert config_of(tmp_path / "gptq")["sym"] is True
    words = tensors_of(tmp_path / "gptq")["model.layers.0.mlp.up_proj.qzeros"]
    assert {word & 0xFFFFFFFF for word in words.flatten().tolist()} == {0x88888888}
    anybit.import_checkpoint(tmp_path / "gptq", out=tmp_path / "back")
    assert same_values(values_of(tmp_path / "back"), values_of(source))
    part = config_of(tmp_path / "back")["layers"]["model.layers.0.mlp.up_proj"]["terms"][0]
    assert part["symmetric"] is True


def test_version_1_has_zeros_one_lower(asymmetric, tmp_path):
    anybit.export(asymmetric, to="gptq", out=tmp_path / "gptq")
    alter_config(tmp_path / "gptq", checkpoint_format="gptq")
    for name in [n for n in tensors_of(tmp_path / "gptq") if n.endswith("qzeros")]:
        alter(tmp_path / "gptq", name, lambda t: pack_words((unpack_words(t, 4, 8 * t.shape[1]) - 1) & 15, 4))
    anybit.import_checkpoint(tmp_path / "gptq", out=tmp_path / "back")
    assert same_values(values_of(tmp_path / "back"), values_of(asymmetric))


def test_biases_travel(tmp_path):
    source = checkpoint(tmp_path, "weights.group_size=32", family="qwen2")
    anybit.export(source, to="gptq", out=tmp_path / "gptq")
    anybit.import_checkpoint(tmp_path / "gptq", out=tmp_path / "back")
    assert same_values(values_of(tmp_path / "back"), values_of(source))
    assert anybit.load(tmp_path / "back")


def test_negative_and_zero_scales_keep_their_values(asymmetric, tmp_path):
    anybit.export(asymmetric, to="gptq", out=tmp_path / "gptq")
    name = "model.layers.0.mlp.up_proj"

    def damage(scales):
        scales[0, 3], scales[1, 5] = -scales[0, 3], 0
        return scales

    alter(tmp_path / "gptq", f"{name}.scales", damage)
    anybit.import_checkpoint(tmp_path / "gptq", out=tmp_path / "back")
    found, before = values_of(tmp_path / "back")[f"{name}.weight"], values_of(asymmetric)[f"{name}.weight"].clone()
    before[3, :32] *= -1
    before[5, 32:] = 0
    assert torch.equal(found, before)


UP = "model.layers.0.mlp.up_proj"
HOSTILE = {
    "NaN scales": (lambda d: alter(d, f"{UP}.scales", lambda t: t * float("nan")), "NaN or infinity"),
    "short words": (lambda d: alter(d, f"{UP}.qweight", lambda t: t[:-1].contiguous()), r"qweight is torch.int32"),
    "float words": (lambda d: alter(d, f"{UP}.qweight", lambda t: t.float()), "wants int32"),
    "no scales": (lambda d: alter(d, f"{UP}.scales", lambda _: None), "scales is in no file"),
    "NaN norm": (lambda d: alter(d, "model.norm.weight", lambda t: t * float("nan")), "NaN or infinity"),
    "no norm": (lambda d: alter(d, "model.norm.weight", lambda _: None), "is in no shard"),
    "group of -7": (lambda d: alter_config(d, group_size=-7), "group_size is -7"),
    "group of a trillion": (lambda d: alter_config(d, group_size=10**12), "config.json wants"),
    "text for bits": (lambda d: alter_config(d, bits="4"), "bits is '4'"),
    "999 bits": (lambda d: alter_config(d, bits=999), "bits is 999"),
    "another method": (lambda d: alter_config(d, quant_method="exl2"), "'exl2', which is not read"),
    "not JSON": (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "holds no JSON object"),
    "cut short": (lambda d: _cut(d), "cut short"),
    "a method of a list": (lambda d: alter_config(d, quant_method=[]), r"'\[\]', which is not read"),
    "brackets without end": (lambda d: (d / "config.json").write_text("[" * 100_000), "is not JSON"),
    "infinity": (lambda d: _model(d, attention_dropout=float("inf")), "is not JSON"),
    "blocks without end": (lambda d: _model(d, num_hidden_layers=10**12), "1000000000000 blocks"),
    "half a block": (lambda d: _model(d, num_hidden_layers=1.5), "1.5 blocks"),
    "a width without end": (lambda d: _model(d, hidden_size=10**12), "cannot|can build"),
    "no heads": (lambda d: _model(d, num_key_value_heads=0), "can build"),
    "an activation nobody knows": (lambda d: _model(d, hidden_act="wink"), "can build"),
    "a dtype that is none": (lambda d: _model(d, dtype="nn"), "can build"),
    "terabytes": (lambda d: _terabytes(d), "more numbers than a weight"),
}


def _model(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _terabytes(directory):
    """The header of a sparse file claims them."""
    (file,) = [f for f in directory.glob("*.safetensors") if f"{UP}.qweight" in load_file(f)]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header[f"{UP}.qweight"] |= {"shape": [2**38], "data_offsets": [end, end + 2**40]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with file.open("r+b") as stream:
        stream.truncate(end + 2**40 + len(text) + 8)


def _cut(directory):
    file = sorted(directory.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_files_are_one_clear_error(how, exported, tmp_path):
    damage, message = HOSTILE[how]
    shutil.copytree(exported, tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises(InputError, match=message):
        anybit.import_checkpoint(tmp_path / "in", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def words_of(bits=4, rows=8, columns=32):
    """A GPTQ layer of one group."""
    codes = torch.arange(rows * columns).reshape(columns, rows) % 2**bits
    return {
        "qweight": pack_words(codes.T.to(torch.uint8), bits).T.contiguous(),
        "qzeros": pack_words(torch.full((1, rows), 3, dtype=torch.uint8), bits),
        "scales": torch.ones(1, rows),
    }


def test_a_group_longer_than_the_row_is_the_row():
    for size in (10**12, 128, 32, -1):
        reader = gptq.Reader({"bits": 4, "group_size": size}, Account("anybit", False))
        form, tensors = reader.layer("x", (8, 32), words_of())
        assert form["terms"][0]["group_size"] == 32
        assert float(dense(load_terms(form, tensors))[1, 1]) == 9 - 4


def test_an_order_that_is_in_no_file_is_refused():
    reader = gptq.Reader({"bits": 4, "group_size": 16, "desc_act": True}, Account("anybit", False))
    tensors = words_of() | {"qzeros": torch.zeros(2, 1, dtype=torch.int32), "scales": torch.ones(2, 8)}
    with pytest.raises(FormatError, match="desc_act"):
        reader.layer("x", (8, 32), tensors)
    reader.layer("x", (8, 32), tensors | {"g_idx": torch.arange(32, dtype=torch.int32) // 16})


def test_reordered_columns_are_refused(asymmetric, tmp_path):
    anybit.export(asymmetric, to="gptq", out=tmp_path / "gptq")
    alter(tmp_path / "gptq", f"{UP}.g_idx", lambda t: t.flip(0).contiguous())
    with pytest.raises(InputError, match="desc_act"):
        anybit.import_checkpoint(tmp_path / "gptq", out=tmp_path / "out")
