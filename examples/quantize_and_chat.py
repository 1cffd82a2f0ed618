"""Quantize the demo model, load it like any other model, ask it something.

Run: python examples/quantize_and_chat.py [OUT]
"""

import sys
from pathlib import Path

from transformers import AutoTokenizer

import anybit


def main(out: Path) -> None:
    """Quantize into `out` unless that has been done, then answer one question, streamed."""
    if not out.is_dir():
        result = anybit.quantize("demo", recipe="gptq-w4", out=str(out), samples=8, seq_len=256)
        print(f"{result['size_bytes'] / 1e6:.0f} MB, {result['bits_per_weight']:.2f} bits per weight\n")
    model, tokenizer = anybit.load(out), AutoTokenizer.from_pretrained(out)
    question = "What is a bit? Answer in one sentence."
    print(f"> {question}")
    anybit.generate(
        model, tokenizer, question, max_new_tokens=64, chat=True, on_text=lambda piece: print(piece, end="", flush=True)
    )
    print()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "smol-w4"))
