"""Which precision vLLM's batches run at: one explicit rule, told with `--additional-config '{"anybit": {...}}'`.

    prefill   bits of passes that read a prompt (default: all that are stored)
    decode    schedule of passes that continue a text, `3` or `4@0,3@32` (default: as prefill)

vLLM puts prompts and continuations into one pass, and a pass has one precision: **a batch runs at the highest precision that
any of its requests needs.** So no request ever gets fewer bits than its schedule says, and one alone gets exactly those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anybit.engine.schedule import FixedSchedule, check_available, parse_schedule
from anybit.errors import InputError, nearest
from anybit.layers.precision import Precision, width_read

KEYS = ("prefill", "decode", "kv")


@dataclass(frozen=True)
class Policy:
    """Bits by phase.

    Attributes:
        prefill: bits.
        decode: bits by decode step; see `engine.schedule`.
        kv: "vllm" where vLLM's own key and value cache may stand in for the checkpoint's.
    """

    prefill: int
    decode: FixedSchedule
    kv: str = ""

    @classmethod
    def read(cls, options: Mapping[str, Any], available: Sequence[int]) -> Policy:
        """From the options of `additional_config["anybit"]`; `available` are the checkpoint's widths, ascending.

        Raises:
            InputError: an option that does not exist, or bits that the checkpoint does not hold.
        """
        for key in options:
            if key not in KEYS:
                raise InputError(f"additional-config: anybit has no option '{key}'{nearest(key, KEYS)}")
        prefill = options.get("prefill", available[-1])
        if not isinstance(prefill, int) or prefill not in available:
            raise InputError(f"additional-config: prefill at {prefill} bits; this checkpoint holds {list(available)}")
        decode = parse_schedule(str(options.get("decode", prefill)))
        check_available(decode, available)
        kv = options.get("kv", "")
        if kv not in ("", "vllm"):
            raise InputError(f"additional-config: kv must be 'vllm' or left out, got '{kv}'")
        return cls(prefill, decode, kv)

    @property
    def asked(self) -> tuple[int, ...]:
        """Every width it may ask for, descending."""
        return tuple(sorted({self.prefill, *self.decode.precisions}, reverse=True))

    def bits(self, emitted: Iterable[int]) -> int:
        """The precision of a pass over requests that have emitted so many tokens each; a request without any reads its
        prompt."""
        return max((self._bits(count) for count in emitted), default=self.prefill)

    def _bits(self, emitted: int) -> int:
        if not emitted:
            return self.prefill
        return next(bits for first, bits in reversed(self.decode.switches) if first <= emitted - 1)


class Widths:
    """The precision in use, shared by all layers of a model on one worker.

    Attributes:
        asked: widths it may be set to, descending.
    """

    def __init__(self, policy: Policy, available: Sequence[int]) -> None:
        """Starts at the policy's prefill precision."""
        self.asked = policy.asked
        self._precision = Precision(available)
        self._cells: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self.set(policy.prefill)

    @property
    def bits(self) -> int:
        """The width in use."""
        return self._precision.bits

    def set(self, bits: int) -> None:
        """Switch: one integer, and one for each kind of weight on a GPU. Raises InputError for a width that is not there."""
        if bits == self._precision.bits:
            return
        self._precision.bits = bits
        for (offered, _), cell in self._cells.items():
            cell.fill_(width_read(offered, bits))

    def cell(self, offered: tuple[int, ...], device: torch.device) -> Tensor:
        """int32 [1] on a device, always the width at which weights that offer these are read."""
        key = (offered, device)
        if key not in self._cells:
            self._cells[key] = torch.full((1,), width_read(offered, self.bits), dtype=torch.int32, device=device)
        return self._cells[key]
