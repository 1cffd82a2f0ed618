"""Generation speed of a model, native or any Hugging Face causal language model, through the engine's own loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anybit.engine.generate import generate
from anybit.engine.native import NativeModel

_WARM_UP_TOKENS = 2


def measure_generation(
    model: PreTrainedModel | NativeModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Generate once after a short warm-up (first calls allocate, repack and compile) and report the speeds.

    Returns:
        `text, tokens, prompt_tokens, prefill_tokens_per_second, decode_tokens_per_second`, as in `GenerationResult`.
    """
    generate(model, tokenizer, prompt, max_new_tokens=_WARM_UP_TOKENS)
    result = generate(
        model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, on_text=on_text
    )
    return {
        "text": result.text,
        "tokens": result.tokens,
        "prompt_tokens": result.prompt_tokens,
        "prefill_tokens_per_second": result.prefill_tokens_per_second,
        "decode_tokens_per_second": result.decode_tokens_per_second,
    }
