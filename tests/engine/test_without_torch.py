"""The native engine from the command line: no PyTorch, no transformers, and memory for the model alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from anybit.engine.generate import generate
from anybit.engine.native import NativeModel
from anybit.engine.open import open_engine
from anybit.engine.tensors import Shard, Tensors
from anybit.errors import FormatError
from anybit.kernels import native
from tiny_checkpoints import quantize_tiny
from tiny_models import tiny_tokenizer

pytestmark = pytest.mark.skipif(native.native() is None, reason="anybit._native is not built")

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
RUN = """
import json, sys
from anybit.cli.app import app
code = app(sys.argv[1:], standalone_mode=False)
heavy = [name for name in ("torch", "transformers", "safetensors.torch") if name in sys.modules]
print(json.dumps(heavy), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    out = quantize_tiny("llama", tmp_path_factory.mktemp("llama"), config={"rope_parameters": LLAMA3})
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32


def run(*arguments, text=""):
    command = [sys.executable, *(["-S"] if sys.flags.no_site else []), "-c", RUN, *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("chat", [False, True])
def test_generate_does_not_import_torch_and_says_the_same(chat, llama):
    options = ["--prompt", "once upon", "--max-new-tokens", 12, "--temperature", 0.8, "--seed", 3, "--json"]
    done = run("generate", llama, *options, "--engine", "native", *(["--chat"] if chat else []))
    assert json.loads(done.stderr.splitlines()[-1]) == []
    found = json.loads(done.stdout)
    templated = tiny_tokenizer()  # transformers' own
    templated.chat_template = TEMPLATE
    expected = generate(
        NativeModel.open(llama), templated, "once upon", max_new_tokens=12, temperature=0.8, seed=3, chat=chat
    )
    assert (found["text"], found["tokens"], found["prompt_tokens"]) == (expected.text, 12, expected.prompt_tokens)


def test_chat_does_not_import_torch(llama):
    done = run("chat", llama, "--max-new-tokens", 4, text="hello\n/quit\n")
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert done.stdout.strip()


def test_both_engines_draw_alike(llama):
    """The logits differ by rounding only, so a draw falls on the other side of a border now and then at most."""
    (ours, tokenizer), (theirs, _) = open_engine(llama, "native"), open_engine(llama, "torch")
    texts = []
    for model in (ours, theirs):
        runs = [generate(model, tokenizer, "once", max_new_tokens=1, temperature=0.7, seed=s) for s in range(60)]
        texts.append([found.token_ids[0] for found in runs])
    assert len(set(texts[0])) > 15
    assert sum(a == b for a, b in zip(*texts, strict=True)) >= 40


KINDS = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16, "d": torch.uint8, "e": torch.int32}


@pytest.fixture
def shard(tmp_path):
    """A file of every dtype, odd sizes, an empty tensor and a scalar."""
    torch.manual_seed(0)
    tensors = {name: (torch.randn(3, 5) * 50).to(kind) for name, kind in KINDS.items()}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "large": torch.randn(1 << 19)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "x.safetensors")})
    )
    return tmp_path


def test_tensors_are_those_of_safetensors(shard):
    from anybit.checkpoint.ledger import tensor_sha256

    reader, expected = Tensors(shard), load_file(shard / "x.safetensors")
    for name, tensor in expected.items():
        bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(reader.get(name), bits.numpy())
        assert Shard(shard / "x.safetensors").sha256(name) == tensor_sha256(tensor)
        if tensor.is_floating_point():
            np.testing.assert_array_equal(reader.floats(name), tensor.float().numpy())
    kept = reader.get("large")
    reader.release()
    np.testing.assert_array_equal(kept, expected["large"].numpy())  # read again from the file


def resident_file_bytes():
    found = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile:")]
    return int(found[0].split()[1]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc here")
def test_what_was_read_can_be_given_back_and_hashing_takes_none(tmp_path):
    save_file({"x": torch.ones(1 << 25, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    shard = Shard(tmp_path / "x.safetensors")
    before = resident_file_bytes()
    shard.sha256("x")
    assert resident_file_bytes() - before < 1 << 23
    assert int(shard.array("x").max()) == 1
    assert resident_file_bytes() - before > 3 << 23
    shard.release()
    assert resident_file_bytes() - before < 1 << 23


@pytest.mark.parametrize("damage", ["cut", "header", "length", "shape", "missing"])
def test_damaged_files_are_refused(damage, shard):
    path = shard / "x.safetensors"
    data = path.read_bytes()
    changed = {
        "cut": data[:-1000],
        "header": data[:20] + b"\xff\xff" + data[22:],
        "length": (1 << 40).to_bytes(8, "little") + data[8:],
        "shape": data.replace(b"[524288]", b"[524287]"),
        "missing": None,
    }[damage]
    path.write_bytes(changed) if changed is not None else path.unlink()
    with pytest.raises(FormatError, match="is damaged or missing"):
        Tensors(shard).get("large")
