"""FlexQ (arXiv 2508.04405): 6-bit weights and 6-bit activations in groups of 128, 8-bit activations where 6 bits hurt.

Weights: symmetric, in the paper scale = max|w| / 31, code = round(w / scale) in -32..31 (`methods/rtn.py: SymmetricRTN`); our
recipes have GPTQ choose codes of the same kind. Activations: symmetric, one scale per token and group. Where K is no multiple
of 128 the last group is short (the paper refuses such layers; its GPU tiles want them whole).

Which linears keep 8 bits is the paper's outcome but not its procedure, so it is decided anew for every model: with weights
rounded (float where their method needs calibration) and everything else float, the inputs of one type of linears (q_proj,
down_proj, ...) are rounded to 6 bits in all blocks and the loss is measured on calibration text. The types that cost most get
8 bits until what the rest costs, added up, is within `budget`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from anybit.formats.activation import IntActivations
from anybit.methods.activations import ActivationMethod


class FlexQInputs(ActivationMethod):
    """Options: `bits` of most layers, `sensitive_bits` of those that the analysis names, `group_size`; `budget` in nats per token
    (the paper's models lose 0.05 of a perplexity of 5.7) and `samples` of the calibration text to measure on."""

    name: ClassVar[str] = "flexq"
    bits: int = Field(default=6, ge=2, le=8)
    sensitive_bits: int = Field(default=8, ge=2, le=8)
    group_size: int = Field(default=128, ge=32)
    budget: float = Field(default=0.009, ge=0)
    samples: int = Field(default=4, ge=1)

    def spec(self, sensitive: bool = False) -> IntActivations:
        """The scheme of most layers, or of the sensitive ones."""
        bits = self.sensitive_bits if sensitive else self.bits
        return IntActivations(bits, granularity="group", group_size=self.group_size)

    def sensitive(self, costs: Mapping[str, float]) -> list[str]:
        """The fewest types, worst first, whose exclusion brings the sum of the other costs (in nats) within the budget."""
        order = sorted(costs, key=lambda type: -costs[type])
        left = [sum(max(costs[type], 0.0) for type in order[i:]) for i in range(len(order) + 1)]
        return order[: next(i for i, rest in enumerate(left) if rest <= self.budget)]


def layer_type(name: str) -> str:
    """`down_proj` of `model.layers.3.mlp.down_proj`."""
    return name.rpartition(".")[2]
