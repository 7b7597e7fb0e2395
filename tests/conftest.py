"""Fixtures that every room's tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.exports import ENCODERS, export


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
