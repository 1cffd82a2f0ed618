"""`anybit chat`: a conversation in the terminal, streamed, with memory of what was said."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer

from anybit.cli.decoding import Decoding, Draft, Guard, Schedule
from anybit.cli.generate import Temperature, speed, writer
from anybit.cli.ledger import read_ledger, stored_precisions
from anybit.cli.options import Directory, Seed
from anybit.cli.output import say
from anybit.errors import InputError

Message = dict[str, str]
Reply = Callable[[list[Message]], Any]
"""Answers a conversation, streaming the text, and returns the engine's `GenerationResult`."""
Precision = Callable[[str], str]
"""Answers `/precision SPEC`, or without SPEC, with a line for a person."""

HELP = """/stats           speed, bits and guesses of the last answer, length of the conversation
/precision       bits per weight in use
/precision SPEC  other bits from the next answer on: 4, or by step 4@0,3@32
/reset           forget the conversation
/quit            leave (or Ctrl-D)"""


def chat(
    directory: Directory,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer")] = 256,
    schedule: Schedule = None,
    guard: Guard = False,
    draft: Draft = "none",
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Talk with a checkpoint. Type /help for the commands."""
    ledger = read_ledger(directory)
    decoding = Decoding(directory, ledger, guard=guard, draft=draft)
    decoding.follow(schedule)
    from anybit.engine.generate import generate
    from anybit.engine.open import open_engine

    model, tokenizer = open_engine(directory)
    fixed: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "chat": True}

    def reply(messages: list[Message]) -> Any:
        return generate(model, tokenizer, messages, on_text=writer(sys.stdout), **fixed, **decoding.options)

    precision = precision_command(decoding, stored_precisions(ledger), schedule)
    say(f"{directory.name}, {precision('')}; /help shows the commands")
    converse(typed_lines(), reply, precision)


def precision_command(decoding: Decoding, known: list[str], spec: str | None) -> Precision:
    """`/precision` for a checkpoint that can run at `known`, beginning with the schedule `spec`."""
    current = spec

    def command(wanted: str) -> str:
        nonlocal current
        if wanted:
            try:
                decoding.follow(wanted)
            except InputError as error:
                return str(error)
            current = wanted
        if decoding.stored is not None:
            return f"{decoding.stored:.2f} bits, the only precision stored here"
        return f"{current or 'stored'} bits; stored here: {', '.join(known[1:])}"

    return command


def converse(lines: Iterable[str], reply: Reply, precision: Precision) -> list[Message]:
    """Answer line after line until `/quit` or the end of input; returns the conversation that is left.

    Args:
        lines: what the person types, without line ends.
        reply: makes and streams one answer.
        precision: shows or changes the bits in use.
    """
    history: list[Message] = []
    last = "nothing said yet"
    for line in map(str.strip, lines):
        command, _, rest = line.partition(" ")
        if line == "/quit":
            break
        if line == "/help":
            say(HELP)
        elif line == "/stats":
            say(f"{last}; {len(history)} messages so far")
        elif command == "/precision":
            say(precision(rest.strip()))
        elif line == "/reset":
            history.clear()
        elif line.startswith("/"):
            say(f"unknown command {command}; /help shows them")
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
