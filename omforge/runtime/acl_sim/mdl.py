"""`acl.mdl`: loading, describing and running models.

Arguments and results as in pyACL's reference (hiascend.com, aclpythondevg_01_*).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from omforge.air.ge_types import ge_number
from omforge.ir.errors import InputError
from omforge.om import GEAR_INPUT, OmTensor, read_om
from omforge.om.payload import read_payload
from omforge.runtime.acl_sim.codes import (
    FEATURE_UNSUPPORTED,
    GE_DYNAMIC_BATCH_SIZE_INVALID,
    GE_DYNAMIC_INPUT_LENGTH_INVALID,
    GE_INTERNAL_ERROR,
    GE_MODEL_ID_INVALID,
    GE_MODEL_PATH_INVALID,
    GE_PARAM_INVALID,
    INVALID_PARAM,
    RT_PARAM_INVALID,
    Fault,
)
from omforge.runtime.acl_sim.models import (
    DataBuffer,
    Dataset,
    Gear,
    LoadedModel,
    Region,
    load_model,
)
from omforge.runtime.acl_sim.process import Part, Process, returns_code, returns_pair, returns_value
from omforge.runtime.acl_sim.streams import Stream, Task

LOAD_TYPE, PATH, WEIGHT, WEIGHT_SIZE, WORK, WORK_SIZE = 1, 2, 5, 6, 7, 8
"""Attributes of a load configuration (hicann/ge:inc/external/acl/acl_mdl.h, aclmdlConfigAttr)."""

FROM_FILE, FROM_FILE_WITH_MEM = 1, 2
T = TypeVar("T")

LONG_NAME = 127
WRITTEN_ALIGNMENT = 32


_NO_SIZES: list[int] = []
_NO_DIMS: dict[str, Any] = {}
_NO_GEARS: list[dict[str, Any]] = []


class _Config(dict[int, Any]):
    """A load configuration: attributes, and the memory of weight files."""

    def __init__(self) -> None:
        super().__init__()
        self.external: dict[str, Region] = {}


class Models(Part):
    """`acl.mdl`."""

    PREFIX: ClassVar[str] = "acl.mdl"

    def __init__(self, process: Process) -> None:
        super().__init__(process)
        self._models: dict[int, LoadedModel] = {}
        self._next = 1

    @property
    def loaded(self) -> dict[int, LoadedModel]:
        """The models that are loaded, by id."""
        return self._models

    # Loading

    @returns_pair(_NO_SIZES)
    def _query_size(self, path: str) -> list[int]:
        try:
            payload = read_payload(read_om(path))
        except InputError as error:
            raise Fault(GE_MODEL_PATH_INVALID, str(error)) from error
        return [max(payload.work_size, 1), payload.weight_size]

    def query_size(self, path: str) -> tuple[int, int, int]:
        """Return the bytes of workspace and of weights."""
        sizes, ret = self._query_size(path)
        work, weight = sizes or (0, 0)
        return work, weight, ret

    @returns_pair(0)
    def load_from_file(self, path: str) -> int:
        """Load a model that brings its own memory."""
        self.process.need_context()
        return self._add(load_model(path, self.process.memory))

    @returns_pair(0)
    def load_from_file_with_mem(
        self, path: str, work: int, work_size: int, weight: int, weight_size: int
    ) -> int:
        """Load a model into the caller's memory; 0 for what it shall allocate itself."""
        self.process.need_context()
        return self._add(
            load_model(
                path,
                self.process.memory,
                work=(work, work_size) if work else None,
                weight=(weight, weight_size) if weight else None,
            )
        )

    @returns_value(0)
    def create_config_handle(self) -> int:
        """Create a load configuration."""
        return self.process.create("config handle", _Config())

    @returns_code
    def set_config_opt(self, handle: int, attribute: int, value: Any) -> None:
        """Set an attribute of a load configuration."""
        config: _Config = self.process.get(handle, "config handle")
        if attribute not in (0, LOAD_TYPE, PATH, WEIGHT, WEIGHT_SIZE, WORK, WORK_SIZE):
            raise Fault(FEATURE_UNSUPPORTED, f"the simulator has no attribute {attribute}")
        if not isinstance(value, str if attribute == PATH else int):
            raise Fault(INVALID_PARAM, f"attribute {attribute} cannot be {value!r}")
        config[attribute] = value

    @returns_pair(0)
    def load_with_config(self, handle: int) -> int:
        """Load a model as a configuration says."""
        self.process.need_context()
        config: _Config = self.process.get(handle, "config handle")
        kind = config.get(LOAD_TYPE)
        if kind not in (FROM_FILE, FROM_FILE_WITH_MEM) or PATH not in config:
            raise Fault(INVALID_PARAM, "a configuration needs a load type (1 or 2) and a path")
        given = {
            name: (config[address], config.get(size, 0))
            for name, address, size in (("work", WORK, WORK_SIZE), ("weight", WEIGHT, WEIGHT_SIZE))
            if config.get(address) and kind == FROM_FILE_WITH_MEM
        }
        return self._add(
            load_model(config[PATH], self.process.memory, **given, external=config.external)
        )

    @returns_code
    def destroy_config_handle(self, handle: int) -> None:
        """Destroy a load configuration."""
        self.process.destroy(handle, "config handle")

    @returns_code
    def unload(self, model_id: int) -> None:
        """Unload a model; what it allocated is freed."""
        model = self._model(model_id)
        if any(model_id in stream.models() for stream in self.process.streams()):
            raise Fault(GE_PARAM_INVALID, f"model {model_id} still has work in a stream")
        for address in model.owned:
            self.process.memory.free(address, "device")
        del self._models[model_id]

    def _add(self, model: LoadedModel) -> int:
        number = self._next
        self._next += 1
        self._models[number] = model
        return number

    def _model(self, model_id: int) -> LoadedModel:
        if model_id not in self._models:
            raise Fault(GE_MODEL_ID_INVALID, f"there is no model {model_id}")
        return self._models[model_id]

    # Descriptions

    @returns_value(0)
    def create_desc(self) -> int:
        """Create a description, still empty."""
        return self.process.create("model description", [])

    @returns_code
    def get_desc(self, desc: int, model_id: int) -> None:
        """Fill a description."""
        held: list[int] = self.process.get(desc, "model description")
        self._model(model_id)
        held[:] = [model_id]

    @returns_code
    def destroy_desc(self, desc: int) -> None:
        """Destroy a description."""
        self.process.destroy(desc, "model description")

    @returns_value(0)
    def get_num_inputs(self, desc: int) -> int:
        """Return how many inputs there are, the gears' own included."""
        return len(self._described(desc).inputs)

    @returns_value(0)
    def get_num_outputs(self, desc: int) -> int:
        """Return how many outputs there are."""
        return len(self._described(desc).outputs)

    @returns_value(0)
    def get_input_size_by_index(self, desc: int, index: int) -> int:
        """Return an input's bytes, of the largest gear."""
        return self._input(desc, index).size

    @returns_value(0)
    def get_output_size_by_index(self, desc: int, index: int) -> int:
        """Return an output's bytes, of the largest gear."""
        return self._output(desc, index).size

    @returns_value("")
    def get_input_name_by_index(self, desc: int, index: int) -> str:
        """Return an input's name."""
        return self._input(desc, index).name

    @returns_value("")
    def get_output_name_by_index(self, desc: int, index: int) -> str:
        """Return an output's name: node:index:tensor."""
        return self._output(desc, index).name

    @returns_pair(0)
    def get_input_index_by_name(self, desc: int, name: str) -> int:
        """Return an input's number."""
        return _index(self._described(desc).inputs, name)

    @returns_pair(0)
    def get_output_index_by_name(self, desc: int, name: str) -> int:
        """Return an output's number."""
        return _index(self._described(desc).outputs, name)

    @returns_value(-1)
    def get_input_data_type(self, desc: int, index: int) -> int:
        """Return an input's dtype, as a ge::DataType."""
        return ge_number(self._input(desc, index).dtype)

    @returns_value(-1)
    def get_output_data_type(self, desc: int, index: int) -> int:
        """Return an output's dtype, as a ge::DataType."""
        return ge_number(self._output(desc, index).dtype)

    @returns_pair(_NO_DIMS)
    def get_input_dims(self, desc: int, index: int) -> dict[str, Any]:
        """Return an input's dims, -1 where a gear decides."""
        tensor = self._input(desc, index)
        return _dims(_short(tensor.name, desc, "input", index), tensor.shape)

    @returns_pair(_NO_DIMS)
    def get_output_dims(self, desc: int, index: int) -> dict[str, Any]:
        """Return an output's dims, of the largest gear."""
        tensor = self._output(desc, index)
        return _dims(_short(tensor.name, desc, "output", index), tensor.shape)

    @returns_pair(_NO_DIMS)
    def get_cur_output_dims(self, desc: int, index: int) -> dict[str, Any]:
        """Return an output's dims at the gear that was last chosen."""
        model, tensor = self._described(desc), self._output(desc, index)
        name = _short(tensor.name, desc, "output", index)
        return _dims(name, model.output_dims(index, model.gear))

    @returns_value("")
    def get_tensor_real_name(self, desc: int, name: str) -> str:
        """Return what a shortened name stands for."""
        model = self._described(desc)
        for kind, tensors in (("input", model.inputs), ("output", model.outputs)):
            for index, tensor in enumerate(tensors):
                if name in (tensor.name, _short(tensor.name, desc, kind, index)):
                    return tensor.name
        raise Fault(INVALID_PARAM, f"no tensor is called {name}")

    def _described(self, desc: int) -> LoadedModel:
        held: list[int] = self.process.get(desc, "model description")
        if not held:
            raise Fault(INVALID_PARAM, "the description is empty: call get_desc first")
        return self._model(held[0])

    def _input(self, desc: int, index: int) -> OmTensor:
        return _at(self._described(desc).inputs, index, "input")

    def _output(self, desc: int, index: int) -> OmTensor:
        return _at(self._described(desc).outputs, index, "output")

    # Datasets

    @returns_value(0)
    def create_dataset(self) -> int:
        """Create an empty dataset."""
        return self.process.create("dataset", Dataset())

    @returns_code
    def destroy_dataset(self, dataset: int) -> None:
        """Destroy a dataset; its buffers stay."""
        self.process.destroy(dataset, "dataset")

    @returns_pair(0)
    def add_dataset_buffer(self, dataset: int, buffer: int) -> int:
        """Append a buffer; return the dataset."""
        found: Dataset = self.process.get(dataset, "dataset")
        self.process.get(buffer, "data buffer")
        found.buffers.append(buffer)
        return dataset

    @returns_value(0)
    def get_dataset_num_buffers(self, dataset: int) -> int:
        """Return how many buffers a dataset has."""
        found: Dataset = self.process.get(dataset, "dataset")
        return len(found.buffers)

    @returns_value(0)
    def get_dataset_buffer(self, dataset: int, index: int) -> int:
        """Return a buffer of a dataset."""
        found: Dataset = self.process.get(dataset, "dataset")
        return _at(found.buffers, index, "buffer")

    # Gears

    @returns_pair(0)
    def get_input_dynamic_gear_count(self, desc: int, index: int) -> int:
        """Return how many gears --dynamic_dims gave."""
        _need_minus_one(index)
        return len(self._described(desc).interface.dynamic_dims)

    @returns_pair(_NO_GEARS)
    def get_input_dynamic_dims(self, desc: int, index: int, count: int) -> list[dict[str, Any]]:
        """Return all dims of all inputs, gear by gear."""
        _need_minus_one(index)
        model = self._described(desc)
        gears = model.interface.dynamic_dims
        if count < len(gears):
            raise Fault(INVALID_PARAM, f"there are {len(gears)} gears, room is for {count}")
        return [_dims("", tuple(model.all_dims(gear))) for gear in gears]

    @returns_code
    def set_input_dynamic_dims(
        self, model_id: int, dataset: int, index: int, dims: dict[str, Any]
    ) -> None:
        """Choose a gear: the device's buffer `index` is written, and the dataset remembers."""
        model = self._model(model_id)
        if not model.interface.dynamic_dims:
            raise Fault(GE_PARAM_INVALID, "the model has no gears of --dynamic_dims")
        values = [int(dim) for dim in dims.get("dims", [])]
        if dims.get("dimCount") != len(values) or not values:
            raise Fault(INVALID_PARAM, f"dimCount is {dims.get('dimCount')}, of {len(values)} dims")
        self._choose(model, dataset, index, model.check_dims(values))

    @returns_code
    def set_dynamic_batch_size(self, model_id: int, dataset: int, index: int, batch: int) -> None:
        """Choose a batch gear."""
        model = self._model(model_id)
        if (batch,) not in model.interface.gears or not model.interface.dynamic_batch:
            raise Fault(
                GE_DYNAMIC_BATCH_SIZE_INVALID,
                f"{batch} is none of {list(model.interface.dynamic_batch)}",
            )
        self._choose(model, dataset, index, (batch,))

    def _choose(self, model: LoadedModel, dataset: int, index: int, gear: Gear) -> None:
        """Write the gear as GeExecutor::SetDynamicDims does: 8 bytes each where there is room."""
        found: Dataset = self.process.get(dataset, "dataset")
        buffer = self._buffer(found, index)
        if not model.inputs or model.inputs[index].name != GEAR_INPUT:
            raise Fault(INVALID_PARAM, f"input {index} is not {GEAR_INPUT}")
        width = 8 if buffer.size >= 8 * len(gear) else 4
        if buffer.size < width * len(gear):
            raise Fault(
                GE_DYNAMIC_INPUT_LENGTH_INVALID,
                f"the buffer has {buffer.size} bytes, {len(gear)} numbers do not fit",
            )
        view = self.process.memory.view(buffer.address, buffer.size, "device", GEAR_INPUT)
        for slot, value in enumerate(gear):
            view[slot * width : (slot + 1) * width] = list(value.to_bytes(width, "little"))
            self.process.moved["H2D"] += width
            self.process.copies["H2D"] += 1
        found.gear = model.gear = gear

    # Running

    @returns_code
    def execute(self, model_id: int, inputs: int, outputs: int) -> None:
        """Run a model, and wait for it."""
        self._prepared(model_id, inputs, outputs).run()

    @returns_code
    def execute_async(self, model_id: int, inputs: int, outputs: int, stream: int) -> None:
        """Run a model in a stream."""
        task = self._prepared(model_id, inputs, outputs)
        chosen: Stream = self.process.get(stream, "stream")
        for other in self.process.streams():
            if other is not chosen and model_id in other.models():
                raise Fault(
                    GE_PARAM_INVALID, f"model {model_id} already has work in another stream"
                )
        chosen.add(task)

    def _prepared(self, model_id: int, inputs: int, outputs: int) -> Task:
        self.process.need_context()
        model = self._model(model_id)
        source: Dataset = self.process.get(inputs, "dataset")
        target: Dataset = self.process.get(outputs, "dataset")
        read = self._regions(source, model, model.inputs, "input")
        write = self._regions(target, model, model.outputs, "output")
        self._check_written(model, read)
        for address, size in write:
            for other, length in (*read, model.work, *model.weights):
                # No document allows it, and the memory planner does not know of it.
                if address < other + length and other < address + size:
                    raise Fault(
                        RT_PARAM_INVALID,
                        f"the output at {address:#x} overlaps what the model reads at {other:#x}",
                    )
        gear = source.gear

        def work() -> None:
            model.run(self.process.memory, read, write, gear)

        return Task(f"model {model_id}", work, model_id=model_id)

    def _check_written(self, model: LoadedModel, read: list[Region]) -> None:
        """What the model writes in place is nobody else's."""
        for at, (tensor, (address, size)) in enumerate(zip(model.inputs, read, strict=True)):
            if not model.is_written(tensor.name):
                continue
            others = [region for other, region in enumerate(read) if other != at]
            for other, length in (*others, model.work, *model.weights):
                if address < other + length and other < address + size:
                    raise Fault(
                        RT_PARAM_INVALID,
                        f"RefData {tensor.name} at {address:#x} is written, and overlaps what the "
                        f"model reads at {other:#x}",
                    )

    def _regions(
        self, dataset: Dataset, model: LoadedModel, tensors: tuple[OmTensor, ...], kind: str
    ) -> list[Region]:
        if len(dataset.buffers) != len(tensors):
            raise Fault(
                GE_PARAM_INVALID,
                f"the dataset has {len(dataset.buffers)} buffers, the model {len(tensors)} {kind}s",
            )
        found: list[Region] = []
        for index, tensor in enumerate(tensors):
            buffer = self._buffer(dataset, index)
            try:
                self._check_buffer(buffer, tensor, kind)
            except Fault as fault:
                if kind == "input" and model.is_written(tensor.name):
                    raise _no_zero_copy(index, tensor.name, fault) from fault
                raise
            found.append((buffer.address, buffer.size))
        return found

    def _check_buffer(self, buffer: DataBuffer, tensor: OmTensor, kind: str) -> None:
        # A device only warns of a buffer that is too large, and allows one 64 bytes too small.
        if buffer.size != tensor.size:
            raise Fault(
                GE_PARAM_INVALID,
                f"{kind} {tensor.name} has {tensor.size} bytes, its buffer {buffer.size}",
            )
        self.process.memory.view(buffer.address, buffer.size, "device", f"{kind} {tensor.name}")
        if buffer.address % WRITTEN_ALIGNMENT:
            raise Fault(
                RT_PARAM_INVALID, f"{kind} {tensor.name}: {buffer.address:#x} is not aligned"
            )

    def _buffer(self, dataset: Dataset, index: int) -> DataBuffer:
        number = _at(dataset.buffers, index, "buffer")
        found: DataBuffer = self.process.get(number, "data buffer")
        return found


