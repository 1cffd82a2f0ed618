"""GGUF, the file of llama.cpp: `blocks.py` and `kquants.py` know the bytes, `write.py` and `read.py` the file."""
