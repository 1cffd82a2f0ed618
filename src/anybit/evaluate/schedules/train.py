"""`anybit schedule train`: a schedule that looks at the prompt, learned from forked texts (methods/pmpd.md 2.4)."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anybit.calibration.progress import Progress, silent
from anybit.engine.schedulers.artefact import save
from anybit.engine.schedulers.resolve import schedule_path
from anybit.engine.schedulers.static import PARTS, chain_of
from anybit.errors import InputError
from anybit.evaluate.schedules.fit import AttentionHead, Fitted, Settings, fit
from anybit.evaluate.schedules.labels import RULE, Labelled, label_prompts
from anybit.evaluate.schedules.subject import Prompts, Subject
from anybit.evaluate.schedules.tune import default_chain
from anybit.evaluate.tasks.find import find_task

LOCAL = ("summarise", "continue", "extract", "translate")
DEFAULT_LENGTH = 96


def train(
    subject: Subject,
    tasks: Sequence[str] = LOCAL,
    *,
    chain: tuple[int, ...] | None = None,
    samples: int = 256,
    length: int = DEFAULT_LENGTH,
    settings: Settings | None = None,
    trials: int = 0,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Label prompts of the tasks' train splits, train one head per pair of neighbouring precisions, write them.

    Args:
        tasks: whose prompts are mixed in equal shares; the schedule itself knows no task.
        chain: precisions; default: the two highest of those that `tune` takes.
        samples: prompts in all.
        length: most new tokens L of the texts that labels come from.
        settings: hyper-parameters.
        trials: search them with optuna's TPE in the paper's ranges, this many times; 0: not.
        out: file to write; default: `DIR/schedules/learned.safetensors`.

    Returns:
        What was written about the heads, with labels and losses of each pair.

    Raises:
        InputError: unknown task or precision, too few examples, or --trials without optuna.
    """
    started = time.perf_counter()
    used = chain_of(chain or default_chain(subject.lanes.precisions)[:2])
    subject.check(used)
    if len(used) < 2:
        raise InputError(f"--chain {used[0]}: a schedule needs at least two precisions")
    prompts = mixed(subject, tasks, samples, length, progress)
    chosen = settings or Settings()
    fitted, pairs = [], []
    for pair in itertools.pairwise(used):
        examples = label_prompts(
            subject.lanes, prompts.ids, prompts.references, pair=pair, prefill=used[0], limit=length,
            decode=subject.decode, progress=progress,
        )  # fmt: skip
        head = train_pair(examples, chosen, trials, progress)
        fitted.append(head)
        pairs.append({"pair": list(pair), **head.facts})
    path = out or schedule_path(subject.directory, "learned")
    facts = {
        "kind": "learned",
        "precisions": list(used),
        "prefill": used[0],
        "parts": PARTS,
        "length": length,
        "label_rule": RULE,
        "feature": "keys and values of the last layer after the prompt, averaged over heads",
        "tasks": list(tasks),
        "reference": subject.float_model.name,
        "fingerprint": subject.fingerprint,
        "pairs": pairs,
    }
    save(path, facts, [head.tensors for head in fitted])
    return facts | {"out": str(path), "seconds": time.perf_counter() - started}


def mixed(subject: Subject, tasks: Sequence[str], samples: int, length: int, progress: Progress) -> Prompts:
    """Prompts of several tasks' train splits, shuffled."""
    share = -(-samples // len(tasks))
    parts = [subject.prompts(find_task(name), "train", share, length, progress=progress) for name in tasks]
    order = [(part, at) for part in parts for at in range(share)]
    random.Random(42).shuffle(order)
    order = order[:samples]
    return Prompts(
        [part.ids[at] for part, at in order],
        [part.references[at] for part, at in order],
        [part.reference_ids[at] for part, at in order],
        length,
    )


def train_pair(examples: Sequence[Labelled], settings: Settings, trials: int, progress: Progress = silent) -> Fitted:
    """A head from labelled prompts."""
    heads = examples[0].head_count
    width = examples[0].features[0].shape[1]
    features, labels = [example.features for example in examples], [example.label for example in examples]

    def once(chosen: Settings) -> Fitted:
        return fit(lambda: AttentionHead(heads, width, PARTS + 1, chosen.dropout), features, labels, chosen, progress)

    return once(_searched(once, settings, trials) if trials else settings)


def _searched(once: Callable[[Settings], Fitted], settings: Settings, trials: int) -> Settings:
    """The hyper-parameters of the lowest loss on the held-out tenth, in the paper's ranges."""
    if importlib.util.find_spec("optuna") is None:
        raise InputError("--trials needs optuna: run `pip install optuna`, or leave --trials out")
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def drawn(trial: Any) -> Settings:
        return replace(
            settings,
            lr=trial.suggest_float("lr", 1e-5, 1e-3, log=True),
            epochs=trial.suggest_categorical("epochs", [3, 5, 10]),
            accumulate=trial.suggest_categorical("accumulate", [32, 64, 128]),
            weight_decay=trial.suggest_float("weight_decay", 0.01, 0.02),
            dropout=trial.suggest_float("dropout", 0.1, 0.3),
        )

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=settings.seed))
    study.optimize(lambda trial: once(drawn(trial)).facts["eval_loss"], n_trials=trials)
    return replace(settings, **study.best_params)
