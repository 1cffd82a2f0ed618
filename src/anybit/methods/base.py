"""The contract of a weight quantizer, and what calibration can tell it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from anybit.formats.decoder import Form
from anybit.formats.terms import Term


@dataclass(frozen=True)
class InputStats:
    """What calibration knows of one linear's input X [T, K].

    Attributes:
        tokens: T, the calibration tokens this layer saw; 0 when the method needs no calibration.
        hessian: float32 [K, K] = 2/T * X^T X, or None.
        inputs: float32 [S, K], an even sample of the rows of X, or None.
        mean_abs: float32 [K], mean |x| of every input channel, or None.
        sample_max: float32 [samples, K], max |x| of every calibration sample and input channel, or None.
        sample_range: float32 [samples, 2, K], lowest and highest x of every calibration sample and input channel, or None.
        after_norm: whether a norm wrote the input.
        name: the linear's module name, for messages and for methods that treat some layers apart.
        fisher: float32 [N, K], sum over calibration sequences of the squared gradient of the loss, or None.
    """

    tokens: int = 0
    hessian: Tensor | None = None
    inputs: Tensor | None = None
    mean_abs: Tensor | None = None
    name: str = ""
    fisher: Tensor | None = None
    sample_max: Tensor | None = None
    sample_range: Tensor | None = None
    after_norm: bool = False

    @property
    def max_abs(self) -> Tensor | None:
        """float32 [K], max |x| of every input channel, or None."""
        return None if self.sample_max is None else self.sample_max.amax(0)

    @property
    def low(self) -> Tensor | None:
        """float32 [K], smallest x of every input channel, or None."""
        return None if self.sample_range is None else self.sample_range[:, 0].amin(0)

    @property
    def high(self) -> Tensor | None:
        """float32 [K], largest x of every input channel, or None."""
        return None if self.sample_range is None else self.sample_range[:, 1].amax(0)


class Method(BaseModel):
    """A weight quantizer: its fields are the recipe's options with the paper's defaults, checked by pydantic.

    Class attributes:
        name: the word used in recipes.
        needs: which parts of `InputStats` it reads, of {"hessian", "inputs", "mean_abs", "max_abs",
            "range"}; empty means no calibration.
        rows_at_once: a slow, row-wise method is given so many rows at a time, on all cores; None: all rows, on one.
        rowwise: whether rows of a weight are quantized independently, so that linears sharing an input may be stacked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    rows_at_once: ClassVar[int | None] = None
    rowwise: ClassVar[bool] = True

    @property
    def gradients(self) -> bool:
        """Whether `quantize` reads `InputStats.fisher`, which takes a backward pass through the whole float model."""
        return False

    @property
    def undecided(self) -> bool:
        """Whether the form depends on the weight: then `decided` settles it before the work (`decide.py`)."""
        return False

    def decided(self, weight: Tensor) -> tuple[Self, str]:
        """This method with its form settled by `weight` float [N, K], and why, for the ledger."""
        raise NotImplementedError

    def plan(self, shape: tuple[int, int]) -> Form:
        """The form that `quantize` will give a weight of `shape` (N, K), known before any work."""
        raise NotImplementedError

    def quantize(self, weight: Tensor, stats: InputStats) -> list[Term]:
        """Terms that stand for `weight` float32 [N, K]. Deterministic; `weight` is not changed."""
        raise NotImplementedError


def relative_output_error(weight: Tensor, quantized: Tensor, stats: InputStats) -> float:
    """||X (W - Q)^T|| / ||X W^T|| from the Hessian where there is one, else ||W - Q|| / ||W|| (white input).

    Both weights are float32 [N, K]; the result is >= 0, and 0 only when nothing was lost.
    """
    delta = weight - quantized
    if stats.hessian is None:
        return float(delta.norm() / weight.norm().clamp_min(1e-30))
    lost = ((delta @ stats.hessian) * delta).sum().clamp_min(0)
    return float((lost / ((weight @ stats.hessian) * weight).sum().clamp_min(1e-30)).sqrt())
