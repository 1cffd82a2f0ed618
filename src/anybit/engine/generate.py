"""Generation with the native decoder or any Hugging Face causal language model: a prompt in, text out while it is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict, Unpack

from anybit.engine.detokenize import Detokenizer
from anybit.engine.drafting.choose import drafting
from anybit.engine.drafting.drafter import Drafter
from anybit.engine.guard import Guard
from anybit.engine.loop import Decoding
from anybit.engine.native import NativeModel
from anybit.engine.prompt import Message, check_length, encode_prompt
from anybit.engine.sampler import Sampler
from anybit.engine.schedule import BitsAccount, FixedSchedule, Scheduler, check_available, parse_schedule
from anybit.engine.stepper import Stepper, stepper
from anybit.engine.steps import Drafting
from anybit.engine.tokenizer import Tokenizer
from anybit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Options(TypedDict, total=False):
    """How a text is made; all of it optional.

    Attributes:
        temperature: 0 (the default) for greedy, else softmax(logits / temperature) is sampled.
        seed: of the sampling, >= 0; the draw of a token depends on it and the token's position alone.
        prefill_precision: bits while reading the prompt; default: all that are stored.
        schedule: bits of each decode step, as `parse_schedule` reads them or any `Scheduler`; default: all that are stored.
        draft: `ngram`, `lookup`, `self`, `self:BITS` or `none`, or a `Drafter` whose guesses are used whole. Changes the
            speed only.
        guard: raise the precision where the low one cannot be trusted (`engine.guard`).
    """

    temperature: float
    seed: int
    prefill_precision: int | None
    schedule: str | Scheduler | None
    draft: str | Drafter
    guard: bool


@dataclass(frozen=True)
class GenerationResult:
    """What one call produced.

    Attributes:
        text: the new text, without special tokens.
        token_ids: the new tokens, with the end-of-sequence token when that ended it.
        tokens: how many these are.
        prompt_tokens: length of the prompt after templating.
        prefill_tokens_per_second: prompt tokens over the time until the first new token is chosen.
        decode_tokens_per_second: tokens after the first over the time of their forward passes; 0.0 when there are none.
        bits: of each decode step; `bits.average`, `bits.average_paper`, `bits.histogram`.
        drafted: guessed tokens that passes checked.
        accepted: those that were right.
        accepted_at: of the guesses at each place after the last certain token, (checked, right).
        passes: forward passes of the decode steps.
        guard: `{probes, raised}`; None without the guard.
    """

    text: str
    token_ids: list[int]
    tokens: int
    prompt_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    bits: BitsAccount = field(default_factory=lambda: BitsAccount(()))
    drafted: int = 0
    accepted: int = 0
    accepted_at: tuple[tuple[int, int], ...] = ()
    passes: int = 0
    guard: dict[str, int] | None = None


def generate(
    model: PreTrainedModel | NativeModel,
    tokenizer: PreTrainedTokenizerBase | Tokenizer,
    prompt: str | Sequence[Message],
    *,
    max_new_tokens: int,
    on_text: Callable[[str], None] | None = None,
    chat: bool = False,
    **options: Unpack[Options],
) -> GenerationResult:
    """Continue `prompt` until end of sequence or `max_new_tokens`.

    Args:
        prompt: text, or with `chat` also a conversation.
        on_text: called with each piece of text as soon as it is certain, always whole characters.
        chat: wrap `prompt` in the tokenizer's chat template.
        options: see `Options`.

    Raises:
        InputError: bad options, an empty prompt, more tokens than the model's context, no chat template, a precision that the
            checkpoint does not hold, drafting where it could change the text.
        PromiseError: the model produced NaN or infinite logits.
    """
    temperature, seed = options.get("temperature", 0.0), options.get("seed", 0)
    if max_new_tokens < 1 or temperature < 0 or seed < 0:
        raise InputError(
            f"need max_new_tokens >= 1, temperature >= 0 and seed >= 0, not {max_new_tokens}, {temperature}, {seed}"
        )
    prompt_ids, runner = encode_prompt(tokenizer, prompt, chat=chat), stepper(model)
    check_length(runner.context, len(prompt_ids), max_new_tokens)
    sampler, ends = Sampler(temperature, seed), end_tokens(runner, tokenizer)
    prefill, scheduler = _precisions(runner, options)
    guesses = drafting(options.get("draft", "none"), runner, sampler, scheduler)
    decoding = Decoding(runner, sampler, scheduler, guesses, max_new_tokens, ends)
    steps, text = decoding.steps, _Text(tokenizer, ends, on_text)
    clock = [time.perf_counter()]  # start, then the arrival of every run of tokens
    for run in decoding.run(prompt_ids, prefill):
        clock.append(time.perf_counter())
        text.push(run)
    count = len(text.ids)
    return GenerationResult(
        text=text.finish(),
        token_ids=text.ids,
        tokens=count,
        prompt_tokens=len(prompt_ids),
        prefill_tokens_per_second=len(prompt_ids) / (clock[1] - clock[0]),
        decode_tokens_per_second=(count - 1) / (clock[-1] - clock[1]) if count > 1 else 0.0,
        bits=BitsAccount(tuple(steps.bits)),
        passes=steps.passes,
        guard=steps.guarded,
        **_counts(guesses),
    )


def end_tokens(runner: Stepper, tokenizer: PreTrainedTokenizerBase | Tokenizer) -> frozenset[int]:
    """Ids that end a text: those of the model's generation config, else the tokenizer's."""
    if runner.end_ids is not None:
        return runner.end_ids
    end = tokenizer.eos_token_id
    return frozenset() if end is None else frozenset([end] if isinstance(end, int) else end)


def _precisions(runner: Stepper, options: Options) -> tuple[int, Scheduler]:
    """Bits of the prompt, and the schedule of what follows."""
    available, guard = runner.precision.available, options.get("guard", False)
    prefill, wanted = options.get("prefill_precision"), options.get("schedule")
    scheduler: Scheduler = FixedSchedule(((0, available[-1]),))
    if isinstance(wanted, str):
        scheduler = parse_schedule(wanted, may_rise=guard)
    elif wanted is not None:
        scheduler = wanted
    if prefill is None:
        prefill = available[-1]
    elif prefill not in available:
        raise InputError(f"--prefill-precision {prefill}: not in this checkpoint; it holds {list(available)}")
    check_available(scheduler, available)
    if guard:
        scheduler = Guard(scheduler, high=max(prefill, *scheduler.precisions))
    return prefill, scheduler


class _Counts(TypedDict, total=False):
    drafted: int
    accepted: int
    accepted_at: tuple[tuple[int, int], ...]


def _counts(guesses: Drafting | None) -> _Counts:
    if guesses is None:
        return {}
    places = tuple(zip(guesses.offered, guesses.right, strict=True))
    return {"drafted": guesses.drafted, "accepted": guesses.accepted, "accepted_at": places}


class _Text:
    """Certain tokens as text, shown while it comes."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | Tokenizer,
        ends: frozenset[int],
        on_text: Callable[[str], None] | None,
    ) -> None:
        self.ids: list[int] = []
        self._detokenizer, self._ends, self._on_text, self._pieces = Detokenizer(tokenizer), ends, on_text, list[str]()

    def push(self, tokens: Sequence[int]) -> None:
        """More of the text; an end token is counted, not shown."""
        for token in tokens:
            self.ids.append(token)
            if token not in self._ends:
                self._show(self._detokenizer.push(token))

    def finish(self) -> str:
        """The whole text."""
        self._show(self._detokenizer.flush())
        return "".join(self._pieces)

    def _show(self, piece: str) -> None:
        self._pieces.append(piece)
        if self._on_text and piece:
            self._on_text(piece)
