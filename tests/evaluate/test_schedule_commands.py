"""`anybit schedule` on a tiny nested checkpoint in the native engine, end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from anybit.checkpoint.canary import write_canary
from anybit.cli import main
from anybit.engine.lanes import NativeLanes, open_lanes
from anybit.engine.native import NativeModel
from anybit.engine.schedule import FixedSchedule
from anybit.engine.schedulers.resolve import resolve
from anybit.engine.schedulers.static import candidates, mean_bits, static
from anybit.engine.stepper import NativeStepper
from anybit.errors import InputError, PromiseError
from anybit.evaluate.schedules.batch import run_fixed
from anybit.evaluate.schedules.divergence import forced_logits
from anybit.evaluate.schedules.search import Option, Target, parse_target, search
from anybit.evaluate.schedules.subject import Subject
from anybit.evaluate.tasks import find
from anybit.evaluate.tasks.task import Example, Task
from nested_case import nest
from tiny_checkpoints import quantize_tiny

WORDS = ["alpha", "beta", "gamma", "delta"]


def examples(split: str) -> list[Example]:
    start = {"train": 0, "validation": 100, "test": 200}[split]
    return [Example(f"{WORDS[at % 4]} {at}") for at in range(start, start + 40)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = nest(quantize_tiny("llama", tmp_path_factory.mktemp("nested"), "rtn-w4"), but=("embed",))
    ids = torch.tensor(json.loads((made / "canary.json").read_text())["ids"])
    model = AutoModelForCausalLM.from_pretrained(made)  # without load's check: the canary is still the old weights'
    with torch.inference_mode():
        write_canary(made / "canary.json", ids, model(input_ids=ids[None]).logits[0, -1])
    return made


@pytest.fixture(autouse=True)
def words_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANYBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(find.TASKS, "words", Task("words", "", 24, "nothing", examples, plain=True))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def test_lanes_say_what_the_engine_says(checkpoint: Path) -> None:
    """Sixteen texts at once, in a batch, equal one after the other in the engine's own stepper, at every precision."""
    lanes = open_lanes(checkpoint)
    assert isinstance(lanes, NativeLanes)
    model = NativeModel.open(checkpoint)
    prompts = [[40 + at, 41, 42 + at * 3] for at in range(7)]
    for bits in (2, 4, 8):
        together = run_fixed(lanes, prompts, static([bits], []), bits, 12)
        for prompt, text in zip(prompts, together, strict=True):
            model.precision.bits = bits
            runner = NativeStepper(model)
            token, alone = int(runner.prefill(prompt).argmax()), []
            while True:
                alone.append(token)
                if token in lanes.end_ids or len(alone) == 12:
                    break
                token = runner.best([token])[0]
            assert alone == text


def test_given_text_runs_as_if_generated(checkpoint: Path) -> None:
    """Logits along a text that the schedule itself made point at that text: the same steps, several in a pass."""
    lanes, prompt = open_lanes(checkpoint), [50, 60, 70]
    for schedule in candidates((8, 4, 2), 15):
        text = run_fixed(lanes, [prompt], schedule, 8, 15)[0]
        assert forced_logits(lanes, prompt, text, (schedule, 8)).argmax(-1).tolist() == text


