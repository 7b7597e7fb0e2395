"""The header and the tables."""

from omforge.om import layout


def test_a_header_unpacks_to_what_was_packed():
    header = layout.Header("n", 77, "64-bit", model_count=3, platform_version="p", is_dynamic=True)
    data = header.pack()
    assert len(data) == layout.HEADER_SIZE
    assert layout.magic_of(data) == layout.MAGIC
    assert layout.unpack_header(data) == header


def test_a_header_without_the_long_length_means_the_narrow_table():
    data = layout.Header("n", 77, "32-bit").pack()
    assert layout.unpack_header(data).table == "32-bit"
    assert layout.unpack_header(data).length == 77


def test_an_old_version_is_never_dynamic():
    data = layout.Header("n", 1, version=0x10000000, model_count=2, is_dynamic=True).pack()
    assert not layout.unpack_header(data).is_dynamic


def test_tables_have_the_sizes_of_the_structs():
    assert len(layout.pack_table("64-bit", [(0, 5), (1, 6)])) == 8 + 2 * 24
    assert len(layout.pack_table("32-bit", [(0, 5), (1, 6)])) == 4 + 2 * 12
