"""Where a bundle can run: on the CPU, on a device through pyACL, on a simulated one, on a plugin's.

A plugin's session is a function in the entry-point group `omforge.sessions`. It takes the bundle
and the batch B, or None for the bundle's own, and returns a `Backend` as `runtime.generate` (with a
cache) and `runtime.encode` (without) declare them: it opens a `runtime.session.Session` for each
bucket, makes the cache that they share, and is closed with the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from omforge.ir.errors import InputError
from omforge.plugins import Registry
from omforge.runtime.bundle import Bundle
from omforge.runtime.cpu_session import CpuBackend, runs_in_place
from omforge.runtime.encode import Encoder
from omforge.runtime.fixed import Array
from omforge.runtime.generate import Backend, LanguageModel, Level

if TYPE_CHECKING:
    from omforge.runtime.acl_session import AclOptions

BackendName = str
"""`cpu`, `sim`, `acl`, or what a plugin's session is called."""

OpenBackend = Callable[[Bundle, int | None], Backend]


def _acl(bundle: Bundle, batch: int | None, options: AclOptions | None = None) -> Backend:
    # It takes its time to import, and the CPU does not need it.
    from omforge.runtime.acl_session import AclBackend

    return AclBackend(bundle, batch, options=options)


def _sim(bundle: Bundle, batch: int | None, options: AclOptions | None = None) -> Backend:
    from omforge.runtime.acl_session import AclBackend
    from omforge.runtime.acl_sim import simulated_acl

    module: Any = simulated_acl(strict=True)
    return AclBackend(bundle, batch, acl=module, options=options)


def _as_session(name: str, made: object) -> OpenBackend:
    if not callable(made):
        raise TypeError(f"it is {made!r}, and no function of a bundle and a batch")
    return cast("OpenBackend", made)


def _on_cpu(bundle: Bundle, batch: int | None) -> Backend:
    raise InputError("the CPU is no backend", "the graphs run on it without one")


_OWN: Mapping[str, OpenBackend] = {"cpu": _on_cpu, "sim": _sim, "acl": _acl}
SESSIONS: Registry[OpenBackend] = Registry(_OWN, "omforge.sessions", _as_session)
"""What runs lowered graphs, plugins' included; `cpu` is what runs them where there is none."""


def open_model(
    bundle: Bundle,
    level: Level = "lowered",
    *,
    batch: int | None = None,
    backend: BackendName = "cpu",
    options: AclOptions | None = None,
) -> LanguageModel:
    """Open a bundle that generates on a backend; what the backend made is undone at the close.

    Args:
        bundle: The bundle.
        level: Only the CPU runs `canonical`.
        batch: B; the manifest's unless given.
        backend: `cpu` runs the graphs on ONNX Runtime, `acl` the .om files on a device, `sim` the
            .om files of the simulated atc on the simulated pyACL, where every misuse is an error;
            another is a plugin's.
        options: What may be chosen of `acl` and `sim`; others do not look at it.

    Raises:
        InputError: The backend cannot run this bundle, or is not installed.
        OmforgeError: A call of pyACL failed.
    """
    if backend == "cpu":
        own = CpuBackend(bundle, batch) if level == "lowered" and runs_in_place(bundle) else None
        return LanguageModel(bundle, level, batch=batch, backend=own)
    device = _device(bundle, level, batch, backend, options)
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
    options: AclOptions | None = None,
) -> Encoder:
    """Open a bundle that encodes on a backend, as `open_model` one that generates.

    `fixed` is what `Encoder` takes, `options` what `open_model` does.

    Raises:
        InputError: The backend cannot run this bundle, or is not installed.
        OmforgeError: A call of pyACL failed.
    """
    if backend == "cpu":
        return Encoder(bundle, level, batch=batch, fixed=fixed)
    device = _device(bundle, level, batch, backend, options)
    try:
        return Encoder(bundle, level, batch=batch, backend=device, fixed=fixed)
    except BaseException:  # Ctrl-C too: a device that is not reset stays occupied
        device.close()
        raise


def _device(
    bundle: Bundle,
    level: Level,
    batch: int | None,
    backend: BackendName,
    options: AclOptions | None,
) -> Backend:
    opener = SESSIONS.get(backend)
    if opener in (_acl, _sim) and options is not None:
        opener = functools.partial(_acl if opener is _acl else _sim, options=options)
    if opener is None:
        raise InputError(
            f"there is no backend {backend!r}",
            f"there are {', '.join(SESSIONS)}",
            "Name one of these, or install the package that adds it",
        )
    if level != "lowered":
        raise InputError(
            f"the level {level} does not run on the backend {backend}",
            "it runs what was made of the lowered graphs",
            "Leave --level or --backend away",
        )
    package = SESSIONS.package(backend)
    try:
        opened = opener(bundle, batch)
    except Exception as error:
        if package:
            error.add_note(f"in the session {backend} of the package {package}")
        raise
    needed = ("open", "close", "cache") if bundle.manifest.task == "generate" else ("open", "close")
    missing = [name for name in needed if not callable(getattr(opened, name, None))]
    if missing:
        raise InputError(
            f"the session {backend} of the package {package} cannot be used",
            f"it returned {opened!r}, which has no {' and no '.join(missing)}",
            "omforge/runtime/generate.py says what a Backend is",
        )
    return opened
