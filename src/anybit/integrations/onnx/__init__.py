"""ONNX: the whole causal language model as one graph, its linears `MatMulNBits` (onnxruntime's operator). `layers.py` has the
modules that stand in for ours while PyTorch's exporter traces, `write.py` the graph."""
