"""A loaded model: a simulated .om, run on ONNX Runtime with the device's bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge.air.ge_types import byte_size
from omforge.ir.errors import InputError, OmforgeError
from omforge.om import GEAR_INPUT, OmModel, OmTensor, read_om
from omforge.om.payload import Payload, read_payload
from omforge.runtime.acl_sim.codes import (
    GE_DYNAMIC_BATCH_SIZE_INVALID,
    GE_DYNAMIC_INPUT_LENGTH_INVALID,
    GE_LOAD_TASK_PARTITION_FAILED,
    GE_MODEL_DATA_SIZE_INVALID,
    GE_MODEL_PATH_INVALID,
    GE_PARAM_INVALID,
    RT_MODEL_EXECUTE,
    Fault,
)
from omforge.runtime.acl_sim.memory import Memory
from omforge.runtime.session import OrtSession

Region = tuple[int, int]
"""A pointer and its bytes."""

Gear = tuple[int, ...]

CLOBBERED = 0xEE
"""What a run leaves in the workspace: whoever keeps something else there notices."""


@dataclass
class DataBuffer:
    """What `create_data_buffer` makes."""

    address: int
    size: int


@dataclass
class Dataset:
    """What `create_dataset` makes; `gear` is what set_input_dynamic_dims chose."""

    buffers: list[int] = field(default_factory=list[int])
    gear: Gear | None = None


@dataclass
class LoadedModel:
    """A model on the device.

    Attributes:
        interface: What the .om says.
        payload: What is run.
        sessions: Run it: one for whatever gear, or one for each.
        owned: Device memory that the load allocated, and that unload frees.
        work: The workspace.
        weights: The weights on the device, shared or not.
        gear: What was last chosen for any of its datasets.
    """

    path: str
    interface: OmModel
    payload: Payload
    sessions: Sequence[OrtSession]
    owned: list[int]
    work: Region
    weights: list[Region]
    gear: Gear | None = None

    @property
    def inputs(self) -> tuple[OmTensor, ...]:
        """The inputs, the gears' own last."""
        return self.interface.inputs

    @property
    def outputs(self) -> tuple[OmTensor, ...]:
        """The outputs."""
        return self.interface.outputs

    def is_written(self, name: str) -> bool:
        """Whether an input is a RefData: what the model writes lands in the caller's buffer."""
        return name in self.payload.written

    def check_dims(self, dims: Sequence[int]) -> Gear:
        """Return the gear that all dims of all inputs mean.

        As hicann/ge's GeExecutor::GetCurDynamicDims: the inputs in `input_order`, static dims too.

        Raises:
            Fault: They are too many or too few, a static one differs, or it is no gear.
        """
        shapes = {tensor.name: tensor.shape for tensor in self.inputs}
        known = [dim for name in self.interface.input_order for dim in shapes[name]]
        if len(known) != len(dims):
            raise Fault(
                GE_DYNAMIC_INPUT_LENGTH_INVALID,
                f"{len(dims)} dims were given, the inputs have {len(known)} in all",
            )
        for index, (mine, given) in enumerate(zip(known, dims, strict=True)):
            if mine >= 0 and mine != given:
                raise Fault(
                    GE_DYNAMIC_INPUT_LENGTH_INVALID,
                    f"dim {index} is static: it is {mine}, not {given}",
                )
        gear = tuple(given for mine, given in zip(known, dims, strict=True) if mine < 0)
        if gear not in self.interface.gears:
            raise Fault(GE_DYNAMIC_BATCH_SIZE_INVALID, f"{gear} is none of {self.interface.gears}")
        return gear

    def all_dims(self, gear: Gear) -> list[int]:
        """Return all dims of all inputs at a gear, in `input_order`."""
        shapes = self.shapes(gear)
        return [dim for name in self.interface.input_order for dim in shapes[name]]

    def shapes(self, gear: Gear | None) -> dict[str, tuple[int, ...]]:
        """Return the inputs' shapes at a gear; the gears' own input is left out."""
        values = iter(gear or ())
        order = self.interface.input_order or tuple(tensor.name for tensor in self.inputs)
        shapes = {tensor.name: tensor.shape for tensor in self.inputs}
        return {
            name: tuple(next(values) if dim < 0 else dim for dim in shapes[name])
            for name in order
            if name != GEAR_INPUT
        }

    def output_dims(self, index: int, gear: Gear | None) -> tuple[int, ...]:
        """Return an output's dims at a gear, or at the largest."""
        if gear is not None:
            number = self.interface.gears.index(gear)
            for which, output, *dims in self.interface.output_shapes:
                if output == index and which in (-1, number):
                    return tuple(dims)
        return self.outputs[index].shape

    def largest(self) -> Gear | None:
        """Return the gear that is used if none was chosen."""
        return max(self.interface.gears, key=math.prod, default=None)

    def run(
        self, memory: Memory, inputs: Sequence[Region], outputs: Sequence[Region], gear: Gear | None
    ) -> None:
        """Run the model on device memory, at a gear that was chosen, or at the largest.

        Raises:
            Fault: A region is no longer there, or the graph fails.
        """
        feeds: dict[str, npt.NDArray[Any]] = {}
        shapes = self.shapes(gear or self.largest())
        for tensor, (address, size) in zip(self.inputs, inputs, strict=True):
            data = memory.view(address, size, "device", f"input {tensor.name}")
            if tensor.name == GEAR_INPUT:
                self._check_gear_data(data, gear)
                continue
            shape = shapes[tensor.name]
            content = data[: byte_size(tensor.dtype, shape)].tobytes()
            feeds[tensor.name] = np.frombuffer(content, tensor.dtype).reshape(shape)
        for address, size in (*self.weights, self.work):
            memory.view(address, size, "device", "the model's own memory")
        memory.view(*self.work, "device", "workspace")[:] = CLOBBERED
        regions = {tensor.name: region for tensor, region in zip(self.inputs, inputs, strict=True)}
        try:
            results = self._session(gear).run(feeds)
        except OmforgeError as error:
            for name in self.payload.written:  # half written, and nobody knows how far
                memory.view(*regions[name], "device", f"RefData {name}")[:] = CLOBBERED
            raise Fault(RT_MODEL_EXECUTE, str(error)) from error
        hidden = set(self.payload.written.values())
        given = [array for name, array in results.items() if name not in hidden]
        for result, tensor, (address, size) in zip(given, self.outputs, outputs, strict=True):
            _put(memory.view(address, size, "device", f"output {tensor.name}"), result)
        for name, output in self.payload.written.items():
            _put(memory.view(*regions[name], "device", f"RefData {name}"), results[output])

    def _session(self, gear: Gear | None) -> OrtSession:
        if len(self.sessions) == 1:
            return self.sessions[0]
        chosen = gear or self.largest() or ()
        return self.sessions[self.interface.gears.index(chosen)]

    def _check_gear_data(self, data: npt.NDArray[np.uint8], gear: Gear | None) -> None:
        """The device chooses the branch by what is in the buffer, not by what the host believes."""
        if gear is None:
            return
        wide = np.int64 if len(data) >= 8 * len(gear) else np.int32
        found = tuple(int(v) for v in np.frombuffer(data.tobytes(), wide)[: len(gear)])
        if found != gear:
            raise Fault(
                GE_DYNAMIC_BATCH_SIZE_INVALID,
                f"the buffer of {GEAR_INPUT} holds {found}, the dataset was set to {gear}",
            )


