"""The .om container: reading and writing the files that atc makes."""

from omforge.om.inout import GEAR_INPUT, OmTensor
from omforge.om.layout import SIMULATED_PAYLOAD, SIMULATED_PLATFORM
from omforge.om.read import OmFile, OmModel, OmPartition, read_om
from omforge.om.write import write_om

__all__ = [
    "GEAR_INPUT",
    "SIMULATED_PAYLOAD",
    "SIMULATED_PLATFORM",
    "OmFile",
    "OmModel",
    "OmPartition",
    "OmTensor",
    "read_om",
    "write_om",
]
