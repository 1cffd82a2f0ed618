"""Continuous batching: requests come and go between passes of one model."""
