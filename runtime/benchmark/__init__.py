"""What the benchmark measures: whole models, single layers, a decoder of real size."""
