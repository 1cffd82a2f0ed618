"""Tuning, training and measuring of precision schedules on generation tasks (methods/pmpd.md)."""
