"""GE's numbers of dtypes and their sizes, for rooms above that know graphs and no .om files."""

from omforge.om.ge_types import byte_size, ge_dtype, ge_number

__all__ = ["byte_size", "ge_dtype", "ge_number"]
