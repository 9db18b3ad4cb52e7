"""From a model to a graph: torch modules and ONNX files."""