class ModelsWithExternalWeights(Models):
    """`acl.mdl` of a pyACL that wraps aclmdlSetExternalWeightAddress.

    The C function is documented; no page of pyACL's reference has it.
    """

    @returns_code
    def set_external_weight_address(self, handle: int, name: str, address: int, size: int) -> None:
        """Say where on the device a weight file already is."""
        config: _Config = self.process.get(handle, "config handle")
        config.external[name] = (address, size)


def _at(items: Sequence[T], index: int, what: str) -> T:
    if not 0 <= index < len(items):
        raise Fault(INVALID_PARAM, f"there is no {what} {index}, there are {len(items)}")
    return items[index]


def _index(tensors: tuple[OmTensor, ...], name: str) -> int:
    for index, tensor in enumerate(tensors):
        if tensor.name == name:
            return index
    raise Fault(INVALID_PARAM, f"there is no {name!r} among {[t.name for t in tensors]}")


def _dims(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "dimCount": len(shape), "dims": list(shape)}


def _short(name: str, desc: int, kind: str, index: int) -> str:
    """Replace a name that is too long for aclmdlIODims."""
    return name if len(name) <= LONG_NAME else f"acl_modelId_{desc}_{kind}_{index}_long"


def _no_zero_copy(index: int, name: str, fault: Fault) -> Fault:
    """hicann/ge:runtime/v1/graph/load/model_manager/davinci_model.cc: an assertion, at RefData."""
    return Fault(
        GE_INTERNAL_ERROR,
        f"input_index {index}, op_name {name} op_type RefData not support zero copy: "
        f"{fault.reason}",
    )


def _need_minus_one(index: int) -> None:
    if index != -1:
        raise Fault(INVALID_PARAM, f"the index must be -1, it is {index}")
