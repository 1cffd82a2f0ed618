"""The plugin's own classes, inside vLLM's environment: `test_vllm_engine.py` runs this file there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not in this environment (make serving-env)")
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod  # noqa: E402
from vllm.model_executor.layers.quantization import get_quantization_config  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import (  # noqa: E402
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality  # noqa: E402

from anybit.errors import FormatError, InputError  # noqa: E402
from anybit.formats.terms import save_terms  # noqa: E402
from anybit.integrations.vllm import register  # noqa: E402
from anybit.integrations.vllm.config import AnybitConfig  # noqa: E402
from anybit.integrations.vllm.linear import AnybitLinear  # noqa: E402
from anybit.integrations.vllm.steps import Steps  # noqa: E402
from anybit.integrations.vllm.table import AnybitTable, TiedHead  # noqa: E402
from anybit.layers.linear import QuantLinear  # noqa: E402
from random_terms import code_term  # noqa: E402

NAMES = ("q_proj", "k_proj", "v_proj")
N, K = 32, 64


def form(bits=4, kind="affine", rows=N):
    return save_terms([code_term(kind, rows, K, bits=bits)], (rows, K))[0]


def config(layers=None, kv=None, version=1):
    layers = {f"model.layers.0.self_attn.{name}": form() for name in NAMES} if layers is None else layers
    made = AnybitConfig.from_config({"version": version, "layers": layers, **({"kv": kv} if kv else {})})
    made.packed_modules_mapping = {"qkv_proj": list(NAMES)}
    return made


def layer(cls=LinearBase):
    return cls.__new__(cls)


@pytest.fixture
def engine():
    """vLLM's settings, as the model sees them while it is built."""
    settings = VllmConfig()
    settings.cache_config.enable_prefix_caching = False
    settings.model_config = SimpleNamespace(hf_text_config=SimpleNamespace(tie_word_embeddings=True))
    with set_current_vllm_config(settings):
        yield settings


def test_registering_twice_changes_nothing():
    register()
    register()
    assert get_quantization_config("anybit") is AnybitConfig


def test_a_later_format_is_refused():
    with pytest.raises(FormatError, match="update anybit"):
        config(version=2)


def test_fused_layers_find_all_their_parts_in_order(engine):
    method = config().get_quant_method(layer(), "model.layers.0.self_attn.qkv_proj")
    assert isinstance(method, AnybitLinear)
    assert [name.rpartition(".")[2] for name in method._forms] == list(NAMES)


def test_layers_without_a_form_stay_with_vllm(engine):
    made = config()
    assert isinstance(made.get_quant_method(layer(), "model.layers.0.mlp.down_proj"), UnquantizedLinearMethod)
    assert made.get_quant_method(layer(VocabParallelEmbedding), "") is None
    assert made.get_quant_method(layer(ParallelLMHead), "lm_head") is None


def test_a_fused_layer_half_in_float_is_refused(engine):
    some = {f"model.layers.0.self_attn.{name}": form() for name in NAMES[:2]}
    with pytest.raises(FormatError, match=r"'model\.layers\.0\.self_attn\.v_proj' is in float"):
        config(some).get_quant_method(layer(), "model.layers.0.self_attn.qkv_proj")


def test_a_layer_saved_fused_is_refused(engine):
    made = config({"model.layers.0.self_attn.qkv_proj": form(rows=96)})
    made.packed_modules_mapping = {}
    method = made.get_quant_method(layer(), "model.layers.0.self_attn.qkv_proj")
    with pytest.raises(FormatError, match="saved fused"):
        method.create_weights(torch.nn.Module(), K, [N, N, N], K, 3 * N, torch.float32)


def test_the_head_reads_the_table_of_a_nameless_embedding(engine):
    made = config({"model.embed_tokens": form(rows=128)})
    assert isinstance(made.get_quant_method(layer(VocabParallelEmbedding), ""), AnybitTable)
    assert isinstance(made.get_quant_method(layer(ParallelLMHead), "lm_head"), TiedHead)
    engine.model_config.hf_text_config.tie_word_embeddings = False
    assert made.get_quant_method(layer(ParallelLMHead), "lm_head") is None


