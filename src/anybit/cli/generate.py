"""`anybit generate`: a prompt in, text out while it is made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from anybit.cli.ledger import mean_code_bits, read_ledger, stored_precisions
from anybit.cli.options import Directory, Json, Seed, require_available
from anybit.cli.output import print_json, say
from anybit.errors import InputError

Temperature = Annotated[float, typer.Option(metavar="T", min=0.0, help="0 takes the likeliest token every time")]


def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue")],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Stop after this many tokens")] = 128,
    prefill_precision: Annotated[
        str | None, typer.Option(metavar="P", help="Bits while reading the prompt; only the stored ones yet")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Bits per decode step; only the stored ones yet")
    ] = None,
    draft: Annotated[str, typer.Option(metavar="none", help="Guess tokens ahead; only `none` yet")] = "none",
    seed: Seed = 0,
    temperature: Temperature = 0.0,
    engine: Annotated[
        str, typer.Option(metavar="auto|native|torch", help="What runs the model; auto: native where it can")
    ] = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template")] = False,
    json: Json = False,
) -> None:
    """Continue a prompt, streamed.

    The text goes to stdout; with --json it streams to stderr, and stdout gets the object.
    """
    ledger = read_ledger(directory)
    stored = stored_precisions(ledger)
    require_available("--prefill-precision", prefill_precision, stored)
    require_available("--schedule", schedule, stored)
    require_available("--draft", draft, ["none"])
    require_available("--engine", engine, ["auto", "native", "torch"])
    if not prompt:
        raise InputError("--prompt is empty; give the text to continue")
    from anybit.engine.generate import generate as run
    from anybit.engine.open import open_engine

    model, tokenizer = open_engine(directory, engine)
    result = run(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        on_text=writer(sys.stderr if json else sys.stdout),
        chat=chat,
    )
    print(file=sys.stderr if json else sys.stdout)
    if json:
        print_json(facts(result, mean_code_bits(ledger)))
    else:
        say(speed(result))


def writer(stream: Any) -> Callable[[str], None]:
    """An `on_text` that shows every piece at once."""

    def write(piece: str) -> None:
        stream.write(piece)
        stream.flush()

    return write


def facts(result: Any, bits: float) -> dict[str, Any]:
    """The JSON of one generation. One precision runs the whole request, so both averages are that precision.

    Args:
        result: a `GenerationResult` of the engine.
        bits: code bits per weight in use.
    """
    return {
        "text": result.text,
        "tokens": result.tokens,
        "prompt_tokens": result.prompt_tokens,
        "average_bits": bits,
        "average_bits_paper": bits,
        "prefill_tokens_per_second": result.prefill_tokens_per_second,
        "decode_tokens_per_second": result.decode_tokens_per_second,
        "drafted": 0,
        "accepted": 0,
    }


def speed(result: Any) -> str:
    """One line about a generation for a person."""
    return (
        f"{result.prompt_tokens} prompt tokens at {result.prefill_tokens_per_second:.1f}/s, "
        f"then {result.decode_tokens_per_second:.1f} tokens/s"
    )
