"""A simulated pyACL: the calls that omforge uses, as strict as their documentation, on no device.

`simulated_acl()` gives an object that is used as the module `acl` is. It runs the .om files of the
simulated atc and no others; a real device runs those of the real atc and not these. Mistakes return
a code other than 0, as there, and are kept with their reason in `sim`; in strict mode they raise
when the module is finalised.

What is stricter than a device: buffers must have exactly the model's sizes, fresh device memory is
NaN, a run destroys what is in the workspace, and work in a stream is done as late as possible.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

from omforge.runtime.acl_sim.codes import (
    INVALID_PARAM,
    RELATIVE_RESOURCE_NOT_CLEARED,
    REPEAT_FINALIZE,
    REPEAT_INITIALIZE,
    RT_PARAM_INVALID,
    UNINITIALIZE,
    Fault,
)
from omforge.runtime.acl_sim.mdl import Models, ModelsWithExternalWeights
from omforge.runtime.acl_sim.memory import Memory
from omforge.runtime.acl_sim.models import DataBuffer
from omforge.runtime.acl_sim.process import Part, Process, returns_code, returns_value
from omforge.runtime.acl_sim.rt import Runtime

__all__ = ["SimulatedAcl", "simulated_acl"]

DEVICE_MEMORY = 64 << 30


class Util(Part):
    """`acl.util`: host bytes as pointers."""

    PREFIX: ClassVar[str] = "acl.util"

    @returns_value(0)
    def bytes_to_ptr(self, data: bytes) -> int:
        """Return the address of a bytes object."""
        return self.process.memory.borrow(data)

    @returns_value(b"")
    def ptr_to_bytes(self, address: int, size: int) -> bytes:
        """Return host bytes at an address."""
        self.process.memory.view(address, size, "host", "ptr_to_bytes")
        return ctypes.string_at(address, size)


class SimulatedAcl(Part):
    """What stands in for the module `acl`; make one with `simulated_acl`.

    Attributes:
        sim: What only a simulation can tell: errors, leaks, counts of calls and copies.
        rt: acl.rt.
        mdl: acl.mdl.
        util: acl.util.
    """

    def __init__(self, process: Process, *, external_weights: bool = False) -> None:
        super().__init__(process)
        self.sim = process
        self.rt = Runtime(process)
        self.mdl = ModelsWithExternalWeights(process) if external_weights else Models(process)
        self.util = Util(process)

    @returns_code
    def _init(self) -> None:
        if self.process.initialised:
            raise Fault(REPEAT_INITIALIZE, "acl.init was called before")
        self.process.initialised, self.process.finalised = True, False

    def init(self, config: str = "") -> int:
        """Begin; `config` is a file that the simulator does not read."""
        return self._init()

    @returns_code
    def _finalize(self) -> None:
        if self.process.finalised:
            raise Fault(REPEAT_FINALIZE, "acl.finalize was called before")
        if not self.process.initialised:
            raise Fault(UNINITIALIZE, "acl.init was not called")
        self.process.initialised, self.process.finalised = False, True
        self.process.leaks = self.process.count_leaks()
        if self.mdl.loaded:
            self.process.leaks.append(f"{len(self.mdl.loaded)} x model")
        if self.process.leaks:
            raise Fault(
                RELATIVE_RESOURCE_NOT_CLEARED, f"left alive: {', '.join(self.process.leaks)}"
            )

    def finalize(self) -> int:
        """End.

        Raises:
            CheckError: In strict mode, if there were errors or something is left alive.
        """
        ret = self._finalize()
        self.process.settle()
        return ret

    @returns_value("")
    def get_recent_err_msg(self) -> str:
        """Return what was wrong with the last call that failed."""
        return self.process.last_error

    # Data buffers

    @returns_value(0)
    def create_data_buffer(self, address: int, size: int) -> int:
        """Create a buffer: a pointer and its bytes."""
        return self.process.create("data buffer", DataBuffer(address, size))

    @returns_code
    def update_data_buffer(self, buffer: int, address: int, size: int) -> None:
        """Let a buffer be somewhere else."""
        found: DataBuffer = self.process.get(buffer, "data buffer")
        if size <= 0:
            raise Fault(INVALID_PARAM, f"a buffer of {size} bytes")
        found.address, found.size = address, size

    @returns_code
    def destroy_data_buffer(self, buffer: int) -> None:
        """Destroy a buffer; the memory stays."""
        self.process.destroy(buffer, "data buffer")

    @returns_value(0)
    def get_data_buffer_addr(self, buffer: int) -> int:
        """Return a buffer's pointer."""
        found: DataBuffer = self.process.get(buffer, "data buffer", RT_PARAM_INVALID)
        return found.address

    @returns_value(0)
    def get_data_buffer_size(self, buffer: int) -> int:
        """Return a buffer's bytes."""
        found: DataBuffer = self.process.get(buffer, "data buffer", RT_PARAM_INVALID)
        return found.size


def simulated_acl(
    *,
    strict: bool = False,
    memory: int = DEVICE_MEMORY,
    memcpy2d_within_device: bool = True,
    external_weights: bool = False,
) -> Any:
    """Return a simulated module `acl`, which knows nothing of others that were made.

    Args:
        strict: Raise at `finalize` if any call failed or anything is left alive.
        memory: Bytes of the device.
        memcpy2d_within_device: acl.rt.memcpy2d_async copies within the device: the sources of CANN
            do, the reference up to 8.5 says that it does not.
        external_weights: acl.mdl.set_external_weight_address exists; only the C function is
            documented.
    """
    process = Process(Memory(memory), strict=strict, two_d=memcpy2d_within_device)
    return SimulatedAcl(process, external_weights=external_weights)