def test_a_linear_takes_its_tensors_through_empty_parameters(engine):
    """All the way without an engine: three parts loaded by shard id, one product."""
    terms = [code_term("affine", N, K, bits=4) for _ in NAMES]
    saved = [save_terms([term], (N, K)) for term in terms]
    forms = {f"l.{name}": each[0] for name, each in zip(NAMES, saved, strict=True)}
    made = config(forms)
    method, module = made.get_quant_method(layer(), "l.qkv_proj"), torch.nn.Module()
    method.create_weights(module, K, [N, N, N], K, 3 * N, torch.float32)
    for shard, (_, tensors) in zip("vkq", reversed(saved), strict=True):
        for name, tensor in tensors.items():
            parameter = module.get_parameter(name)
            assert parameter.numel() == 0
            parameter.weight_loader(parameter, tensor, shard)
    method.process_weights_after_loading(module)
    x, bias = torch.randn(3, K), torch.randn(3 * N)
    wanted = torch.cat([x @ term.dense().t() for term in terms], 1)
    torch.testing.assert_close(method.apply(module, x), wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(method.apply(module, x, bias), wanted + bias, rtol=1e-4, atol=1e-3)
    assert module.anybit_parts == ()
    with pytest.raises(FormatError, match="two layers"):
        method.create_weights(torch.nn.Module(), K, [N, N, N], K, 3 * N, torch.float32)


def test_integer_products_are_those_of_our_layers_bit_for_bit(engine):
    activations = {
        "kind": "int",
        "bits": 8,
        "symmetric": True,
        "granularity": "token",
        "group_size": 128,
        "static": False,
    }
    saved = [save_terms([code_term("affine-symmetric", N, K, bits=8, group=K)], (N, K)) for _ in NAMES]
    forms = {f"l.{name}": each[0] | {"activations": activations} for name, each in zip(NAMES, saved, strict=True)}
    method, module = config(forms).get_quant_method(layer(), "l.qkv_proj"), torch.nn.Module()
    method.create_weights(module, K, [N, N, N], K, 3 * N, torch.float32)
    for shard, (_, tensors) in zip("qkv", saved, strict=True):
        for name, tensor in tensors.items():
            module.get_parameter(name).weight_loader(module.get_parameter(name), tensor, shard)
    method.process_weights_after_loading(module)
    x, own = torch.randn(5, K), []
    for saved_form, (_, tensors) in zip(forms.values(), saved, strict=True):
        own.append(QuantLinear(saved_form, bias=False))
        own[-1].fill(tensors)
    assert torch.equal(method.apply(module, x), torch.cat([each(x) for each in own], 1))


NESTED = {f"model.layers.0.self_attn.{name}": form(kind="nested_affine") for name in NAMES}


def ask(made):
    return made.get_quant_method(layer(), "model.layers.0.self_attn.qkv_proj")


def test_precision_by_phase_refuses_prefix_caching(engine):
    engine.additional_config = {"anybit": {"prefill": 4, "decode": "3"}}
    engine.cache_config.enable_prefix_caching = True
    made = config(NESTED)
    made.followed = True
    with pytest.raises(InputError, match="--no-enable-prefix-caching"):
        ask(made)
    engine.cache_config.enable_prefix_caching = False
    ask(made)
    assert made.widths.asked == (4, 3)


def test_precision_by_phase_needs_to_be_told_of_batches(engine):
    engine.additional_config = {"anybit": {"prefill": 4, "decode": "3"}}
    with pytest.raises(InputError, match="logits processor"):
        ask(config(NESTED))


def test_a_cache_that_vllm_does_not_have_is_refused_or_left_to_it(engine):
    kv = {"key_bits": 4, "value_bits": 4}
    with pytest.raises(InputError, match="k4v4-token, which vLLM cannot"):
        ask(config(kv=kv))
    engine.additional_config = {"anybit": {"kv": "vllm"}}
    assert ask(config(kv=kv))
    engine.additional_config = {}
    assert ask(config(kv={"key_bits": 16, "value_bits": 16}))


def steps(engine, **options):
    """A config whose policy is fixed, and the processor that follows batches for it."""
    engine.additional_config = {"anybit": options}
    engine.quant_config = made = config(NESTED)
    follower = Steps(engine, None, False)
    ask(made)
    return made, follower


def update(size, removed=(), added=(), moved=()):
    return BatchUpdate(batch_size=size, removed=removed, added=added, moved=moved)


def test_precision_follows_what_is_in_the_batch(engine):
    made, follower = steps(engine, prefill=4, decode="3@0,2@2")
    one, other = [], [7, 7]
    follower.update_state(update(1, added=[(0, None, [1, 2], one)]))
    assert made.widths.bits == 4
    one.append(5)  # vLLM adds to its own list
    follower.update_state(None)
    assert made.widths.bits == 3
    one += [5, 5]
    follower.update_state(None)
    assert made.widths.bits == 2
    follower.update_state(update(2, added=[(1, None, [1], other)]))
    assert made.widths.bits == 3
    follower.update_state(update(1, removed=[0], moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    other.append(7)
    follower.update_state(None)
    assert made.widths.bits == 2
    assert list(follower._emitted) == [0]
    follower.update_state(update(0, removed=[0]))
    assert made.widths.bits == 4


def test_swapped_rows_keep_their_tokens(engine):
    _, follower = steps(engine, prefill=4, decode="3")
    one, other = [1], [2]
    follower.update_state(update(2, added=[(0, None, [1], one), (1, None, [1], other)]))
    follower.update_state(update(2, moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert follower._emitted[0] is other
    assert follower._emitted[1] is one


def test_other_models_are_left_alone():
    follower = Steps(SimpleNamespace(quant_config=None), None, False)
    follower.update_state(update(1, added=[(0, None, [1], [])]))
    logits = torch.randn(2, 3)
    assert follower.apply(logits) is logits
    assert follower.is_argmax_invariant()
