"""Block-wise learning (ABQ-LLM): what is learned, that it helps, that rounding afterwards gives what was learned."""

from __future__ import annotations

import copy

import pytest
import torch

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import workers
from anybit.calibration.statistics import BlockCall, propagate
from anybit.formats.terms import dense
from anybit.learn_block import Lesson, causal, learn_block
from anybit.methods.abq import ABQ, Learned, attention_loss, away_from_zero, block_loss, fake_round, first_scales
from anybit.methods.activations import IntInputs
from anybit.methods.base import InputStats
from anybit.methods.gptq import GPTQ
from anybit.methods.rtn import RTN
from anybit.models.graph import block_inputs, trace_block
from anybit.models.normalize import normalize
from anybit.models.pairs import ScalePair, scale_pairs
from anybit.models.structure import find_structure
from tiny_models import tiny, token_ids

SAMPLES, TOKENS = 3, 20
GRID = RTN(bits=3, group_size=-1)
INPUTS = IntInputs(bits=4, symmetric=False, rounded_zero=True)


class Case:
    """The first block of a tiny model with its calls and streams."""

    def __init__(self, family, folder):
        model = tiny(family)
        normalize(model)
        name = find_structure(model).blocks[0]
        width = model.config.hidden_size
        self.source, self.stream = (Activations(folder / what, SAMPLES, TOKENS, width) for what in ("hidden", "stream"))
        for sample in range(SAMPLES):
            hidden, kwargs = block_inputs(model, [name], token_ids(TOKENS, seed=sample))[0]
            self.source.write(sample, hidden)
        self.call = BlockCall(model.get_submodule(name), kwargs)
        self.graph = trace_block(self.call.block, self.source.read(0), kwargs)
        self.original, self.folder, self.width = copy.deepcopy(self.call.block), folder, width
        with workers(1) as pool:
            propagate(BlockCall(self.original, kwargs), self.source, self.stream, pool)

    def lesson(self, corrected=True, inputs=True):
        names = self.graph.linears
        own = Activations(self.folder / "own", SAMPLES, TOKENS, self.width)
        maps = Activations(self.folder / "maps", SAMPLES, TOKENS, TOKENS)
        schemes = dict.fromkeys(names, INPUTS) if inputs else {}
        return Lesson(
            self.original, self.source, self.stream, own, maps, dict.fromkeys(names, GRID), schemes, corrected
        )

    def learn(self, method, threads=2, **facts):
        with workers(threads) as pool:
            return learn_block(self.call, self.graph, method, self.lesson(**facts), pool)

    def rounded_error(self):
        """Mean squared error of the block with weights and inputs rounded, as it stands; restores its weights."""
        block, total = copy.deepcopy(self.call.block), 0.0
        call = BlockCall(block, self.call.arguments)
        for name in self.graph.linears:
            weight = block.get_parameter(f"{name}.weight")
            weight.data.copy_(dense(GRID.quantize(weight.data, InputStats())))
            call.attach(name, lambda x: INPUTS.spec().encode(x.reshape(-1, x.shape[-1]), {}).values().view(x.shape))
        for sample in range(SAMPLES):
            total += float((call.run(self.source.read(sample)) - self.stream.read(sample)).square().mean())
        return total / SAMPLES


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt"])
def test_scales_alone_leave_the_float_block_as_it_is(family, tmp_path):
    case = Case(family, tmp_path)
    block, hidden = case.call.block, case.source.read(0)
    pairs = [p for p in scale_pairs(block, hidden, case.call.arguments, case.graph) if p.expert is None]
    draw = torch.Generator().manual_seed(0)
    scaled = [(pair, torch.rand(pair.size, generator=draw) + 0.5) for pair in pairs]
    learned = Learned(ABQ(clip=False), dict(block.named_parameters()), scaled, {}, [])
    before = case.call.run(hidden)
    changed = learned.float_parameters()
    with torch.no_grad():
        for name, value in changed.items():
            block.get_parameter(name).copy_(value)
    assert len(pairs) >= 2
    assert any(not torch.equal(changed[n], p) for n, p in case.original.named_parameters())
    torch.testing.assert_close(case.call.run(hidden), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize("grid", [GRID, RTN(bits=2, group_size=16, balanced=True), RTN(bits=4, symmetric=True)])
def test_rounding_the_clamped_weight_gives_what_was_learned(grid):
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    learned = Learned(ABQ(), {"a.weight": weight}, [], {"a": grid}, ["a"])
    with torch.no_grad():
        for group in learned.groups:
            for leaf in group["params"]:
                leaf += torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1)) * 0.5
        made = learned.rounded()["a.weight"]
        clamped = learned.clipped("a", learned.float_parameters()["a.weight"])
    (term,) = grid.quantize(clamped, InputStats())
    torch.testing.assert_close(term.dense(), made, rtol=1e-5, atol=1e-6)


