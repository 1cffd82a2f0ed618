"""Packages that only some users want: asked for by name when they are missing."""

from __future__ import annotations

import importlib.util

from anybit.errors import InputError


def require(module: str, purpose: str, extra: str) -> None:
    """Raise InputError, naming the extra to install, unless `module` can be imported; nothing is imported."""
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{purpose} needs the package {module}: run `pip install anybit[{extra}]`")
