"""Requests that share passes, pages and slots say what each says alone, token for token."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from anybit.engine.guard import Guard
from anybit.engine.loop import Decoding
from anybit.engine.native import NativeModel
from anybit.engine.sampler import Sampler
from anybit.engine.schedule import parse_schedule
from anybit.engine.stepper import NativeStepper
from anybit.errors import Busy, InputError
from anybit.formats.kv import KVSpec
from anybit.kernels import native
from anybit.serving.batch import engine as module
from anybit.serving.batch.engine import BatchEngine
from anybit.serving.batch.request import Request
from nested_case import nest
from tiny_checkpoints import quantize_tiny
from tiny_models import VOCAB

pytestmark = pytest.mark.skipif(native.native() is None, reason="anybit._native is not built")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return nest(quantize_tiny("llama", tmp_path_factory.mktemp("batch"), config={"max_position_embeddings": 512}))


@pytest.fixture(scope="module")
def alone(checkpoint):
    model = NativeModel.open(checkpoint, verify=False, max_tokens=512)

    def run(request):
        stepper = NativeStepper(model)
        sampler = Sampler(request.temperature, request.seed, request.top_p)
        schedule = request.schedule or parse_schedule("8")
        decoding = Decoding(stepper, sampler, schedule, None, request.max_new_tokens, request.ends or frozenset())
        return [t for run in decoding.run(list(request.prompt_ids), request.prefill_precision or 8) for t in run]

    return run


class Served:
    """An engine, and what came of each request."""

    def __init__(self, checkpoint, *, start=True, tokens=512, slots=4, kv=None, **options):
        self.model = NativeModel.open(checkpoint, verify=False, max_tokens=tokens, max_sequences=slots, kv=kv)
        self.engine = BatchEngine(self.model, ends=frozenset(), **options)
        self.pieces = {}
        if start:
            self.engine.start()

    def ask(self, request):
        pieces = []
        ticket = self.engine.submit(request, pieces.append)
        self.pieces[ticket] = pieces
        return ticket

    def tokens(self, ticket):
        return [token for piece in self.pieces[ticket] for token in piece.token_ids]

    def finish(self, ticket):
        last = [piece.finish for piece in self.pieces[ticket]]
        assert None not in last[-1:]
        assert set(last[:-1]) <= {None}
        return last[-1]


def serve(checkpoint, requests, **options):
    served = Served(checkpoint, start=False, **options)
    tickets = [served.ask(request) for request in requests]
    served.engine.start()
    assert served.engine.drain(60)
    served.engine.close()
    return served, tickets


def prompt(seed, length):
    draw = random.Random(seed)
    words = [[draw.randrange(4, VOCAB) for _ in range(draw.randrange(1, 6))] for _ in range(5)]
    return tuple([token for _ in range(length) for token in draw.choice(words)][:length])


def mixed(count):
    draw = random.Random(5)
    for seed in range(count):
        sampled = seed % 3 == 1
        yield Request(
            prompt(seed % 4, draw.choice([3, 40, 64, 65, 130, 200])),
            draw.randrange(1, 50),
            temperature=0.8 * sampled,
            top_p=0.7 if seed % 6 == 1 else 1.0,
            seed=seed,
            prefill_precision=[None, 4, 8][seed % 3],
            schedule=parse_schedule(["8", "4", "8@0,4@5,3@9", "2"][seed % 4]),
            draft=["none", "ngram", "lookup"][seed % 3],
        )


@pytest.mark.parametrize("tokens", [2048, 300])
@pytest.mark.parametrize("kv", [None, KVSpec.parse("4-channel-sink64"), KVSpec.parse("16")])
def test_a_crowd_says_what_each_says_alone(tokens, kv, checkpoint, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 48)
    requests = list(mixed(14))
    single = NativeModel.open(checkpoint, verify=False, max_tokens=512, kv=kv)
    served, tickets = serve(checkpoint, requests, tokens=tokens, kv=kv)
    for request, ticket in zip(requests, tickets, strict=True):
        decoding = Decoding(
            NativeStepper(single), Sampler(request.temperature, request.seed, request.top_p), request.schedule, None,
            request.max_new_tokens, frozenset(),
        )  # fmt: skip
        prefill = request.prefill_precision or 8
        expected = [t for run in decoding.run(list(request.prompt_ids), prefill) for t in run]
        assert served.tokens(ticket) == expected
        assert served.finish(ticket) == "length"
        bits = [b for piece in served.pieces[ticket] for b in piece.bits]
        assert bits == [prefill, *decoding.steps.bits]
    stats = served.engine.stats()
    assert stats.generated_tokens == sum(request.max_new_tokens for request in requests)
    assert (stats.waiting, stats.running, stats.finished) == (0, 0, 14)
    assert (stats.preempted > 0) == (tokens == 300)
    if tokens > 300:  # else they had to be forgotten
        assert (stats.prefix_tokens > 0) == (kv is None or not kv.seals)
    kept = len(served.engine._prefixes)
    assert stats.pages_free == stats.pages_total - kept


def test_requests_that_come_later_change_nothing(checkpoint, alone):
    served = Served(checkpoint)
    requests = list(mixed(8))
    arrived = threading.Event()
    first = served.engine.submit(requests[0], lambda _: arrived.set())
    assert arrived.wait(10)
    tickets = [served.ask(request) for request in requests[1:]]
    assert served.engine.drain(60)
    assert first.text.over
    for request, ticket in zip(requests[1:], tickets, strict=True):
        assert served.tokens(ticket) == alone(request)
    served.engine.close()


def test_a_prompt_read_before_is_not_read_again(checkpoint, alone):
    served, ids = Served(checkpoint), prompt(1, 150)
    asked = [
        Request(ids, 5),
        Request(ids, 5),  # 128 of 150 tokens are known
        Request((*ids[:100], *prompt(9, 40)), 5),  # 64 are
        Request(ids, 5, prefill_precision=4),  # read at other bits
        Request(ids[:128], 5),  # its last token must be run: 64 are
        Request(ids, 5, echo_logprobs=True, logprobs=0),  # wants logits of every token
    ]
    for request, cached in zip(asked, [0, 128, 64, 0, 64, 0], strict=True):
        ticket = served.ask(request)
        while not (served.pieces[ticket] and served.pieces[ticket][-1].finish):
            pass
        assert served.pieces[ticket][0].cached_tokens == cached
        assert served.tokens(ticket) == alone(request)
    assert served.engine.stats().prefix_tokens == 256
    served.engine.close()


def test_a_text_that_ends_where_its_precision_falls_is_over(checkpoint):
    falls = Request(prompt(0, 506), 6, schedule=parse_schedule("8@0,4@5"))  # the next step would be at 4 bits
    other = Request(prompt(1, 10), 12, schedule=parse_schedule("4"))
    served, tickets = serve(checkpoint, [falls, other], tokens=1024)
    assert [served.finish(ticket) for ticket in tickets] == ["length", "length"]
    assert served.engine.stats().generated_tokens == 18
    by_bits = served.engine.stats().tokens_by_bits
    assert (by_bits[8], by_bits[4]) == (1 + 5 + 1, 11)


def test_short_prompts_that_are_alike_are_read_in_one_pass(checkpoint):
    """They have no page to share, so nothing is gained by waiting for one another."""
    served, _ = serve(checkpoint, [Request(prompt(0, 20), 1)] * 4)
    assert served.engine.stats().passes == 1


def test_counts_can_be_read_while_the_first_token_at_a_precision_is_made(checkpoint):
    served, caught = Served(checkpoint), []
    counts = served.engine._passes.counts.tokens_by_bits
    for bits in served.engine.precisions:  # `stats` copies it on another thread, which a new key would break
        served.ask(Request(prompt(0, 10), 2, schedule=parse_schedule(str(bits)), prefill_precision=bits))
        caught.append(len(counts))
    assert served.engine.drain(30)
    served.engine.close()
    assert set(caught) == {len(counts)}


def test_only_the_worker_asks_the_model(checkpoint, monkeypatch):
    """Its calls from several threads must not overlap."""
    served, asked, free = Served(checkpoint, start=False), set(), NativeModel.free_pages
    monkeypatch.setattr(
        NativeModel, "free_pages", property(lambda self: asked.add(threading.current_thread().name) or free.fget(self))
    )
    served.ask(Request(prompt(0, 100), 5))
    served.engine.start()
    while not served.engine.stats().generated_tokens:
        assert served.engine.stats().pages_free <= served.engine.stats().pages_total
    assert served.engine.drain(30)
    assert served.engine.stats().pages_free == served.engine.stats().pages_total - len(served.engine._prefixes)
    served.engine.close()
    assert asked == {"anybit-batch"}


def test_prompts_that_come_together_are_read_once(checkpoint, alone, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 100)
    ids = prompt(1, 330)
    requests = [Request(ids, 5), Request(ids, 5), Request((*ids[:200], 7), 5), Request(ids, 5, prefill_precision=4)]
    served, tickets = serve(checkpoint, requests, tokens=2048)
    assert [served.tokens(ticket) for ticket in tickets] == [alone(request) for request in requests]
    assert [served.pieces[ticket][0].cached_tokens for ticket in tickets] == [0, 320, 192, 0]
    assert served.engine.stats().prefix_tokens == 512


def test_pages_in_use_are_not_forgotten(checkpoint, alone):
    requests = [Request((*prompt(1, 150), seed), 60) for seed in range(4, 10)]
    served, tickets = serve(checkpoint, requests, tokens=320, slots=3)
    assert [served.tokens(ticket) for ticket in tickets] == [alone(request) for request in requests]
    assert served.engine.stats().prefix_tokens >= 128 * 4


def test_a_receiver_that_fails_hurts_nobody_else(checkpoint):
    served = Served(checkpoint, start=False)
    served.engine.submit(Request(prompt(0, 10), 5), lambda piece: 1 / 0)  # noqa: ARG005
    other = served.ask(Request(prompt(1, 10), 5))
    served.engine.start()
    assert served.engine.drain(30)
    assert served.finish(other) == "length"
    served.engine.close()


def test_a_shared_page_is_never_written(checkpoint):
    model = NativeModel.open(checkpoint, verify=False, max_tokens=256, max_sequences=2)
    ids = prompt(2, 100)
    model.prefill(ids, 0)
    page = model.hold_page(0, 0)
    with pytest.raises(ValueError, match="not finished"):
        model.hold_page(0, 1)
    model.attach_pages(1, [page])
    with pytest.raises(ValueError, match="not empty"):
        model.attach_pages(1, [page])
    with pytest.raises(InputError, match="shared"):
        model.truncate(1, 63)
    free = model.free_pages
    model.reset(0)
    assert model.free_pages == free + 1  # the second page; the first is still held
    logits = model.prefill(ids[64:], 1)
    assert np.array_equal(logits, model.prefill(ids, 0))
    model.reset(1)
    model.release_page(page)
    model.reset(0)
    assert model.free_pages == free + 2 == 5


@pytest.mark.parametrize("when", ["waiting", "first", "later"])
def test_cancelling_frees_everything(when, checkpoint):
    served = Served(checkpoint, start=False, slots=2, keep_prefixes=False)
    pieces, tickets = [], []

    def deliver(piece):
        pieces.append(piece)
        if len(pieces) == {"first": 1, "later": 5}.get(when):
            served.engine.cancel(tickets[0])

    tickets.append(served.engine.submit(Request(prompt(0, 100), 200), deliver))
    other = served.ask(Request(prompt(1, 20), 8))
    if when == "waiting":
        served.engine.cancel(tickets[0])
    served.engine.start()
    assert served.engine.drain(30)
    assert pieces[-1].finish == "cancelled"
    assert len(pieces) < 8
    assert served.finish(other) == "length"
    stats = served.engine.stats()
    assert stats.pages_free == stats.pages_total
    served.engine.close()


def test_what_can_not_be_answered_is_refused(checkpoint):
    served = Served(checkpoint, start=False, max_waiting=2)
    ids = prompt(0, 10)
    for request, why in [
        (Request((), 5), "at least one"),
        (Request(ids, 0), "at least one"),
        (Request(ids, 503), "exceed the context of 512"),
        (Request((VOCAB,), 5), f"id {VOCAB}"),
        (Request((-1,), 5), "id -1"),
        (Request(ids, 5, logit_bias={VOCAB + 7: 1.0}), f"id {VOCAB + 7}"),
        (Request(ids, 5, top_p=0.0), "top_p"),
        (Request(ids, 5, temperature=-1.0), "temperature"),
        (Request(ids, 5, logprobs=21), "0 to 20"),
        (Request(ids, 5, draft="self"), "known: none, ngram"),
        (Request(ids, 5, prefill_precision=7), "holds"),
        (Request(ids, 5, schedule=parse_schedule("7")), "holds"),
        (Request(ids, 5, schedule=Guard(parse_schedule("4"), high=8)), "leave it out"),
        (Request(ids, 5, seed=2**64), "seed"),
    ]:
        with pytest.raises(InputError, match=why):
            served.ask(request)
    tickets = [served.ask(Request(ids, 5)) for _ in range(2)]
    with pytest.raises(Busy, match="2 requests are waiting"):
        served.ask(Request(ids, 5))
    served.engine.start()
    assert served.engine.drain(30)
    with pytest.raises(Busy, match="shutting down"):
        served.ask(Request(ids, 5))
    assert [served.finish(ticket) for ticket in tickets] == ["length", "length"]
    served.engine.close()


def test_ends_and_logprobs(checkpoint, alone):
    plain = alone(Request(prompt(3, 30), 30))
    end = plain[7]
    requests = [
        Request(prompt(3, 30), 30, ends=frozenset([end])),
        Request(prompt(3, 30), 6, logprobs=3, echo_logprobs=True),
        Request(prompt(3, 30), 0, logprobs=0, echo_logprobs=True),
        Request(prompt(3, 30), 30, logit_bias={plain[0]: -100.0}),
        Request(prompt(3, 30), 30, presence_penalty=2.0, frequency_penalty=2.0),
    ]
    served, tickets = serve(checkpoint, requests)
    ended, likely, echoed, biased, fresh = tickets
    assert served.tokens(ended) == plain[: plain.index(end) + 1]
    assert served.finish(ended) == "stop"
    assert served.tokens(likely) == plain[:6]
    found = [entry for piece in served.pieces[likely] for entry in piece.logprobs]
    assert [entry.top[0][0] for entry in found] == plain[:6]
    assert all(entry.top[0][1] == entry.logprob >= entry.top[1][1] >= entry.top[2][1] for entry in found)
    model = NativeModel.open(checkpoint, verify=False, max_tokens=64)
    logits = model.logits(prompt(3, 30), prompt=True).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    first, *rest = served.pieces[echoed][0].prompt_logprobs
    assert first is None
    assert served.finish(echoed) == "length"
    for row, token, entry in zip(probabilities, prompt(3, 30)[1:], rest, strict=False):
        assert entry.logprob == pytest.approx(np.log(row[token]), abs=1e-6)
    assert len(rest) == 29
    assert plain[0] not in served.tokens(biased)
    repeats = len(set(served.tokens(fresh))) - len(set(plain))
    assert repeats > 0


def test_a_failing_admission_fails_its_request_alone(checkpoint, monkeypatch):
    served = Served(checkpoint, start=False)
    broken, other = served.ask(Request(prompt(0, 10), 5)), served.ask(Request(prompt(1, 10), 5))
    attach, seen = served.engine._prefixes.attach, []

    def once(*words):
        seen.append(words)
        return 1 / 0 if len(seen) == 1 else attach(*words)

    monkeypatch.setattr(served.engine._prefixes, "attach", once)
    served.engine.start()
    assert served.engine.drain(30)
    assert served.finish(broken) == "error"
    assert served.finish(other) == "length"
    assert served.engine.stats().running == served.engine.stats().waiting == 0
    served.engine.close()


def test_a_failing_pass_fails_its_requests_alone(checkpoint, monkeypatch):
    served = Served(checkpoint, start=False)
    ticket = served.ask(Request(prompt(0, 10), 5))
    monkeypatch.setattr(served.model, "top", lambda *_: 1 / 0)
    served.engine.start()
    served.engine._thread.join(0.5)
    while not (served.pieces[ticket] and served.pieces[ticket][-1].finish):
        pass
    assert served.finish(ticket) == "error"
    monkeypatch.undo()
    again = served.ask(Request(prompt(0, 10), 5))
    assert served.engine.drain(30)
    assert served.finish(again) == "length"
    served.engine.close()
