"""Drafting changes nothing but the speed: tokens, cache and account of bits against a loop of single steps."""

import random

import numpy as np
import pytest

from anybit.engine.drafting.lookup import LookupDrafter
from anybit.engine.drafting.ngram import NgramDrafter
from anybit.engine.drafting.pace import Pace
from anybit.engine.drafting.self_speculation import SelfDrafter
from anybit.engine.guard import Guard
from anybit.engine.loop import Decoding
from anybit.engine.native import NativeModel
from anybit.engine.sampler import Sampler
from anybit.engine.schedule import parse_schedule
from anybit.engine.stepper import NativeStepper
from anybit.engine.steps import Drafting
from anybit.kernels import native
from nested_case import nest
from tiny_checkpoints import quantize_tiny
from tiny_models import VOCAB

pytestmark = pytest.mark.skipif(native.native() is None, reason="anybit._native is not built")
FALLING = "8@0,4@9,3@10,2@21"
NOBODY = frozenset()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def make(family):
        if family not in made:
            made[family] = nest(quantize_tiny(family, tmp_path_factory.mktemp(family)))
        return made[family]

    return make


@pytest.fixture(scope="module")
def runner(checkpoint):
    return NativeStepper(NativeModel.open(checkpoint("llama"), verify=False, max_tokens=256))


def prompt(seed, length=30):
    draw = random.Random(seed)
    words = [[draw.randrange(4, VOCAB) for _ in range(draw.randrange(1, 6))] for _ in range(6)]
    return [token for _ in range(length) for token in draw.choice(words)][:length]


def one_by_one(runner, ids, count, schedule=FALLING, temperature=0.0, seed=0, prefill=8, ends=NOBODY):
    """The obvious loop, on the model itself."""
    model, plan, sampler = runner._model, parse_schedule(schedule), Sampler(temperature, seed)
    model.reset()
    model.precision.bits = prefill
    logits, tokens = model.prefill(ids), []
    while len(tokens) < count and not (tokens and tokens[-1] in ends):
        if tokens:
            model.precision.bits = plan.bits(plan.start(None, count), len(tokens) - 1)
            logits = model.step({0: tokens[-1]})[0]
        tokens.append(sampler(np.asarray(logits), len(tokens)))
    return tokens


def decoded(runner, ids, count, drafter, schedule=FALLING, temperature=0.0, seed=0, pace=None, ends=NOBODY):
    scheduler = parse_schedule(schedule) if isinstance(schedule, str) else schedule
    drafting = None if drafter is None else Drafting(drafter, pace)
    decoding = Decoding(runner, Sampler(temperature, seed), scheduler, drafting, count, ends)
    return [token for run in decoding.run(ids, 8) for token in run], decoding.steps


class Fixed:
    """A drafter that says what a function of the position of the next token says, too much of it as a rule."""

    level = 1

    def __init__(self, says, longest=7):
        self.says, self.longest = says, longest

    def start(self, prompt_ids):
        self.position = 0

    def update(self, tokens):
        self.position += len(tokens)

    def propose(self, limit):
        return self.says(self.position)


@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize("longest", [1, 3, 7, 15])
def test_ngrams_change_no_token(order, longest, runner):
    accepted = 0
    for seed in range(10):
        ids, schedule = prompt(seed), ["2", "4", FALLING][seed % 3]
        tokens, decoding = decoded(runner, ids, 48, NgramDrafter(order, longest), schedule)
        assert tokens == one_by_one(runner, ids, 48, schedule)
        plan = parse_schedule(schedule)
        assert decoding.bits == [plan.bits(plan.start(None, 48), step) for step in range(47)]
        accepted += decoding.drafting.accepted
        assert decoding.passes == 47 - decoding.drafting.accepted
    assert accepted > 50


@pytest.mark.parametrize("temperature", [0.0, 0.1])
@pytest.mark.parametrize("drafter", ["lookup", "first", "self", "paced"])
def test_other_drafters_change_no_token(drafter, temperature, runner):
    def choose(tokens, position):
        return [sampler(row, position + at) for at, row in enumerate(runner.verify(tokens))]

    accepted = 0
    for seed in range(10):
        ids, sampler = prompt(seed), Sampler(temperature, seed)
        made = {
            "lookup": LookupDrafter(),
            "first": LookupDrafter(longest=10, deepest=3, first=True),
            "self": SelfDrafter(runner, choose, 3, longest=4),
            "paced": NgramDrafter(),
        }[drafter]
        pace = Pace() if drafter == "paced" else None
        tokens, decoding = decoded(runner, ids, 48, made, FALLING, temperature, seed, pace)
        assert tokens == one_by_one(runner, ids, 48, FALLING, temperature, seed)
        accepted += decoding.drafting.accepted
    assert drafter == "paced" or accepted > (5 if temperature else 20)  # a pace depends on the clock


def test_sampled_texts_differ_by_seed_and_not_by_drafting(runner):
    ids = prompt(1)
    texts = [decoded(runner, ids, 40, NgramDrafter(), "4", 0.7, seed)[0] for seed in range(20)]
    assert texts == [one_by_one(runner, ids, 40, "4", 0.7, seed) for seed in range(20)]
    assert len(set(map(tuple, texts))) == 20


