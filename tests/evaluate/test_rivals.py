"""Rivals as fake programs: what is asked of them, what is made of their answers, and what happens when they fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anybit.errors import InputError
from anybit.evaluate.rivals import cache
from anybit.evaluate.rivals.contract import RivalFailed, Speed
from anybit.evaluate.rivals.llama_cpp import LlamaBench, LlamaCpp
from anybit.evaluate.rivals.openvino import OpenVino
from anybit.evaluate.rivals.process import Worker, last_line, run_command
from anybit.evaluate.rivals.table import RIVALS, parse_rivals
from anybit.evaluate.rivals.torchao import TorchAo

Program = Callable[[str, str], Path]

# llama-bench's JSON, cut to the keys we read; the numbers depend on what was asked, so that a mix-up shows.
LLAMA_BENCH = """
import json, sys
value = dict(zip(sys.argv[1::2], sys.argv[2::2]))
prompt, new, threads = (int(value[key]) for key in ("-p", "-n", "-t"))
assert value["-o"] == "json" and value["-r"] == "1"
rows = [{"n_prompt": prompt, "n_gen": 0, "avg_ts": 1000.0 * threads + prompt}] if prompt else []
rows += [{"n_prompt": 0, "n_gen": new, "avg_ts": 10.0 * threads + new}] if new else []
print(json.dumps(rows))
"""
CONVERT = """
import os, sys
if "--outtype" in sys.argv:
    target, model = sys.argv[sys.argv.index("--outfile") + 1], sys.argv[-1]
else:
    model, target = sys.argv[-3], sys.argv[-2]
source = model + "/config.json" if os.path.isdir(model) else model
open(target, "w").write(open(source).read() + " ".join(sys.argv[1:-3]) + sys.argv[-1])
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """`program(name, source)` puts a Python program on a PATH that holds nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("ANYBIT_RIVALS", str(tmp_path / "rivals"))
    monkeypatch.setenv("ANYBIT_CACHE", str(tmp_path / "cache"))

    def write(name: str, source: str) -> Path:
        path = folder / name
        path.write_text(f"#!{sys.executable} -S\n{source}")
        path.chmod(0o755)
        return path

    return write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "float"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_llama_cpp_on_path_is_measured(program: Program, model: Path) -> None:
    program("llama-bench", LLAMA_BENCH)
    contestant = LlamaCpp("Q8_0").start(model / "model.safetensors", threads=3)
    assert contestant.measure(512, 128) == Speed(3512.0, 158.0)
    assert contestant.measure(0, 64) == Speed(None, 94.0)
    assert contestant.measure(64, 0) == Speed(3064.0, None)
    assert contestant.label == "llama.cpp Q8_0"
    assert contestant.weight_bytes == len(b"weights")


def test_llama_cpp_converts_once_and_again_when_the_weights_change(program: Program, model: Path) -> None:
    program("llama-bench", LLAMA_BENCH)
    program("llama-quantize", CONVERT)
    program("convert_hf_to_gguf.py", CONVERT)
    rival = LlamaCpp("Q4_1")
    assert rival.missing() == ""
    first = rival.prepare(model)
    assert first.read_text().endswith("Q4_1")
    (model / "config.json").touch()
    assert rival.prepare(model) == first
    assert LlamaCpp("Q4_0").prepare(model) != first
    (model / "model.safetensors").write_bytes(b"weighty")
    assert rival.prepare(model) != first


def test_a_refusing_converter_leaves_nothing_in_the_cache(program: Program, model: Path, tmp_path: Path) -> None:
    program("convert_hf_to_gguf.py", "import sys; sys.exit('no such architecture')")
    with pytest.raises(RivalFailed, match=r"ended with status 1: no such architecture"):
        LlamaCpp().prepare(model)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import sys; sys.stderr.write('line one\\nbad model\\n'); sys.exit(7)", r"status 7: bad model$"),
        ("import os; os.kill(os.getpid(), 11)", r"status -11: no output$"),
        ("print('hello')", "something else"),
        ("print('[]')", "left out a measurement"),
        ("print('[{\"n_prompt\": 8}]')", "something else"),
    ],
)
def test_a_failing_llama_bench_is_one_line(program: Program, tmp_path: Path, source: str, said: str) -> None:
    program("llama-bench", source)
    with pytest.raises(RivalFailed, match=said) as caught:
        LlamaBench("llama.cpp Q4_0", 1, tmp_path / "model.gguf", 1).measure(8, 8)
    assert "\n" not in str(caught.value)


def test_a_missing_rival_says_what_is_missing_and_how_to_get_it(program: Program) -> None:
    program("llama-bench", LLAMA_BENCH)
    reason = LlamaCpp().missing()
    assert "llama-quantize, convert_hf_to_gguf.py not found" in reason
    assert "llama-bench" not in reason
    for rival in (LlamaCpp(), OpenVino(), TorchAo()):
        assert "make rivals" in rival.missing()


def test_the_build_of_make_rivals_goes_before_path(program: Program, tmp_path: Path) -> None:
    program("llama-bench", LLAMA_BENCH)
    built = tmp_path / "rivals" / "llama.cpp" / "build" / "bin" / "llama-bench"
    built.parent.mkdir(parents=True)
    built.write_text(f"#!{sys.executable} -S\nimport json\nprint(json.dumps([dict(n_prompt=0, n_gen=4, avg_ts=1.5)]))")
    built.chmod(0o755)
    assert LlamaBench("", 1, tmp_path, 1).measure(0, 4) == Speed(None, 1.5)


WORKER = """
import json, sys
print("a library says hello")
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    wanted = json.loads(line)
    if wanted["new"] == 13:
        sys.exit("Traceback\\n  ...\\nMemoryError: 13 is too much")
    print(json.dumps({"prefill": wanted["prompt"] * 2.0, "decode": wanted["new"] * 3.0}), flush=True)
