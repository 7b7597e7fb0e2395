"""acl.mdl: models are loaded, described and run as documented, and mistakes are errors."""

from typing import Any

import numpy as np
import pytest

from omforge.om import GEAR_INPUT
from omforge.runtime.acl_sim import simulated_acl
from omforge.runtime.acl_sim.rt import D2H, H2D
from tests.om.samples import sample

X = np.arange(8, dtype=np.float32).reshape(2, 4)
M = np.ones((2, 6), np.float32)


class Loaded:
    """A model with its description and a dataset for each side."""

    def __init__(self, acl: Any, path: str) -> None:
        self.acl = acl
        self.id, ret = acl.mdl.load_from_file(path)
        assert ret == 0, acl.sim.last_error
        self.desc = acl.mdl.create_desc()
        assert acl.mdl.get_desc(self.desc, self.id) == 0
        sizes = acl.mdl.get_input_size_by_index, acl.mdl.get_output_size_by_index
        counts = acl.mdl.get_num_inputs(self.desc), acl.mdl.get_num_outputs(self.desc)
        self.inputs, self.outputs = (
            [self.buffer(size(self.desc, index)) for index in range(count)]
            for size, count in zip(sizes, counts, strict=True)
        )
        self.source, self.target = (self.dataset(b) for b in (self.inputs, self.outputs))

    def buffer(self, size: int) -> int:
        address, ret = self.acl.rt.malloc(size, 0)
        assert ret == 0
        return self.acl.create_data_buffer(address, size)

    def dataset(self, buffers: list[int]) -> int:
        made = self.acl.mdl.create_dataset()
        for buffer in buffers:
            assert self.acl.mdl.add_dataset_buffer(made, buffer) == (made, 0)
        return made

    def write(self, index: int, array: np.ndarray) -> None:
        acl, data = self.acl, array.tobytes()
        address = acl.get_data_buffer_addr(self.inputs[index])
        pointer = acl.util.bytes_to_ptr(data)
        assert acl.rt.memcpy(address, len(data), pointer, len(data), H2D) == 0

    def read(self, index: int, shape: tuple[int, ...]) -> np.ndarray:
        size = 4 * int(np.prod(shape))
        host, _ = self.acl.rt.malloc_host(size)
        address = self.acl.get_data_buffer_addr(self.outputs[index])
        assert self.acl.rt.memcpy(host, size, address, size, D2H) == 0
        data = self.acl.util.ptr_to_bytes(host, size)
        self.acl.rt.free_host(host)
        return np.frombuffer(data, np.float32).reshape(shape)

    def execute(self) -> int:
        return self.acl.mdl.execute(self.id, self.source, self.target)

    def close(self) -> None:
        acl = self.acl
        for made in (self.source, self.target):
            assert acl.mdl.destroy_dataset(made) == 0
        for buffer in (*self.inputs, *self.outputs):
            assert acl.rt.free(acl.get_data_buffer_addr(buffer)) == 0
            assert acl.destroy_data_buffer(buffer) == 0
        assert acl.mdl.destroy_desc(self.desc) == 0
        assert acl.mdl.unload(self.id) == 0


def test_a_static_model_runs(acl, model):
    loaded = Loaded(acl, model())
    loaded.write(0, X)
    loaded.write(1, M)
    assert loaded.execute() == 0
    np.testing.assert_array_equal(loaded.read(0, (2, 4)), X + 6)
    np.testing.assert_array_equal(loaded.read(1, (2, 1)), [[6], [6]])
    loaded.close()
    assert acl.rt.reset_device(0) == 0
    assert acl.finalize() == 0
    assert (acl.sim.leaks, acl.sim.errors) == ([], [])


