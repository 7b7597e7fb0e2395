"""The pyACL backend: a bundle's .om files on a device, or on the simulated one.

Everything is allocated when the backend opens. A step then moves: token ids, positions, the logits'
rows and masks to the device in one copy (with gears one more for each further mask), the logits
back in one, and the new keys and values within the device. There is one wait.

All models run in one stream, so they may share one workspace (pyACL's reference,
load_from_file_with_mem). What is uncertain is an option, and its conservative reading the default.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from omforge.air.ge_types import byte_size, ge_dtype
from omforge.bundle.manifest import Bucket, TensorSpec
from omforge.ir.dims import evaluate, parse_dim
from omforge.ir.errors import InputError
from omforge.ir.fronts import Front
from omforge.om import GEAR_INPUT, OmFile, OmTensor, read_om
from omforge.om.fit import output_names
from omforge.runtime.acl_cache import DeviceCache, Slice, place
from omforge.runtime.acl_device import AclDevice, KvCopy, import_acl
from omforge.runtime.bundle import Bundle
from omforge.runtime.cache import state_specs
from omforge.runtime.session import check_feeds, describe

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

GAP = 4096
"""Bytes between two inputs that are copied along rather than split into two copies."""

ROUNDED = 1024
"""How many bytes a tensor may be larger in the .om than its shape says."""

LIBRARY = "libascendcl.so"

_LOAD_TYPE, _PATH, _WORK, _WORK_SIZE = 1, 2, 7, 8
_FROM_FILE_WITH_MEM = 2
_CHUNK = 16 << 20


@dataclass(frozen=True)
class AclOptions:
    """What may be chosen.

    Attributes:
        device: Its number.
        kv_copy: See `AclDevice`.
        share_workspace: One workspace for all models, as large as the largest needs. The English
            reference also says "the total size"; the Chinese one and the advice to use one stream
            say the largest.
        share_weights: `auto` loads each weight file once, where pyACL offers
            acl.mdl.set_external_weight_address: the C function is documented, no page of pyACL's
            reference has it. `ctypes` calls the C function itself, which supposes that pyACL's
            handles are C's pointers. `no` lets every model load its own. (Models with gears share
            by themselves: there is only one.)
    """

    device: int = 0
    kv_copy: KvCopy = "auto"
    share_workspace: bool = True
    share_weights: Literal["auto", "ctypes", "no"] = "auto"


class AclBackend:
    """A bundle on a device, ready to run: close it, or use it as a context manager.

    Args:
        bundle: It has an .om for each bucket.
        batch: B; the buckets of that batch are loaded.
        acl: The module; `import acl` if None.
        options: What may be chosen.

    Raises:
        InputError: An .om is missing, does not fit its bucket, or is not for this backend; or pyACL
            is not installed.
        OmforgeError: A call of pyACL failed. Whatever was made until then is undone.
    """

    def __init__(
        self,
        bundle: Bundle,
        batch: int | None = None,
        *,
        acl: Any = None,
        options: AclOptions | None = None,
    ) -> None:
        self.options = options or AclOptions()
        rows = bundle.manifest.batch if batch is None else batch
        chosen = [bucket for bucket in bundle.manifest.buckets if bucket.batch == rows]
        module = import_acl() if acl is None else acl
        files = {
            bucket.name: _om(bundle, bucket, simulated=hasattr(module, "sim")) for bucket in chosen
        }
        self.device = AclDevice(module, self.options.device, self.options.kv_copy)
        try:
            states = state_specs(bundle.manifest.states, rows)
            self.device_cache = DeviceCache(self.device, bundle.manifest.kv, rows, states)
            loader = _Loader(self.device, [om.path for om in files.values()], self.options)
            self._sessions = {
                bucket.name: AclSession(
                    self.device,
                    loader.load(files[bucket.name].path),
                    bucket,
                    self.device_cache,
                    bundle.manifest.front,
                )
                for bucket in chosen
            }
        except BaseException:  # Ctrl-C too
            self.device.close()
            raise

    def open(self, bucket: Bucket) -> AclSession:
        """Return a bucket's session, which was loaded with the rest."""
        return self._sessions[bucket.name]

    def cache(self) -> DeviceCache:
        """Return the cache, which all sessions read."""
        return self.device_cache

    def close(self) -> None:
        """Give everything back; a second time does nothing."""
        self.device.close()

    def __enter__(self) -> AclBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _om(bundle: Bundle, bucket: Bucket, *, simulated: bool) -> OmFile:
    """Read a bucket's .om, and refuse one that this backend cannot load."""
    if bucket.om is None:
        raise InputError(
            f"bucket {bucket.name} has no .om",
            "atc was not run on the bundle",
            "Run `omforge build` on it where atc is; with --atc sim it makes files for "
            "--backend sim",
        )
    om = read_om(bundle.folder / bucket.om)
    if om.simulated and not simulated:
        raise InputError(
            f"{om.path} is a simulation",
            "omforge-atc-sim made it, and no device loads it",
            "Run atc on the bundle, or use --backend sim",
        )
    if simulated and not om.simulated:
        raise InputError(
            f"{om.path} needs a device",
            "atc compiled it, and the simulator has no hardware to run it on",
            "Use --backend acl on a machine with an NPU, or omforge-atc-sim in place of atc",
        )
    return om