"""


def test_a_worker_answers_again_and_again_and_ends(program: Program) -> None:
    worker = Worker("fake", 5, [sys.executable, "-S", program("worker", WORKER)])
    assert worker.measure(4, 5) == Speed(8.0, 15.0)
    assert worker.measure(6, 7) == Speed(12.0, 21.0)
    worker.close()
    with pytest.raises(RivalFailed):
        run_command([sys.executable, "-c", f"import os; os.kill({worker._process.pid}, 0)"], seconds=10)


def test_a_worker_that_dies_is_one_line(program: Program) -> None:
    worker = Worker("fake", 5, [sys.executable, "-S", program("worker", WORKER)])
    with pytest.raises(RivalFailed, match=r"^its process ended with status 1: MemoryError: 13 is too much$"):
        worker.measure(1, 13)
    with pytest.raises(RivalFailed, match="MemoryError"):  # and again for who asks again
        worker.measure(1, 1)
    worker.close()


def test_a_worker_that_never_gets_ready(program: Program) -> None:
    with pytest.raises(RivalFailed, match="status 3"):
        Worker("fake", 5, [sys.executable, "-S", program("worker", "import sys; sys.exit(3)")])
    with pytest.raises(RivalFailed, match="No such file"):
        Worker("fake", 5, ["/nowhere/python"])


def test_run_command_has_a_time_limit() -> None:
    with pytest.raises(RivalFailed, match="took more than 0 s"):
        run_command([sys.executable, "-S", "-c", "import time; time.sleep(9)"], seconds=0.2)


def test_other_interpreters_do_not_see_our_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    told = json.loads(
        run_command([sys.executable, "-S", "-c", "import json, sys; print(json.dumps(sys.path))"], seconds=30)
    )
    assert "/ours" not in told


def test_parse_rivals() -> None:
    names = [
        (rival.name, getattr(rival, "type", None)) for rival in parse_rivals("llama.cpp:Q4_K_M+imatrix, torch,openvino")
    ]
    assert names == [("llama.cpp", "Q4_K_M"), ("torch", None), ("openvino", None)]
    assert parse_rivals("") == []
    assert set(RIVALS) == {"llama.cpp", "openvino", "torch", "torchao"}


@pytest.mark.parametrize("text", ["lama.cpp", "openvino:int3", "torchao:int2", "llama.cpp:Q4_0+magic", "torch:fp8"])
def test_parse_rivals_refuses(text: str) -> None:
    with pytest.raises(InputError, match=r"--rivals: "):
        parse_rivals(text)


def test_every_rival_names_itself_as_the_table_does() -> None:
    assert {name: make().name for name, make in RIVALS.items()} == {name: name for name in RIVALS}


def test_converted_keeps_nothing_half_done(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYBIT_CACHE", str(tmp_path / "cache"))

    def build(out: Path) -> None:
        (out / "half").write_text("done")
        raise RivalFailed("full disk")

    with pytest.raises(RivalFailed):
        cache.converted("fake", model, build)
    assert list((tmp_path / "cache").iterdir()) == []


def test_last_line() -> None:
    assert last_line("a\n\nb \n \n") == "b"
    assert last_line("") == "no output"
