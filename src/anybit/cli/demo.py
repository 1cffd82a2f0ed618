"""`anybit demo`: the main job on the model that comes along, from quantizing to a report."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.calibration.progress import Progress
from anybit.cli.options import Json, Overwrite, Resume
from anybit.cli.output import print_json, say, say_facts
from anybit.cli.progress import progress_bars
from anybit.errors import InputError
from anybit.machine import machine
from anybit.report.words import quality_words, size

PROMPT = "Explain in two sentences why the sky is blue."


@dataclass(frozen=True)
class Size:
    """How much work a demo does. Windows are `ctx` tokens long; calibration and test text never overlap."""

    samples: int = 32
    ctx: int = 512
    test_windows: int = 16
    new_tokens: int = 64


QUICK = Size(samples=8, ctx=256, test_windows=4, new_tokens=24)


@dataclass(frozen=True)
class Steps:
    """The library calls a demo makes, so that a test can watch them."""

    quantize: Callable[..., dict[str, Any]]
    evaluate: Callable[..., dict[str, Any]]
    generate: Callable[[str | Path, str, int], Any]  # model, prompt, new tokens -> GenerationResult


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the checkpoint and the report go")] = Path(
        "anybit-demo"
    ),
    recipe: Annotated[str, typer.Option(metavar="NAME_OR_YAML", help="Recipe to show")] = "gptq-w4",
    quick: Annotated[
        bool, typer.Option("--quick", help="Less calibration, less test text: a minute, rougher numbers")
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """The main job on the model that comes along.

    Quantizes it, compares it with the float model on unseen text, generates with both and writes a report.
    """
    check_out(out, resume=resume, overwrite=overwrite)
    with progress_bars() as progress:
        amount = QUICK if quick else Size()
        data = run_demo(out, recipe, amount, library_steps(), progress, resume=resume, overwrite=overwrite)
    if json:
        print_json(data)
    else:
        show(data)


def check_out(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to write among files that are already there.

    Raises:
        InputError: `out` is a file, or a directory that holds something, and neither flag allows it.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a directory")
    if out.is_dir() and any(out.iterdir()) and not (resume or overwrite):
        raise InputError(f"--out {out} is not empty; add --overwrite to replace it, --resume to go on, or name another")


def run_demo(
    out: Path, recipe: str, amount: Size, steps: Steps, progress: Progress, *, resume: bool, overwrite: bool
) -> dict[str, Any]:
    """The main job: quantize `demo` into out/checkpoint, evaluate, generate twice, write out/report.html.

    Returns:
        The JSON of `anybit demo --json`.
    """
    from anybit.report.page import write_report

    checkpoint, page = out / "checkpoint", out / "report.html"
    made = steps.quantize(
        "demo",
        recipe=recipe,
        out=str(checkpoint),
        samples=amount.samples,
        seq_len=amount.ctx,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
    quality = steps.evaluate(
        checkpoint,
        text="wiki-test",
        baseline="demo",
        ctx=amount.ctx,
        max_tokens=amount.test_windows * amount.ctx,
        progress=progress,
    )
    progress("generate", 0, 2)
    texts = {"float": steps.generate("demo", PROMPT, amount.new_tokens)}
    progress("generate", 1, 2)
    texts["quantized"] = steps.generate(checkpoint, PROMPT, amount.new_tokens)
    progress("generate", 2, 2)
    data = results(made, quality, texts) | {"report": str(page)}
    ledger = json_module.loads(Path(made["ledger"]).read_text(encoding="utf-8"))
    command = f"anybit demo --recipe {recipe}" + (" --quick" if amount == QUICK else "")
    write_report(report_data(data, made, ledger, command), page)
    return data


def results(made: dict[str, Any], quality: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
    """One flat summary of the three steps."""
    return {
        "model": "demo",
        "recipe": made["recipe"],
        "perplexity_float": quality["baseline_perplexity"],
        "perplexity": quality["perplexity"],
        "bits_per_weight": made["bits_per_weight"],
        "size_bytes": made["size_bytes"],
        "decode_tokens_per_second": texts["quantized"].decode_tokens_per_second,
        "decode_tokens_per_second_float": texts["float"].decode_tokens_per_second,
        "prompt": PROMPT,
        "text": texts["quantized"].text,
        "text_float": texts["float"].text,
        "seconds": made["seconds"],
        "peak_rss_bytes": made["peak_rss_bytes"],
        "quality": quality,
    }


def report_data(data: dict[str, Any], made: dict[str, Any], ledger: dict[str, Any], command: str) -> dict[str, Any]:
    """What `write_report` needs, see `anybit.report.page`."""
    return {
        "title": f"anybit demo: {data['recipe']}",
        "ledger": ledger,
        "quality": data["quality"],
        "sample": {
            "prompt": data["prompt"],
            "float": data["text_float"],
            "quantized": data["text"],
            "float_tokens_per_second": data["decode_tokens_per_second_float"],
            "quantized_tokens_per_second": data["decode_tokens_per_second"],
        },
        "run": {
            "command": command,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "seconds": made["seconds"],
            "peak_rss_bytes": made["peak_rss_bytes"],
            **machine(),
        },
    }


def library_steps() -> Steps:
    """The real steps. Imported here, because they bring torch and transformers."""
    import anybit
    from anybit.evaluate.run import evaluate

    return Steps(anybit.quantize, evaluate, generate_with)


def generate_with(model: str | Path, prompt: str, new_tokens: int) -> Any:
    """Greedy answer of a float model or of a checkpoint (on its fastest engine), as a `GenerationResult`."""
    from anybit.engine.generate import generate
    from anybit.engine.open import open_engine
    from anybit.loading import is_anybit_directory, load_any

    network, tokenizer = open_engine(model) if is_anybit_directory(model) else load_any(model)
    return generate(network, tokenizer, prompt, max_new_tokens=new_tokens, chat=True)


def show(data: dict[str, Any]) -> None:
    """Print a demo for a person."""
    say_facts(
        {
            "recipe": data["recipe"],
            "size": f"{size(data['size_bytes'])}, {data['bits_per_weight']:.3f} bits per weight",
            "perplexity": f"{data['perplexity']:.3f}, float model {data['perplexity_float']:.3f}",
            "decode": f"{data['decode_tokens_per_second']:.1f} tokens/s",
            "report": data["report"],
        }
    )
    say(*quality_words(data["quality"]), "", f"> {data['prompt']}", data["text"])