def test_a_correction_of_zero_changes_nothing_and_blocks_in_the_middle_have_none():
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    plain, corrected = (Learned(ABQ(), {"a.weight": weight}, [], {"a": GRID}, names) for names in ([], ["a"]))
    assert torch.equal(plain.rounded()["a.weight"], corrected.rounded()["a.weight"])
    assert [i for i in range(30) if ABQ().corrects(i, 30)] == [0, 1, 2, 26, 27, 28, 29]
    assert not any(ABQ(correction=False).corrects(i, 30) for i in range(30))


def test_balance_has_five_levels_in_three_planes_and_less_error():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    (plain,), (balanced,) = (
        RTN(bits=2, group_size=64, balanced=b).quantize(weight, InputStats()) for b in (False, True)
    )
    assert (plain.decoder.bits, balanced.decoder.bits) == (2, 3)
    ends = torch.tensor([[-2.0, -1, 0, 1, 2, 0.4, -0.6, 1.4]])
    (term,) = RTN(bits=2, group_size=8, balanced=True).quantize(ends, InputStats())
    assert torch.equal(term.dense(), torch.tensor([[-2.0, -1, 0, 1, 2, 0, -1, 1]]))
    assert float((balanced.dense() - weight).square().mean()) < 0.7 * float((plain.dense() - weight).square().mean())
    hessian = torch.eye(256)
    (solved,) = GPTQ(bits=2, group_size=64, balanced=True).quantize(weight, InputStats(1, hessian))
    assert int(solved.dense().unique(dim=None).numel()) > 5  # many groups, yet at most five levels in each
    for part in solved.dense()[0].split(64):
        assert len(part.unique()) <= 5
    with pytest.raises(ValueError, match="balanced is for bits=2"):
        RTN(bits=3, balanced=True)


def test_gradients_reach_scales_clips_and_corrections():
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    learned = Learned(ABQ(), {"a.weight": weight}, [], {"a": GRID}, ["a"])
    target = weight * 0.9
    loss = (learned.rounded()["a.weight"] - target).square().sum()
    loss.backward()
    for group in learned.groups:
        for leaf in group["params"]:
            assert leaf.grad is not None
            # b has no gradient while a is 0
            assert bool(leaf.grad.abs().sum() > 0) == (not torch.equal(leaf.detach(), torch.ones_like(leaf)))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_learning_lowers_the_error_of_the_rounded_block(family, tmp_path):
    case = Case(family, tmp_path)
    before = case.rounded_error()
    said = case.learn(ABQ(epochs=8))
    first, last = (float(word) for word in said.rsplit("loss ", 1)[1].split(" -> "))
    assert last < first
    assert case.rounded_error() < before


def test_each_part_can_be_switched_off(tmp_path):
    case = Case("llama", tmp_path)
    off = ABQ(epochs=1, transform=False, clip=False, attention=False)
    assert "nothing to learn" in case.learn(off, corrected=False)
    for name, parameter in case.original.named_parameters():
        assert torch.equal(parameter, case.call.block.get_parameter(name))


