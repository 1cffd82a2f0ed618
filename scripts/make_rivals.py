"""`make rivals`: build the engines that `anybit bench` compares with, each in its own folder.

    python scripts/make_rivals.py [llama.cpp] [openvino] [torchao]

The folder is `$ANYBIT_RIVALS` (default `~/.cache/anybit/rivals`). What is there already is left alone; one rival that
fails is named with its reason and its log, and the others go on. llama.cpp takes about ten minutes on two cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from anybit.evaluate.rivals.home import rivals_home

LLAMA_CPP = "llama-cpp-python==0.3.36"  # its sdist carries the whole llama.cpp tree
LLAMA_TOOLS = ("llama-bench", "llama-quantize", "llama-perplexity", "llama-imatrix")
LLAMA_FLAGS = (
    "GGML_NATIVE=ON",
    "LLAMA_CURL=OFF",
    "LLAMA_OPENSSL=OFF",
    "LLAMA_BUILD_SERVER=OFF",
    "LLAMA_BUILD_TESTS=OFF",
)
LLAMA_CONVERTER = ("sentencepiece",)  # what its converter needs beyond our own packages
TILE_CONFIG = """\
// gcc says that _tile_loadconfig reads 8 bytes, so it deletes the stores to the other 56 and llama.cpp's AMX path crashes.
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
#endif
"""
TORCH = os.environ.get("TORCH", "torch==2.13.0")  # pinned first: a resolver's own choice may be gigabytes of CUDA
OPENVINO = ("optimum-intel[openvino]==2.2.0", "nncf==3.4.0", "openvino==2026.4.1", "openvino-genai==2026.4.1.0")
TORCHAO = ("torchao==0.18.0", "transformers", "accelerate")

Run = Callable[..., None]


def llama_cpp(home: Path, run: Run) -> None:
    """Unpack the sdist into `source` and build the tools into `build/bin`, for this machine's instruction set."""
    source, build = home / "source", home / "build"
    if not source.is_dir():
        fetched = home / "fetched"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        run(*pip, "--dest", fetched, LLAMA_CPP)
        unpack(next(fetched.glob("*.tar.gz")), "vendor/llama.cpp", source)
        shutil.rmtree(fetched)
    run(sys.executable, "-m", "pip", "install", "--quiet", "--target", home / "python", *LLAMA_CONVERTER)
    header = home / "tile_config.h"
    header.write_text(TILE_CONFIG)
    flags = [f"-D{flag}" for flag in (*LLAMA_FLAGS, "CMAKE_BUILD_TYPE=Release", f"CMAKE_CXX_FLAGS=-include {header}")]
    run("cmake", "-S", source, "-B", build, "-G", "Ninja", *flags)
    run("cmake", "--build", build, "--parallel", str(cores()), "--target", *LLAMA_TOOLS)


def openvino(home: Path, run: Run) -> None:
    """OpenVINO GenAI and the exporter; it wants an older transformers than ours."""
    environment(home, run, OPENVINO)


def torchao(home: Path, run: Run) -> None:
    """torchao beside the same torch as ours."""
    environment(home, run, TORCHAO)


RIVALS = {"llama.cpp": llama_cpp, "openvino": openvino, "torchao": torchao}


def environment(home: Path, run: Run, packages: tuple[str, ...]) -> None:
    """A virtual environment in `home/venv` with torch, then `packages`."""
    python = home / "venv" / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", home / "venv")
    run(python, "-m", "pip", "install", "--quiet", TORCH)
    run(python, "-m", "pip", "install", "--quiet", TORCH, *packages)
    # Pulled in by some of them, built for another torch, and then transformers cannot be imported; no text model needs it.
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision")


def unpack(archive: Path, folder: str, target: Path) -> None:
    """Extract `folder` of an sdist as `target`, whole or not at all."""
    scratch = target.with_name(target.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(scratch, filter="data")
    (next(scratch.iterdir()) / folder).rename(target)
    shutil.rmtree(scratch)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make(name: str, build: Callable[[Path, Run], None]) -> bool:
    """Build one rival unless its `ready` file says that it is there; print one line, and the log's path on failure."""
    home = rivals_home() / name
    if (home / "ready").is_file():
        print(f"{name}: already there, {home}", flush=True)
        return True
    home.mkdir(parents=True, exist_ok=True)
    log = home / "build.log"
    # Our environment's cmake and ninja count even when it is not activated.
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PATH": search}
    print(f"{name}: building in {home}, log {log}", flush=True)

    def run(*command: object) -> None:
        with log.open("a") as out:
            subprocess.run([*map(str, command)], check=True, stdout=out, stderr=subprocess.STDOUT, env=variables)

    try:
        build(home, run)
    except (OSError, subprocess.CalledProcessError, tarfile.TarError, StopIteration) as error:
        print(f"{name}: failed, {reason(error)}; see {log}", flush=True)
        return False
    (home / "ready").write_text("")
    print(f"{name}: ready, {home}", flush=True)
    return True


def reason(error: Exception) -> str:
    """One line about what stopped a build."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"`{' '.join(error.cmd[:4])} ...` ended with status {error.returncode}"
    return f"{type(error).__name__} {error}"


def main(wanted: list[str]) -> int:
    """Build what is asked for, or all; 1 when any failed."""
    if unknown := [name for name in wanted if name not in RIVALS]:
        print(f"unknown rival {', '.join(unknown)}; known: {', '.join(RIVALS)}", file=sys.stderr)
        return 2
    made = [make(name, RIVALS[name]) for name in wanted or RIVALS]
    return 0 if all(made) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
