"""What compile writes: the torch artefact, the ONNX file, the report."""
