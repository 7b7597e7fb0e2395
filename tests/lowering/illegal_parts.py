"""What deliberately illegal models are made of: text, edits of the message, files beside it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import TensorProto, helper

HEADER = '<ir_version: 8, opset_import: ["" : 16]>'

Edit = Callable[[onnx.ModelProto], None]


@dataclass(frozen=True)
class Source:
    """A model as text, what is done to its message, and the file's name."""

    text: str
    edit: Edit | None = None
    file: str = "model.onnx"
    gears: bool = False

    def message(self) -> onnx.ModelProto:
        text = self.text if self.text.lstrip().startswith("<") else HEADER + self.text
        proto = onnx.parser.parse_model(text)
        for index, node in enumerate(proto.graph.node):
            node.name = node.name or f"n{index}"
        if self.edit is not None:
            self.edit(proto)
        return proto

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.message().SerializeToString(deterministic=True))
        return path


@dataclass(frozen=True)
class IllegalModel:
    """One model, the rule that it breaks, and what atc says.

    Attributes:
        name: Unique.
        source: The model.
        rule: The rule of our check.
        code: atc's error; "" where it reports none.
        trap: The simulator's code where atc reports none.
        soc: The SoC that it is illegal on.
        sim: Whether the simulator, which ends behind the parser, refuses it too.
        reason: Why it does not, where `sim` is false.
        flags: More of atc's command line.
        legal: The mended model.
        legal_soc: A SoC on which the model itself is legal.
        release: The release to simulate; older ones stop at the second opset import.
        writes: Makes the file itself, where it is no message.
    """

    name: str
    source: Source
    rule: str
    code: str = ""
    trap: str = ""
    soc: str = "Ascend310P3"
    sim: bool = True
    reason: str = ""
    flags: tuple[str, ...] = ()
    legal: Source | None = None
    legal_soc: str = ""
    release: str = ""
    writes: Callable[[Path], Path] | None = field(default=None)

    def write(self, folder: Path) -> Path:
        """Write the model, and return its path."""
        return self.source.write(folder) if self.writes is None else self.writes(folder)


RELU = "g (float[2] x) => (float[2] y) { y = Relu (x) }"
CHAIN = "g (float[2] x) => (float[2] y) { h = Relu (x) y = Neg (h) }"
KERNEL = "kernels and their dtypes lie behind the parser"
DOCUMENT = "a limit of the kernel, known from its document"
CONVENTION = "the parser takes it; what comes of it is inferred"


def text(source: str, edit: Edit | None = None, **options: object) -> Source:
    return Source(source, edit, **options)  # type: ignore[arg-type]


def with_tensor(tensor: TensorProto) -> Edit:
    """Multiply x with this constant, where the text multiplies it with itself."""

    def edit(proto: onnx.ModelProto) -> None:
        tensor.name = "w"
        proto.graph.initializer.append(tensor)
        proto.graph.node[0].input[1] = "w"

    return edit


SQUARE = "g (float[2] x) => (float[2] y) { y = Mul (x, x) }"


def constant(tensor: TensorProto) -> Source:
    return text(SQUARE, with_tensor(tensor))


def tensor(dtype: int, dims: list[int], raw: bytes = b"", **lists: list[float]) -> TensorProto:
    made = TensorProto(data_type=dtype, dims=dims, **lists)
    if raw:
        made.raw_data = raw
    return made


