"""What the vLLM plugin does without vLLM: shards of layers, fused parts, products, the precision policy, cores."""

from __future__ import annotations

import os

import pytest
import torch

from anybit.errors import FormatError, InputError, KernelUnavailable
from anybit.formats.terms import ColumnsTerm, LowRankTerm, dense, save_terms
from anybit.integrations.vllm import matrix_unit
from anybit.integrations.vllm.multiply import _on_gpu, gpu_refusal, multiplier
from anybit.integrations.vllm.part import Part, Shard, joined, own_share
from anybit.integrations.vllm.policy import Policy, Widths
from anybit.integrations.vllm.threads import bound_cores
from anybit.kernels.linear_w_bf16 import op
from anybit.layers.inputs import apply_inputs
from random_terms import KINDS, code_term

CPU = torch.device("cpu")
ACTIVATIONS = {"kind": "int", "bits": 8, "symmetric": True, "granularity": "token", "group_size": 128, "static": False}
N, K = 32, 64


def widths(available=(4,), **options):
    return Widths(Policy.read(options, available), available)


def part(terms, rows=None, columns=None, name="model.layers.0.mlp.up_proj", **more):
    """A part filled from what `save_terms` writes, in reverse order."""
    shape = (rows_of(terms), K)
    form, tensors = save_terms(terms, shape)
    made = Part(name, form | more, rows or (0, shape[0]), columns or (0, K))
    for key in sorted(tensors, reverse=True):
        made.load(key, tensors[key])
    return made


def rows_of(terms):
    return next(term.shape[0] for term in terms if not isinstance(term, LowRankTerm))