def test_bytes_do_not_depend_on_threads(tmp_path):
    found = []
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        folder.mkdir()
        case = Case("llama", folder)
        case.learn(ABQ(epochs=2, batch=2), threads)
        found.append([p.clone() for p in case.call.block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_attention_in_the_open_is_attention(tmp_path):
    case = Case("llama", tmp_path)
    mask = causal(case.call.arguments.get("attention_mask"), TOKENS)
    fused = case.call.run(case.source.read(0))
    config = case.call.block.self_attn.config
    config._attn_implementation = "eager"
    eager = BlockCall(case.call.block, {**case.call.arguments, **mask}).run(case.source.read(0))
    config._attn_implementation = "sdpa"
    torch.testing.assert_close(eager, fused, rtol=1e-4, atol=1e-4)
    case.learn(ABQ(epochs=1))
    assert config._attn_implementation == "sdpa"
    maps = Activations(tmp_path / "maps", SAMPLES, TOKENS, TOKENS).read(0)[0]
    torch.testing.assert_close(maps.sum(-1), torch.ones(TOKENS))
    assert not maps.triu(1).any()


def test_losses_at_their_edges():
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    assert float(block_loss(x, [x], relative=False)) == pytest.approx(0, abs=1e-6)
    orthogonal = torch.cat([x[..., 4:], -x[..., :4]], -1)
    assert torch.isfinite(block_loss(x - x, [orthogonal], relative=False))
    p = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]])
    q = torch.tensor([[0.6, 0.4, 0.0], [0.3, 0.3, 0.4]])
    assert float(attention_loss(p, p)) == 0
    kl = (p * (p / q).log()).nan_to_num(0).sum(-1) + (q * (q / p).log()).nan_to_num(0).sum(-1)
    assert float(attention_loss(q, p)) == pytest.approx(float(kl.mean()), rel=1e-4)
    assert away_from_zero(torch.tensor([1e-5, -1e-5, 0.5])).tolist() == pytest.approx([1e-2, -1e-2, 0.5])


def test_first_scales_follow_the_formula_and_share_heads():
    largest, weight = torch.tensor([4.0, 1, 9, 16]), torch.tensor([[1.0, -2, 1, 1], [0.5, 1, 1, 4]])
    plain = first_scales(ScalePair("n", "norm", (0, 4), ("a",)), largest, [weight], 0.5)
    assert plain.tolist() == pytest.approx([2, 0.5**0.5, 3, 2])
    shared = first_scales(ScalePair("v", "linear", (0, 2), ("o",), repeat=2, run=2), largest, [weight], 0.5)
    assert shared.tolist() == pytest.approx([3, 2])  # heads 0 and 1 of the columns read one head


def test_first_scales_may_leave_the_first_token_out(tmp_path):
    def norm(spike, counted, folder):
        folder.mkdir()
        case = Case("llama", folder)
        hidden = case.source.read(0)
        hidden[:, 0, 5] += spike  # one channel of one token
        case.source.write(0, hidden)
        case.learn(ABQ(epochs=1, lr_transform=1e-9, clip=False, attention=False, first_token=counted), corrected=False)
        return case.call.block.get_parameter("input_layernorm.weight").clone()

    found = {(s, c): norm(s, c, tmp_path / f"{s}{c}") for s in (0, 1000) for c in (True, False)}
    torch.testing.assert_close(found[0, False], found[1000, False])
    assert float(found[1000, True][5]) < 0.8 * float(found[0, True][5])  # the spike moved its channel's scale


def test_a_fake_rounded_weight_is_the_grid_s(tmp_path):
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    torch.testing.assert_close(fake_round(weight, low, high, GRID, 32), dense(GRID.quantize(weight, InputStats())))
