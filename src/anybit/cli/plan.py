"""`anybit plan`: what a recipe would cost, before doing it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from anybit.cli.options import Json, Model, Overrides, Recipe, parse_size
from anybit.cli.output import print_json
from anybit.cli.quantize import show_plan
from anybit.errors import InputError, PromiseError
from anybit.report.words import size


def plan(
    model: Model,
    recipe: Recipe = "gptq-w4",
    max_size: Annotated[str | None, typer.Option(metavar="S", help="Fail (exit 3) above this size, e.g. 90MB")] = None,
    max_kl: Annotated[float | None, typer.Option(metavar="X", help="Fail (exit 3) above this KL divergence")] = None,
    min_tokens_per_second: Annotated[
        float | None, typer.Option(metavar="Y", help="Fail (exit 3) below this decoding speed")
    ] = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nobody changes it
    dry_run: Annotated[  # noqa: ARG001 - see its help
        bool, typer.Option("--dry-run", help="A plan never writes anything; accepted for habit")
    ] = False,
    json: Json = False,
) -> None:
    """Predict size, memory, time and quality.

    What this version cannot predict is null, never guessed.
    """
    from anybit.job import plan as make_plan

    limit = None if max_size is None else parse_size(max_size, "--max-size")
    result = make_plan(model, recipe=recipe, overrides=overrides)
    check_limits(result["predicted"], max_size=limit, max_kl=max_kl, min_speed=min_tokens_per_second)
    if json:
        print_json(result)
    else:
        show_plan(result)


def check_limits(
    predicted: dict[str, Any],
    *,
    max_size: int | None = None,
    max_kl: float | None = None,
    min_speed: float | None = None,
) -> None:
    """Compare predictions with the asked limits (None: no limit).

    Raises:
        PromiseError: a prediction is beyond its limit.
        InputError: a limit was asked for something this version does not predict.
    """
    limits = (("--max-size", "size_bytes", max_size), ("--max-kl", "kl", max_kl))
    for flag, key, limit in (*limits, ("--min-tokens-per-second", "tokens_per_second", min_speed)):
        value = predicted.get(key)
        if limit is None:
            continue
        if value is None:
            raise InputError(
                f"{flag}: this version does not predict {key}; quantize, then measure it with `anybit eval`"
            )
        if value < limit if flag.startswith("--min") else value > limit:
            shown = f"{size(value)} > {size(limit)}" if key == "size_bytes" else f"{value} against {limit}"
            raise PromiseError(f"{flag}: predicted {key} {shown}; try fewer bits, e.g. --set weights.bits=3")