@pytest.mark.parametrize("longest", [1, 3, 7])
def test_whoever_guesses_right_saves_passes_and_nobody_else_changes_anything(longest, runner):
    ids, draw = prompt(3), random.Random(0)
    truth = one_by_one(runner, ids, 41, "4")
    says = {
        "right": lambda at: truth[at : at + longest],
        "wrong": lambda at: [(token + 1) % VOCAB for token in truth[at : at + longest]],
        "random": lambda _: [draw.randrange(VOCAB) for _ in range(draw.randrange(longest + 1))],
        "half": lambda at: [t if draw.random() < 0.5 else 5 for t in truth[at : at + longest]],
        "too long": lambda at: truth[at:] + [5] * 99,
        "nothing": lambda _: [],
    }
    passes = {}
    for name, say in says.items():
        tokens, decoding = decoded(runner, ids, 41, Fixed(say, longest), "4")
        assert tokens == truth, name
        assert runner.length == len(ids) + 40
        passes[name] = decoding.passes
    assert passes["right"] == passes["too long"] == -(-40 // (longest + 1))
    assert passes["wrong"] == passes["nothing"] == 40
    assert passes["right"] < passes["half"] < 40


def test_an_end_inside_a_right_guess_ends_the_text_there(runner):
    ids = prompt(4)
    truth = one_by_one(runner, ids, 30, "8")
    for at in range(30):
        ends = frozenset([truth[at]])
        expected = truth[: truth.index(truth[at]) + 1]
        drafter = Fixed(lambda position: truth[position:])
        assert decoded(runner, ids, 30, drafter, "8", ends=ends)[0] == expected


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # gemma3: sliding windows
@pytest.mark.parametrize("kv_bits", [16, 4])
def test_the_cache_after_wrong_guesses_is_that_of_single_steps(family, kv_bits, checkpoint):
    model = NativeModel.open(checkpoint(family), kv=kv_bits, verify=False, max_tokens=256)
    runner, ids = NativeStepper(model), prompt(5, 50)

    def cache():
        shape = (model.facts.kv_heads, model.length(), model.facts.head_dim)
        read = []
        for layer in range(model.facts.layers):
            keys, values = np.empty(shape, np.float32), np.empty(shape, np.float32)
            model._decoder.read_cache(layer, 0, keys.ctypes.data, values.ctypes.data)
            read += [keys, values]
        return np.stack(read)

    truth = one_by_one(runner, ids, 40)
    expected = cache()
    drafter = Fixed(lambda at: [*truth[at : at + at % 4], *range(4, 11)])
    tokens, decoding = decoded(runner, ids, 40, drafter)
    assert tokens == truth
    assert 0 < decoding.drafting.accepted < decoding.drafting.drafted
    assert np.array_equal(cache(), expected)
    assert np.unique(expected).size > 1000


class Jumpy:
    """A schedule that looks at every step's logits: the precision follows the last token."""

    precisions, observes = (8, 4, 2), True

    def start(self, features, max_new_tokens):
        return [8]

    def bits(self, state, step):
        return state[min(step, len(state) - 1)]

    def observe(self, state, step, logits):
        assert len(state) == step + 1, "each step once, in order"
        state.append((8, 4, 2)[int(logits.argmax()) // 3 % 3] if step % 3 == 2 else state[-1])


def test_a_schedule_that_observes_is_never_overtaken(runner):
    for seed in range(5):
        ids = prompt(seed)
        plain, decoding = decoded(runner, ids, 48, None, Jumpy())
        drafted, other = decoded(runner, ids, 48, NgramDrafter(), Jumpy())
        assert drafted == plain
        assert other.bits == decoding.bits
        assert other.drafting.accepted > 0
    assert len(set(decoding.bits)) > 1


@pytest.mark.parametrize("options", [{"sure": 0.9, "hold": 5}, {"sure": 0.0, "agree": 1.1, "period": 8, "hold": 3}])
def test_the_guard_raises_the_same_steps_with_and_without_drafting(options, runner):
    for seed in range(4):
        ids = prompt(seed)
        plain, decoding = decoded(runner, ids, 60, None, Guard(parse_schedule("2"), 8, **options))
        drafted, other = decoded(runner, ids, 60, NgramDrafter(), Guard(parse_schedule("2"), 8, **options))
        assert (drafted, other.bits, other.guarded) == (plain, decoding.bits, decoding.guarded)
        assert decoding.guarded["raised"] > 0
        assert set(decoding.bits) == {2, 8}
        assert (decoding.guarded["probes"] > 0) == ("agree" in options)


def test_a_guard_that_sees_nothing_wrong_changes_nothing(runner):
    ids = prompt(7)
    tokens, decoding = decoded(runner, ids, 30, None, Guard(parse_schedule("4"), 8, sure=0.0, period=99))
    assert tokens == one_by_one(runner, ids, 30, "4")
    assert decoding.guarded == {"probes": 0, "raised": 0}


def test_a_probe_reads_the_last_tokens_again_at_the_high_precision(runner):
    """After a probe the cache is as if those tokens had been read at 8 bits."""
    ids, model = prompt(8), runner._model
    guard = Guard(parse_schedule("2"), 8, window=4, period=8, sure=0.0, agree=0.0)
    tokens, decoding = decoded(runner, ids, 12, None, guard)
    assert decoding.guarded == {"probes": 1, "raised": 0}
    model.reset()
    model.precision.bits = 8
    logits, expected = model.prefill(ids), []
    for step in range(12):
        expected.append(int(logits.argmax()))
        if step == 8:
            model.truncate(0, len(ids) + 4)
            model.precision.bits = 8
            model.forward([(token, 0) for token in expected[4:8]], [])
        model.precision.bits = 2
        logits = model.step({0: expected[-1]})[0]
    assert tokens == expected
