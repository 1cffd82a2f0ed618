"""Tool calls of models that write `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` into their text (Hermes, Qwen)."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def known(template: str | None) -> bool:
    """Whether a chat template shows tools to its model."""
    return template is not None and "tools" in template


def parse(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text without its tool calls, and these as OpenAI says them; text that is not quite a call stays text."""
    calls: list[dict[str, Any]] = []

    def take(found: re.Match[str]) -> str:
        try:
            call = json.loads(found[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError, TypeError):
            return found[0]
        if not isinstance(name, str):
            return found[0]
        words = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        function = {"name": name, "arguments": words}
        calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
        return ""

    left = _CALL.sub(take, text)
    return (left.strip() if calls else left), calls
