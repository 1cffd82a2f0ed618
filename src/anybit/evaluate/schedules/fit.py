"""Training of the learned schedule's heads (methods/pmpd.md 2.4), on logits; `paper_exact` repeats its double softmax."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anybit.calibration.progress import Progress, silent
from anybit.engine.schedulers.head import NORM_EPSILON, Array
from anybit.errors import InputError

Feature = tuple[Array, ...]


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of the paper's manual runs, more epochs for want of its 256 long examples."""

    epochs: int = 10
    accumulate: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.1
    paper_exact: bool = False
    seed: int = 42


@dataclass(frozen=True)
class Fitted:
    """A trained head.

    Attributes:
        tensors: as `engine.schedulers.head.Head` takes them.
        facts: JSON: losses and accuracies on the held-out tenth beside always guessing the prior's most frequent class,
            histograms of labels and of predictions, whether the head collapsed to one class.
    """

    tensors: dict[str, Array]
    facts: dict[str, Any]


class AttentionHead(nn.Module):
    """The network of `engine.schedulers.head`, with gradients."""

    def __init__(self, heads: int, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        size = heads * width
        self.queries = nn.Parameter(torch.empty(heads, heads, width))
        nn.init.xavier_normal_(self.queries)
        self.norm = nn.LayerNorm(size, eps=NORM_EPSILON)
        self.hidden, self.out = nn.Linear(size, size), nn.Linear(size, classes)
        self.dropout = dropout

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """Logits [classes] from keys and values [T, D]."""
        weights = (self.queries @ keys.T / math.sqrt(keys.shape[1])).softmax(-1)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        read = (weights @ values).mean(1).T.reshape(-1)
        logits: Tensor = self.out(self.hidden(self.norm(read)).relu())
        return logits


class MeanHead(nn.Module):
    """The network of `engine.schedulers.activation`."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        middle = (width + 4) // 2
        self.hidden, self.out = nn.Linear(width, middle), nn.Linear(middle, classes)

    def forward(self, mean: Tensor) -> Tensor:
        """Logits [classes] from the mean hidden state [E]."""
        logits: Tensor = self.out(self.hidden(mean).relu())
        return logits


def balanced(labels: Sequence[int], draw: random.Random) -> list[int]:
    """Indices with the rarer classes repeated at random until all are as frequent, shuffled."""
    by_class: dict[int, list[int]] = {}
    for at, label in enumerate(labels):
        by_class.setdefault(label, []).append(at)
    most = max(map(len, by_class.values()))
    chosen = [at for members in by_class.values() for at in members + draw.choices(members, k=most - len(members))]
    draw.shuffle(chosen)
    return chosen


def fit(
    build: Callable[[], nn.Module],
    features: Sequence[Feature],
    labels: Sequence[int],
    settings: Settings,
    progress: Progress = silent,
) -> Fitted:
    """Train on nine tenths, measure on the first tenth; both balanced, as in the paper.

    Args:
        build: a fresh network; its initial weights depend on `settings.seed`.
        features: of each example, the network's arguments.

    Raises:
        InputError: fewer than 20 examples, or one class only.
    """
    if len(labels) < 20 or len(set(labels)) < 2:
        raise InputError(
            f"{len(labels)} examples of classes {sorted(set(labels))} train nothing: give at least 20 with two classes "
            "(raise --samples, or precisions further apart)"
        )
    draw = random.Random(settings.seed)
    torch.manual_seed(settings.seed)
    held = max(2, len(labels) // 10)
    tensors = [tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in feature) for feature in features]
    test, train = balanced(labels[:held], draw), [held + at for at in balanced(labels[held:], draw)]
    net = build()
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    curve = []
    for epoch in range(settings.epochs):
        _epoch(net, optimizer, tensors, labels, train, settings)
        curve.append(_measure(net, tensors, labels, test, settings)[0])
        progress("training", epoch + 1, settings.epochs)
    return Fitted(_tensors(net), _facts(net, tensors, labels, (train, test), settings) | {"curve": curve})


def _epoch(
    net: nn.Module, optimizer: Any, features: Any, labels: Any, order: Sequence[int], settings: Settings
) -> None:
    net.train()
    for start in range(0, len(order), settings.accumulate):
        group = order[start : start + settings.accumulate]
        optimizer.zero_grad()
        for at in group:
            (_loss(net(*features[at]), labels[at], settings) / len(group)).backward()
        optimizer.step()


def _loss(logits: Tensor, label: int, settings: Settings) -> Tensor:
    scores = logits.softmax(-1) if settings.paper_exact else logits
    return nn.functional.cross_entropy(scores[None], torch.tensor([label]))


@torch.inference_mode()
def _measure(
    net: nn.Module, features: Any, labels: Any, order: Sequence[int], settings: Settings
) -> tuple[float, list[int]]:
    """Mean loss and the predictions."""
    net.eval()
    logits = [net(*features[at]) for at in order]
    losses = [float(_loss(row, labels[at], settings)) for row, at in zip(logits, order, strict=True)]
    return float(np.mean(losses)), [int(row.argmax()) for row in logits]


def _facts(net: nn.Module, features: Any, labels: Any, parts: Any, settings: Settings) -> dict[str, Any]:
    train, test = parts
    loss, _ = _measure(net, features, labels, test, settings)
    held = range(max(2, len(labels) // 10))
    _, guesses = _measure(net, features, labels, held, settings)
    _, everywhere = _measure(net, features, labels, range(len(labels)), settings)
    common = Counter(labels[len(held) :]).most_common(1)[0][0]
    return {
        "settings": asdict(settings),
        "examples": len(labels),
        "train_loss": _measure(net, features, labels, train, settings)[0],
        "eval_loss": loss,
        "chance_loss": math.log(len(set(labels[at] for at in test))),
        "eval_accuracy": float(np.mean([g == labels[at] for g, at in zip(guesses, held, strict=True)])),
        "eval_accuracy_prior": float(np.mean([labels[at] == common for at in held])),
        "labels": histogram(labels),
        "predictions": histogram(everywhere),
        "collapsed": len(set(everywhere)) == 1,
    }


def histogram(classes: Sequence[int]) -> dict[str, int]:
    """How often each class comes."""
    return {str(name): count for name, count in sorted(Counter(classes).items())}


def _tensors(net: nn.Module) -> dict[str, Array]:
    return {name: tensor.detach().numpy().astype(np.float32) for name, tensor in net.state_dict().items()}
