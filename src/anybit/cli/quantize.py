"""`anybit quantize`: a model and a recipe in, one checkpoint with its ledger out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.cli.options import Json, Model, Overrides, Overwrite, Recipe, Resume, Seed, require_available
from anybit.cli.output import print_json, say_facts, say_table
from anybit.cli.progress import progress_bars
from anybit.integrations.extras import require
from anybit.report.words import duration, size


def quantize(
    model: Model,
    recipe: Recipe,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write; refused when it holds something")],
    calibration: Annotated[
        str,
        typer.Option(metavar="FILE_OR_BUILTIN", help="Text file, `wiki` or `topics`: what the model is calibrated on"),
    ] = "wiki",
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Calibration windows")] = 32,
    seq_len: Annotated[int, typer.Option(metavar="L", min=1, help="Tokens per calibration window")] = 512,
    seed: Seed = 0,
    max_ram: Annotated[str | None, typer.Option(metavar="SIZE", help="Stay below this memory, e.g. 8GiB")] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to compute")] = "cpu",
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nobody changes it
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; all cores unless said")] = None,
    block_inputs: Annotated[
        str,
        typer.Option(
            metavar="quantized|float",
            help="What a block is fitted to: outputs of quantized blocks, or of the float model",
        ),
    ] = "quantized",
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Share the blocks among N processes (Ray); needs --block-inputs float"),
    ] = None,
    allow_unseen_experts: Annotated[
        bool, typer.Option("--allow-unseen-experts", help="Round experts that saw no calibration token to nearest")
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing")] = False,
    json: Json = False,
) -> None:
    """Quantize MODEL with a recipe into a checkpoint.

    Ctrl-C leaves nothing half-written: go on later with --resume.
    """
    import anybit

    require_available("--device", device, ["cpu"])
    if dry_run:
        plan = anybit.plan(model, recipe=recipe, overrides=overrides, samples=samples, seq_len=seq_len)
        if json:
            print_json(plan)
        else:
            show_plan(plan)
        return
    with progress_bars() as progress:
        result = anybit.quantize(
            model,
            recipe=recipe,
            out=str(out),
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            max_ram=max_ram,
            overrides=overrides,
            resume=resume,
            overwrite=overwrite,
            allow_unseen_experts=allow_unseen_experts,
            threads=threads,
            block_inputs=block_inputs,
            spread=_spread(workers, threads),
            progress=progress,
        )
    if json:
        print_json(result)
    else:
        show_result(result, out)


def _spread(workers: int | None, threads: int | None) -> Any:
    """Who does the blocks: this process (None), or workers."""
    if workers is None:
        return None
    require("ray", "--workers", "ray")
    from anybit.integrations.ray import on_ray

    return on_ray(workers, threads)


def show_result(result: dict[str, Any], out: Path) -> None:
    """Print what `anybit.quantize` returned, and what to do next."""
    say_facts(
        {
            "recipe": result["recipe"],
            "bits per weight": f"{result['bits_per_weight']:.3f}  (codes, scales and everything else the layers store)",
            "size": size(result["size_bytes"]),
            "time": duration(result["seconds"]),
            "peak memory": size(result["peak_rss_bytes"]),
            "layers": result["layers"],
            "ledger": result["ledger"],
            "next": f"anybit inspect {out}   or   anybit chat {out}",
        }
    )


def show_plan(plan: dict[str, Any]) -> None:
    """Print a plan: totals as facts, tensors as a table. What was not predicted is said to be so."""
    predicted = plan["predicted"]
    shown = {"size_bytes": size, "peak_rss_bytes": size, "seconds": duration}
    facts: dict[str, object] = {"recipe": plan["choice"], "bits per weight": f"{plan['bits_per_weight']:.3f}"}
    for key, value in predicted.items():
        facts[key] = "not predicted in this version" if value is None else shown.get(key, str)(value)
    rows = plan["layers"]
    columns = list(rows[0]) if rows else []
    say_table(columns, ([row[key] for key in columns] for row in rows))
    say_facts(facts)
