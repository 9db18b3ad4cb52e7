"""How a sparse product runs: layouts, kernels, the tuner, sparse modules, ONNX Runtime, the benchmark."""
