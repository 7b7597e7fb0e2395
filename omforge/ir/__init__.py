"""The intermediate representation: onnx-ir's classes, and what onnx-ir lacks."""
