"""Token ids to text, a piece at a time, without ever showing half a character."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from anybit.engine.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Streaming decoder: `push` returns the text that became certain, `flush` what is left at the end.

    Some tokens are parts of a UTF-8 character and some tokenizers drop the space of a first token, so ids cannot be
    decoded one by one. Each step decodes a short run of ids that begins before the unseen ones and returns what the
    unseen ones add.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # shown ids that give context, then unseen ones
        self._shown = 0  # how many of `_ids` were returned as text

    def push(self, token: int) -> str:
        """Text completed by one more token; `""` while a character is incomplete."""
        self._ids.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """The rest; a character the model never completed is dropped."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._ids[: self._shown])
        after = self._decode(self._ids)
        if final:
            after = after.rstrip(_INCOMPLETE)
        elif after.endswith(_INCOMPLETE):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
