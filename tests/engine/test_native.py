"""The native decoder against transformers with the same integer activations, and against itself bit for bit."""

import json
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from anybit.checkpoint.layout import INDEX, read_config
from anybit.engine import build
from anybit.errors import InputError, KernelUnavailable
from anybit.formats.terms import save_terms
from anybit.kernels import native
from anybit.kernels.linear_w_bf16 import op as linear_w_bf16
from anybit.layers.embedding import TiedHead
from anybit.layers.linear import QuantLinear
from native_tensors import NativeModel
from random_terms import code_term
from tiny_checkpoints import quantize_tiny
from tiny_models import VOCAB, logits, token_ids

pytestmark = pytest.mark.skipif(native.native() is None, reason="anybit._native is not built")

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0, 1.5] * 4,
    "long_factor": [2.0, 4.0] * 4,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
CASES = {
    "llama": ("llama", {}),
    "llama-biases-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-rope3": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama-yarn": ("llama", {"rope_parameters": {**YARN, "original_max_position_embeddings": 32}}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {"layer_types": ["sliding_attention", "full_attention"], "final_logit_softcapping": 5.0}),
    "phi3": ("phi3", {}),
    "phi3-longrope": ("phi3", {"rope_parameters": {**LONG, "original_max_position_embeddings": 256}}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def make(case, **options):
        key = (case, *sorted(options.items()))
        if key not in made:
            family, config = CASES[case]
            where = tmp_path_factory.mktemp("native")
            made[key] = quantize_tiny(family, where, config=config, **options)
        return made[key]

    return make


def as_int8(x, group_size):
    """What quantize_activations makes of x [..., K], as float."""
    padded = nn.functional.pad(x, (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size))
    amax = padded.abs().amax(-1, keepdim=True)
    codes = (padded * torch.where(amax > 0, 127 / amax, 0)).round()
    return (codes * (amax / 127)).flatten(-2)[..., : x.shape[-1]]


@pytest.fixture
def oracle(monkeypatch):
    """Makes transformers models whose linears see int8 activations and whose keys and values are float16."""

    def make(directory):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
        model.set_attn_implementation("eager")
        home = sys.modules[type(model).__module__]
        eager = home.eager_attention_forward

        def rounded(module, query, key, value, *args, **kwargs):
            return eager(module, query, key.half().float(), value.half().float(), *args, **kwargs)

        monkeypatch.setattr(home, "eager_attention_forward", rounded)
        for module in model.modules():
            if isinstance(module, QuantLinear | TiedHead):
                form = module.form if isinstance(module, QuantLinear) else module._table[0].form
                part = form["terms"][0]
                size = form["shape"][1] if part["kind"] == "dual_grained" else part["group_size"]
                module.register_forward_pre_hook(lambda _, args, size=size: (as_int8(args[0], size),))
        return lambda ids: logits(model, torch.tensor([ids]))[0]

    return make


def text(tokens, seed=0):
    return token_ids(tokens, seed)[0].tolist()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, checkpoint, oracle):
    """To float32 rounding, in a text where no int8 code falls on the other side of a tie; else to a code's size."""
    directory = checkpoint(case)
    expect, model = oracle(directory), NativeModel.open(directory, kv=16, max_tokens=64)
    largest = []
    while not largest or largest[-1] > 1e-4:
        expected = expect(text(40, len(largest)))
        difference = (model.logits(text(40, len(largest))) - expected).abs() / expected.std()
        largest.append(float(difference.max()))
        assert largest[-1] < 0.15
        assert len(largest) < 8, largest


MIXED = """
name: mixed
paper: none
summary: unlike forms
weights: several
stages:
  weights:
    - {name: rtn, targets: ["*v_proj", "*up_proj"], options: {bits: 3, group_size: 64}}
    - {name: rtn, targets: [linears], options: {bits: 4, group_size: 32, symmetric: true}}
  embeddings:
    - {name: float, targets: [embedding]}
    - {name: %s, targets: [head]}
"""


@pytest.mark.parametrize(
    ("half", "head", "tied"),
    [(False, "rtn", False), (True, "rtn", False), (True, "float", False), (True, "float", True)],
)
def test_linears_that_cannot_be_joined_and_float_ends(half, head, tied, tmp_path, oracle):
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(MIXED % head)
    directory = quantize_tiny("llama", tmp_path, str(recipe), half=half, config={"tie_word_embeddings": tied})
    expect, model = oracle(directory), NativeModel.open(directory, kv=16, max_tokens=64)
    largest = [float((model.logits(text(20, seed)) - expect(text(20, seed))).abs().max()) for seed in range(5)]
    assert min(largest) < 1e-4
    assert max(largest) < 0.2
    model.reset()
    values, ids = model.top([(token, 0) for token in text(20)], [19], 5)
    assert torch.equal(values[0], model.logits(text(20))[19].topk(5).values)
    assert len(set(ids[0].tolist())) == 5


def test_dual_grained_layers(tmp_path, oracle):
    out = quantize_tiny("llama", tmp_path)
    names = [f"model.layers.0.{name}_proj" for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.down")]
    config, index = json.loads((out / "config.json").read_text()), json.loads((out / INDEX).read_text())
    layers, files = config["quantization_config"]["layers"], index["weight_map"]
    shard = out / files[f"{names[0]}.weight"]
    tensors = load_file(shard)
    for name in names:
        rows, columns = layers[name]["shape"]
        found = code_term("dual_grained", rows, columns, bits=4, group=32)
        scale = 0.005 * torch.rand(rows, 1) + 0.001
        term = replace(found, decoder=replace(found.decoder, channel_scale=scale.half()))
        layers[name], made = save_terms([term], (rows, columns))
        for key in ("weight", "scale", "zero"):
            del tensors[f"{name}.{key}"], files[f"{name}.{key}"]
        tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
        files |= {f"{name}.{key}": shard.name for key in made}
    save_file(tensors, shard, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    (out / INDEX).write_text(json.dumps(index))
    expect, model = oracle(out), NativeModel.open(out, kv=16, max_tokens=64, verify=False)
    largest = [float((model.logits(text(20, seed)) - expect(text(20, seed))).abs().max()) for seed in range(5)]
    assert min(largest) < 1e-4
    assert max(largest) < 0.2


def test_a_float32_head_is_refused(tmp_path):
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(MIXED % "float")
    with pytest.raises(KernelUnavailable, match="the head is kept in float32; quantize it"):
        NativeModel.open(quantize_tiny("llama", tmp_path, str(recipe)))


@pytest.fixture
def two_threads():
    before = native.loaded().threads()
    native.set_threads(2)
    yield
    native.set_threads(before)


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("kv_bits", [16, 8, 4])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_same_bits_however_the_work_is_cut(case, kv_bits, prompt, checkpoint, two_threads):
    ids = text(150)
    model = NativeModel.open(checkpoint(case), kv=kv_bits, max_tokens=2000, max_sequences=8)
    whole = model.logits(ids, prompt=prompt)
    assert len(whole.unique()) > 1000

    def cut_at(*places: int) -> torch.Tensor:
        model.reset(3)
        parts = [[(token, 3) for token in ids[a:b]] for a, b in pairwise([0, *places, 150])]
        return torch.cat([model.forward(part, range(len(part)), prompt=prompt) for part in parts])

    assert torch.equal(cut_at(*range(1, 150)), whole)
    assert torch.equal(cut_at(70, 71), whole)
    native.set_threads(1)
    assert torch.equal(model.logits(ids, 3, prompt=prompt), whole)
    assert torch.equal(cut_at(1, 2, 3, 20), whole)


def test_a_prompt_read_as_bfloat16_agrees_to_rounding(checkpoint):
    ids = text(100)
    model = NativeModel.open(checkpoint("llama"), max_tokens=2000)
    integers, prompt = model.logits(ids), model.logits(ids, 1, prompt=True)
    assert torch.equal(model.prefill(ids, 2), prompt[-1])
    assert torch.equal(torch.cat([model.step({3: token}) for token in ids]), integers)
    assert float((prompt - integers).abs().max() / integers.std()) < 0.2  # mostly the rounding to bytes
    assert torch.equal(prompt, integers) == bool(linear_w_bf16.refusal())


@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_a_sequence_does_not_see_its_neighbours(case, checkpoint, two_threads):
    texts = [text(30 + 5 * slot, seed=slot) for slot in range(8)]
    model = NativeModel.open(checkpoint(case), max_tokens=1000)
    alone = [model.logits(ids) for ids in texts]
    model.reset()
    for slot, ids in enumerate(texts):
        assert torch.equal(model.logits(ids[:20], slot)[19], alone[slot][19])
    together = torch.stack([model.step({slot: ids[t] for slot, ids in enumerate(texts)}) for t in range(20, 30)])
    for slot in range(8):
        assert torch.equal(together[:, slot], alone[slot][20:30])
    rows = [(texts[slot][t], slot) for t in range(30, 35) for slot in range(1, 8)]  # all mixed in one call
    mixed = model.forward(rows, range(len(rows))).view(5, 7, VOCAB)
    for slot in range(1, 8):
        assert torch.equal(mixed[:, slot - 1], alone[slot][30:35])


def test_a_long_prompt_is_cut_into_passes(checkpoint):
    ids = [token for seed in range(5) for token in text(120, seed)]
    model = NativeModel.open(checkpoint("llama"), max_tokens=3000)
    assert model.context == 128  # positions beyond it are the caller's business
    whole = model.logits(ids)
    assert torch.equal(model.prefill(ids, 1), model.logits(ids, 3, prompt=True)[-1])
    rows = [(token, 2) for token in ids]
    wanted = [0, 5, 255, 256, 511, 512, 599]
    assert torch.equal(model.forward(rows, wanted), whole[wanted])


def test_truncated_tokens_never_were(checkpoint):
    ids, other = text(140), text(90, seed=1)
    model = NativeModel.open(checkpoint("llama"), max_tokens=400, max_sequences=2)
    expected = model.logits(ids[:70] + other)
    model.logits(ids, 1)
    model.truncate(1, 70)
    assert model.length(1) == 70
    assert torch.equal(model.forward([(token, 1) for token in other], range(90)), expected[70:])


def test_pages_of_truncated_tokens_are_free_again(checkpoint):
    model = NativeModel.open(checkpoint("llama"), max_tokens=128, max_sequences=2)  # three pages
    first = model.logits(text(60) + text(130, seed=1))
    model.truncate(0, 60)
    with pytest.raises(InputError, match=r"full \(128 tokens left\)"):
        model.prefill(text(129), 1)
    model.prefill(text(128), 1)
    assert torch.equal(model.forward([(token, 0) for token in text(4, seed=1)], [3])[0], first[63])


@pytest.fixture(scope="module")
def with_equal_rows(tmp_path_factory):
    """A checkpoint of 3000 tokens whose head has every row twice, far apart."""
    out = quantize_tiny("llama", tmp_path_factory.mktemp("equal"), config={"vocab_size": 3000})
    (file,) = {name for key, name in json.loads((out / INDEX).read_text())["weight_map"].items() if "lm_head" in key}
    tensors = load_file(out / file)
    tensors["lm_head.weight"][:, 1500:] = tensors["lm_head.weight"][:, :1500]
    for table in ("lm_head.scale", "lm_head.zero"):
        tensors[table][1500:] = tensors[table][:1500]
    save_file(tensors, out / file, metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("case", ["equal rows", "gemma2"])  # gemma2: a tied head, soft-capped logits
def test_top_is_the_head_of_all_logits(case, checkpoint, with_equal_rows, two_threads):
    ids = text(40)
    directory = with_equal_rows if case == "equal rows" else checkpoint(case)
    model = NativeModel.open(directory, max_tokens=256, verify=case != "equal rows")
    order = model.logits(ids).sort(dim=-1, descending=True, stable=True)
    for k in (1, 5, 64):
        model.reset()
        values, chosen = model.top([(token, 0) for token in ids], range(40), k)
        assert torch.equal(values, order.values[:, :k])
        assert torch.equal(chosen.long(), order.indices[:, :k])
    assert case == "gemma2" or bool((values[:, 1:] == values[:, :-1]).any())
    with pytest.raises(InputError, match="k must be 1 to 64"):
        model.top([(5, 0)], [0], 65)


def test_bad_calls_change_nothing(checkpoint):
    model = NativeModel.open(checkpoint("llama"), max_tokens=64, max_sequences=2)
    first = model.prefill(text(10))
    for rows, message in [
        ([(VOCAB, 0)], f"token {VOCAB} is outside the vocabulary of {VOCAB}"),
        ([(-1, 0)], "token -1 is outside"),
        ([(5, 0), (5, 2)], "slot 2 is not one of 2"),
        ([(5, 1)] * 65 + [(5, 0)] * 120, "cache is full"),
    ]:
        with pytest.raises(InputError, match=message):
            model.forward(rows, [0])
    assert (model.length(0), model.length(1)) == (10, 0)
    for wanted in ([-1], [0, 2], [1, 0]):
        with pytest.raises(InputError, match="must ascend"):
            model.forward([(5, 0), (5, 0)], wanted)
    with pytest.raises(InputError, match="holds 10 tokens"):
        model.truncate(0, 11)
    with pytest.raises(InputError, match="slot 2 is not one of 2"):
        model.length(2)
    model.reset()
    assert torch.equal(model.prefill(text(10)), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "architecture 'gpt2' is not one of llama"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"use_bidirectional_attention": True}, "looks ahead"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic RoPE"),
        ({"head_dim": 12}, "head_dim 12"),
    ],
)
def test_refused_configurations(change, message, checkpoint):
    config = read_config(checkpoint("llama"))
    forms = config["quantization_config"]["layers"]
    assert build.refusal(config, forms) == ""
    assert message in build.refusal({**config, **change}, forms)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "is kept in float"),
        ({"group_size": 24}, "group_size 24 is neither"),
        ({"kind": "codebook"}, "has codebook codes"),
        ({"columns": [0, 32]}, "some of its columns"),
    ],
)
def test_refused_forms(change, message, checkpoint):
    config = read_config(checkpoint("llama"))
    forms = dict(config["quantization_config"]["layers"])
    name = "model.layers.1.mlp.down_proj"
    form = forms.pop(name)
    if change is not None:
        forms[name] = {**form, "terms": [{**form["terms"][0], **change}]}
    assert build.refusal(config, forms).startswith(f"layer '{name}' ")
    assert message in build.refusal(config, forms)


