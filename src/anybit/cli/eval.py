"""`anybit eval`: perplexity of a checkpoint on a text, how far it is from the float model, and lm-eval's tasks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.cli.ledger import chosen_precision, read_ledger
from anybit.cli.options import Directory, Json
from anybit.cli.output import print_json, say, say_facts
from anybit.cli.progress import progress_bars
from anybit.errors import InputError
from anybit.integrations.extras import require
from anybit.report.words import quality_words


def evaluate(
    directory: Directory,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE_OR_BUILTIN", help="Text file, or held-out text that comes along: `wiki-test`"),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Float model to compare with, token by token")
    ] = None,
    ctx: Annotated[int, typer.Option(min=2, help="Tokens per window")] = 512,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", min=2, help="Stop after this many tokens")] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="P", help="Bits to read nested weights with; default: all stored")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Tasks of lm-eval; wiki-cloze, wiki-text, topics-cloze, topics-text come along"
        ),
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with lm-eval tasks of your own (YAML)")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Documents of each task; default: all")] = None,
    json: Json = False,
) -> None:
    """Measure perplexity, distance from a float model, and scores on tasks.

    Perplexity convention: non-overlapping windows of --ctx tokens, the first token of a window is not scored.
    """
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if text is None and not names:
        raise InputError("nothing to measure; give --text FILE_OR_BUILTIN or --tasks A,B")
    if not names and (task_path or limit):
        raise InputError("--task-path and --limit say how to score tasks; give --tasks A,B too")
    bits = None if precision is None else chosen_precision(read_ledger(directory), "--precision", precision)
    result: dict[str, Any] = {"model": str(directory)}
    if text is not None:
        from anybit.evaluate.run import evaluate as measure

        with progress_bars() as progress:
            sizes: dict[str, Any] = {"ctx": ctx, "max_tokens": max_tokens}
            result = measure(directory, text=text, baseline=baseline, precision=bits, progress=progress, **sizes)
    if names:
        result |= score_tasks(directory, names, baseline, precision=bits, task_path=task_path, limit=limit)
    if json:
        print_json(result)
    else:
        show(result)


def score_tasks(directory: Path, names: list[str], baseline: str | None, **options: Any) -> dict[str, Any]:
    """`tasks`: metrics by task of the checkpoint; `baseline_tasks`: of the float model, where one is given."""
    require("lm_eval", "--tasks", "lm-eval")
    # It warns of what is meant here: a model that is loaded already.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from anybit.integrations.lm_eval import score

    found = {"tasks": score(directory, names, **options)}
    if baseline is not None:
        found["baseline_tasks"] = score(baseline, names, **options | {"precision": None})
    return found


def show(result: dict[str, Any]) -> None:
    """Print an evaluation for a person."""
    for key, title in (("tasks", ""), ("baseline_tasks", "float model: ")):
        for task, metrics in result.get(key, {}).items():
            say(f"{title}{task}  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    if "perplexity" not in result:
        return
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
