"""`anybit schedule tune|train|show`: when the precision falls while a nested model generates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.cli.ledger import read_ledger
from anybit.cli.options import Directory, Json
from anybit.cli.output import print_json, say, say_facts, say_table
from anybit.cli.progress import progress_bars
from anybit.errors import InputError

Chain = Annotated[
    str | None, typer.Option(metavar="4,3,2", help="Precisions to fall through; default: the stored ones up to 4")
]
Baseline = Annotated[str | None, typer.Option(metavar="MODEL", help="Float model to agree with; default: the ledger's")]
Engine = Annotated[
    str, typer.Option(metavar="auto|native|torch", help="What runs the model; auto: native where it can")
]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Default: where `generate --schedule` finds it, in DIR/schedules")
]


def tune(
    directory: Directory,
    task: Annotated[
        str, typer.Option(metavar="NAME", help="summarise, continue, extract, translate; cnn-dm ... from the hub")
    ],
    chain: Chain = None,
    target: Annotated[
        str | None, typer.Option(metavar="'rouge-loss<=0.02'", help="Share of ROUGE-L that may be lost; the default")
    ] = None,
    mean_bits: Annotated[float | None, typer.Option(metavar="X", help="Instead: the best within X bits a step")] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Validation prompts")] = 32,
    max_new_tokens: Annotated[int | None, typer.Option(metavar="L", min=3, help="Default: the task's")] = None,
    out: Out = None,
    baseline: Baseline = None,
    engine: Engine = "auto",
    json: Json = False,
) -> None:
    """Choose the switch points of a task.

    Texts are generated with every candidate on the task's validation split and compared with the float model's. Texts made
    once are kept in the cache directory, so a run that was interrupted goes on where it stopped.
    """
    read_ledger(directory)
    from anybit.evaluate.schedules.search import parse_target

    goal, precisions = parse_target(target, mean_bits), parse_chain(chain)
    from anybit.evaluate.schedules.subject import Subject
    from anybit.evaluate.schedules.tune import tune as run

    subject = Subject(directory, baseline, engine)
    with progress_bars() as progress:
        facts = run(
            subject,
            task,
            target=goal,
            chain=precisions,
            samples=samples,
            length=max_new_tokens,
            out=out,
            progress=progress,
        )
    if json:
        print_json(facts)
        return
    show_options(facts)
    say(
        f"wrote {facts['out']}; use it with `anybit generate {directory} --schedule {out or 'task:' + task} --prompt ...`"
    )


def train(
    directory: Directory,
    task: Annotated[
        str, typer.Option(metavar="A,B", help="Tasks whose training prompts are mixed")
    ] = "summarise,continue,extract,translate",
    chain: Chain = None,
    samples: Annotated[int, typer.Option(metavar="N", min=20, help="Prompts in all")] = 256,
    max_new_tokens: Annotated[int, typer.Option(metavar="L", min=3, help="Length of the texts labels come from")] = 96,
    trials: Annotated[int, typer.Option(metavar="N", min=0, help="Search hyper-parameters N times (needs optuna)")] = 0,
    paper_exact: Annotated[
        bool, typer.Option("--paper-exact", help="Train through the paper's double softmax")
    ] = False,
    out: Out = None,
    baseline: Baseline = None,
    engine: Engine = "auto",
    json: Json = False,
) -> None:
    """Train a schedule that looks at the prompt.

    Every prompt is labelled with the earliest switch that loses nothing against never switching; a small network learns it
    from the keys and values of the last layer.
    """
    read_ledger(directory)
    precisions = parse_chain(chain)
    from anybit.evaluate.schedules.fit import Settings
    from anybit.evaluate.schedules.subject import Subject
    from anybit.evaluate.schedules.train import train as run

    subject = Subject(directory, baseline, engine)
    with progress_bars() as progress:
        facts = run(
            subject, task.split(","), chain=precisions, samples=samples, length=max_new_tokens,
            settings=Settings(paper_exact=paper_exact), trials=trials, out=out, progress=progress,
        )  # fmt: skip
    if json:
        print_json(facts)
        return
    show_pairs(facts)
    say(f"wrote {facts['out']}; use it with `anybit generate {directory} --schedule {out or 'auto'} --prompt ...`")


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Schedule written by `tune` or `train`")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw what was tried, as one page")] = None,
    json: Json = False,
) -> None:
    """Show what a schedule file holds."""
    from anybit.engine.schedulers.artefact import read

    facts, heads = read(file)
    if html is not None:
        draw(facts, html)
    if json:
        print_json(facts | {"parameters": sum(tensor.size for head in heads for tensor in head.values())})
        return
    say_facts(
        {
            "kind": facts["kind"],
            "task": facts.get("task") or ", ".join(facts.get("tasks", [])),
            "precisions": ", ".join(map(str, facts["precisions"])),
            "prompt read at": f"{facts['prefill']} bits",
            "new tokens": facts.get("length"),
            "checkpoint": facts["fingerprint"][:16],
        }
    )
    (show_options if facts["kind"] == "static" else show_pairs)(facts)


def draw(facts: dict[str, Any], path: Path) -> None:
    """The page of a tuned schedule: bits at every step and quality against bits of everything that was tried.

    Raises:
        InputError: a schedule that was trained: it decides for each prompt.
    """
    if "options" not in facts:
        raise InputError(f"--html {path}: only tuned schedules have alternatives to draw; leave it out")
    from anybit.engine.schedule import parse_schedule
    from anybit.report.page import write_report

    length, rows = int(facts["length"]), []
    for option in facts["options"]:
        state = parse_schedule(option["schedule"]).start(None, length)  # type: ignore[arg-type]  # looks at no features
        top = option["rouge"] - option["difference"]  # of the chain's highest precision
        rows.append(
            {key: option[key] for key in ("bits", "rouge")}
            | {
                "name": f"prompt {option['prefill']}, {option['schedule']}",
                "group": f"prompt at {option['prefill']} bits",
            }
            | {"rouge_low": top + option["low"], "rouge_high": top + option["high"]}
            | {"bits_per_step": [state.bits(step) for step in range(length)]}
        )
    title = f"Schedules tried for {facts['task']}"
    write_report({"title": title, "schedules": {"rows": rows, "prompts": facts["samples"], "length": length}}, path)
    say(f"wrote {path}")


def parse_chain(text: str | None) -> tuple[int, ...] | None:
    """Precisions of `--chain`.

    Raises:
        InputError: not falling numbers.
    """
    if text is None:
        return None
    try:
        chain = tuple(int(part) for part in text.split(","))
    except ValueError:
        chain = ()
    if not chain or list(chain) != sorted(set(chain), reverse=True):
        raise InputError(f"--chain {text}: write falling precisions such as 4,3,2")
    return chain


def show_options(facts: dict[str, Any]) -> None:
    """The schedules that were tried, the chosen one marked."""
    chosen = facts["prefill"], facts["schedule"]
    rows = []
    for option in facts["options"]:
        change = f"{option['difference']:+.3f} [{option['low']:+.3f}, {option['high']:+.3f}]"
        mark = "<-" if (option["prefill"], option["schedule"]) == chosen else ""
        rows.append(
            [option["prefill"], option["schedule"], f"{option['bits']:.2f}", f"{option['rouge']:.3f}", change, mark]
        )
    say_table(["prompt", "schedule", "bits", "ROUGE-L", "change (95 %)", ""], rows, right=["prompt", "bits", "ROUGE-L"])


def show_pairs(facts: dict[str, Any]) -> None:
    """How training went, pair by pair; a head that always says the same is told."""
    for pair in facts["pairs"]:
        high, low = pair["pair"]
        say_facts(
            {
                f"{high} to {low} bits": f"{pair['examples']} examples",
                "labels": pair["labels"],
                "predictions": pair["predictions"],
                "evaluation loss": f"{pair['eval_loss']:.3f} (balanced; {pair['chance_loss']:.3f} is chance)",
                "accuracy": f"{pair['eval_accuracy']:.2f} (always the commonest class: {pair['eval_accuracy_prior']:.2f})",
            }
        )
        if pair["collapsed"]:
            say("warning: this head always gives the same answer: it is a static schedule; use `anybit schedule tune`")
