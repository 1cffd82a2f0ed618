"""Models with made-up tokenizers (generated for speed tests): llama.cpp only converts tokenizers that it knows."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from anybit.evaluate.rivals.process import run_command

_TRAIN = """
import io, sys
from sentencepiece import SentencePieceTrainer
model = io.BytesIO()
SentencePieceTrainer.Train(sentence_iterator=iter(["a b c"]), model_writer=model, model_type="bpe", vocab_size=300,
                           byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
open(sys.argv[1], "wb").write(model.getvalue())
"""


@contextmanager
def with_stand_in_tokenizer(model: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """A directory with the weights and configuration of `model` and a tokenizer of bytes.

    Speeds are the same, because they are measured on token ids; text of the result would mean nothing.

    Args:
        environment: variables under which our interpreter finds sentencepiece.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        for path in model.resolve().iterdir():
            if not path.name.startswith(("tokenizer", "vocab", "merges", "special_tokens")):
                (target / path.name).symlink_to(path)
        run_command([sys.executable, "-c", _TRAIN, target / "tokenizer.model"], seconds=60, env=environment)
        yield target
