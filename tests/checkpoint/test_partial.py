"""A checkpoint being written: every way to begin, go on and end; files whole or absent."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from anybit.checkpoint import partial as module
from anybit.checkpoint.ledger import Ledger
from anybit.checkpoint.partial import Partial, differences, write_json, write_shard
from anybit.errors import InputError, PromiseError
from anybit.integrations.exchange.place import written_whole

JOB = {"model": {"sha": "a"}, "data": {"seed": 0, "names": ("x",)}}
OTHER = {"model": {"sha": "a"}, "data": {"seed": 1, "names": ("x",)}}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.mark.parametrize("name", [".", "..", "/", "somewhere/.."])
def test_a_directory_needs_a_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (lambda: Partial(Path(name)), lambda: written_whole(Path(name), True, True).__enter__()):
        with pytest.raises(InputError, match="no name of its own"):
            place()
    assert not list(tmp_path.iterdir())


def test_a_fresh_start_leaves_out_alone(out):
    run = Partial(out)
    assert run.begin(JOB, resume=False, overwrite=False) == {}
    assert run.root == out.with_name("out.partial")
    assert not out.exists()
    assert run.finished(JOB) is None


def test_commit_and_resume(out):
    Partial(out).begin(JOB, resume=False, overwrite=False)
    assert Partial(out).begin(JOB, resume=True, overwrite=False) == {}  # killed before the first commit
    Partial(out).commit({"next": 1, "rows": []})
    Partial(out).commit({"next": 2, "rows": [1]})
    assert Partial(out).begin(JOB, resume=True, overwrite=False) == {"next": 2, "rows": [1]}


def test_resume_with_nothing_there_is_a_fresh_start(out):
    assert Partial(out).begin(JOB, resume=True, overwrite=False) == {}
    assert (out.with_name("out.partial") / "state" / "identity.json").is_file()


def test_resume_of_a_run_killed_before_its_identity_was_written(out):
    root = out.with_name("out.partial")
    (root / "state").mkdir(parents=True)
    (root / "junk").write_text("half")
    assert Partial(out).begin(JOB, resume=True, overwrite=False) == {}
    assert not (root / "junk").exists()
    assert Partial(out).begin(JOB, resume=True, overwrite=False) == {}
    with pytest.raises(InputError, match="another job"):
        Partial(out).begin(OTHER, resume=True, overwrite=False)


def test_what_is_in_the_way_is_refused(out):
    out.write_text("a file")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is a file"):
            Partial(out).begin(JOB, resume=False, overwrite=overwrite)
    out.unlink()
    out.mkdir()
    Partial(out).begin(JOB, resume=False, overwrite=False)  # an empty directory is not in the way
    with pytest.raises(InputError, match=r"--resume.*--overwrite"):
        Partial(out).begin(JOB, resume=False, overwrite=False)
    (out / "mine").write_text("precious")
    for resume in (False, True):
        with pytest.raises(InputError, match="not empty"):
            Partial(out).begin(JOB, resume=resume, overwrite=False)
    assert (out / "mine").read_text() == "precious"


def test_overwrite_starts_again(out):
    run = Partial(out)
    run.begin(JOB, resume=False, overwrite=False)
    run.commit({"next": 3})
    assert Partial(out).begin(OTHER, resume=False, overwrite=True) == {}
    assert Partial(out).begin(OTHER, resume=True, overwrite=False) == {}


def test_resuming_another_job_names_the_difference(out):
    Partial(out).begin(JOB, resume=False, overwrite=False)
    with pytest.raises(InputError, match=r"another job: data\.seed was 0, now 1;"):
        Partial(out).begin(OTHER, resume=True, overwrite=False)


def write_ledger(directory, identity):
    facts = {"model": "m", "recipe": "r", "bits_per_weight": 4.5, "size_bytes": 9, "float_bytes": 90}
    Ledger(tensors=[], float_tensors={}, identity=identity, **facts).write(directory)


def test_finish_is_the_moment_out_exists(out):
    run = Partial(out)
    run.begin(JOB, resume=False, overwrite=False)
    write_ledger(run.root, JOB)
    run.finish()
    assert sorted(p.name for p in out.iterdir()) == ["ledger.json"]
    assert not run.root.exists()
    found = Partial(out).finished(JOB)
    assert found is not None
    assert found.size_bytes == 9
    with pytest.raises(InputError, match=r"another job: data\.seed"):
        Partial(out).finished(OTHER)


def test_an_unfinished_run_beside_a_finished_one_goes_first(out):
    out.mkdir()
    write_ledger(out, OTHER)
    assert Partial(out).begin(JOB, resume=False, overwrite=True) == {}
    assert Partial(out).finished(JOB) is None


def test_finish_replaces_an_older_result_whole(out):
    out.mkdir()
    (out / "old").write_text("1")
    run = Partial(out)
    run.begin(JOB, resume=False, overwrite=True)
    (run.root / "new").write_text("2")
    assert (out / "old").is_file()
    run.finish()
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_differences():
    assert list(differences({"a": 1, "b": {"c": [1], "d": 2}}, {"a": 1, "b": {"c": [2], "d": 2}, "e": None, "f": 0})) \
        == ["b.c was [1], now [2]", "f was null, now 0"]  # fmt: skip
    assert list(differences(JOB, JOB)) == []


def shard():
    return {"b": torch.arange(6).view(2, 3).t(), "a": torch.tensor([1.5, -0.0], dtype=torch.float16)}


def test_same_tensors_same_bytes(tmp_path):
    write_shard(tmp_path / "one", shard())
    write_shard(tmp_path / "two", dict(reversed(shard().items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), PromiseError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), PromiseError),
        (RuntimeError("I/O error: No space left on device (os error 28)"), PromiseError),
        (OSError(errno.EIO, "Input/output error"), OSError),
        (RuntimeError("something else"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch, failure, raised):
    path = tmp_path / "shard"
    write_shard(path, shard())
    before = path.read_bytes()

    def fail(tensors, file, **kwargs):
        file.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(raised, match="--resume" if raised is PromiseError else None):
        write_shard(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == before


def test_bytes_are_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    """A power cut between rename and write would otherwise leave an empty file under the final name."""
    synced = []
    real = module._sync
    monkeypatch.setattr(
        module, "_sync", lambda path: (synced.append((path.name, (tmp_path / "x").exists())), real(path))
    )
    for write in (lambda: write_json(tmp_path / "x", {}), lambda: write_shard(tmp_path / "x", shard())):
        synced.clear()
        (tmp_path / "x").unlink(missing_ok=True)
        write()
        assert synced == [("x.tmp", False), (tmp_path.name, True)]


def test_json_that_is_no_json_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert (tmp_path / "x.json").read_text() == '{\n "a": 1\n}\n'
