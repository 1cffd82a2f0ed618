"""Which recipe loses least? Quantizes the demo model with several and measures each against the float model.

Run: python examples/compare_recipes.py [RECIPE ...]      (a few minutes for each recipe on two cores)
"""

import sys
import tempfile
from pathlib import Path

import anybit


def main(recipes: list[str]) -> None:
    """Print one line per recipe; the checkpoints are thrown away."""
    print(f"{'recipe':12} {'MB':>6} {'bits':>6} {'perplexity':>11} {'float':>7} {'KL':>8} {'same token':>11}")
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / recipe)
            made = anybit.quantize("demo", recipe=recipe, out=out, samples=8, seq_len=256, overrides=["weights.bits=3"])
            found = anybit.evaluate(out, text="wiki-test", baseline="demo", ctx=256, max_tokens=2048)
        print(
            f"{recipe:12} {made['size_bytes'] / 1e6:6.1f} {made['bits_per_weight']:6.3f} {found['perplexity']:11.2f} "
            f"{found['baseline_perplexity']:7.2f} {found['kl_mean']:8.4f} {found['top1_agreement']:10.1%}"
        )


if __name__ == "__main__":
    main(sys.argv[1:] or ["rtn-w4", "gptq-w4", "awq-w4"])
