"""One choice of an answer: pieces of tokens become text that no stop string is seen in, with what is known of each token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anybit.engine.detokenize import Detokenizer
from anybit.engine.tokenizer import Tokenizer
from anybit.serving.batch.request import Piece, TokenLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    AnyTokenizer = PreTrainedTokenizerBase | Tokenizer


class Stops:
    """Lets text through up to the first stop string; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is certain to be seen; nothing after a stop string was `found`."""
        if self.found:
            return ""
        held = self._held + text
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back at the end."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Part:
    """What a piece adds to an answer: text, and of its tokens the ids, precisions and log-probabilities."""

    text: str
    token_ids: tuple[int, ...] = ()
    bits: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: str | None = None


@dataclass
class Answer:
    """One choice.

    Attributes:
        finish: why it is complete, as OpenAI says it: "stop" or "length"; None while it is not.
        tokens: generated.
        bits: how many tokens were made at each precision.
        cached: tokens of the prompt that were not read again.
        prompt_logprobs: of the prompt's tokens, where asked for.
    """

    tokenizer: AnyTokenizer
    ends: frozenset[int]
    stops: Stops
    finish: str | None = None
    tokens: int = 0
    bits: Counter[int] = field(default_factory=Counter)
    cached: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()

    def __post_init__(self) -> None:
        self._text = Detokenizer(self.tokenizer)

    def push(self, piece: Piece) -> Part:
        """What `piece` adds; once `finish` is set nothing more is wanted."""
        self.cached += piece.cached_tokens
        self.prompt_logprobs += piece.prompt_logprobs
        taken, text = 0, ""
        for token in piece.token_ids:
            taken += 1
            text += self.stops.push(self._text.push(token) if token not in self.ends else "")
            if self.stops.found:
                break
        self.tokens += taken
        self.bits.update(piece.bits[:taken])
        if self.stops.found:
            self.finish = "stop"
        elif piece.finish:
            text += self.stops.push(self._text.flush())
            self.finish = "stop" if self.stops.found else piece.finish
            text += self.stops.flush()
        return Part(text, piece.token_ids[:taken], piece.bits[:taken], piece.logprobs[:taken], self.finish)

    def word(self, token: int) -> str:
        """A token as text; special ones by name."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False))