def _put(target: npt.NDArray[np.uint8], array: npt.NDArray[Any]) -> None:
    content = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
    target[: len(content)] = content


def load_model(
    path: str,
    memory: Memory,
    *,
    work: Region | None = None,
    weight: Region | None = None,
    external: dict[str, Region] | None = None,
) -> LoadedModel:
    """Load a simulated .om.

    Args:
        path: The file.
        memory: Where weights and workspace go.
        work: The caller's workspace; allocated if absent.
        weight: The caller's memory for the weights inside the .om.
        external: The caller's memory for weight files, by file name.

    Raises:
        Fault: It is no .om, a real one, or memory is missing or too small.
    """
    if not Path(path).is_file():
        raise Fault(GE_MODEL_PATH_INVALID, f"there is no file {path}")
    try:
        om = read_om(path)
    except InputError as error:
        raise Fault(GE_MODEL_DATA_SIZE_INVALID, str(error)) from error
    try:
        payload = read_payload(om)
        folder = Path(path).parent
        sessions = [OrtSession(bytes(graph), folder=folder, name=path) for graph in payload.graphs]
    except InputError as error:
        raise Fault(GE_LOAD_TASK_PARTITION_FAILED, str(error)) from error
    owned: list[int] = []

    def own(size: int, what: str) -> Region:
        owned.append(memory.malloc(size, what, fill=False))
        return owned[-1], size

    if work is not None:
        _need(memory, work, payload.work_size, "the workspace")
    weights = _weights(path, memory, payload, weight, external or {}, own)
    return LoadedModel(
        path=path,
        interface=om.models[0],
        payload=payload,
        sessions=sessions,
        owned=owned,
        work=work or own(max(payload.work_size, 1), "workspace of a model"),
        weights=weights,
    )


def _weights(
    path: str,
    memory: Memory,
    payload: Payload,
    weight: Region | None,
    external: dict[str, Region],
    own: Any,
) -> list[Region]:
    """Put the weights on the device: the caller's memory where there is some, our own elsewhere."""
    files = {Path(name).name: Path(path).parent / name for name in payload.weights}
    found: list[Region] = []
    for name, file in files.items():
        size = file.stat().st_size
        region: Region = external.get(name) or own(size, "weights of a model")
        if name in external:
            _need(memory, region, size, f"the weights {name}")
            view = memory.view(region[0], size, "device", f"the weights {name}")
            if view.tobytes() != file.read_bytes():
                raise Fault(GE_PARAM_INVALID, f"the device memory of {name} holds something else")
        found.append(region)
    rest = payload.weight_size - sum(file.stat().st_size for file in files.values())
    if rest > 0:
        if weight is not None:
            _need(memory, weight, rest, "the weights")
        found.append(weight or own(rest, "weights of a model"))
    return found


def _need(memory: Memory, region: Region, size: int, what: str) -> None:
    if region[1] < size:
        raise Fault(GE_PARAM_INVALID, f"{what} has {region[1]} bytes, the model needs {size}")
    memory.view(*region, "device", what)
