"""`anybit bench` on a tiny checkpoint, with programs on PATH that act as rivals."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anybit.cli.bench import SHAPES, cells
from anybit.errors import PromiseError
from anybit.evaluate import bench, bench_kernels, cold, ours
from anybit.evaluate.rivals.contract import RivalFailed, Speed
from tiny_checkpoints import quantize_tiny

ROW = {"what", "ours", "rival", "ratio", "of_bandwidth", "of_peak"}
LLAMA_BENCH = """
import json, sys
value = dict(zip(sys.argv[1::2], sys.argv[2::2]))
rows = [dict(n_prompt=int(value["-p"]), n_gen=0, avg_ts=50.0), dict(n_prompt=0, n_gen=int(value["-n"]), avg_ts=20.0)]
print(json.dumps(rows))
"""
COPY = """
import sys
words = sys.argv
target = words[words.index("--outfile") + 1] if "--outfile" in words else words[-2]
open(target, "w").write("gguf")
"""
FEW = ("--rounds", "2", "--prompt", "8", "--new", "3", "--threads", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def small_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rivals of this machine, and buffers that take no time."""
    monkeypatch.setenv("ANYBIT_RIVALS", str(tmp_path / "rivals"))
    monkeypatch.setenv("ANYBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cold, "free_memory", lambda: 64 << 20)
    monkeypatch.setattr(bench_kernels, "free_memory", lambda: 8 << 20)


@pytest.fixture
def llama(tmp_path: Path) -> Callable[[str], None]:
    """`llama(source)` puts llama.cpp's programs on PATH, with this llama-bench."""

    def install(source: str) -> None:
        for name, text in (("llama-bench", source), ("llama-quantize", COPY), ("convert_hf_to_gguf.py", COPY)):
            path = tmp_path / name
            path.write_text(f"#!{sys.executable} -S\n{text}")
            path.chmod(0o755)

    return install


def test_beside_a_rival(anybit: Callable[..., Any], tiny: Path, llama: Callable[[str], None]) -> None:
    llama(LLAMA_BENCH)
    done = anybit("bench", tiny, "--rivals", "llama.cpp:Q8_0", "--json", *FEW)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    decode, prefill = result["rows"]
    assert decode.keys() >= ROW
    assert prefill.keys() >= ROW
    assert (decode["what"], decode["rival"], decode["rival_name"]) == ("decode 3", 20.0, "llama.cpp Q8_0")
    assert (prefill["what"], prefill["rival"], prefill["n"]) == ("prefill 8", 50.0, 2)
    assert decode["ratio"] == pytest.approx(sum(decode["ours_spread"]) / 2 / 20.0)
    assert decode["of_bandwidth"] > 0
    assert decode["of_peak"] is None
    assert prefill["of_bandwidth"] is None
    assert result["machine"]["peaks"]["read_bytes"] > 0
    assert result["machine"]["peaks"]["threads"] == 1
    assert set(result["checks"]) == {"loading", "engine"}
    assert result["skipped"] == {}
    assert "command" in result


def test_beside_another_checkpoint(anybit: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    done = anybit("bench", tiny, "--rivals", "", "--beside", other, "--json", *FEW)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert [row["rival_name"] for row in result["rows"]] == ["anybit native other"] * 2
    assert all(row["rival"] > 0 for row in result["rows"])
    assert set(result["checks"]) == {"loading", "engine", "loading other", "engine other"}
    wrong = anybit("bench", tiny, "--rivals", "", "--beside", tmp_path / "none", *FEW)
    assert wrong.code == 2
    assert "none" in wrong.err
    assert "--beside takes checkpoints" in anybit("bench", "64x64", "--beside", other).err


def test_missing_and_crashing_rivals_cost_one_line_each(
    anybit: Callable[..., Any], tiny: Path, llama: Callable[[str], None]
) -> None:
    llama("import os; os.kill(os.getpid(), 11)")
    done = anybit("bench", tiny, "--rivals", "openvino,llama.cpp,torchao", "--json", *FEW)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert [row["rival"] for row in result["rows"]] == [None, None]
    assert all(row["ours"] > 0 for row in result["rows"])
    assert set(result["skipped"]) == {"openvino", "llama.cpp Q4_0", "torchao"}
    assert "make rivals" in result["skipped"]["openvino"]
    assert result["skipped"]["llama.cpp Q4_0"] == "llama-bench ended with status -11: no output"
    assert done.err.count("left out") == 3
    assert "Traceback" not in done.err


def test_the_table(anybit: Callable[..., Any], tiny: Path, llama: Callable[[str], None]) -> None:
    llama(LLAMA_BENCH)
    done = anybit("bench", tiny, "--rivals", "llama.cpp", *FEW)
    assert done.out == ""
    assert "memory read" in done.err
    assert "decode 3" in done.err
    assert "llama.cpp Q4_0" in done.err


def test_nothing_is_timed_when_a_check_fails(
    anybit: Callable[..., Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_: Path) -> str:
        raise PromiseError("wrong logits")

    monkeypatch.setattr(bench, "CHECKS", (("engine", wrong),))
    monkeypatch.setattr(bench, "open_ours", lambda *_: pytest.fail("measured all the same"))
    done = anybit("bench", tiny, "--rivals", "", *FEW)
    assert done.code == 3
    assert "wrong logits" in done.err


def test_the_engine_check_sees_a_wrong_engine(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nats apart" in ours.check_native(tiny)
    right = ours.open_native(tiny)
    assert right is not None

    class Swapped:
        facts = right.facts

        def logits(self, ids: list[int]) -> Any:
            return right.logits(ids[::-1])

    monkeypatch.setattr(ours, "open_native", lambda _: Swapped())
    with pytest.raises(PromiseError, match="nats away"):
        ours.check_native(tiny)


def test_the_torch_engine_is_measured_when_there_is_no_native_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "open_native", lambda _: None)
    assert "no native engine" in ours.check_native(tiny)
    contestant = ours.open_ours(tiny, 1)
    assert contestant.label == "anybit torch"
    speed = contestant.measure(4, 2)
    assert min(speed.prefill or 0, speed.decode or 0) > 0
    assert contestant.measure(4, 0).decode is None


def test_both_engines_choose_the_same_tokens(tiny: Path) -> None:
    from anybit.loading import load

    native = ours.open_native(tiny)
    assert native is not None
    runners = [ours.NativeRunner(native), ours.TorchRunner(load(str(tiny)).eval())]
    for runner in runners:
        runner.prefill([9, 8])  # forgotten by the next prefill
    first = {runner.prefill([3, 4, 5, 6]) for runner in runners}
    assert len(first) == 1
    assert len({runner.step(token) for runner in runners for token in first}) == 1


def test_work_per_token(tiny: Path) -> None:
    ledger = json.loads((tiny / "ledger.json").read_text())
    blocks = [row for row in ledger["tensors"] if ".layers." in row["name"]]
    read, weights = bench.work_per_token(tiny)
    assert weights == sum(row["shape"][0] * row["shape"][1] for row in blocks)
    assert sum(row["stored_bytes"] for row in blocks) < read <= ledger["size_bytes"]


def test_a_rival_that_fails_later_is_dropped(tiny: Path) -> None:
    class Dies:
        name, label, weight_bytes, turns = "dies", "dies", 1, 0
        closed = False

        def missing(self) -> str:
            return ""

        def prepare(self, model: Path) -> Path:
            return model

        def start(self, prepared: Path, threads: int) -> Any:
            return self

        def measure(self, prompt_tokens: int, new_tokens: int) -> Speed:
            self.turns += 1
            if self.turns == 2:
                raise RivalFailed("killed")
            return Speed(1.0, 1.0)

        def close(self) -> None:
            self.closed = True

    rival, said = Dies(), list[str]()
    result = bench.bench([tiny], [rival], threads=1, rounds=3, prompt=4, new=2, say=said.append)
    assert result["skipped"] == {"dies": "killed"}
    assert "dies: left out, killed" in said
    assert result["rows"][0]["n"] == 3
    assert rival.closed


def test_shapes(anybit: Callable[..., Any]) -> None:
    done = anybit("bench", "48x96", "--rounds", "2", "--threads", "1", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    names = [f"gemv 48x96 {bits} bit, group 32" for bits in (8, 4, 3, 2)]
    names += [f"gemm M=512 48x96 {bits} bit, group {group}" for bits in (8, 4) for group in (32, 96)]
    assert [row["what"] for row in rows] == names
    assert all(row["ours"] > 0 and row["rival"] > 0 for row in rows)
    assert all((row["of_bandwidth"] is None) == ("gemm" in row["what"]) for row in rows)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_kernels.linear_w_a8.linear_quantized
    monkeypatch.setattr(bench_kernels.linear_w_a8, "linear_quantized", lambda x, w: right(x, w) * 1.01)
    with pytest.raises(PromiseError, match=r"48x96 4 bit: the kernel is off by 0\.01"):
        bench_kernels.our_calls((48, 96), 1, 4)


@pytest.mark.parametrize("words", [("nowhere",), ("0x5",), (".", "--rivals", "llama"), (".",)])
def test_bad_usage_is_one_line(anybit: Callable[..., Any], words: tuple[str, ...]) -> None:
    done = anybit("bench", *words)
    assert done.code == 2
    assert done.out == ""
    assert done.err.count("\n") <= 2


def test_what_counts_as_shapes() -> None:
    assert all(SHAPES.fullmatch(text) for text in ("4096x11008", "1x1,22x33"))
    assert not any(SHAPES.fullmatch(text) for text in ("smol-w4", "4096x", "4096x11008,", "models/4x4"))


def test_cells_of_a_row_without_rival() -> None:
    row = {"what": "decode 8", "ours": 12.34, "unit": "tokens/s", "rival": None, "ratio": None}
    shown = cells(row | {"of_bandwidth": 0.876, "of_peak": None, "of_vector_peak": None})
    assert shown == ["decode 8", "12.3 tokens/s", None, None, None, None, "88 %", None, None]
