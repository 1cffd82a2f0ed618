"""anybit: one checkpoint for every precision, an honest account of what it cost, integer kernels to run it.

    anybit.quantize(model, recipe="gptq-w4", out=directory)     anybit.load(directory)
    anybit.evaluate(directory, text=file)                        anybit.generate(model, tokenizer, prompt)
    anybit.export(directory, to="gguf", out=file)                anybit.import_checkpoint(path, out=directory)
    anybit.save(model, directory)

After `import anybit`, `transformers.AutoModelForCausalLM.from_pretrained(directory)` loads an anybit checkpoint too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from anybit.integrations.on_import import register_with_transformers

if TYPE_CHECKING:
    from anybit.engine.generate import generate
    from anybit.evaluate.run import evaluate
    from anybit.integrations.exchange.adopt import import_checkpoint
    from anybit.integrations.exchange.export import export
    from anybit.job import plan
    from anybit.loading import load
    from anybit.pipeline import quantize
    from anybit.saving import save

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "export", "generate", "import_checkpoint", "load", "plan", "quantize", "save"]

_HOME = {
    "evaluate": "anybit.evaluate.run",
    "export": "anybit.integrations.exchange.export",
    "generate": "anybit.engine.generate",
    "import_checkpoint": "anybit.integrations.exchange.adopt",
    "load": "anybit.loading",
    "plan": "anybit.job",
    "quantize": "anybit.pipeline",
    "save": "anybit.saving",
}


def __getattr__(name: str) -> Any:
    """Public functions are imported when first used, so that `import anybit` stays light."""
    if name not in _HOME:
        raise AttributeError(f"module 'anybit' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


register_with_transformers()
