"""GE graphs as files (.air), which ATC takes with --framework=1: what they are, read and written.

`graph` is the graph as records, `messages` its protobuf, `files` reads and writes one, `names` the
slots of operators by name, `prototypes` what GE registers of each operator, `kernels` what CANN
8.1.RC1 has kernels for, `reference` the same graph for ONNX Runtime, `show` one for a reader.
"""
