"""Number formats: how weights are written down, and nothing about who chose them or where they run.

`planes.py` holds the one saved form of integer codes; each decoder file turns codes into numbers; `terms.py` puts both
together into the terms a quantized weight is a sum of.
"""
