"""`anybit generate`: a prompt in, text out while it is made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from anybit.cli.decoding import Decoding, Draft, Guard, Prefill, Schedule
from anybit.cli.ledger import read_ledger
from anybit.cli.options import Directory, Json, Seed, require_available
from anybit.cli.output import print_json, say
from anybit.errors import FormatError, InputError
from anybit.formats.kv import KVSpec

Temperature = Annotated[float, typer.Option(metavar="T", min=0.0, help="0 takes the likeliest token every time")]


def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue")],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Stop after this many tokens")] = 128,
    prefill_precision: Prefill = None,
    schedule: Schedule = None,
    guard: Guard = False,
    draft: Draft = "none",
    seed: Seed = 0,
    temperature: Temperature = 0.0,
    engine: Annotated[
        str, typer.Option(metavar="auto|native|torch", help="What runs the model; auto: native where it can")
    ] = "auto",
    kv: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="Key-value cache: 16, 8, k8v4, 4-channel-sink64, 4-rotated; default: the checkpoint's"
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template")] = False,
    json: Json = False,
) -> None:
    """Continue a prompt, streamed.

    The text goes to stdout; with --json it streams to stderr, and stdout gets the object.
    """
    decoding = Decoding(directory, read_ledger(directory), guard=guard, draft=draft)
    decoding.read_prompts_at(prefill_precision)
    decoding.follow(schedule)
    require_available("--engine", engine, ["auto", "native", "torch"])
    if draft != "none" and engine == "torch":
        raise InputError(
            "--draft with --engine torch: float sums there depend on how many tokens a pass has, so drafting could "
            "change the text; use --engine native, or --draft none"
        )
    cache = cache_spec(kv)
    if not prompt:
        raise InputError("--prompt is empty; give the text to continue")
    from anybit.engine.generate import generate as run
    from anybit.engine.open import open_engine

    model, tokenizer = open_engine(directory, engine, cache)
    shown = writer(sys.stderr if json else sys.stdout)
    fixed: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "chat": chat}
    result = run(model, tokenizer, prompt, on_text=shown, **fixed, **decoding.options)
    print(file=sys.stderr if json else sys.stdout)
    if json:
        print_json(facts(result, decoding.stored))
    else:
        say(speed(result))


def cache_spec(text: str | None) -> KVSpec | None:
    """`--kv`. InputError: not a cache."""
    try:
        return None if text is None else KVSpec.parse(text)
    except FormatError as error:
        raise InputError(f"--kv: {error}") from None


def writer(stream: Any) -> Callable[[str], None]:
    """An `on_text` that shows every piece at once."""

    def write(piece: str) -> None:
        stream.write(piece)
        stream.flush()

    return write


def facts(result: Any, stored: float | None) -> dict[str, Any]:
    """The JSON of one generation.

    Args:
        result: a `GenerationResult` of the engine.
        stored: code bits per weight of a checkpoint with one precision, which is then both averages.
    """
    return {
        "text": result.text,
        "tokens": result.tokens,
        "prompt_tokens": result.prompt_tokens,
        "average_bits": result.bits.average if stored is None else stored,
        "average_bits_paper": result.bits.average_paper if stored is None else stored,
        "bits": {} if stored is not None else {str(bits): steps for bits, steps in result.bits.histogram.items()},
        "prefill_tokens_per_second": result.prefill_tokens_per_second,
        "decode_tokens_per_second": result.decode_tokens_per_second,
        "passes": result.passes,
        "drafted": result.drafted,
        "accepted": result.accepted,
        "guard": result.guard,
    }


def speed(result: Any) -> str:
    """One line about a generation for a person."""
    words = [
        f"{result.prompt_tokens} prompt tokens at {result.prefill_tokens_per_second:.1f}/s, "
        f"then {result.decode_tokens_per_second:.1f} tokens/s"
    ]
    if len(result.bits.histogram) > 1:
        steps = ", ".join(f"{count} steps at {bits}" for bits, count in result.bits.histogram.items())
        words.append(f"{result.bits.average:.2f} bits ({steps})")
    if result.drafted:
        words.append(f"{result.accepted} of {result.drafted} guesses right, {result.passes} passes")
    if result.guard:
        words.append(f"guard: {result.guard['probes']} probes, raised {result.guard['raised']} times")
    return "; ".join(words)
