"""Where a bundle can run: on the CPU, on a device through pyACL, or on a simulated device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from omforge.ir.errors import InputError
from omforge.runtime.bundle import Bundle
from omforge.runtime.encode import Encoder
from omforge.runtime.fixed import Array
from omforge.runtime.generate import LanguageModel, Level

if TYPE_CHECKING:
    from omforge.runtime.acl_session import AclBackend

BackendName = Literal["cpu", "sim", "acl"]


def open_model(
    bundle: Bundle,
    level: Level = "lowered",
    *,
    batch: int | None = None,
    backend: BackendName = "cpu",
) -> LanguageModel:
    """Open a bundle that generates on a backend; what the backend made is undone at the close.

    Args:
        bundle: The bundle.
        level: Only the CPU runs `canonical`.
        batch: B; the manifest's unless given.
        backend: `cpu` runs the graphs on ONNX Runtime, `acl` the .om files on a device, `sim` the
            .om files of the simulated atc on the simulated pyACL, where every misuse is an error.

    Raises:
        InputError: The backend cannot run this bundle, or is not installed.
        OmforgeError: A call of pyACL failed.
    """
    if backend == "cpu":
        return LanguageModel(bundle, level, batch=batch)
    device = _device(bundle, level, batch, backend)
    try:
        return LanguageModel(bundle, level, batch=batch, backend=device)
    except BaseException:  # Ctrl-C too: a device that is not reset stays occupied
        device.close()
        raise


def open_encoder(
    bundle: Bundle,
    level: Level = "lowered",
    *,
    batch: int | None = None,
    backend: BackendName = "cpu",
    fixed: Mapping[str, Array] | None = None,
) -> Encoder:
    """Open a bundle that encodes on a backend, as `open_model` one that generates.

    `fixed` is what `Encoder` takes.

    Raises:
        InputError: The backend cannot run this bundle, or is not installed.
        OmforgeError: A call of pyACL failed.
    """
    if backend == "cpu":
        return Encoder(bundle, level, batch=batch, fixed=fixed)
    device = _device(bundle, level, batch, backend)
    try:
        return Encoder(bundle, level, batch=batch, backend=device, fixed=fixed)
    except BaseException:  # Ctrl-C too: a device that is not reset stays occupied
        device.close()
        raise


def _device(bundle: Bundle, level: Level, batch: int | None, backend: BackendName) -> AclBackend:
    if level != "lowered":
        raise InputError(
            f"the level {level} does not run on the backend {backend}",
            "it runs .om files, which are made of the lowered graphs",
            "Leave --level or --backend away",
        )
    # Both take their time to import, and the CPU needs neither.
    from omforge.runtime.acl_session import AclBackend
    from omforge.runtime.acl_sim import simulated_acl

    module: Any = simulated_acl(strict=True) if backend == "sim" else None
    return AclBackend(bundle, batch, acl=module)