def test_asynchronous_execution_gives_its_results_at_synchronize(acl, model):
    loaded = Loaded(acl, model())
    stream, _ = acl.rt.create_stream()
    loaded.write(0, X)
    loaded.write(1, M)
    assert acl.mdl.execute_async(loaded.id, loaded.source, loaded.target, stream) == 0
    assert np.isnan(loaded.read(0, (2, 4))).all()  # not run yet
    other, _ = acl.rt.create_stream()
    assert acl.mdl.execute_async(loaded.id, loaded.source, loaded.target, other) == 145000
    assert acl.sim.last_error == f"model {loaded.id} already has work in another stream"
    assert acl.mdl.unload(loaded.id) == 145000
    assert acl.rt.synchronize_stream(stream) == 0
    np.testing.assert_array_equal(loaded.read(0, (2, 4)), X + 6)


def test_descriptions(acl, model):
    loaded = Loaded(acl, model())
    mdl, desc = acl.mdl, loaded.desc
    assert [mdl.get_input_name_by_index(desc, i) for i in (0, 1)] == ["x", "m"]
    assert mdl.get_output_name_by_index(desc, 0) == "Add_y:0:y"
    assert mdl.get_input_index_by_name(desc, "m") == (1, 0)
    assert mdl.get_output_index_by_name(desc, "Identity_z:0:z") == (1, 0)
    assert mdl.get_input_index_by_name(desc, "y") == (0, 100000)
    assert mdl.get_input_dims(desc, 1) == ({"name": "m", "dimCount": 2, "dims": [2, 6]}, 0)
    assert mdl.get_output_dims(desc, 1)[0]["dims"] == [2, 1]
    assert (mdl.get_input_data_type(desc, 0), mdl.get_output_data_type(desc, 1)) == (0, 0)
    assert mdl.get_input_size_by_index(desc, 1) == 48
    assert mdl.get_tensor_real_name(desc, "x") == "x"
    assert mdl.get_input_size_by_index(desc, 2) == 0
    assert "there is no input 2, there are 2" in acl.sim.last_error
    empty = mdl.create_desc()
    assert mdl.get_num_inputs(empty) == 0
    assert "call get_desc first" in acl.sim.last_error


def geared(acl, model) -> Loaded:
    return Loaded(acl, model(gears=True))


def choose(loaded: Loaded, dims: list[int], **changed: Any) -> int:
    index, ret = loaded.acl.mdl.get_input_index_by_name(loaded.desc, GEAR_INPUT)
    assert ret == 0
    told = {"name": "", "dimCount": len(dims), "dims": dims} | changed
    return loaded.acl.mdl.set_input_dynamic_dims(loaded.id, loaded.source, index, told)


def test_gears_are_listed(acl, model):
    loaded = geared(acl, model)
    assert acl.mdl.get_num_inputs(loaded.desc) == 3
    assert acl.mdl.get_input_dims(loaded.desc, 0)[0]["dims"] == [2, -1]
    assert acl.mdl.get_input_dynamic_gear_count(loaded.desc, -1) == (2, 0)
    dims, ret = acl.mdl.get_input_dynamic_dims(loaded.desc, -1, 2)
    assert ret == 0
    assert [gear["dims"] for gear in dims] == [[2, 1, 2, 3], [2, 4, 2, 6]]
    assert acl.mdl.get_input_dynamic_dims(loaded.desc, -1, 1)[1] == 100000
    assert acl.mdl.get_input_dynamic_gear_count(loaded.desc, 0) == (0, 100000)


def test_a_gear_runs_with_its_shapes(acl, model):
    loaded = geared(acl, model)
    assert choose(loaded, [2, 1, 2, 3]) == 0
    loaded.write(0, X[:, :1].copy())
    loaded.write(1, M[:, :3].copy())
    assert loaded.execute() == 0
    np.testing.assert_array_equal(loaded.read(0, (2, 1)), [[3], [7]])
    assert acl.mdl.get_cur_output_dims(loaded.desc, 0)[0]["dims"] == [2, 1]
    assert acl.mdl.get_output_dims(loaded.desc, 0)[0]["dims"] == [2, 4]