class _Loader:
    """Loads models so that they share what can be shared."""

    def __init__(self, device: AclDevice, paths: Sequence[Path], options: AclOptions) -> None:
        self._device = device
        self._work: tuple[int, int] | None = None
        self._weights: dict[str, tuple[int, int]] = {}
        mdl = device.acl.mdl
        if options.share_workspace:
            size = 0
            for path in paths:
                work, _, ret = mdl.query_size(str(path))
                device.check(ret, f"acl.mdl.query_size of {path}")
                size = max(size, work)
            self._work = (device.malloc(size), size) if size else None
        self._tell: Callable[[int, str, int, int], int] | None = None
        if options.share_weights == "auto":
            self._tell = getattr(mdl, "set_external_weight_address", None)
        elif options.share_weights == "ctypes":
            self._tell = _c_function()
        if self._tell is not None:
            self._upload_weights(sorted({path.parent / "weight" for path in paths}))

    def load(self, path: Path) -> int:
        """Load a model; return its id."""
        device, mdl = self._device, self._device.acl.mdl
        if self._weights:
            model_id = self._load_with_config(str(path))
        elif self._work is not None:
            result = mdl.load_from_file_with_mem(str(path), *self._work, 0, 0)
            model_id = device.made(result, f"loading {path}")
        else:
            model_id = device.made(mdl.load_from_file(str(path)), f"loading {path}")
        device.later(mdl.unload, model_id)
        return model_id

    def _load_with_config(self, path: str) -> int:
        device, mdl = self._device, self._device.acl.mdl
        handle = device.handle(mdl.create_config_handle(), "acl.mdl.create_config_handle")
        try:
            settings: list[tuple[int, Any]] = [(_LOAD_TYPE, _FROM_FILE_WITH_MEM), (_PATH, path)]
            if self._work is not None:
                settings += [(_WORK, self._work[0]), (_WORK_SIZE, self._work[1])]
            for name, (address, size) in self._weights.items():
                ret = self._tell(handle, name, address, size) if self._tell is not None else -1
                device.check(ret, "aclmdlSetExternalWeightAddress")
            for attribute, value in settings:
                ret = mdl.set_config_opt(handle, attribute, value)
                device.check(ret, "acl.mdl.set_config_opt")
            model_id: int = device.made(mdl.load_with_config(handle), f"loading {path}")
        finally:
            mdl.destroy_config_handle(handle)
        return model_id

    def _upload_weights(self, folders: Sequence[Path]) -> None:
        """Put every weight file on the device once (aclmdlSetExternalWeightAddress)."""
        files = {file.name: file for folder in folders for file in sorted(folder.glob("weight_*"))}
        if not files:
            return
        device = self._device
        host, view = device.malloc_host(_CHUNK)
        for name, file in files.items():
            size = file.stat().st_size
            room = -(-size // 32) * 32  # the function wants a multiple
            address = device.malloc(room)
            with file.open("rb") as stream:
                done = 0
                while count := stream.readinto(view.data):
                    device.upload(address + done, host, count)
                    device.synchronize()
                    done += count
            self._weights[name] = (address, room)


def _c_function() -> Callable[[int, str, int, int], int]:
    """Return aclmdlSetExternalWeightAddress (hicann/ge:inc/external/acl/acl_mdl.h) itself."""
    try:
        function = ctypes.CDLL(LIBRARY).aclmdlSetExternalWeightAddress
    except (OSError, AttributeError) as error:
        raise InputError(
            f"weights cannot be shared through {LIBRARY}", str(error), "Leave share_weights at auto"
        ) from error
    function.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
    function.restype = ctypes.c_int
    return lambda handle, name, address, size: function(handle, name.encode(), address, size)


@dataclass(frozen=True)
class _Result:
    """An output that the caller gets: where it is on the device, and on the host."""

    spec: TensorSpec
    address: int
    host: int
    view: npt.NDArray[np.uint8]


class AclSession:
    """One loaded model, with its buffers; the cache's are bound to it and are never fed.

    Args:
        device: Where.
        model_id: The model; whoever loaded it unloads it.
        bucket: What the bundle says of it.
        cache: The cache, which it reads and whose new slots it computes, or writes.
        front: What the .om was compiled from.

    Raises:
        InputError: The .om's interface is not the bucket's.
    """

    def __init__(
        self,
        device: AclDevice,
        model_id: int,
        bucket: Bucket,
        cache: DeviceCache,
        front: Front = "onnx",
    ) -> None:
        self.name = bucket.name
        self._front: Front = front
        self._device = device
        self._model = model_id
        self._bucket = bucket
        self._cache = cache
        self._gear: int | None = None
        self._desc = _Description(device, model_id)
        self._check_interface()
        past = set(cache.addresses)
        self._fed = tuple(spec for spec in bucket.inputs if spec.name not in past)
        self._place_inputs(past)
        self._place_outputs()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs, in order, those included that are the cache."""
        return self._bucket.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs, in order, those included that stay on the device."""
        return self._bucket.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run a step; return its results. New keys and values stay on the device, for the cache.

        Raises:
            InputError: A feed is missing or unknown, or its dtype or shape is not the graph's.
            OmforgeError: A call of pyACL failed.
        """
        check_feeds(self.name, self._fed, feeds)
        seq = int(feeds[self._bucket.inputs[0].name].shape[1])  # ids, or embeddings
        self._choose(seq)
        used: list[tuple[int, int]] = []
        for spec in self._fed:
            data = np.ascontiguousarray(feeds[spec.name]).reshape(-1).view(np.uint8)
            start = self._offsets[spec.name]
            self._staging[start : start + len(data)] = data
            used.append((start, start + len(data)))
        device, acl = self._device, self._device.acl
        for start, end in _merged(used):
            device.upload(self._block + start, self._host + start, end - start)
        ret = acl.mdl.execute_async(self._model, self._source, self._target, device.stream)
        device.check(ret, f"running {self.name}")
        sizes: list[int] = []
        for result in self._results:
            size = byte_size(result.spec.dtype, _bound(result.spec, seq))
            device.download(result.host, result.address, size)
            sizes.append(size)
        device.synchronize()
        self._cache.produced(Slice(self._present, seq))
        return {
            result.spec.name: result.view[:size]
            .view(result.spec.dtype)
            .reshape(_bound(result.spec, seq))
            .copy()
            for result, size in zip(self._results, sizes, strict=True)
        }

    def close(self) -> None:
        """Nothing: the device gives everything back, in reverse order."""

    def _place_inputs(self, past: set[str]) -> None:
        """Give each input its buffer: those that are fed lie in one block, in the graph's order."""
        device, acl = self._device, self._device.acl
        # Largest last, so that with gears one copy takes the small ones and the first large one.
        fed = sorted(self._fed, key=lambda spec: self._desc.size(spec.name))
        size, offsets = place([self._desc.size(spec.name) for spec in fed])
        self._offsets = {spec.name: offset for spec, offset in zip(fed, offsets, strict=True)}
        self._block = device.malloc(size)
        self._host, self._staging = device.malloc_host(size)
        self._staging[:] = 0
        self._source = device.handle(acl.mdl.create_dataset(), "acl.mdl.create_dataset")
        device.later(acl.mdl.destroy_dataset, self._source)
        for tensor in self._desc.inputs:
            if tensor.name in past:
                address = self._cache.addresses[tensor.name]
            elif tensor.name == GEAR_INPUT:
                address = device.malloc(tensor.size)
            else:
                address = self._block + self._offsets[tensor.name]
            self._add(self._source, address, tensor.size)

    def _place_outputs(self) -> None:
        device, acl = self._device, self._device.acl
        size, offsets = place([tensor.size for tensor in self._desc.outputs])
        block = device.malloc(size)
        addresses = {
            spec.name: block + offset
            for spec, offset in zip(self._bucket.outputs, offsets, strict=True)
        }
        kept = self._cache.presents
        self._present = {name: a for name, a in addresses.items() if name in kept}
        self._results: list[_Result] = []
        for spec in self._bucket.outputs:
            if spec.name not in kept:
                # With gears, room for the largest.
                size = byte_size(spec.dtype, _bound(spec, self._bucket.seq))
                self._results.append(_Result(spec, addresses[spec.name], *device.malloc_host(size)))
        self._target = device.handle(acl.mdl.create_dataset(), "acl.mdl.create_dataset")
        device.later(acl.mdl.destroy_dataset, self._target)
        for spec, tensor in zip(self._bucket.outputs, self._desc.outputs, strict=True):
            self._add(self._target, addresses[spec.name], tensor.size)

    def _add(self, dataset: int, address: int, size: int) -> None:
        device, acl = self._device, self._device.acl
        buffer = device.handle(acl.create_data_buffer(address, size), "acl.create_data_buffer")
        device.later(acl.destroy_data_buffer, buffer)
        device.made(acl.mdl.add_dataset_buffer(dataset, buffer), "acl.mdl.add_dataset_buffer")

    def _choose(self, seq: int) -> None:
        """Choose a gear, if there are any and it is another one than before.

        pyACL copies its numbers to the device one by one, and waits; so not at every step.
        """
        if not self._bucket.gears or seq == self._gear:
            return
        device, mdl = self._device, self._device.acl.mdl
        if seq not in self._bucket.gears:
            gears = ", ".join(map(str, self._bucket.gears))
            raise InputError(f"{self.name} has no gear of {seq} tokens", f"it has {gears}")
        dims = [dim for spec in self._bucket.inputs for dim in _bound(spec, seq)]
        told = {"name": "", "dimCount": len(dims), "dims": dims}
        index = self._desc.index(GEAR_INPUT)
        ret = mdl.set_input_dynamic_dims(self._model, self._source, index, told)
        device.check(ret, "acl.mdl.set_input_dynamic_dims")
        self._gear = seq

    def _check_interface(self) -> None:
        """Refuse an .om whose tensors are not those of the bucket, by name, dtype and size."""
        bucket, seq = self._bucket, self._bucket.seq
        extra = (GEAR_INPUT,) if bucket.gears else ()
        names = tuple(tensor.name for tensor in self._desc.inputs)
        wanted = (*(spec.name for spec in bucket.inputs), *extra)
        if names != wanted:
            raise _mismatch(bucket, f"its inputs are {list(names)}, not {list(wanted)}")
        made = [tensor.name for tensor in self._desc.outputs]
        outputs = output_names(made, bucket.outputs, self._front)
        wanted = [spec.name for spec in bucket.outputs]
        if outputs != wanted:
            raise _mismatch(bucket, f"its outputs are {outputs}, not {wanted}")
        for tensor, spec in zip(self._desc.inputs, bucket.inputs, strict=False):
            shape = tuple(dim if isinstance(dim, int) else -1 for dim in spec.shape)
            _check_tensor(bucket, tensor, spec, shape)
        for tensor, spec in zip(self._desc.outputs, bucket.outputs, strict=True):
            # With gears an output is described as it is at the largest (get_output_dims).
            _check_tensor(bucket, tensor, spec, _bound(spec, seq))


def _check_tensor(
    bucket: Bucket, tensor: OmTensor, spec: TensorSpec, shape: tuple[int, ...]
) -> None:
    size = byte_size(spec.dtype, _bound(spec, bucket.seq))
    # GE may round a size up; how far is not documented.
    rounded = 0 <= tensor.size - size < ROUNDED
    if (tensor.dtype, tensor.shape) != (spec.dtype, shape) or not rounded:
        raise _mismatch(
            bucket,
            f"{spec.name} is {describe(tensor.dtype, tensor.shape)} of {tensor.size} bytes in the "
            f".om, the manifest says {describe(spec.dtype, spec.shape)}",
        )


class _Description:
    """What a loaded model says of its tensors; `size` of an output or input by its name."""

    def __init__(self, device: AclDevice, model_id: int) -> None:
        mdl = device.acl.mdl
        desc = device.handle(mdl.create_desc(), "acl.mdl.create_desc")
        device.later(mdl.destroy_desc, desc)
        device.check(mdl.get_desc(desc, model_id), "acl.mdl.get_desc")
        self.inputs = tuple(
            OmTensor(
                mdl.get_input_name_by_index(desc, index),
                ge_dtype(mdl.get_input_data_type(desc, index)),
                tuple(device.made(mdl.get_input_dims(desc, index), "get_input_dims")["dims"]),
                mdl.get_input_size_by_index(desc, index),
            )
            for index in range(mdl.get_num_inputs(desc))
        )
        self.outputs = tuple(
            OmTensor(
                mdl.get_output_name_by_index(desc, index),
                ge_dtype(mdl.get_output_data_type(desc, index)),
                tuple(device.made(mdl.get_output_dims(desc, index), "get_output_dims")["dims"]),
                mdl.get_output_size_by_index(desc, index),
            )
            for index in range(mdl.get_num_outputs(desc))
        )

    def size(self, name: str) -> int:
        """Return an input's bytes."""
        return self.inputs[self.index(name)].size

    def index(self, name: str) -> int:
        """Return an input's number."""
        return [tensor.name for tensor in self.inputs].index(name)


def _bound(spec: TensorSpec, seq: int) -> tuple[int, ...]:
    """Return a shape at a gear: `seq` and `C + seq` become numbers."""
    return tuple(
        dim if isinstance(dim, int) else evaluate(parse_dim(dim), {"seq": seq})
        for dim in spec.shape
    )


def _merged(used: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges between which there is little."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(used):
        if found and start - found[-1][1] <= GAP:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def _mismatch(bucket: Bucket, why: str) -> InputError:
    return InputError(
        f"the .om of {bucket.name} is not the one of this manifest", why, "Run atc on it again"
    )
