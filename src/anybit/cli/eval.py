"""`anybit eval`: perplexity of a checkpoint on a text, and how far it is from the float model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from anybit.cli.ledger import chosen_precision, read_ledger
from anybit.cli.options import Directory, Json
from anybit.cli.output import print_json, say, say_facts
from anybit.cli.progress import progress_bars
from anybit.errors import InputError
from anybit.report.words import quality_words


def evaluate(
    directory: Directory,
    text: Annotated[
        str, typer.Option(metavar="FILE_OR_BUILTIN", help="Text file, or held-out text that comes along: `wiki-test`")
    ],
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Float model to compare with, token by token")
    ] = None,
    ctx: Annotated[int, typer.Option(min=2, help="Tokens per window")] = 512,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", min=2, help="Stop after this many tokens")] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="P", help="Bits to read nested weights with; default: all stored")
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Tasks to score; none available yet")] = None,
    json: Json = False,
) -> None:
    """Measure perplexity, and distance from a float model.

    Perplexity convention: non-overlapping windows of --ctx tokens, the first token of a window is not scored.
    """
    bits = None if precision is None else chosen_precision(read_ledger(directory), "--precision", precision)
    if tasks is not None:
        raise InputError(f"--tasks {tasks}: tasks are not available in this version of anybit; leave --tasks out")
    from anybit.evaluate.run import evaluate as measure

    with progress_bars() as progress:
        sizes: dict[str, Any] = {"ctx": ctx, "max_tokens": max_tokens}
        result = measure(directory, text=text, baseline=baseline, precision=bits, progress=progress, **sizes)
    if json:
        print_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """Print an evaluation for a person."""
    say_facts(
        {
            "perplexity": f"{result['perplexity']:.3f} ± {result['stderr']:.3f}",
            "precision": f"{result['precision']} bits" if result["precision"] else None,
            "tokens": f"{result['tokens']} in windows of {result['ctx']}",
            "float model": _number(result, "baseline_perplexity", 3),
            "KL mean": _number(result, "kl_mean", 5),
            "KL p99": _number(result, "kl_p99", 5),
        }
    )
    say(*quality_words(result))


def _number(result: dict[str, Any], key: str, digits: int) -> str | None:
    return f"{result[key]:.{digits}f}" if key in result else None
