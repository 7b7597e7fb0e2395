"""Where a bundle can run: on the CPU, on a device through pyACL, on a simulated one, on a plugin's.

A plugin's session is a function in the entry-point group `omforge.sessions`. It takes the bundle
and the batch B, or None for the bundle's own, and returns a `Backend` as `generate` (with a cache)
and `encode` (without) declare them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from omforge.ir.errors import InputError
from omforge.plugins import Registry
from omforge.runtime.bundle import Bundle
from omforge.runtime.encode import Encoder
from omforge.runtime.fixed import Array
from omforge.runtime.generate import Backend, LanguageModel, Level

BackendName = str
"""`cpu`, `sim`, `acl`, or what a plugin's session is called."""

OpenBackend = Callable[[Bundle, int | None], Backend]


def _acl(bundle: Bundle, batch: int | None) -> Backend:
    # It takes its time to import, and the CPU does not need it.
    from omforge.runtime.acl_session import AclBackend

    return AclBackend(bundle, batch)


def _sim(bundle: Bundle, batch: int | None) -> Backend:
    from omforge.runtime.acl_session import AclBackend
    from omforge.runtime.acl_sim import simulated_acl

    module: Any = simulated_acl(strict=True)
    return AclBackend(bundle, batch, acl=module)


def _as_session(name: str, made: object) -> OpenBackend:
    if not callable(made):
        raise ValueError(f"{name} is {made!r}, and no function of a bundle and a batch")
    return cast("OpenBackend", made)


_OWN: Mapping[str, OpenBackend] = {"sim": _sim, "acl": _acl}
SESSIONS: Registry[OpenBackend] = Registry(_OWN, "omforge.sessions", "session", _as_session)
"""What runs lowered graphs elsewhere than on ONNX Runtime, plugins' included."""


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
            .om files of the simulated atc on the simulated pyACL, where every misuse is an error;
            another is a plugin's.

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


def _device(bundle: Bundle, level: Level, batch: int | None, backend: BackendName) -> Backend:
    opener = SESSIONS.get(backend)
    if opener is None:
        raise InputError(
            f"there is no backend {backend!r}",
            f"there are {', '.join(('cpu', *SESSIONS))}",
            "Name one of these, or install the package that adds it",
        )
    if level != "lowered":
        raise InputError(
            f"the level {level} does not run on the backend {backend}",
            "it runs .om files, which are made of the lowered graphs",
            "Leave --level or --backend away",
        )
    return opener(bundle, batch)
