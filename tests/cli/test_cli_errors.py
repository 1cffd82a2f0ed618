"""Failures are one line on stderr, nothing on stdout, and the right exit code."""

from __future__ import annotations

import errno
import json

import pytest

from anybit.cli.errors import run
from anybit.cli.plan import check_limits
from anybit.errors import AnybitError, FormatError, InputError, KernelUnavailable, PromiseError, RecipeError


def raiser(error: BaseException):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("x"), 2),
        (FormatError("x"), 2),
        (RecipeError("x"), 2),
        (KernelUnavailable("x"), 2),
        (PromiseError("x"), 3),
        (AnybitError("x"), 1),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("x"), 1),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/x"), 2),
        (OSError(errno.EIO, "Input/output error", "x"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1),
    ],
)
def test_exit_codes(error, code, capsys):
    assert run(raiser(error)) == code
    done = capsys.readouterr()
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


def test_a_message_of_several_lines_becomes_one(capsys):
    assert run(raiser(InputError("first\nsecond"))) == 2
    assert capsys.readouterr().err == "error: first second\n"


def test_a_bug_says_where_and_shows_the_traceback_only_when_asked(capsys, monkeypatch):
    monkeypatch.delenv("ANYBIT_DEBUG", raising=False)
    run(raiser(ZeroDivisionError("oops")))
    brief = capsys.readouterr().err
    assert "ZeroDivisionError: oops at " in brief
    assert f"{__file__}:" in brief
    assert "ANYBIT_DEBUG=1" in brief
    monkeypatch.setenv("ANYBIT_DEBUG", "1")
    assert run(raiser(ZeroDivisionError("oops"))) == 1
    full = capsys.readouterr().err
    assert "Traceback (most recent call last)" in full
    assert full.splitlines()[-1] == "error: ZeroDivisionError: oops"


def test_success_is_zero_whatever_the_command_returns(capsys):
    assert run(lambda: None) == 0
    assert run(lambda: "text") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quantise"], "quantize"),
        (["quantize"], "MODEL"),
        (["quantize", "demo", "--out", "x"], "--recipe"),
        (["quantize", "demo", "--recipe", "rtn-w4", "--out", "x", "--samples", "0"], "--samples"),
        (["quantize", "demo", "--recipe", "rtn-w4", "--out", "x", "--device", "tpu"], "--device tpu"),
        (["quantize", "demo", "--recipe", "rtn-w4", "--out", "x", "--wat"], "--wat"),
        (["recipes", "gptq-w44"], "gptq-w4"),
        (["inspect", "no/such"], "no/such"),
        (["eval", "no/such", "--limit", "3", "--text", "topics"], "--tasks"),
        (["eval", "no/such"], "--tasks"),
        (["eval", "no/such", "--text", "topics", "--ctx", "1"], "--ctx"),
        (["plan", "demo", "--max-size", "big"], "--max-size"),
        (["generate", "no/such", "--prompt", "x"], "no/such"),
    ],
)
def test_wrong_usage_names_the_culprit(anybit, words, said):
    done = anybit(*words)
    assert done.code == 2
    assert done.out == ""
    assert said in done.err
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--schedule", "4@0,3@32"], "not nested: it holds 4 bits only"),
        (["--schedule", "3"], "not nested: it holds 4 bits only"),
        (["--schedule", "auto"], "--schedule auto: this checkpoint is not nested"),
        (["--schedule", "3@0,4@9"], "bits may only fall"),
        (["--prefill-precision", "8"], "--prefill-precision 8: not in this checkpoint"),
        (["--draft", "self"], "--draft self: this checkpoint is not nested"),
        (["--draft", "tree"], "--draft tree: unknown; known: none, ngram, lookup, self"),
        (["--draft", "ngram", "--engine", "torch"], "--draft with --engine torch: float sums"),
        (["--guard"], "--guard: this checkpoint is not nested"),
        (["--engine", "gpu"], "--engine gpu: not available in this version"),
    ],
)
def test_generate_refuses_what_cannot_be(anybit, checkpoint, flags, said):
    done = anybit("generate", checkpoint, "--prompt", "x", *flags)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_stored_bits_are_a_valid_precision(anybit, checkpoint):
    done = anybit("generate", checkpoint, "--prompt", "", "--schedule", "4", "--prefill-precision", "stored")
    assert "--prompt is empty" in done.err  # so the precisions before it were accepted


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: None,
        lambda ledger: [ledger],
        lambda ledger: ledger | {"tensors": "none"},
        lambda ledger: ledger | {"bits_per_weight": "4"},
        lambda ledger: ledger | {"tensors": [*ledger["tensors"], {}]},
        lambda ledger: ledger | {"tensors": [ledger["tensors"][0] | {"error": "small"}]},
        lambda ledger: ledger | {"tensors": [17]},
    ],
)
def test_a_damaged_ledger_is_an_input_error(anybit, checkpoint, ledger, damage):
    (checkpoint / "ledger.json").write_text(json.dumps(damage(ledger)))
    done = anybit("inspect", checkpoint)
    assert done.code == 2
    assert "ledger.json" in done.err
    assert done.err.count("\n") == 1


def test_a_truncated_ledger_is_an_input_error(anybit, checkpoint):
    path = checkpoint / "ledger.json"
    path.write_text(path.read_text()[:-20])
    assert anybit("inspect", checkpoint).code == 2
    path.write_bytes(b"\xff\xfe{}")
    assert anybit("inspect", checkpoint).code == 2
    path.unlink()
    assert anybit("inspect", checkpoint).code == 2


PREDICTED = {"size_bytes": 94_000_000, "kl": None, "tokens_per_second": 20.0}


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({}, None),
        ({"max_size": 94_000_000}, None),
        ({"max_size": 93_999_999}, PromiseError),
        ({"min_speed": 20.0}, None),
        ({"min_speed": 20.1}, PromiseError),
        ({"max_kl": 1.0}, InputError),
    ],
)
def test_limits_of_a_plan(limits, error):
    if error is None:
        check_limits(PREDICTED, **limits)
        return
    with pytest.raises(error):
        check_limits(PREDICTED, **limits)


def test_a_promise_that_cannot_be_checked_is_not_called_broken():
    with pytest.raises(InputError, match="does not predict kl"):
        check_limits(PREDICTED, max_kl=0.1)
