"""Tasks for lm-eval that come along."""
