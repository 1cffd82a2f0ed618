"""Rotary frequencies against transformers' own, type by type."""

import numpy as np
import pytest
import torch
import transformers as tf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from anybit.engine.rope import frequencies

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
SHORT, LONG = [1.0 + i / 8 for i in range(32)], [2.0 + i / 2 for i in range(32)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
CASES = [
    {"rope_type": "linear", "factor": 3.0},
    {**LLAMA3, "original_max_position_embeddings": 1024},
    {**LLAMA3, "rope_theta": 5e5},
    YARN,
    {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    {**YARN, "attention_factor": 1.5, "partial_rotary_factor": 0.5},
    {**YARN, "factor": 0.5},
    {**LONGROPE, "original_max_position_embeddings": 1000},
    {**LONGROPE, "original_max_position_embeddings": 512, "factor": 6.0},
    {**LONGROPE, "original_max_position_embeddings": 512, "attention_factor": 1.25},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [100, 2048])
def test_equals_transformers(case, tokens):
    parameters = {"rope_theta": 1e4, **case}
    config = tf.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=dict(parameters)
    )
    expected, factor = ROPE_INIT_FUNCTIONS[case["rope_type"]](config, torch.device("cpu"), seq_len=tokens)
    found, ours = frequencies({**config.to_dict(), "rope_parameters": parameters}, None, tokens)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=3e-7)
    assert ours == pytest.approx(factor, rel=1e-12)
    plain, _ = frequencies({**config.to_dict(), "rope_parameters": {"rope_theta": parameters["rope_theta"]}}, None, 9)
    assert len(plain) != len(found) or np.abs(plain / found - 1).max() > 0.1  # the setting matters


def test_the_trained_length_of_the_configuration_goes_first_and_layers_have_their_own():
    settings = {**LONGROPE, "rope_theta": 1e4, "original_max_position_embeddings": 4096}
    config = {"head_dim": 64, "max_position_embeddings": 2048, "original_max_position_embeddings": 256}
    both = {"a": settings, "b": {"rope_type": "default", "rope_theta": 100.0}}
    assert frequencies({**config, "rope_parameters": settings}, None, 300)[0][0] == np.float32(1 / LONG[0])
    found, factor = frequencies({**config, "rope_parameters": both}, "b", 300)
    np.testing.assert_allclose(found, 1 / 100.0 ** (np.arange(0, 64, 2) / 64), rtol=1e-6)
    assert factor == 1.0
