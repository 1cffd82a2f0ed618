"""What is asked of the batch, and what it brings back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from anybit.engine.schedule import Scheduler

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Request:
    """One text to continue.

    Attributes:
        prompt_ids: at least one token.
        max_new_tokens: >= 1, or 0 where only `echo_logprobs` are wanted.
        temperature: 0 for the likeliest token, else softmax(logits / temperature) is sampled.
        top_p: the likeliest tokens that together have this probability may be drawn, 0 < top_p <= 1.
        seed: of the sampling, >= 0; the draw of a token depends on it and the token's position alone.
        ends: ids that end the text; None: the model's.
        prefill_precision: bits for the prompt; None: all that are stored.
        schedule: bits of each decode step; None: all that are stored.
        draft: `none`, `ngram` or `lookup`; changes the speed only.
        logprobs: how many alternatives to report with each token, 0 to `MOST_LOGPROBS`; None: no log-probabilities at all.
        echo_logprobs: report the prompt's tokens, too.
        logit_bias: added to logits, by token id.
        presence_penalty, frequency_penalty: taken from the logits of tokens of the new text, once and for each occurrence.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ends: frozenset[int] | None = None
    prefill_precision: int | None = None
    schedule: Scheduler | None = None
    draft: str = "none"
    logprobs: int | None = None
    echo_logprobs: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether tokens are chosen from the model's own logits, by temperature alone."""
        return not (self.logit_bias or self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probability of a token, and the likeliest ones there: (id, log-probability), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one pass brought one request.

    Attributes:
        token_ids: new tokens; with finish "stop" the last one is the end token.
        bits: the precision each was made with.
        logprobs: of each new token, where asked for.
        prompt_logprobs: of each token of the prompt, in the first piece, where asked for; the first has none.
        finish: None while there is more to come; "stop", "length", "cancelled" or "error".
        error: one line, with finish "error".
        cached_tokens: of the prompt that were found in the cache; in the first piece.
    """

    token_ids: tuple[int, ...] = ()
    bits: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    finish: str | None = None
    error: str = ""
    cached_tokens: int = 0


@dataclass(frozen=True)
class Stats:
    """Since the start; `waiting`, `running` and `pages_free` now.

    Attributes:
        passes: of the model, prompts' included.
        preempted: requests that gave their pages away and read their text again later.
        prefix_tokens: prompt tokens that were found in the cache instead of being read.
        tokens_by_bits: new tokens by the precision they were made with.
    """

    waiting: int = 0
    running: int = 0
    pages_free: int = 0
    pages_total: int = 0
    passes: int = 0
    preempted: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens_by_bits: Mapping[int, int] = field(default_factory=dict)
