"""`anybit chat`: a conversation in the terminal, streamed, with memory of what was said."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer

from anybit.cli.generate import Temperature, speed, writer
from anybit.cli.ledger import mean_code_bits, read_ledger
from anybit.cli.options import Directory, Seed
from anybit.cli.output import say

Message = dict[str, str]
Reply = Callable[[list[Message]], Any]
"""Answers a conversation, streaming the text, and returns the engine's `GenerationResult`."""

HELP = """/stats      speed of the last answer and length of the conversation
/precision  bits per weight in use
/reset      forget the conversation
/quit       leave (or Ctrl-D)"""


def chat(
    directory: Directory,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer")] = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Talk with a checkpoint. Type /help for the commands."""
    bits = mean_code_bits(read_ledger(directory))
    from anybit.engine.generate import generate
    from anybit.engine.open import open_engine

    model, tokenizer = open_engine(directory)

    def reply(messages: list[Message]) -> Any:
        return generate(
            model,
            tokenizer,
            messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            on_text=writer(sys.stdout),
            chat=True,
        )

    say(f"{directory.name}, {bits:.2f} bits; /help shows the commands")
    converse(typed_lines(), reply, bits)


def converse(lines: Iterable[str], reply: Reply, bits: float) -> list[Message]:
    """Answer line after line until `/quit` or the end of input; returns the conversation that is left.

    Args:
        lines: what the person types, without line ends.
        reply: makes and streams one answer.
        bits: code bits per weight in use, for `/precision`.
    """
    history: list[Message] = []
    last = "nothing said yet"
    for line in map(str.strip, lines):
        if line == "/quit":
            break
        if line == "/help":
            say(HELP)
        elif line == "/stats":
            say(f"{last}; {len(history)} messages so far")
        elif line == "/precision":
            say(f"{bits:.2f} bits per weight, the only precision stored here that this version can run")
        elif line == "/reset":
            history.clear()
        elif line.startswith("/"):
            say(f"unknown command {line.split()[0]}; /help shows them")
        elif line:
            history.append({"role": "user", "content": line})
            result = reply(history)
            print()
            history.append({"role": "assistant", "content": result.text})
            last = speed(result)
    return history


def typed_lines() -> Iterator[str]:
    """Lines of standard input, with a prompt when a person is there."""
    prompt = "\n> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
