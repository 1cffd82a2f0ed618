"""The native engine with its answers as PyTorch tensors, for tests that compare them with PyTorch's."""

from __future__ import annotations

from typing import Any

import torch

from anybit.engine import native


class NativeModel(native.NativeModel):
    """As the engine's; `prefill`, `step` and `logits` are made of `forward`."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """Tensor."""
        return torch.from_numpy(super().forward(*args, **options))

    def top(self, *args: Any, **options: Any) -> Any:
        """Tensors."""
        values, ids = super().top(*args, **options)
        return torch.from_numpy(values), torch.from_numpy(ids)
