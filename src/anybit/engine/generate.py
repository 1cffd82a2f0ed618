"""Generation with the native decoder or any Hugging Face causal language model: prefill once, then one token at a time.

The plain loop, without drafting and precision schedules, whose greedy output equals `model.generate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from anybit.engine.detokenize import Detokenizer
from anybit.engine.native import NativeModel
from anybit.engine.sampler import Sampler
from anybit.engine.stepper import Stepper, stepper
from anybit.engine.tokenizer import Tokenizer
from anybit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = dict[str, str]
"""One turn of a conversation: `{"role": "user", "content": "..."}`."""


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
    """

    text: str
    token_ids: list[int]
    tokens: int
    prompt_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


def generate(
    model: PreTrainedModel | NativeModel,
    tokenizer: PreTrainedTokenizerBase | Tokenizer,
    prompt: str | Sequence[Message],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
    chat: bool = False,
) -> GenerationResult:
    """Continue `prompt` until end of sequence or `max_new_tokens`.

    Args:
        prompt: text, or with `chat` also a conversation.
        temperature: 0 for greedy, else softmax(logits / temperature) is sampled.
        seed: of the sampling; unused when greedy.
        on_text: called with each piece of text as soon as it is certain, always whole characters.
        chat: wrap `prompt` in the tokenizer's chat template.

    Raises:
        InputError: bad options, an empty prompt, more tokens than the model's context, no chat template.
        PromiseError: the model produced NaN or infinite logits.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise InputError(f"need max_new_tokens >= 1 and temperature >= 0, not {max_new_tokens} and {temperature}")
    prompt_ids = encode_prompt(tokenizer, prompt, chat=chat)
    runner = stepper(model)
    _check_length(runner.context, len(prompt_ids), max_new_tokens)
    sampler, detokenizer = Sampler(temperature, seed), Detokenizer(tokenizer)
    ends = end_tokens(runner, tokenizer)
    token_ids: list[int] = []
    pieces: list[str] = []
    clock = [time.perf_counter()]  # start, then the arrival of every token
    for token in islice(_tokens(runner, prompt_ids, sampler), max_new_tokens):
        clock.append(time.perf_counter())
        token_ids.append(token)
        if token in ends:
            break
        pieces.append(detokenizer.push(token))
        if on_text and pieces[-1]:
            on_text(pieces[-1])
    pieces.append(detokenizer.flush())
    if on_text and pieces[-1]:
        on_text(pieces[-1])
    return GenerationResult(
        text="".join(pieces),
        token_ids=token_ids,
        tokens=len(token_ids),
        prompt_tokens=len(prompt_ids),
        prefill_tokens_per_second=len(prompt_ids) / (clock[1] - clock[0]),
        decode_tokens_per_second=(len(token_ids) - 1) / (clock[-1] - clock[1]) if len(token_ids) > 1 else 0.0,
    )


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | Tokenizer, prompt: str | Sequence[Message], *, chat: bool
) -> list[int]:
    """Token ids of a prompt, through the chat template when `chat`.

    Raises:
        InputError: no chat template, or no token at all.
    """
    if not chat:
        if not isinstance(prompt, str):
            raise InputError("a prompt of several messages needs chat=True")
        encoded: Any = tokenizer(prompt)
    elif not tokenizer.chat_template:
        raise InputError("this model's tokenizer has no chat template; give a plain prompt instead (without --chat)")
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    ids = list(encoded["input_ids"])
    if not ids:
        raise InputError("the prompt is empty; give at least one token of text")
    return ids


def end_tokens(runner: Stepper, tokenizer: PreTrainedTokenizerBase | Tokenizer) -> frozenset[int]:
    """Ids that end a text: those of the model's generation config, else the tokenizer's."""
    if runner.end_ids is not None:
        return runner.end_ids
    end = tokenizer.eos_token_id
    return frozenset() if end is None else frozenset([end] if isinstance(end, int) else end)


def _tokens(runner: Stepper, prompt_ids: list[int], sampler: Sampler) -> Iterator[int]:
    """Endless tokens after the prompt, each one forward pass."""
    logits = runner.prefill(prompt_ids)
    for position in count():
        token = sampler(logits, position)
        yield token
        logits = runner.step(token)


def _check_length(limit: int | None, prompt_tokens: int, max_new_tokens: int) -> None:
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise InputError(
            f"prompt ({prompt_tokens} tokens) and {max_new_tokens} new tokens exceed the model's context of {limit}; "
            "shorten the prompt or lower --max-new-tokens"
        )