def test_without_a_choice_the_largest_gear_runs(acl, model):
    loaded = geared(acl, model)
    loaded.write(0, X)
    loaded.write(1, M)
    assert loaded.execute() == 0
    np.testing.assert_array_equal(loaded.read(0, (2, 4)), X + 6)


def test_gears_that_are_refused(acl, model):
    loaded = geared(acl, model)
    assert choose(loaded, [2, 2, 2, 4]) == 145013
    assert "(2, 4) is none of ((1, 3), (4, 6))" in acl.sim.last_error
    assert choose(loaded, [3, 1, 2, 3]) == 145012
    assert acl.sim.last_error == "dim 0 is static: it is 2, not 3"
    assert choose(loaded, [1, 3]) == 145012
    assert choose(loaded, [2, 1, 2, 3], dimCount=3) == 100000
    told = {"name": "", "dimCount": 4, "dims": [2, 1, 2, 3]}
    assert acl.mdl.set_input_dynamic_dims(loaded.id, loaded.source, 0, told) == 100000
    assert acl.mdl.set_dynamic_batch_size(loaded.id, loaded.source, 2, 4) == 145013
    static = Loaded(acl, model())
    assert acl.mdl.set_input_dynamic_dims(static.id, static.source, 0, told) == 145000


def test_the_gear_that_the_device_sees_must_be_the_chosen_one(acl, model):
    loaded = geared(acl, model)
    choose(loaded, [2, 1, 2, 3])
    loaded.write(2, np.array([4, 6], np.int32))
    assert loaded.execute() == 145013
    assert "holds (4, 6), the dataset was set to (1, 3)" in acl.sim.last_error


def test_datasets_that_do_not_fit(acl, model):
    loaded = Loaded(acl, model())
    short = loaded.dataset(loaded.inputs[:1])
    assert acl.mdl.execute(loaded.id, short, loaded.target) == 145000
    assert acl.sim.last_error == "the dataset has 1 buffers, the model 2 inputs"
    address = acl.get_data_buffer_addr(loaded.inputs[0])
    acl.update_data_buffer(loaded.inputs[0], address, 28)
    assert loaded.execute() == 145000
    assert acl.sim.last_error == "input x has 32 bytes, its buffer 28"
    acl.update_data_buffer(loaded.inputs[0], address + 4, 32)
    assert loaded.execute() == 107000
    assert "run past the end" in acl.sim.last_error
    acl.update_data_buffer(loaded.inputs[0], acl.util.bytes_to_ptr(b"0" * 32), 32)
    assert loaded.execute() == 107016
    assert "is on the host, not device" in acl.sim.last_error


def test_outputs_must_not_be_where_inputs_are(acl, model):
    loaded = Loaded(acl, model())
    address = acl.get_data_buffer_addr(loaded.inputs[0])
    acl.update_data_buffer(loaded.outputs[0], address, 32)
    assert loaded.execute() == 107000
    assert "overlaps what the model reads" in acl.sim.last_error


def test_what_was_destroyed_or_unloaded_cannot_be_used(acl, model):
    loaded = Loaded(acl, model())
    acl.rt.free(acl.get_data_buffer_addr(loaded.inputs[0]))
    assert loaded.execute() == 107000
    assert "input x: use after free" in acl.sim.last_error
    acl.destroy_data_buffer(loaded.outputs[0])
    assert acl.get_data_buffer_addr(loaded.outputs[0]) == 0
    acl.mdl.destroy_dataset(loaded.target)
    assert loaded.execute() == 100000
    assert "the dataset" in acl.sim.last_error
    acl.mdl.unload(loaded.id)
    assert loaded.execute() == 145003
    assert acl.mdl.unload(loaded.id) == 145003
    assert acl.mdl.get_num_inputs(loaded.desc) == 0


