"""Guessing tokens ahead, so that one pass can check several: lossless, whatever is guessed (methods/anpd.md)."""
