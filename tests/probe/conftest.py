"""A kit of two families, and an atc that answers what a test plants."""

from pathlib import Path

import pytest

from omforge.lowering.target import TARGETS
from omforge.probe.kit import write_kit

PLANTED_ATC = """#!/bin/sh
# An atc that does what $PLANT says: taken, hang, kill, or a code that it fails with.
for word in "$@"; do
    case $word in --output=*) output=${word#--output=} ;; esac
done
case $output in */never-made/*) [ "$PLANT" = hang-never-made ] && sleep 60 ;; esac
[ "$PLANT" = hang-never-made ] && PLANT=taken
case ${PLANT:-taken} in
    taken) echo om > "$output.om"
        echo "ATC run success, welcome to the next use." ;;
    hang) sleep 60 ;;
    kill) kill -9 $PPID; sleep 60 ;;
    *) echo "ATC run failed"; echo "$PLANT: Planted."; exit 255 ;;
esac
"""


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The kits by SoC; read-only."""
    folder = tmp_path_factory.mktemp("kits")
    found = {
        soc: folder / soc for soc in ("Ascend310P3", "Ascend910B4", "Ascend310B4", "Ascend910_95")
    }
    for soc, kit in found.items():
        write_kit(kit, TARGETS[soc])
    return found


@pytest.fixture(scope="session")
def atc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted atc."""
    program = tmp_path_factory.mktemp("bin") / "atc"
    program.write_text(PLANTED_ATC)
    program.chmod(0o755)
    return program