def test_open_says_why_not(tmp_path):
    with pytest.raises(KernelUnavailable, match="cannot run in the native decoder: architecture 'gpt2'"):
        NativeModel.open(quantize_tiny("gpt2", tmp_path))
    with pytest.raises(InputError, match="no such directory"):
        NativeModel.open(tmp_path / "none")


@pytest.mark.parametrize("kv_bits", [16, 4])
def test_rows_that_nobody_wants_and_sequences_row_by_row_in_turn(kv_bits, checkpoint, two_threads):
    """At 4 bits tokens 32 apart share bytes of a page: rows of two sequences in turn must still not meet."""
    texts = [text(100), text(100, 1)]
    model = NativeModel.open(checkpoint("llama"), kv=kv_bits, max_tokens=2000)
    whole = [model.logits(ids) for ids in texts]
    model.reset()
    rows = [(ids[t], slot) for t in range(80) for slot, ids in enumerate(texts)]
    wanted = [0, 0, 31, 31, 31, 64, 158, 159]
    some = model.forward(rows, wanted)
    assert torch.equal(some, torch.stack([whole[row % 2][row // 2] for row in wanted]))
    assert len(model.forward([(texts[0][80], 0), (texts[1][80], 1)], [])) == 0
    assert torch.equal(model.forward([(token, 1) for token in texts[1][81:]], [0, 18]), whole[1][[81, 99]])
