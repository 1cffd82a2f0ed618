"""torchao, eager, in the environment that `make rivals` builds."""

from __future__ import annotations

from pathlib import Path

from anybit.evaluate.rivals.cache import tree_bytes
from anybit.evaluate.rivals.contract import RivalFailed
from anybit.evaluate.rivals.home import HINT, environment_python
from anybit.evaluate.rivals.process import Worker
from anybit.evaluate.rivals.torch_bf16 import WORKER


class TorchAo:
    """Quantized when loaded.

    Args:
        variant: int4 (weights only, group 32) or int8 (weights and dynamic activations).
    """

    name = "torchao"

    def __init__(self, variant: str = "int4") -> None:
        if variant not in ("int4", "int8"):
            raise RivalFailed(f"torchao:{variant}: known are int4, int8")
        self.variant = variant

    def missing(self) -> str:
        """See `Rival`."""
        python = environment_python(self.name)
        return "" if python.exists() else f"no environment {python.parent.parent}; get it with `{HINT}`"

    def prepare(self, model: Path) -> Path:
        """Nothing to convert beforehand."""
        return model

    def start(self, prepared: Path, threads: int) -> Worker:
        """See `Rival`."""
        command = [environment_python(self.name), WORKER, prepared, str(threads), self.variant]
        return Worker(f"torchao {self.variant}", tree_bytes(prepared, "*.safetensors"), command)
