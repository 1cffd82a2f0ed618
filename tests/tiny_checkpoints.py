"""Quantized tiny models, for tests that need a real checkpoint and do not care how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anybit
from tiny_models import save_tiny

TEXT = "The quick brown fox jumps over the lazy dog, turns around and asks for the way home. 0123456789 "


def quantize_tiny(
    family: str,
    where: Path,
    recipe: str = "rtn-w4",
    config: dict[str, Any] | None = None,
    half: bool = False,
    **options: Any,
) -> Path:
    """`where/float` (in bfloat16 if `half`) and from it `where/out`, the checkpoint, which is returned."""
    model = save_tiny(family, where / "float", **(config or {}))
    if half:
        model.bfloat16().save_pretrained(where / "float")
    (where / "text.txt").write_text("".join(TEXT[i % 7 :] for i in range(30)))
    fixed = {"samples": 3, "seq_len": 32, "threads": 1, "allow_unseen_experts": True}
    paths = {"out": str(where / "out"), "calibration": str(where / "text.txt")}
    anybit.quantize(str(where / "float"), recipe=recipe, **paths, **fixed, **options)
    return where / "out"
