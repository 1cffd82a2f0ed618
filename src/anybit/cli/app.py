"""The list of commands. One line each: name, function, and the example its `--help` ends with."""

from __future__ import annotations

from collections.abc import Callable

import typer

from anybit.cli.bench import bench
from anybit.cli.chat import chat
from anybit.cli.demo import demo
from anybit.cli.doctor import doctor
from anybit.cli.eval import evaluate
from anybit.cli.export import export
from anybit.cli.generate import generate
from anybit.cli.import_ import import_
from anybit.cli.inspect import inspect
from anybit.cli.plan import plan
from anybit.cli.quantize import quantize
from anybit.cli.recipes import recipes
from anybit.cli.schedule import show, train, tune
from anybit.cli.serve import serve

COMMANDS: tuple[tuple[str, Callable[..., None], str], ...] = (
    ("demo", demo, "anybit demo --out anybit-demo"),
    ("quantize", quantize, "anybit quantize demo --recipe gptq-w4 --out smol-w4 --set weights.bits=3"),
    ("recipes", recipes, "anybit recipes gptq-w4"),
    ("inspect", inspect, "anybit inspect smol-w4 --html smol-w4.html"),
    ("eval", evaluate, "anybit eval smol-w4 --text wiki-test --baseline demo --max-tokens 8192"),
    ("generate", generate, 'anybit generate smol-w4 --prompt "The capital of France is" --max-new-tokens 32'),
    ("chat", chat, "anybit chat smol-w4"),
    ("serve", serve, "anybit serve smol-w4 --port 8000"),
    ("schedule tune", tune, "anybit schedule tune smol-nested --task summarise --chain 4,3,2 --mean-bits 3.0"),
    ("schedule train", train, "anybit schedule train smol-nested --chain 4,3 --samples 256"),
    ("schedule show", show, "anybit schedule show smol-nested/schedules/summarise.json"),
    ("export", export, "anybit export smol-w4 --to compressed-tensors --out smol-w4-vllm"),
    ("import", import_, "anybit import SmolLM2.Q4_K_M.gguf --out smol-gguf"),
    ("plan", plan, "anybit plan demo --recipe gptq-w4 --max-size 90MB"),
    ("bench", bench, "anybit bench smol-w4 --rivals llama.cpp,openvino --threads 2"),
    ("doctor", doctor, "anybit doctor"),
)

# Plain help (no boxes): it reads the same in a terminal, in a pipe and in docs/cli.md.
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Low-bit language models: quantize, see what it costs, run.",
    epilog="Start with `anybit demo`: a small real model, quantized, compared with its float self, and a report.",
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
_schedule = typer.Typer(
    rich_markup_mode=None,
    help="When the precision falls while a nested model generates: tune it for a task, train it, show it.",
    epilog="\b\nExample:\n  anybit schedule tune smol-nested --task summarise",
)
for _name, _command, _example in COMMANDS:
    _group = _schedule if _name.startswith("schedule ") else app
    _group.command(_name.split()[-1], epilog=f"\b\nExample:\n  {_example}")(_command)
app.add_typer(_schedule, name="schedule")
