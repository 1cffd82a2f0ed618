"""KL(float || scheduled) along the float model's own text, token by token: every schedule is judged on the same tokens.

The text is given, the schedule is not skipped: each token's keys and values are made at the precision its step would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from anybit.calibration.progress import Progress, silent
from anybit.engine.lanes import Lanes
from anybit.engine.schedule import FixedSchedule
from anybit.evaluate.divergence import token_divergence
from anybit.evaluate.references import FloatModel

Plan = tuple[FixedSchedule, int]
"""Switch points, and the precision prompts are read at."""


def forced_logits(lanes: Lanes, prompt: Sequence[int], text: Sequence[int], plan: Plan) -> Tensor:
    """Logits float32 [len(text), vocabulary] that predict each token of a given text."""
    schedule, prefill = plan
    rows = [lanes.read(0, prompt, prefill)[None]]
    given = list(text[:-1])
    ends = [first for first, _ in schedule.switches[1:]] + [len(given)]
    for (first, bits), end in zip(schedule.switches, ends, strict=True):
        if part := given[first:end]:
            rows.append(lanes.extend(0, part, bits))
    return torch.from_numpy(np.concatenate(rows))


def mean_divergence(
    lanes: Lanes,
    float_model: FloatModel,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    plans: Mapping[str, Plan],
    progress: Progress = silent,
) -> dict[str, list[float]]:
    """Mean KL in nats along each float text (after each prompt) under every plan, by its name."""
    found: dict[str, list[float]] = {name: [] for name in plans}
    for done, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
        reference = float_model.logits(prompt, text)
        for name, plan in plans.items():
            kl, _ = token_divergence(reference, forced_logits(lanes, prompt, text, plan))
            found[name].append(float(kl.mean()))
        progress("divergence", done, len(prompts))
    return found
