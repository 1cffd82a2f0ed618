"""compressed-tensors, the format of llm-compressor and vLLM: `scheme.py` says it in JSON, `write.py` and `read.py` in tensors.

    pack-quantized   weight_packed int32 [N, ceil(K b / 32)] dense along K, weight_scale [N, G], weight_shape int64 [2];
                     asymmetric: weight_zero_point int32 [ceil(N b / 32), G] dense along N
    int-quantized    weight int8 [N, K], weight_scale [N, G]
    float-quantized  weight float8 e4m3 [N, K], weight_scale [N, G]

Codes and zeros are signed, code - 2^(b-1); packed ones have 2^(b-1) added. G = 1 for the strategy "channel". Written as
version 0.20 does (0.17 packs 3, 5, 6 and 7 bits otherwise).
"""
