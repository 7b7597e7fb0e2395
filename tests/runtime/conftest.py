"""The tiny bundles, each built once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from omforge.runtime.bundle import Bundle
from tests.runtime.tiny import Tiny, build


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tiny], Bundle]:
    """`tiny_bundle(Tiny(...))` is that bundle; read-only, because tests share it."""
    built: dict[Tiny, Bundle] = {}

    def bundle(tiny: Tiny) -> Bundle:
        if tiny not in built:
            folder: Path = tmp_path_factory.mktemp("tiny") / "bundle"
            built[tiny] = build(folder, tiny)
        return built[tiny]

    return bundle