def external(
    dtype: int = TensorProto.FLOAT, dims: tuple[int, ...] = (2,), **entries: str
) -> TensorProto:
    made = TensorProto(data_type=dtype, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        made.external_data.add(key=key, value=value)
    return made


def rename_node(index: int, name: str) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        proto.graph.node[index].name = name

    return edit


def rename_all(*names: str) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        for node, name in zip(proto.graph.node, names, strict=True):
            node.name = name

    return edit


def output_names(node: int, *names: str) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        del proto.graph.node[node].output[:]
        proto.graph.node[node].output.extend(names)

    return edit


def no_shape(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.ClearField("shape")


def input_dtype(dtype: int) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        proto.graph.input[0].type.tensor_type.elem_type = dtype

    return edit


def sequence_input(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].CopyFrom(
        helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [2])
    )


def add_import(domain: str, version: int) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        proto.opset_import.add(domain=domain, version=version)

    return edit


def drop_import(domain: str) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        kept = [entry for entry in proto.opset_import if entry.domain != domain]
        del proto.opset_import[:]
        proto.opset_import.extend(kept)

    return edit


def add_function(proto: onnx.ModelProto) -> None:
    proto.opset_import.add(domain="own", version=1)
    proto.functions.append(
        helper.make_function(
            "own",
            "twice",
            ["x"],
            ["y"],
            [helper.make_node("Add", ["x", "x"], ["y"])],
            [helper.make_opsetid("", 16)],
        )
    )
    proto.graph.node[0].domain = "own"
    proto.graph.node[0].op_type = "twice"


def sparse(proto: onnx.ModelProto) -> None:
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2]))
    proto.graph.node[0].input[1] = "w"


def one_branch(proto: onnx.ModelProto) -> None:
    del proto.graph.node[0].attribute[1:]


def external_in_branch(proto: onnx.ModelProto) -> None:
    branch = proto.graph.node[0].attribute[0].g
    inner = external(location="w.bin", offset="0", length="8")
    inner.name = "w"
    branch.initializer.append(inner)
    branch.node[0].op_type = "Add"
    branch.node[0].input.append("w")


def external_shape(proto: onnx.ModelProto) -> None:
    shape = external(TensorProto.INT64, (2,), location="s.bin", offset="0", length="16")
    shape.name = "s"
    proto.graph.initializer.append(shape)
    proto.graph.node[0].input.append("s")


def drop_attribute(name: str) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            kept = [attribute for attribute in node.attribute if attribute.name != name]
            del node.attribute[:]
            node.attribute.extend(kept)

    return edit


def beside(name: str, content: bytes) -> Callable[[Source], Callable[[Path], Path]]:
    """Write the model with another file beside it."""

    def of(source: Source) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            path = source.write(folder)
            (folder / name).write_bytes(content)
            return path

        return write

    return of


def empty_file(folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(b"")
    return path


def huge_file(folder: Path) -> Path:
    path = folder / "model.onnx"
    with path.open("wb") as file:
        file.truncate(1 << 31)  # sparse: it takes no room
    return path


def link_to_strange_folder(folder: Path) -> Path:
    real = Source(RELU).write(folder / "strange folder+1")
    path = folder / "plain.onnx"
    os.symlink(real, path)
    return path


IF = """g (bool c, float[4] x) => (float[4] y)
    { y = If (c) <then_branch = t () => (float[4] a) { a = Relu (x) },
                  else_branch = e () => (float[4] b) { b = Neg (x) }> }"""


def npu(op: str, version: int = 1, opset: int = 16) -> str:
    return f"""<ir_version: 8, opset_import: ["" : {opset}, "npu" : {version}]>
        g (float[2,8] x, float[8] w) => (float[2,8] y) {{ y, r = npu.{op} (x, w) }}"""


A2 = "Ascend910B4"


LEGAL = Source(RELU)


LEGAL_CONSTANT = constant(tensor(TensorProto.FLOAT, [2], b"\0\0\0\0\0\0\x80\x3f"))


def flash(inputs: str, soc_attributes: str = "", opset: int = 16, layout: str = "BSH") -> str:
    return f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float16[1,32,64] q, bool[32,32] m) => (float16[1,32,64] y) <float16[0] none = {{}}>
        {{ y = NPUPromptFlashAttention <num_heads = 1, input_layout = "{layout}", scale_value = 0.125,
            pre_tokens = 2147483647{soc_attributes}> ({inputs}) }}"""


def weight_quant(
    x: str = "16,64", w: str = "int8[64,64]", s: str = "64", attributes: str = ""
) -> str:
    y = x.rsplit(",", 1)[0] + ",64"
    return f"""g (float16[{x}] x, {w} w, float16[{s}] s) => (float16[{y}] y)
        {{ y = NPUWeightQuantBatchMatmulV2 {attributes} (x, w, s) }}"""
