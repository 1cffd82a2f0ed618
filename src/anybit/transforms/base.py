"""The contract of a transform: a rewrite of a block that leaves its float output as it is."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall
from anybit.layers.inputs import Op
from anybit.models.graph import BlockGraph


class Transform(BaseModel):
    """Its fields are the recipe's options with the paper's defaults, checked by pydantic.

    Class attributes:
        name: the word used in recipes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str]

    def inputs(self, linear: str, columns: int) -> list[Op]:
        """What `linear` (full name) with so many inputs does to x at run time; known before any work.

        Most transforms fold away and need nothing.
        """
        return []

    def apply(self, call: BlockCall, graph: BlockGraph, source: Activations, pool: Workers) -> list[str]:
        """Rewrite the float32 block in place, run-time operations attached to `call`; returns notes, "linear: what".

        `source` holds the block's inputs. Deterministic for any number of threads.
        """
        raise NotImplementedError
