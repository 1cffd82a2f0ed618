"""Numbers in words: sizes, times and the verdict a reader wants first."""

from __future__ import annotations

from typing import Any


def size(count: float) -> str:
    """Bytes in decimal units with three digits, as file managers show them: 87.3 MB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 0 if unit == "B" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """A time span: 12.3 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def float_bits(ledger: dict[str, Any]) -> int | None:
    """16 or 32, the width of the float model's weights, from its size; None when the ledger does not say."""
    if not ledger.get("size_bytes") or not ledger.get("float_bytes") or not ledger.get("bits_per_weight"):
        return None
    weights = 8 * ledger["size_bytes"] / ledger["bits_per_weight"]
    bits = round(8 * ledger["float_bytes"] / weights)
    return bits if bits in (16, 32) else None


def size_words(ledger: dict[str, Any]) -> str | None:
    """How much smaller the checkpoint is than the float model; None when the ledger does not say.

    A 32-bit original makes every ratio look twice as good as people expect, so the one to 16 bits stands beside it.
    """
    small, large = ledger.get("size_bytes"), ledger.get("float_bytes")
    if not small or not large:
        return None
    bits = float_bits(ledger)
    wide = f" in {bits}-bit float" if bits else ""
    beside = f" ({large / small / 2:.1f} times against 16-bit float)" if bits == 32 else ""
    return f"{size(small)} instead of {size(large)}{wide}: {large / small:.1f} times smaller{beside}."


def quality_words(quality: dict[str, Any]) -> list[str]:
    """What an evaluation says, as sentences; only what was measured is mentioned.

    Args:
        quality: the JSON of `anybit eval`.
    """
    if quality.get("baseline_perplexity") is None:
        after, error, tokens = quality["perplexity"], quality["stderr"], quality["tokens"]
        return [f"Perplexity {after:.2f} ± {error:.2f} on {tokens:,} tokens; no float model to compare with."]
    return [sentence for sentence in (_perplexity(quality), _divergence(quality), _agreement(quality)) if sentence]


def change_percent(quality: dict[str, Any]) -> tuple[float, float, float]:
    """How much higher the perplexity is than the float model's, in percent: value, low and high of its 95 % interval.

    Without an interval for the pair, one from the perplexity's own standard error: too wide, never too narrow, because
    both models are scored on the same tokens.
    """
    value = quality["perplexity"] / quality["baseline_perplexity"]
    half = 1.96 * quality["stderr"] / quality["baseline_perplexity"]
    low = quality.get("perplexity_ratio_low", value - half)
    high = quality.get("perplexity_ratio_high", value + half)
    return (value - 1) * 100, (low - 1) * 100, (high - 1) * 100


def _perplexity(quality: dict[str, Any]) -> str:
    before, after = quality["baseline_perplexity"], quality["perplexity"]
    change, low, high = change_percent(quality)
    return (
        f"Perplexity {after:.2f} against {before:.2f} in float: {change:+.1f} % "
        f"(95 % interval {low:+.1f} to {high:+.1f} %, {quality['tokens']:,} tokens)."
    )


def _divergence(quality: dict[str, Any]) -> str | None:
    mean, floor = quality.get("kl_mean"), quality.get("kl_noise_floor")
    if mean is None:
        return None
    said = f"Its next-token distribution differs from the float model's by {mean:.4f} nats on average"
    if not floor:
        return said + "."
    times = mean / floor
    place = "no more than" if times <= 1 else f"{times:,.0f} times" if times >= 10 else f"{times:.1f} times"
    return f"{said}, {place} the noise floor of {floor:.2g} (the float model against itself in bfloat16)."


def _agreement(quality: dict[str, Any]) -> str | None:
    share = quality.get("top1_agreement")
    return None if share is None else f"Both pick the same next token {share * 100:.1f} % of the time."
