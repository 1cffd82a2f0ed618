"""What is on disk is what the ledger says, or is refused by name; and what is written is what was planned."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from anybit.checkpoint.finish import finish_directory, float_tensors
from anybit.checkpoint.ledger import Ledger
from anybit.checkpoint.partial import Partial
from anybit.checkpoint.verify import verify
from anybit.errors import FormatError, PromiseError
from tiny_checkpoints import quantize_tiny

LAYER = "model.layers.0.mlp.up_proj"
SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return quantize_tiny("llama", tmp_path_factory.mktemp("verify"))


@pytest.fixture
def own(good, tmp_path):
    return shutil.copytree(good, tmp_path / "own")


def test_a_good_checkpoint_gives_its_ledger(good):
    assert verify(good) == Ledger.read(good)


@pytest.mark.parametrize("file", ["../own2/" + SHARD, "/etc/hostname", "x" * 5000, 5, None])
def test_an_index_names_files_beside_it_only(own, file):
    shutil.copytree(own, own.with_name("own2"))
    index = own / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"][f"{LAYER}.weight"] = file
    index.write_text(json.dumps(found))
    with pytest.raises(FormatError, match="not there"):
        verify(own)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "null", "\xff"])
def test_a_config_that_is_no_object(own, text):
    (own / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"not JSON|no quantization at all"):
        verify(own)


def change(directory, name, new):
    state = load_file(directory / SHARD)
    state[name] = new(state[name])
    save_file(state, directory / SHARD, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "tensor", [f"{LAYER}.weight", f"{LAYER}.scale", f"{LAYER}.zero", "model.layers.0.input_layernorm.weight"]
)
def test_one_changed_number_is_found(own, tensor):
    def bump(t):
        t.view(-1)[-1] += 1
        return t

    change(own, tensor, bump)
    with pytest.raises(FormatError, match=tensor.replace(".", r"\.") + ".*altered"):
        verify(own)


@pytest.mark.parametrize(
    ("tensor", "new"),
    [
        (f"{LAYER}.scale", lambda t: t.float()),
        (f"{LAYER}.scale", lambda t: t[:, :1].contiguous()),
        (f"{LAYER}.weight", lambda t: t[:3].contiguous()),
        (f"{LAYER}.zero", lambda t: t.char()),
    ],
)
def test_another_shape_or_dtype_is_found(own, tensor, new):
    change(own, tensor, new)
    with pytest.raises(FormatError, match=tensor.replace(".", r"\.") + " is not torch"):
        verify(own)


def test_a_form_other_than_the_ledgers_is_found(own):
    config = json.loads((own / "config.json").read_text())
    config["quantization_config"]["layers"][LAYER]["terms"][0]["bits"] = 3
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=f"'{LAYER}' is affine3g32, the ledger planned affine4g32"):
        verify(own)


def test_a_ledger_whose_rows_kept_no_promise_is_found(own):
    ledger = json.loads((own / "ledger.json").read_text())
    row = next(row for row in ledger["tensors"] if row["name"] == LAYER)
    row["actual"] = "affine3g32"
    (own / "ledger.json").write_text(json.dumps(ledger))
    with pytest.raises(FormatError, match=LAYER):
        verify(own)


def test_a_tensor_in_no_shard_is_named(own):
    index = own / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"]["model.layers.0.input_layernorm.weight"]
    index.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=r"input_layernorm\.weight is in no shard"):
        verify(own)


def rebuilt(good, tmp_path, edit):
    """`finish_directory` over the shards of `good`, after `edit` changed what was planned."""
    ledger = Ledger.read(good)
    account = ledger.model_dump(include={"model", "recipe", "bits_per_weight", "size_bytes", "float_bytes", "identity"})
    forms = json.loads((good / "config.json").read_text())["quantization_config"]["layers"]
    rows = list(ledger.tensors)
    partial = Partial(tmp_path / "again")
    partial.begin({}, resume=False, overwrite=False)
    for file in good.glob("*.safetensors"):
        shutil.copyfile(file, partial.root / file.name)
    edit(SimpleNamespace(account=account, forms=forms, rows=rows))
    finish_directory(partial, good.parent / "float", 4, account, forms, rows)
    return partial.out


def test_finishing_again_gives_the_same_files(good, tmp_path):
    out = rebuilt(good, tmp_path, lambda _: None)
    for name in ("config.json", "ledger.json", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (good / name).read_bytes()


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda plan: plan.account.update(size_bytes=plan.account["size_bytes"] + 1), "bytes of tensors were planned"),
        (lambda plan: plan.rows.pop(), "planned and not written"),
        (lambda plan: plan.forms.pop(LAYER), f"'{LAYER}' was planned and not written, or written"),
    ],
)
def test_what_was_not_planned_is_not_finished(good, tmp_path, edit, match):
    with pytest.raises(PromiseError, match=match):
        rebuilt(good, tmp_path, edit)
    assert not (tmp_path / "again").exists()


def test_what_stays_float_is_cast_and_checked():
    module = nn.ModuleDict({"up": nn.Linear(3, 2), "norm": nn.LayerNorm(3)})
    kept = float_tensors(module, "m", {"m.up"}, torch.bfloat16)
    assert sorted(kept) == ["m.norm.bias", "m.norm.weight", "m.up.bias"]
    assert {t.dtype for t in kept.values()} == {torch.bfloat16}
    module["norm"].weight.data[1] = torch.nan
    with pytest.raises(PromiseError, match=r"m\.norm\.weight.*NaN"):
        float_tensors(module, "m", set(), torch.float32)
    assert torch.isfinite(module["up"].weight.data.mul_(1e30)).all()
    with pytest.raises(PromiseError, match=r"m\.up\.weight.*infinity"):  # does not fit the dtype it is stored in
        float_tensors(module, "m", set(), torch.float16)