def test_tune_show_and_use(checkpoint: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    words = (
        "schedule",
        "tune",
        checkpoint,
        "--task",
        "words",
        "--chain",
        "4,2",
        "--samples",
        12,
        "--max-new-tokens",
        12,
    )
    code, out, _ = run(*words, "--mean-bits", 3.2, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["best"]["bits"] <= 3.2
    within = [option["rouge"] for option in facts["options"] if option["bits"] <= 3.2]
    assert facts["best"]["rouge"] == max(within)
    assert len(facts["options"]) == 4
    assert Path(facts["out"]) == checkpoint / "schedules" / "words.json"
    found = resolve("task:words", checkpoint, (2, 3, 4, 6, 8))
    state = found.start(None, 12)  # type: ignore[arg-type]
    assert state.switches == [tuple(switch) for switch in facts["switches"]]
    page = checkpoint.parent / "tried.html"
    code, _, err = run("schedule", "show", facts["out"], "--html", page)
    assert all(option["schedule"] in page.read_text() for option in facts["options"])
    assert code == 0
    assert "words" in err
    assert err.count("<-") == 1
    assert run("schedule", "show", checkpoint / "none.json")[0] == 2


def test_tuning_again_generates_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, schedule = Subject(checkpoint), static((4, 2), [3])
    prompts = subject.prompts(find.TASKS["words"], "validation", 6)
    first = subject.run(prompts, schedule, 4)
    monkeypatch.setattr(type(subject.lanes), "read", None)  # any pass would fail now
    assert subject.run(prompts, schedule, 4) == first
    again = Subject(checkpoint)
    assert again.run(again.prompts(find.TASKS["words"], "validation", 6), schedule, 4) == first
    with pytest.raises(TypeError):
        subject.run(prompts, schedule, 8)  # another way to read the prompt is another text


def test_train_and_use(checkpoint: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    words = (
        "schedule",
        "train",
        checkpoint,
        "--task",
        "words",
        "--chain",
        "4,2",
        "--samples",
        40,
        "--max-new-tokens",
        18,
    )
    code, out, err = run(*words, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert sum(facts["pairs"][0]["labels"].values()) == 40
    assert facts["prefill"] == 4
    found = resolve("auto", checkpoint, (2, 3, 4, 6, 8))
    lanes = open_lanes(checkpoint)
    lanes.read(0, [50, 60, 70], 4)
    from anybit.engine.lanes import LaneFeatures

    state = found.start(LaneFeatures(lanes, 0), 18)
    assert state.data["classes"][0] in range(4)
    assert run("schedule", "show", facts["out"])[0] == 0


def test_no_tuning_on_the_calibration_text(checkpoint: Path) -> None:
    source = json.loads((checkpoint / "ledger.json").read_text())["identity"]["data"]["source"]
    with pytest.raises(InputError, match="calibrated on"):
        Subject(checkpoint).prompts(Task("words", "", 24, source, examples, plain=True), "validation", 6)


def test_what_is_refused(checkpoint: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    tune = ("schedule", "tune", checkpoint, "--samples", 4, "--task")
    for words, why in (
        ((*tune, "wrods"), "did you mean 'words'"),
        ((*tune, "words", "--chain", "5,3"), "precision 5 is not in"),
        ((*tune, "words", "--chain", "3,4"), "falling precisions"),
        ((*tune, "words", "--chain", "4"), "at least two precisions"),
        ((*tune, "words", "--target", "bleu>3"), "rouge-loss<=0.02"),
        ((*tune, "words", "--mean-bits", "1.5"), "needs at most 1.5 bits"),
        ((*tune, "words", "--mean-bits", "3", "--target", "rouge-loss<=1%"), "not both"),
    ):
        code, _, err = run(*words)
        assert code in (2, 3)
        assert why in err
        assert "Traceback" not in err
    single = quantize_tiny("llama", tmp_path, "rtn-w4")
    code, _, err = run("schedule", "tune", single, "--task", "words")
    assert code == 2
    assert "not nested" in err


def measured(
    quality: dict[tuple[int, tuple[tuple[int, int], ...]], float], default: Callable[[FixedSchedule, int], float]
):
    def measure(schedule: FixedSchedule, prefill: int) -> Option:
        value = quality.get((prefill, schedule.switches), default(schedule, prefill))
        return Option(schedule, prefill, mean_bits(schedule, 12), (value, value))

    return measure


def test_search_finds_the_cheapest_that_is_good_enough() -> None:
    # quality falls by 1 % for every tenth of a bit below 4, a prompt below 4 bits costs 5 % more
    measure = measured({}, lambda schedule, prefill: 1 - (4 - mean_bits(schedule, 12)) / 10 - 0.05 * (prefill < 4))
    found = search((4, 3, 2), 12, Target(loss=0.1), measure)
    assert (found.best.prefill, found.best.bits) == (4, 3.0)
    assert found.best.mean == pytest.approx(0.9)
    # all precisions good enough: the lowest for both phases
    same = measured({}, lambda *_: 0.7)
    cheap = search((4, 3, 2), 12, Target(loss=0.0), same).best
    assert (cheap.bits, cheap.prefill) == (2.0, 2)
    # three bits do for both, and two for decoding if the prompt was read at four
    phases = {(4, ((0, 4),)): 1.0, (3, ((0, 3),)): 0.99, (4, ((0, 2),)): 0.99}
    apart = search((4, 3, 2), 12, Target(loss=0.02), measured(phases, lambda *_: 0.5)).best
    assert (apart.bits, apart.prefill) == (2.0, 4)
    # nothing but the top is
    strict = measured({(4, ((0, 4),)): 1.0}, lambda *_: 0.5)
    assert search((4, 3), 12, Target(loss=0.02), strict).best.schedule.switches == ((0, 4),)
    # a budget: the best within it, though a cheaper one is nearly as good
    budget = search((4, 3, 2), 12, Target(bits=3.1), measure)
    assert budget.best.bits == 3.0
    with pytest.raises(PromiseError, match=r"needs at most 1\.9 bits"):
        search((4, 3, 2), 12, Target(bits=1.9), measure)


def test_targets() -> None:
    assert parse_target(None, None) == Target(loss=0.02)
    assert parse_target("rouge-loss <= 2%", None) == Target(loss=0.02)
    assert parse_target(None, 3.0) == Target(bits=3.0)
    for text in ("rouge-loss<=2", "kl<=1", ""):
        with pytest.raises(InputError):
            parse_target(text or "x", None)
