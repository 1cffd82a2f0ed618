"""`anybit bench`: our speed beside other engines' and beside the machine's limits."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.cli.options import Json, check_directory
from anybit.cli.output import print_json, say, say_facts, say_table
from anybit.errors import InputError
from anybit.machine import cores, machine

SHAPES = re.compile(r"\d+x\d+(,\d+x\d+)*")


def bench(
    subject: Annotated[
        str,
        typer.Argument(metavar="DIR_OR_SHAPES", help="Checkpoint, or weight shapes N x K such as 4096x11008,4096x4096"),
    ],
    rivals: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="llama.cpp, openvino, torch, torchao; a variant behind a colon, as in llama.cpp:Q4_K_M; '' for none",
        ),
    ] = "llama.cpp,openvino,torch",
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=256, help="Threads of everybody; default all cores")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Float model for the rivals; default the ledger's")
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Another checkpoint to measure in the same rounds; may be repeated"),
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Turns that everybody takes")] = 7,
    prompt: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of prefill")] = 512,
    new: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of decode")] = 128,
    json: Json = False,
) -> None:
    """Measure speed beside other engines, in one run.

    Correctness is checked first. Rivals run in environments of their own, which `make rivals` builds; a missing one is
    named and left out. Ratios are medians of each round's: everybody takes turns, so a busy machine hurts all alike.
    """
    from anybit.evaluate.rivals.table import parse_rivals

    wanted = parse_rivals(rivals)
    count = threads or cores()
    if SHAPES.fullmatch(subject):
        from anybit.evaluate.bench_kernels import kernel_rows

        shapes = [(int(n), int(k)) for n, _, k in (word.partition("x") for word in subject.split(","))]
        if beside:
            raise InputError("--beside takes checkpoints and goes with a checkpoint, not with shapes")
        if not all(n and k for n, k in shapes):
            raise InputError(f"{subject}: a shape has two positive sizes, such as 4096x11008")
        result = kernel_rows(shapes, count, rounds=rounds, say=say)
    else:
        from anybit.evaluate.bench import bench as measure

        options: dict[str, Any] = {"threads": count, "reference": reference, "rounds": rounds}
        directories = [check_directory(path) for path in (Path(subject), *(beside or []))]
        result = measure(directories, wanted, **options, prompt=prompt, new=new, say=say)
    limits = {"peaks": result.pop("peaks"), "busy_cores": result.pop("busy_cores")}
    result = {"machine": machine() | limits, **result, "command": command(sys.argv[1:])}
    if json:
        print_json(result)
    else:
        show(result)


def command(words: list[str]) -> str:
    """The command line as one would type it again."""
    return " ".join(["anybit", *words])


def show(result: dict[str, Any]) -> None:
    """Print a measurement for a person."""
    peaks = result["machine"]["peaks"]
    cache = (
        "" if peaks["beyond_cache"] else f" (buffer of {peaks['read_buffer'] >> 20} MiB only, part of it from cache)"
    )
    say_facts(
        {
            "processor": result["machine"]["processor"],
            "threads": peaks["threads"],
            "memory read": f"{peaks['read_bytes'] / 1e9:.1f} GB/s{cache}",
            "int8 vectors": f"{peaks['int8_vector'] / 1e9:.0f} GOPS",
            "int8 tiles": f"{peaks['int8_tiles'] / 1e9:.0f} GOPS" if peaks["int8_tiles"] else None,
        }
    )
    columns = ["what", "ours", "rival", "", "ratio", "spread", "of read", "of int8", "of VNNI"]
    say_table(columns, map(cells, result["rows"]), right=columns[1:3] + columns[4:])


def cells(row: dict[str, Any]) -> list[str | None]:
    """One row of the table."""
    low, high = row.get("ratio_spread") or (None, None)
    return [
        row["what"],
        f"{row['ours']:.1f} {row['unit']}",
        None if row["rival"] is None else f"{row['rival']:.1f}",
        row.get("rival_name"),
        None if row["ratio"] is None else f"{row['ratio']:.2f}x",
        None if low is None else f"{low:.2f}-{high:.2f}",
        percent(row["of_bandwidth"]),
        percent(row["of_peak"]),
        percent(row["of_vector_peak"]),
    ]


def percent(part: float | None) -> str | None:
    """A part as `87 %`."""
    return None if part is None else f"{100 * part:.0f} %"
