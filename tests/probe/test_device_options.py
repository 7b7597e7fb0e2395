"""How a bundle is run on a device, by what was seen of it."""

from omforge.lowering.facts import NOTHING_SEEN, Facts, Seen
from omforge.probe.device_options import acl_options
from omforge.runtime.acl_session import AclOptions


def seen(**values: str) -> Facts:
    found = {name.replace("_", "-"): Seen(value, "") for name, value in values.items()}
    return Facts("Ascend310P3", seen=found)


def test_what_was_not_seen_is_left_at_its_careful_default() -> None:
    assert acl_options(NOTHING_SEEN) == AclOptions()


def test_copies_workspace_and_weights_follow_what_was_seen() -> None:
    assert acl_options(seen(copy_2d_within_device="right")).kv_copy == "2d"
    assert acl_options(seen(copy_2d_within_device="fails")).kv_copy == "rows"
    assert acl_options(seen(copy_2d_within_device="wrong")).kv_copy == "rows"
    assert not acl_options(seen(one_workspace="wrong")).share_workspace
    assert acl_options(seen(one_workspace="right")).share_workspace
    assert acl_options(seen(weights_by_pyacl="wrong")).share_weights == "no"
    assert acl_options(seen(weights_by_pyacl="fails")).share_weights == "auto"
