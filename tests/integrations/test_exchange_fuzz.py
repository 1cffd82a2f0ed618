"""Damaged checkpoints of other engines: cut, flipped, with nonsense for settings. Either they are imported, or refused in one
line with nothing left behind; no other error, and no waiting."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anybit
from anybit.errors import InputError
from tiny_checkpoints import quantize_tiny

EXAMPLES = 10
FORMATS = {"gptq": "in", "awq": "in", "compressed-tensors": "in", "gguf": "in/model.gguf"}
NONSENSE = [None, True, -1, 0, 3, 7, 10**12, 2**70, 0.5, float("inf"), "", "4", "re:(", "nn", [], [1], {}, {"a": 1}]
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=20_000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, tmp_path_factory):
    """A good one, and the folder where damaged copies of it go."""
    where = tmp_path_factory.mktemp(request.param)
    source = quantize_tiny("llama", where, overrides=["weights.group_size=32"], config={"num_hidden_layers": 1})
    (where / "good").mkdir()
    out = where / "good" / "model.gguf" if request.param == "gguf" else where / "good"
    anybit.export(source, to=request.param, out=out, overwrite=True)
    return where / "good", FORMATS[request.param]


def attempt(exported, damage) -> None:
    """Import a damaged copy: as it should be, or refused as it should be."""
    good, name = exported
    work = good.parent / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(good, work / "in")
    damage(work / "in")
    try:
        anybit.import_checkpoint(work / name, out=work / "out", allow_loss=True)
    except InputError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 - other classes fail the test
        assert [path.name for path in work.iterdir()] == ["in"]
    else:
        assert (work / "out" / "ledger.json").is_file()


places = st.floats(0, 1, exclude_max=True)


def of(folder, place, pattern="*"):
    """One of the files that matter, at a fraction of them all."""
    files = sorted(f for f in folder.glob(pattern) if f.suffix in (".safetensors", ".gguf") or f.name == "config.json")
    return files[int(place * len(files))]


@fuzz
@given(which=places, cut=places)
def test_cut_short(exported, which, cut):
    def damage(folder):
        data = (file := of(folder, which)).read_bytes()
        file.write_bytes(data[: int(cut * len(data))])

    attempt(exported, damage)


@fuzz
@given(which=places, flips=st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_of_headers(exported, which, flips):
    def damage(folder):
        data = bytearray((file := of(folder, which)).read_bytes())
        for at, flip in flips:
            data[at % len(data)] ^= flip
        file.write_bytes(data)

    attempt(exported, damage)


def leaves(tree, at=()):
    """Paths of all values of a JSON tree, branches too."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in pairs for path in [(*at, key), *leaves(value, (*at, key))]]


@fuzz
@given(which=places, value=st.sampled_from(NONSENSE))
def test_nonsense_for_a_setting(exported, which, value):
    if exported[1].endswith(".gguf"):
        pytest.skip("its settings are bytes of the header")

    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        *path, last = leaves(config)[int(which * len(leaves(config)))]
        branch = config
        for key in path:
            branch = branch[key]
        branch[last] = value
        (folder / "config.json").write_text(json.dumps(config))

    attempt(exported, damage)
