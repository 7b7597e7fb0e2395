"""Fixtures that every room's tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omforge.atc.build import BuildOptions
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.runtime.bundle import Bundle
from tests.exports import ENCODER_DECODERS, ENCODERS, export


@pytest.fixture(autouse=True, scope="session")
def no_facts_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What lies in the configuration folder of whoever runs the tests does not change them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`exported(route, family)` is the path of a complete model.onnx, written once per session.

    Treat it as read-only: other tests use the same file. Under pytest-xdist each worker has its own
    (a session there is one worker's), so nothing is locked.
    """
    written: dict[tuple[str, str], Path] = {}

    def path(route: str, family: str) -> Path:
        if (route, family) not in written:
            folder = tmp_path_factory.mktemp(f"{route}-{family}")
            written[route, family] = export(route, family, folder)
        return written[route, family]

    return path


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`encoder(route, family)`: the same of models that are no causal decoder with token ids."""
    written: dict[tuple[str, str], Path] = {}

    def path(route: str, family: str) -> Path:
        if (route, family) not in written:
            folder = tmp_path_factory.mktemp(f"{route}-{family}")
            written[route, family] = export(route, family, folder, ENCODERS)
        return written[route, family]

    return path


@pytest.fixture(scope="session")
def bert(encoder: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An encoder's bundle of two lengths and two rows, with simulated .om files; read-only."""
    folder = tmp_path_factory.mktemp("bert") / "bundle"
    build = BuildOptions("sim", cache=None)
    options = CompileOptions("Ascend310P3", prefill=(4, 12), batch=2, build=build)
    compile_bundle(encoder("optimum", "bert"), folder, options)
    return Bundle.open(folder)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`decoder(route, family)`: the same of decoders that attend to an encoder's states."""
    written: dict[tuple[str, str], Path] = {}

    def path(route: str, family: str) -> Path:
        if (route, family) not in written:
            folder = tmp_path_factory.mktemp(f"{route}-{family}")
            written[route, family] = export(route, family, folder, ENCODER_DECODERS)
        return written[route, family]

    return path
