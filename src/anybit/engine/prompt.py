"""A prompt as token ids, through the chat template where one is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anybit.engine.tokenizer import Tokenizer
from anybit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
"""One turn of a conversation: `{"role": "user", "content": "..."}`."""


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | Tokenizer,
    prompt: str | Sequence[Message],
    *,
    chat: bool,
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a prompt, through the chat template when `chat`; `tools`: JSON schemas that the template shows.

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
        asked: dict[str, Any] = {"tools": list(tools)} if tools else {}
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **asked)
    ids = list(encoded["input_ids"])
    if not ids:
        raise InputError("the prompt is empty; give at least one token of text")
    return ids


def check_length(limit: int | None, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise InputError when a text would outgrow the model's context; None: there is no limit."""
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise InputError(
            f"prompt ({prompt_tokens} tokens) and {max_new_tokens} new tokens exceed the model's context of {limit}; "
            "shorten the prompt or lower --max-new-tokens"
        )
