"""OpenVINO GenAI with 4-bit weights, in the environment that `make rivals` builds."""

from __future__ import annotations

from pathlib import Path

from anybit.evaluate.rivals.cache import converted, tree_bytes
from anybit.evaluate.rivals.contract import RivalFailed
from anybit.evaluate.rivals.home import HINT, environment_python
from anybit.evaluate.rivals.process import CONVERT_SECONDS, Worker, run_command

GROUP_SIZES = {"int4": 64, "int4-g32": 32, "int4-g128": 128}
_WORKER = Path(__file__).parent / "workers" / "openvino_llm.py"


class OpenVino:
    """Symmetric int4 for every linear layer; its exporter keeps embedding and head in int8.

    Args:
        variant: a key of `GROUP_SIZES`, or int8.
    """

    name = "openvino"

    def __init__(self, variant: str = "int4") -> None:
        if variant != "int8" and variant not in GROUP_SIZES:
            raise RivalFailed(f"openvino:{variant}: known are int8, {', '.join(GROUP_SIZES)}")
        self.variant = variant

    def missing(self) -> str:
        """See `Rival`."""
        python = environment_python(self.name)
        return "" if python.exists() else f"no environment {python.parent.parent}; get it with `{HINT}`"

    def prepare(self, model: Path) -> Path:
        """The exported directory."""
        if self.variant == "int8":
            bits = ["--weight-format", "int8"]
        else:
            group = str(GROUP_SIZES[self.variant])
            bits = ["--weight-format", "int4", "--group-size", group, "--ratio", "1.0", "--sym"]
        exporter = environment_python(self.name).with_name("optimum-cli")
        task = ["export", "openvino", "--model", model, "--task", "text-generation-with-past"]
        return converted(
            f"openvino-{self.variant}",
            model,
            lambda out: void(run_command([exporter, *task, *bits, out], seconds=CONVERT_SECONDS)),
        )

    def start(self, prepared: Path, threads: int) -> Worker:
        """See `Rival`."""
        command = [environment_python(self.name), _WORKER, prepared, str(threads)]
        return Worker(f"OpenVINO {self.variant}", tree_bytes(prepared, "openvino_model.bin"), command)


def void(_: object) -> None:
    """Drops a result."""
