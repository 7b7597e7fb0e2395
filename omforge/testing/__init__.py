"""For pass authors: assertions on ONNX text, and graph strategies."""
