"""Makes transformers know anybit checkpoints, without importing transformers before the user does.

transformers has no entry point for quantizers; registering needs its `quantizers` module. If that is loaded already
we register at once, otherwise the first import of it is followed by our registration.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TARGET = "transformers.quantizers"


def register_with_transformers() -> None:
    """Register now or right after `transformers.quantizers` is first imported; calling it again does nothing."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    importlib.import_module("anybit.integrations.transformers")  # registers as it is imported


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds only `TARGET`, through the usual finders, and runs `_register` once that module is ready."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The usual spec with a loader that registers afterwards; None for every other module."""
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    """Another loader, followed by our registration."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the inner loader."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module as ever, then register."""
        self._inner.exec_module(module)
        _register()
