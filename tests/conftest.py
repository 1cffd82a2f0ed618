"""Puts tests/ on the path, so that every test can `from tiny_models import tiny`; Triton interprets where there is no GPU."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read at Triton's first import, whoever makes it
