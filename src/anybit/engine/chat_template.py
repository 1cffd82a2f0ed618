"""Chat templates: Jinja that comes with a model, run in the sandbox and with the few additions that such templates expect
(transformers' `utils/chat_template_utils.py`)."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from anybit.errors import InputError

if TYPE_CHECKING:
    from jinja2 import Template


def render(
    template: str,
    conversation: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    specials: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The conversation as one text.

    Args:
        template: Jinja source.
        conversation: messages with `role` and `content`.
        add_generation_prompt: end with what begins an answer.
        specials: texts of special tokens by name, such as `bos_token`.
        tools: JSON schemas of functions that the model may ask for.

    Raises:
        InputError: the template refuses the conversation, or is no Jinja.
    """
    from jinja2 import TemplateError  # only who chats waits for it

    messages = [{key: value for key, value in message.items() if value is not None} for message in conversation]
    known = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
    try:
        return _compiled(template).render({**specials, **known})
    except (TemplateError, TypeError, ValueError) as error:  # the latter from what a client's fields hold
        raise InputError(f"the model's chat template refuses this conversation: {error}; change its messages") from None


@functools.cache
def _compiled(source: str) -> Template:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant said, for training; here it is only its body."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's name)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As it is, where Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
