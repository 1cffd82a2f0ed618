"""Generation with any Hugging Face causal language model: prefill once, then one token at a time.

The plain loop, without drafting and precision schedules, whose greedy output equals `model.generate`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from anybit.engine.detokenize import Detokenizer
from anybit.errors import InputError, PromiseError
from anybit.layers.linear import Terms

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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
    _check_length(model, len(prompt_ids), max_new_tokens)
    sampler, detokenizer = _Sampler(temperature, seed, model.device), Detokenizer(tokenizer)
    ends = end_tokens(model, tokenizer)
    token_ids: list[int] = []
    pieces: list[str] = []
    clock = [time.perf_counter()]  # start, then the arrival of every token
    for token in islice(_tokens(model, prompt_ids, sampler), max_new_tokens):
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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message], *, chat: bool) -> list[int]:
    """Token ids of a prompt, through the chat template when `chat`.

    Raises:
        InputError: no chat template, or no token at all.
    """
    if not chat:
        if not isinstance(prompt, str):
            raise InputError("a prompt of several messages needs chat=True")
        encoded = tokenizer(prompt)
    elif not tokenizer.chat_template:
        raise InputError("this model's tokenizer has no chat template; give a plain prompt instead (without --chat)")
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        encoded = cast(
            BatchEncoding, tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        )
    ids = list(encoded["input_ids"])
    if not ids:
        raise InputError("the prompt is empty; give at least one token of text")
    return ids


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end a text: those of the generation config, else the tokenizer's."""
    config = model.generation_config
    ends = config.eos_token_id if config is not None else None
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


class _Sampler:
    """Chooses a token from logits [vocabulary]; owns its random state so that a seed means one text."""

    def __init__(self, temperature: float, seed: int, device: torch.device) -> None:
        self._temperature = temperature
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        logits = logits.float()
        if not logits.max().isfinite():  # the maximum of a row with a NaN is NaN
            raise PromiseError("the model gives NaN or infinite logits; inspect its scales and norms")
        if self._temperature == 0:
            return int(logits.argmax())
        # softmax is unchanged by a shift; shifting first keeps tiny temperatures from overflowing to inf - inf
        probabilities = ((logits - logits.max()) / self._temperature).softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def _tokens(model: PreTrainedModel, prompt_ids: list[int], sampler: _Sampler) -> Iterator[int]:
    """Endless tokens after the prompt, each one forward pass."""
    # only the last position's logits are wanted: [prompt, vocabulary] would be the largest tensor of the whole run
    accepts = inspect.signature(model.forward).parameters
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
    step = torch.tensor([prompt_ids], device=model.device)
    cache = None
    quantized = any(isinstance(module, Terms) for module in model.modules())
    while True:
        with torch.inference_mode(), _torch_threads(1 if quantized and cache is not None else None):
            output = model(input_ids=step, past_key_values=cache, use_cache=True, **only_last)
            token = sampler(output.logits[0, -1])
        yield token
        cache = output.past_key_values
        step = torch.tensor([[token]], device=model.device)


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    """Run the body with this many torch threads, None: as many as before.

    In a decode step our own threads do the work that is worth sharing, and torch has only small operations left. On a
    busy machine, sharing those made attention alone take 100 times as long (kernels/linear_a16/NOTES.md).
    """
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_length(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise InputError(
            f"prompt ({prompt_tokens} tokens) and {max_new_tokens} new tokens exceed the model's context of {limit}; "
            "shorten the prompt or lower --max-new-tokens"
        )
