"""Whether an .om takes and gives what the manifest says of its bucket."""

from __future__ import annotations

from collections.abc import Sequence

from omforge.bundle.manifest import Bucket, TensorSpec
from omforge.ir.errors import InputError
from omforge.ir.fronts import Front
from omforge.om.inout import GEAR_INPUT, OmTensor
from omforge.om.read import OmFile


def output_names(names: Sequence[str], specs: Sequence[TensorSpec], front: Front) -> list[str]:
    """Return what the manifest calls an .om's outputs.

    Of an ONNX model they are node:index:name. A GE graph has no names of tensors, and atc makes
    some up (`output_0_node_0`): there the order says all.
    """
    if front == "air" and len(names) == len(specs):
        return [spec.name for spec in specs]
    return [name.rsplit(":", 1)[-1] for name in names]


def require_fit(om: OmFile, bucket: Bucket, front: Front = "onnx") -> None:
    """Compare names, dtypes and shapes, in order.

    Args:
        om: The file.
        bucket: What the manifest says of it.
        front: What it was compiled from.

    Raises:
        InputError: One differs, or the file has no interface that could be read.
    """
    model = om.models[0]
    if not model.interface:
        raise _refused(om, bucket, "it does not say what it takes and gives")
    extra = (GEAR_INPUT,) if bucket.gears else ()
    sides = (("inputs", model.inputs, bucket.inputs), ("outputs", model.outputs, bucket.outputs))
    for side, tensors, specs in sides:
        names = [tensor.name for tensor in tensors]
        if side == "outputs":
            names = output_names(names, specs, front)
        wanted = [*(spec.name for spec in specs), *(extra if side == "inputs" else ())]
        if names != wanted:
            raise _refused(
                om, bucket, f"its {side} are {', '.join(names)}, not {', '.join(wanted)}"
            )
        for tensor, spec in zip(tensors, specs, strict=False):
            if tensor.dtype != spec.dtype or not _same(tensor, spec, gears=bool(bucket.gears)):
                raise _refused(
                    om,
                    bucket,
                    f"{spec.name} is {tensor.dtype}{_text(tensor.shape)}, the manifest says "
                    f"{spec.dtype}{_text(spec.shape)}",
                )


def _same(tensor: OmTensor, spec: TensorSpec, *, gears: bool) -> bool:
    """Whether the shapes agree; with gears, open dims are not compared."""
    if len(tensor.shape) != len(spec.shape):
        return False
    pairs = zip(tensor.shape, spec.shape, strict=True)
    return all(found == told or (gears and not isinstance(told, int)) for found, told in pairs)


def _text(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _refused(om: OmFile, bucket: Bucket, why: str) -> InputError:
    return InputError(
        f"{om.path} is not the .om of bucket {bucket.name}", why, "Run atc on it again"
    )
