"""Reading models: every family comes back exactly, one block at a time, and bad input is one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anybit.errors import InputError
from anybit.models.source import open_model, release
from anybit.models.structure import find_structure
from tiny_models import FAMILIES, logits, save_tiny, token_ids


def _parts(structure):
    ends = (structure.embedding, structure.head, *([structure.final_norm] if structure.final_norm else []))
    return (*structure.blocks, *structure.pre, *ends)


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_all_parts_gives_the_original_logits(saved, family):
    original, directory = saved(family)
    source = open_model(directory)
    model = source.skeleton()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    for name in _parts(find_structure(model)):
        source.load_into(model.get_submodule(name), name)
    assert not [name for name, p in model.named_parameters() if p.is_meta]
    ids = token_ids()
    # looped and fused experts sum the same products in another order: float32 rounding only
    torch.testing.assert_close(logits(model, ids), logits(original, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral", "qwen2_moe"])
def test_state_is_the_original_state(saved, family):
    original, directory = saved(family)
    source = open_model(directory)
    state = original.state_dict()
    for name in dict(source.skeleton().named_parameters()):
        expected = _original(state, name, transpose=family == "gpt2")
        assert torch.equal(source.tensor(name), expected), name


def _original(state, name, transpose):
    if ".experts." in name:
        experts, index, part, _ = name.rsplit(".", 3)
        return state[f"{experts}.{part}_proj"][int(index)]
    is_conv1d = transpose and ".h." in name and state[name].dim() == 2
    return state[name].T if is_conv1d else state[name]


def test_only_one_block_is_in_memory_and_release_takes_it_away(saved):
    _, directory = saved("llama")
    source = open_model(directory)
    model = source.skeleton()
    block = model.get_submodule("model.layers.1")
    source.load_into(block, "model.layers.1", dtype=torch.bfloat16)
    real = {name for name, p in model.named_parameters() if not p.is_meta}
    assert real
    assert all(name.startswith("model.layers.1.") for name in real)
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    release(block)
    assert all(p.is_meta for p in model.parameters())
    assert not model.model.rotary_emb.inv_freq.is_meta
    source.load_into(block, "model.layers.1")  # and it can come back
    assert torch.equal(block.mlp.up_proj.weight, source.tensor("model.layers.1.mlp.up_proj.weight"))


def test_tied_parameters_stay_tied(saved):
    _, directory = saved("gemma2")
    source = open_model(directory)
    model = source.skeleton()
    source.load_into(model, "")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    release(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_expert_tensors_in_the_file(saved, tmp_path, family):
    original, directory = saved(family)
    state = {name: tensor.contiguous() for name, tensor in original.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")  # transformers 5 names: gate_up_proj [E, 2I, H]
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    fused, split = open_model(tmp_path), open_model(directory)
    for name in ("model.layers.1.mlp.experts.3.gate_up.weight", "model.layers.0.mlp.experts.2.down.weight"):
        assert torch.equal(fused.tensor(name), split.tensor(name))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_base_model_prefix_may_be_missing_in_the_file(saved, tmp_path, family):
    original, directory = saved(family)
    prefix = original.base_model_prefix + "."
    state = {n.removeprefix(prefix): t.clone() for n, t in original.state_dict().items() if n != "lm_head.weight"}
    if family == "llama":
        state["lm_head.weight"] = original.lm_head.weight.clone()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    source = open_model(tmp_path)
    model = source.skeleton()
    source.load_into(model, "")
    torch.testing.assert_close(logits(model, token_ids()), logits(original, token_ids()))


def test_identity_tells_models_apart_and_survives_a_copy(saved, tmp_path):
    _, directory = saved("llama")
    same, other = tmp_path / "same", tmp_path / "other"
    save_tiny("llama", same, max_shard_size="100KB")
    save_tiny("llama", other, seed=1, max_shard_size="100KB")
    assert open_model(same).identity() == open_model(directory).identity()
    assert open_model(other).identity() != open_model(directory).identity()
    json.dumps(open_model(same).identity())


def test_tokenizer(saved):
    tokenizer = open_model(saved("llama")[1]).tokenizer()
    text = "Déjà vu, 3 × 7\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.fixture
def broken(tmp_path):
    save_tiny("llama", tmp_path)
    return tmp_path


def _error(what: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        open_model(what).skeleton()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_truncated_weights(broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "cut short" in _error(broken)


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 64, (20).to_bytes(8, "little") + b"{not json at all....}"])
def test_corrupt_header(broken, data):
    (broken / "model.safetensors").write_bytes(data)
    assert "model.safetensors" in _error(broken)


def test_missing_tensor_is_named(broken):
    file = broken / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file)
    assert "lacks model.layers.1.mlp.up_proj.weight" in _error(broken)


def test_weights_of_another_size(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    assert "has shape" in _error(broken)


def test_nan_is_refused(broken):
    file = broken / "model.safetensors"
    state = load_file(file)
    state["model.norm.weight"][3] = float("nan")
    save_file(state, file)
    source = open_model(broken)
    with pytest.raises(InputError, match=r"model\.norm\.weight holds NaN"):
        source.load_into(source.skeleton().model.norm, "model.norm")


def test_missing_shard(tmp_path):
    save_tiny("llama", tmp_path, max_shard_size="100KB")
    next(tmp_path.glob("model-00002*")).unlink()
    assert "missing" in _error(tmp_path)


def test_pickle_is_never_opened(broken):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    assert "pickle" in _error(broken)
    assert "save_pretrained" in _error(broken)


def test_already_quantized(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "already quantized (gptq)" in _error(broken)


@pytest.mark.parametrize("part", [{"num_hidden_layers": 10**12}, {"text_config": {"n_layer": 10**12}}])
def test_blocks_without_end_are_not_built(broken, part):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | part))
    assert "1000000000000 blocks" in _error(broken)


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "no-such-model"}', "{}"])
def test_bad_config(broken, config):
    (broken / "config.json").write_text(config)
    assert "config.json" in _error(broken)


def test_remote_code_is_not_run(broken):
    mine = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (broken / "config.json").write_text(json.dumps(mine))
    (broken / "mine.py").write_text(f"open({str(broken / 'ran')!r}, 'w')\nclass Config: pass\n")
    _error(broken)
    assert not (broken / "ran").exists()


def test_nothing_there(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYBIT_CACHE", str(tmp_path / "cache"))
    assert "no such directory" in _error("./nowhere/at/all")
    assert "no such file" in _error(tmp_path / "nowhere.gguf")
    assert "no config.json" in _error(tmp_path)
    (tmp_path / "fake.gguf").write_bytes(b"GGML" + bytes(100))
    assert "not a GGUF file" in _error(tmp_path / "fake.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(3))
    assert "damaged" in _error(tmp_path / "cut.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    assert "damaged" in _error(tmp_path / "empty.gguf")  # a sound header, and no model
    assert not list((tmp_path / "cache").iterdir())  # failed conversions leave nothing behind
