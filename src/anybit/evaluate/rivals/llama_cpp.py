"""llama.cpp: converted and quantized by its own tools, measured with `llama-bench`."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from anybit.evaluate.rivals.cache import converted
from anybit.evaluate.rivals.contract import RivalFailed, Speed
from anybit.evaluate.rivals.home import HINT, rivals_home
from anybit.evaluate.rivals.process import CONVERT_SECONDS, MEASURE_SECONDS, run_command
from anybit.evaluate.rivals.stand_in import with_stand_in_tokenizer

IMATRIX_CHARACTERS = 200_000
IMATRIX_CHUNKS = 32
_CONVERTER = "convert_hf_to_gguf.py"


class LlamaCpp:
    """One GGUF type. The build of `make rivals` goes before one on PATH: it is made for this very machine.

    Args:
        variant: a type of `llama-quantize` such as Q4_0, Q4_K_M or Q8_0 (F16 leaves the weights alone), with
            `+imatrix` behind it to weigh errors by activations on calibration text.
    """

    name = "llama.cpp"

    def __init__(self, variant: str = "Q4_0") -> None:
        self.type, _, extra = variant.partition("+")
        if extra not in ("", "imatrix"):
            raise RivalFailed(f"llama.cpp:{variant}: after the type only +imatrix is known")
        self.imatrix = bool(extra)

    def missing(self) -> str:
        """See `Rival`."""
        absent = [tool for tool in ("llama-bench", "llama-quantize", _CONVERTER) if find(tool) is None]
        return f"{', '.join(absent)} not found on PATH or in {rivals_home()}; get it with `{HINT}`" if absent else ""

    def prepare(self, model: Path) -> Path:
        """The GGUF file of `model` in this type."""
        float_file = converted("llama.cpp-F16", model, lambda out: convert(model, out / "model.gguf")) / "model.gguf"
        if self.type == "F16":
            return float_file
        weights = ["--imatrix", importance(model, float_file)] if self.imatrix else []

        def quantize(out: Path) -> None:
            command = [tool("llama-quantize"), *weights, float_file, out / "model.gguf", self.type]
            run_command(command, seconds=CONVERT_SECONDS)

        name = f"llama.cpp-{self.type}{'-imatrix' if self.imatrix else ''}"
        return converted(name, model, quantize) / "model.gguf"

    def start(self, prepared: Path, threads: int) -> LlamaBench:
        """See `Rival`."""
        label = f"llama.cpp {self.type}" + (" imatrix" if self.imatrix else "")
        return LlamaBench(label, prepared.stat().st_size, prepared, threads)


@dataclass(frozen=True)
class LlamaBench:
    """`llama-bench` on one file; a process per measurement (the file is mapped, loading takes well under a second)."""

    label: str
    weight_bytes: int
    file: Path
    threads: int

    def measure(self, prompt_tokens: int, new_tokens: int) -> Speed:
        """See `Contestant`."""
        sizes = ["-p", str(prompt_tokens), "-n", str(new_tokens), "-t", str(self.threads)]
        command = [tool("llama-bench"), "-m", self.file, *sizes, "-r", "1", "-o", "json"]
        output = run_command(command, seconds=MEASURE_SECONDS)
        try:
            rows = json.loads(output)
            prefill = [float(row["avg_ts"]) for row in rows if row["n_prompt"] and not row["n_gen"]]
            decode = [float(row["avg_ts"]) for row in rows if row["n_gen"] and not row["n_prompt"]]
        except (ValueError, KeyError, TypeError) as error:
            raise RivalFailed(f"llama-bench wrote something else than expected ({type(error).__name__})") from None
        if len(prefill) != bool(prompt_tokens) or len(decode) != bool(new_tokens):
            raise RivalFailed("llama-bench left out a measurement")
        return Speed(prefill[0] if prefill else None, decode[0] if decode else None)

    def close(self) -> None:
        """Nothing stays open."""


def find(name: str) -> Path | None:
    """Where a tool of llama.cpp is."""
    home = rivals_home() / "llama.cpp"
    for path in (home / "build" / "bin" / name, home / "source" / name):
        if path.is_file():
            return path
    found = shutil.which(name)
    return Path(found) if found else None


def tool(name: str) -> Path:
    """Where a tool of llama.cpp is; RivalFailed when nowhere."""
    found = find(name)
    if found is None:
        raise RivalFailed(f"{name} not found; get it with `{HINT}`")
    return found


def convert(model: Path, target: Path) -> None:
    """Write `model` as float16 GGUF with llama.cpp's own converter, in our interpreter (it needs torch)."""
    script = tool(_CONVERTER)
    extra = rivals_home() / "llama.cpp" / "python"
    paths = [str(script.parent / "gguf-py"), str(extra), *filter(None, sys.path)]
    environment = {"PYTHONPATH": ":".join(paths)}
    command = [sys.executable, script, "--outtype", "f16", "--outfile", target]
    try:
        run_command([*command, model], seconds=CONVERT_SECONDS, env=environment)
    except RivalFailed as error:
        if "pre-tokenizer was not recognized" not in str(error):
            raise
        with with_stand_in_tokenizer(model, environment) as same_weights:
            run_command([*command, same_weights], seconds=CONVERT_SECONDS, env=environment)


def importance(model: Path, float_file: Path) -> Path:
    """The importance matrix of `model` on calibration text (`wiki`)."""
    from anybit.calibration.text import read_documents

    def build(out: Path) -> None:
        text = out / "calibration.txt"
        text.write_text("\n\n".join(read_documents("wiki"))[:IMATRIX_CHARACTERS], encoding="utf-8")
        size = ["-c", "512", "--chunks", str(IMATRIX_CHUNKS)]
        command = [tool("llama-imatrix"), "-m", float_file, "-f", text, "-o", out / "imatrix.gguf", *size]
        run_command(command, seconds=CONVERT_SECONDS)

    return converted("llama.cpp-imatrix", model, build) / "imatrix.gguf"