def product(parts, dtype=torch.float32, **options):
    return multiplier(joined([each.finished() for each in parts]), widths(**options), CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_layer_multiplies_as_its_decoder_says(kind, tokens, dtype):
    terms, x = [code_term(kind, N, K)], torch.randn(tokens, K).to(dtype)
    available = terms[0].decoder.precisions
    y = product([part(terms)], dtype, available=available)(x)
    assert y.dtype == dtype
    wanted = x.float() @ dense(terms).t()
    torch.testing.assert_close(
        y.float(), wanted, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-3 * wanted.abs().max()
    )


def all_terms():
    index = torch.tensor([5, 40], dtype=torch.int32)
    columns = ColumnsTerm(index, torch.randn(N, 2).half(), (N, K))
    return [code_term("affine", N, K), columns, LowRankTerm(torch.randn(N, 3).half(), torch.randn(3, K).half())]


@pytest.mark.parametrize("workers", [2, 4])
def test_shards_along_the_inputs_add_up(workers):
    terms, x, step = all_terms(), torch.randn(5, K), K // workers
    cuts = [(step * i, step * i + step) for i in range(workers)]
    total = sum(product([part(terms, columns=cut)])(x[:, slice(*cut)]) for cut in cuts)
    torch.testing.assert_close(total, x @ dense(terms).t(), rtol=1e-4, atol=1e-3)


def test_shards_along_the_outputs_stand_side_by_side():
    terms, x = all_terms(), torch.randn(5, K)
    found = [product([part(terms, rows=(start, start + 8))])(x) for start in range(0, N, 8)]
    torch.testing.assert_close(torch.cat(found, 1), product([part(terms)])(x), rtol=1e-5, atol=1e-5)


def test_fused_parts_written_alike_become_one_weight():
    parts = [part([code_term("affine", rows, K)]) for rows in (32, 8, 8)]
    wanted = torch.cat([dense(each.finished().terms) for each in parts])
    shards = joined([each.finished() for each in parts])
    assert [shard.rows for shard in shards] == [48]
    assert torch.equal(dense(shards[0].terms), wanted)


def test_fused_parts_written_differently_run_side_by_side():
    parts = [part([code_term("affine", 16, K, bits=bits)]) for bits in (4, 3, 4)]
    x = torch.randn(3, K)
    assert len(joined([each.finished() for each in parts])) == 3
    wanted = torch.cat([x @ dense(each.finished().terms).t() for each in parts], 1)
    torch.testing.assert_close(product(parts)(x), wanted, rtol=1e-4, atol=1e-4)


def test_quantized_activations_are_quantized_once_for_all_parts():
    parts = [part([code_term("affine-symmetric", 16, K, bits=8, group=K)], activations=ACTIVATIONS) for _ in range(2)]
    x = torch.randn(4, K)
    scale = x.abs().amax(1, keepdim=True) / 127
    rounded = (x / scale).round() * scale
    wanted = torch.cat([rounded @ dense(each.finished().terms).t() for each in parts], 1)
    torch.testing.assert_close(product(parts)(x), wanted, rtol=1e-4, atol=1e-4)
    unrounded = torch.cat([x @ dense(each.finished().terms).t() for each in parts], 1)
    assert not torch.allclose(product(parts)(x), unrounded, rtol=1e-4, atol=1e-4)


def test_parts_with_other_activations_stay_apart():
    plain, quantized = part([code_term("affine", 16, K)]), part([code_term("affine", 16, K)], activations=ACTIVATIONS)
    assert len(joined([plain.finished(), quantized.finished()])) == 2


def test_hadamard_blocks_may_be_divided_and_whole_rows_may_not():
    blocks, whole = [{"op": "hadamard", "sizes": [1, 32]}], [{"op": "hadamard", "sizes": [1, 64]}]
    terms, x = [code_term("affine", N, K)], torch.randn(2, K)
    found = sum(product([part(terms, columns=cut, inputs=blocks)])(x[:, slice(*cut)]) for cut in ((0, 32), (32, 64)))
    torch.testing.assert_close(found, apply_inputs(x, blocks) @ dense(terms).t(), rtol=1e-4, atol=1e-3)
    with pytest.raises(FormatError, match=r"up_proj.*'hadamard' over 64 columns.*tensor parallel size 1"):
        part(terms, columns=(0, 32), inputs=whole)


def test_a_cut_inside_a_group_names_the_layer():
    with pytest.raises(
        FormatError, match=r"model\.layers\.0\.mlp\.up_proj: 16 columns from 0 are no whole groups of 32"
    ):
        part([code_term("affine", N, K, group=32)], columns=(0, 16))


def test_a_missing_tensor_is_named():
    form, tensors = save_terms([code_term("affine", N, K)], (N, K))
    broken = Part("layer", form, (0, N), (0, K))
    broken.load("weight", tensors["weight"])
    with pytest.raises(FormatError, match=r"lacks layer\.scale"):
        broken.finished()


def test_a_tensor_of_another_shape_is_refused():
    form, tensors = save_terms([code_term("affine-symmetric", N, K)], (N, K))
    broken = Part("layer", form, (0, N), (0, K))
    broken.load("weight", tensors["weight"])
    with pytest.raises(FormatError, match="layer: tensor 'scale'"):
        broken.load("scale", tensors["scale"][:4])


def test_a_shard_does_not_keep_the_whole_tensors():
    shard = part([code_term("affine", N, K)], rows=(0, 8)).finished()
    assert shard.terms[0].planes.untyped_storage().nbytes() == shard.terms[0].planes.numel()
    assert shard.terms[0].planes.is_contiguous()


@pytest.mark.parametrize(
    ("whole", "mine", "workers", "wanted"),
    [(64, 64, 1, [(0, 64)]), (64, 32, 2, [(0, 32), (32, 64)]), (64, 32, 4, [(0, 32), (0, 32), (32, 64), (32, 64)])],
)
def test_shares(whole, mine, workers, wanted):
    assert [own_share("k", whole, mine, rank, workers) for rank in range(workers)] == wanted


@pytest.mark.parametrize(("mine", "workers"), [(48, 1), (0, 1), (32, 1), (32, 3)])
def test_shares_that_do_not_add_up_are_refused(mine, workers):
    with pytest.raises(FormatError, match="k: 64 rows or columns"):
        own_share("k", 64, mine, 0, workers)


def test_nested_weights_follow_the_cell():
    term, x = code_term("nested_affine", N, K), torch.randn(3, K)
    available = term.decoder.precisions
    shared = widths(available, prefill=available[-1], decode=f"{available[-1]}@0,{available[0]}@4")
    apply = multiplier([part([term]).finished()], shared, CPU, torch.float32)
    for bits in (available[-1], available[0], available[-1]):
        shared.set(bits)
        torch.testing.assert_close(apply(x), x @ term.dense(bits).t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", matrix_unit.KINDS)
def test_models_in_bfloat16_multiply_many_tokens_in_the_matrix_unit(kind):
    term, x = code_term(kind, N, K, group=32), torch.randn(5, K).bfloat16()
    shard, available = part([term]).finished(), term.decoder.precisions
    if reason := op.refusal():
        pytest.skip(reason)
    assert not matrix_unit.refusal(shard)
    shared = widths(available, prefill=available[-1], decode=str(available[0]))
    apply = multiplier([shard], shared, CPU, torch.bfloat16)
    for bits in sorted({available[-1], available[0]}):
        shared.set(bits)
        rounded = x.double() @ term.dense(bits).bfloat16().double().t()
        torch.testing.assert_close(apply(x).double(), rounded, rtol=2**-8, atol=2**-16 * float(rounded.abs().max()))
        few = x[:1].double() @ term.dense(bits).double().t()  # looked up: weights are not rounded
        torch.testing.assert_close(apply(x[:1]).double(), few, rtol=2**-8, atol=2**-16 * float(few.abs().max()))


def test_the_matrix_unit_leaves_float32_and_rotated_inputs_alone():
    shard = part([code_term("affine", N, K, group=32)], inputs=[{"op": "hadamard", "sizes": [1, 64]}]).finished()
    assert matrix_unit.refusal(shard)
    x, term = torch.randn(5, K), code_term("affine", N, K, group=32)
    exact = x @ term.dense().t()
    torch.testing.assert_close(product([part([term])])(x), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is there: Triton does not interpret")
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("kind", ["affine", "codebook", "binary_coded", "nested_affine"])
def test_the_gpu_path_in_the_interpreter(kind, tokens):
    pytest.importorskip("triton", reason="the GPU kernels need Triton")
    term, x = code_term(kind, N, K), torch.randn(tokens, K)
    available = term.decoder.precisions
    shared = widths(available, prefill=available[-1], decode=str(available[0]))
    apply = _on_gpu(part([term]).finished(), shared, CPU)
    for bits in (available[-1], available[0]):
        shared.set(bits)
        wanted = x @ term.dense(bits).t()
        torch.testing.assert_close(apply(x), wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


def test_what_no_gpu_kernel_multiplies_is_refused_by_name():
    plain = part([code_term("affine", N, K)]).finished()
    assert not gpu_refusal(plain)
    rotated = Shard(plain.terms, None, {}, [{"op": "hadamard", "sizes": [1, 64]}])
    quantized = part([code_term("affine", N, K)], activations=ACTIVATIONS).finished()
    dual, blocks = (part([code_term(kind, N, K)]).finished() for kind in ("dual_grained", "blocked"))
    many, some = part(all_terms()).finished(), part([code_term("affine", N, K, (0, 32))]).finished()
    words = ("hadamard", "quantized activations", "dual_grained", "blocked", "not one code term", "not one code term")
    for shard, word in zip((rotated, quantized, dual, blocks, many, some), words, strict=True):
        assert word in gpu_refusal(shard)
        with pytest.raises(KernelUnavailable, match=word):
            multiplier([shard], widths(), torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize(
    ("emitted", "bits"), [([], 8), ([0], 8), ([1], 4), ([32], 4), ([33], 3), ([500], 3), ([500, 2], 4), ([500, 0], 8)]
)
def test_a_batch_runs_at_the_most_that_any_request_needs(emitted, bits):
    assert Policy.read({"prefill": 8, "decode": "4@0,3@32"}, (2, 3, 4, 8)).bits(emitted) == bits


def test_without_options_everything_runs_at_full_width():
    policy = Policy.read({}, (2, 3, 4))
    assert policy.asked == (4,)
    assert policy.bits([0, 9]) == 4


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"prefil": 4}, "did you mean 'prefill'"),
        ({"prefill": 5}, "prefill at 5 bits"),
        ({"prefill": "4"}, "prefill at 4 bits"),
        ({"decode": "5"}, "wants 5 bits"),
        ({"decode": "3@4"}, "ascend from 0"),
        ({"kv": "fp8"}, "kv must be 'vllm'"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, what):
    with pytest.raises(InputError, match=what):
        Policy.read(options, (2, 3, 4))


def test_a_checkpoint_of_one_width_refuses_a_schedule():
    with pytest.raises(InputError, match="not nested"):
        Policy.read({"decode": "3"}, (4,))


@pytest.mark.parametrize(
    ("name", "value", "cores"),
    [
        ("OMP_PLACES", "{0,1,5}", {0, 1, 5}),
        ("GOMP_CPU_AFFINITY", "0 1 12", {0, 1, 12}),
        ("KMP_AFFINITY", "granularity=fine,explicit,proclist=[2,3]", {2, 3}),
        ("OMP_PLACES", "cores", set()),
        ("HOME", "/root", set()),
    ],
)
def test_cores_are_read_from_what_vllm_tells_openmp(name, value, cores):
    assert bound_cores({name: value}) == cores