def test_files_that_are_not_loaded(acl, model, tmp_path):
    assert acl.mdl.load_from_file(str(tmp_path / "no.om")) == (0, 145002)
    file = tmp_path / "real.om"
    file.write_bytes(sample())
    assert acl.mdl.load_from_file(str(file)) == (0, 545004)
    assert "needs a device" in acl.sim.last_error
    assert acl.mdl.query_size(str(file)) == (0, 0, 145002)
    file.write_bytes(b"IMOD")
    assert acl.mdl.load_from_file(str(file)) == (0, 145006)


def test_a_workspace_of_the_callers(acl, model):
    path = model()
    work, weights, ret = acl.mdl.query_size(path)
    assert (work, weights, ret) == (40, 8, 0)
    address, _ = acl.rt.malloc(work, 0)
    one, ret = acl.mdl.load_from_file_with_mem(path, address, work, 0, 0)
    assert ret == 0
    two, ret = acl.mdl.load_from_file_with_mem(path, address, work, 0, 0)
    assert ret == 0
    assert acl.mdl.load_from_file_with_mem(path, address, work - 1, 0, 0) == (0, 145000)
    assert "the workspace has 39 bytes, the model needs 40" in acl.sim.last_error
    for model_id in (one, two):
        assert acl.mdl.unload(model_id) == 0
    assert acl.rt.free(address) == 0


def test_a_run_destroys_what_is_in_the_workspace(acl, model):
    address, _ = acl.rt.malloc(40, 0)
    path = model()
    model_id, _ = acl.mdl.load_from_file_with_mem(path, address, 40, 0, 0)
    loaded = Loaded(acl, path)
    acl.mdl.unload(loaded.id)
    loaded.id = model_id
    acl.update_data_buffer(loaded.inputs[0], address, 32)
    acl.rt.memset(address, 40, 0, 40)
    assert loaded.execute() == 0
    assert not np.allclose(loaded.read(0, (2, 4)), 6)


def test_a_load_by_configuration(acl, model):
    work, _ = acl.rt.malloc(40, 0)
    handle = acl.mdl.create_config_handle()
    assert acl.mdl.load_with_config(handle) == (0, 100000)
    for attribute, value in ((1, 2), (2, model()), (7, work), (8, 40)):
        assert acl.mdl.set_config_opt(handle, attribute, value) == 0
    assert acl.mdl.set_config_opt(handle, 2, 5) == 100000
    assert acl.mdl.set_config_opt(handle, 99, 5) == 200006
    model_id, ret = acl.mdl.load_with_config(handle)
    assert ret == 0
    assert acl.mdl.destroy_config_handle(handle) == 0
    assert acl.mdl.unload(model_id) == 0


def test_external_weights_are_offered_only_where_they_exist(acl):
    assert not hasattr(acl.mdl, "set_external_weight_address")
    assert hasattr(simulated_acl(external_weights=True).mdl, "set_external_weight_address")


def test_leaks_are_listed_by_kind(acl, model):
    Loaded(acl, model())
    acl.rt.create_stream()
    assert acl.finalize() == 148051
    assert acl.sim.leaks == [
        "4 x data buffer",
        "2 x dataset",
        "4 x device memory",
        "1 x device that was not reset",
        "1 x model description",
        "1 x stream",
        "1 x weights of a model",
        "1 x workspace of a model",
        "168 bytes",
        "1 x model",
    ]


@pytest.mark.parametrize("name", ["x" * 128, "x" * 127])
def test_long_names_are_replaced(acl, tmp_path, name):
    from onnx import parser

    from omforge import ir
    from omforge.om.simulated import simulate_om

    text = f'<ir_version: 9, opset_import: ["" : 16]> g (float[2] {name}) => (float[2] y) '
    graph = ir.from_proto(parser.parse_model(text + f"{{ y = Relu ({name}) }}"))
    simulate_om(graph, tmp_path / "a.om")
    loaded = Loaded(acl, str(tmp_path / "a.om"))
    shown = acl.mdl.get_input_dims(loaded.desc, 0)[0]["name"]
    assert (shown == name) == (len(name) == 127)
    assert acl.mdl.get_tensor_real_name(loaded.desc, shown) == name
