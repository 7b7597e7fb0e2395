"""The manifest: what is written is what is read, and a wrong field is named."""

import copy
import dataclasses
import json
import pathlib
from typing import Any

import pytest

from omforge.bundle.manifest import (
    Bucket,
    Export,
    KvCache,
    LayerSizes,
    Manifest,
    MaskSpec,
    ModelFacts,
    TensorSpec,
    sealed,
)
from omforge.ir.errors import InputError


def make_manifest() -> Manifest:
    return Manifest(
        schema_version=2,
        omforge="0.1.0",
        target="Ascend310P3",
        dtype="float16",
        batch=1,
        context=512,
        model=ModelFacts("llama", 2, 4, 2, 16, 64, 128, (2, 3), 1, None, 2048),
        kv=KvCache("stacked", 2, 2, 16, 16, 512, "float16"),
        masks=(MaskSpec("attention_mask", None),),
        mask_value=-30000.0,
        buckets=(
            Bucket(
                name="decode_c512",
                kind="decode",
                batch=1,
                seq=1,
                capacity=512,
                file="decode_c512.onnx",
                inputs=(
                    TensorSpec("input_ids", "int32", (1, 1)),
                    TensorSpec("attention_mask", "float16", (1, 1, 1, 513)),
                ),
                outputs=(TensorSpec("logits", "float16", (1, 128)),),
                om=None,
                command=("atc", "--framework=5"),
            ),
        ),
        canonical="canonical.onnx",
        weights="weights.bin",
        export=Export(
            path="../model.onnx",
            sha256="0" * 64,
            input_ids="input_ids",
            attention_mask="attention_mask",
            position_ids=None,
            past=(("pk.0", "pv.0"), ("pk.1", "pv.1")),
            present=(("k.0", "v.0"), ("k.1", "v.1")),
            logits="logits",
            extra=(TensorSpec("unused", "float32", ("batch", 3)),),
            dtype="float32",
        ),
        files={name: "a" * 64 for name in ("decode_c512.onnx", "canonical.onnx", "weights.bin")},
        coverage={"attention": [2, 2]},
    )


def test_what_is_saved_loads_as_the_same_manifest(tmp_path: pathlib.Path) -> None:
    manifest = make_manifest()
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_the_same_manifest_gives_the_same_sorted_text(tmp_path: pathlib.Path) -> None:
    text = make_manifest().to_json()
    assert text == make_manifest().to_json()
    keys = list(json.loads(text))
    assert keys == sorted(keys)
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("batch",), "1", "batch: is '1' (str), must be int"),
        (("batch",), True, "batch: is True (bool), must be int"),
        (("batch",), 0, "batch: is 0, must be 1 or more"),
        (("schema_version",), 1, "schema_version: is 1, this omforge reads version 2"),
        (("mask_value",), 0.0, "mask_value: is 0.0"),
        (("kv", "layout"), "inner", "kv.layout: is 'inner', must be one of 'stacked', 'per-layer'"),
        (("kv", "layers"), 3, "kv.layers: is 3, model.layers is 2"),
        (("kv", "kv_heads"), 4, "kv.kv_heads: is 4, model.kv_heads is 2"),
        (("kv", "value_head_size"), 8, "kv.value_head_size: is 8, the stacked layout needs"),
        (("model", "kv_heads"), 3, "model.kv_heads: 3 does not divide 4 heads"),
        (("model", "eos_token_ids"), 2, "model.eos_token_ids: is 2 (int), must be a list"),
        (("model", "eos_token_ids"), [2, None], "model.eos_token_ids[1]: is null, must be int"),
        (("model", "bos_token_id"), 1.5, "model.bos_token_id: is 1.5 (float), must be int or null"),
        (("masks", 0, "window"), 0, "masks[0].window: is 0"),
        (("masks", 0, "name"), "other", "buckets[0].inputs: lack 'other', which masks[0] names"),
        (("buckets", 0, "kind"), "both", "buckets[0].kind: is 'both'"),
        (("buckets", 0, "file"), "/etc/x", "buckets[0].file: '/etc/x' is absolute"),
        (("buckets", 0, "file"), "manifest.json", "'manifest.json' is the manifest already"),
        (("buckets", 0, "file"), "weights.bin", "'weights.bin' is weights already"),
        (("buckets", 0, "om"), "../x.om", "buckets[0].om: '../x.om' leads out of the folder"),
        (
            ("buckets", 0, "om"),
            "x.om",
            "files: have no sha256 of 'x.om', which buckets[0].om names",
        ),
        (("buckets", 0, "name"), "../x", "buckets[0].name: '../x' leads out of the folder"),
        (("buckets", 0, "name"), "/tmp/x", "buckets[0].name: '/tmp/x' is absolute"),
        (("buckets", 0, "name"), "a/b", "buckets[0].name: 'a/b' has a slash"),
        (("buckets", 0, "name"), "", "buckets[0].name: '' is empty"),
        (("buckets", 0, "command"), ["a\0b"], "buckets[0].command: 'a\\x00b' cannot be printed"),
        (("canonical",), "../m.onnx", "canonical: '../m.onnx' leads out of the folder"),
        (("weights",), "a\\b", "weights: 'a\\\\b' holds a backslash"),
        (("files",), {}, "files: have no sha256 of 'canonical.onnx', which canonical names"),
        (("files",), {"../x": "a" * 64}, "files: '../x' leads out of the folder"),
        (("buckets", 0, "inputs", 0, "shape"), ["batch"], "buckets[0].inputs[0].shape[0]"),
        (("buckets", 0, "inputs", 1, "name"), "input_ids", "names 'input_ids' more than once"),
        (("export", "past"), [["a", "b"]], "export.past: has 1 layers, model.layers is 2"),
        (("export", "past"), [["a"], ["b"]], "export.past[0]: has 1 items, must have 2"),
        (("export", "sha256"), "abc", "export.sha256: 'abc' is not a sha256"),
        (("files",), [], "files: is [] (list), must be an object"),
        (("files",), {"a": "b"}, "files['a']: 'b' is not a sha256"),
    ],
)
def test_a_wrong_field_is_named(
    tmp_path: pathlib.Path, path: tuple[str | int, ...], value: object, message: str
) -> None:
    data: Any = json.loads(make_manifest().to_json())
    where = data
    for step in path[:-1]:
        where = where[step]
    where[path[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(sealed(data)))
    with pytest.raises(InputError) as caught:
        Manifest.load(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "manifest.json") in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"context": 512', '"context": 256'),
        ('"eos_token_ids": [', '"eos_token_ids": [\n      9,'),
        ("a" * 64, "b" * 64),
        ('"omforge": "0.1.0"', '"omforge": "0.1.1"'),
    ],
)
def test_a_change_by_hand_is_noticed(tmp_path: pathlib.Path, before: str, after: str) -> None:
    text = make_manifest().to_json()
    assert before in text
    (tmp_path / "manifest.json").write_text(text.replace(before, after, 1))
    with pytest.raises(InputError, match=r"sha256: is '[0-9a-f]{64}', .* it was changed by hand"):
        Manifest.load(tmp_path)


def test_spaces_and_order_are_no_change(tmp_path: pathlib.Path) -> None:
    data = json.loads(make_manifest().to_json())
    text = json.dumps(dict(reversed(data.items())))
    (tmp_path / "manifest.json").write_text(text)
    assert Manifest.load(tmp_path) == make_manifest()


def test_a_manifest_without_its_own_hash_is_refused() -> None:
    data: Any = json.loads(make_manifest().to_json())
    del data["sha256"]
    with pytest.raises(InputError, match="sha256: is None"):
        Manifest.from_json(data)


def with_gears(gears: list[int], kind: str = "gears", seq: int = 16, open_dim: str = "seq") -> Any:
    """A manifest's JSON whose bucket leaves `seq` open."""
    data: Any = json.loads(make_manifest().to_json())
    data["buckets"][0] |= {"gears": gears, "kind": kind, "seq": seq}
    data["buckets"][0]["inputs"][0]["shape"] = [1, open_dim]
    return sealed(data)


def test_a_graph_with_gears_may_leave_dims_open() -> None:
    manifest = Manifest.from_json(with_gears([1, 16]))
    assert manifest.buckets[0].gears == (1, 16)
    assert Manifest.from_json(json.loads(manifest.to_json())) == manifest


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_gears([16, 1]), "gears: are [16, 1], must be two or more in ascending order"),
        (with_gears([16]), "must be two or more"),
        (with_gears([1, 8]), "the last one seq = 16"),
        (with_gears([1, 16], kind="decode"), "buckets[0].kind: is 'decode' with 2 gears"),
        (with_gears([]), "is 'seq', no number"),
        (with_gears([1, 16], open_dim="32 + batch"), "'32 + batch', gears bind only seq"),
    ],
)
def test_gears_that_contradict_the_bucket_are_refused(data: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Manifest.from_json(data)
    assert message in str(caught.value)


def test_a_manifest_written_before_there_were_gears_has_none() -> None:
    data: Any = json.loads(make_manifest().to_json())
    del data["buckets"][0]["gears"]
    assert Manifest.from_json(sealed(data)).buckets[0].gears == ()


def with_states(*states: Any, exported: int | None = None) -> Any:
    """A manifest's JSON with states of these shapes."""
    data: Any = json.loads(make_manifest().to_json())
    data["states"] = [
        {"input": f"in.{i}", "output": f"out.{i}", "dtype": "float16", "shape": shape}
        for i, shape in enumerate(states)
    ]
    count = len(states) if exported is None else exported
    data["export"]["states"] = [[f"a.{i}", f"b.{i}"] for i in range(count)]
    return sealed(data)


def test_a_manifest_may_have_states() -> None:
    manifest = Manifest.from_json(with_states(["batch", 3], [2, "batch", 4]))
    assert [state.shape for state in manifest.states] == [("batch", 3), (2, "batch", 4)]
    assert manifest.states[0].output == "out.0"
    assert Manifest.from_json(json.loads(manifest.to_json())) == manifest


def test_a_manifest_written_before_there_were_states_has_none() -> None:
    data: Any = json.loads(make_manifest().to_json())
    del data["states"], data["export"]["states"]
    manifest = Manifest.from_json(sealed(data))
    assert (manifest.states, manifest.export.states) == ((), ())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_states(["batch", 0]), "states[0].shape[1]: is 0, must be 1 or more"),
        (with_states(["seq", 3]), "states[0].shape[0]: is 'seq', only batch is open"),
        (with_states(["batch", 3], exported=2), "export.states: are 2, the bundle's 1"),
    ],
)
def test_states_that_no_runtime_could_hold_are_refused(data: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Manifest.from_json(data)
    assert message in str(caught.value)


def with_layer_sizes(*sizes: tuple[int, int, int], layout: str = "per-layer") -> Any:
    """A manifest's JSON with (K, size of a key, size of a value) of each layer."""
    data: Any = json.loads(make_manifest().to_json())
    names = ("kv_heads", "head_size", "value_head_size")
    given = [dict(zip(names, of, strict=True)) for of in sizes]
    data["kv"] |= {"layout": layout, "layer_sizes": given}
    return sealed(data)


def test_layers_may_have_caches_of_their_own_sizes() -> None:
    manifest = Manifest.from_json(with_layer_sizes((2, 16, 16), (1, 64, 32)))
    assert manifest.kv.each_layer == (LayerSizes(2, 16, 16), LayerSizes(1, 64, 32))
    assert Manifest.from_json(json.loads(manifest.to_json())) == manifest


def test_layers_that_are_alike_are_not_listed() -> None:
    manifest = make_manifest()
    assert manifest.kv.each_layer == (LayerSizes(2, 16, 16),) * 2
    assert "layer_sizes" not in manifest.to_json()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            with_layer_sizes((2, 16, 16), (1, 8, 8), layout="stacked"),
            "kv.layer_sizes: are given, the stacked layout needs layers that are alike",
        ),
        (with_layer_sizes((2, 16, 16)), "kv.layer_sizes: are 1, kv.layers is 2"),
        (with_layer_sizes((2, 16, 16), (1, 0, 8)), "kv.layer_sizes[1].head_size: is 0, must be 1"),
        (
            with_layer_sizes((2, 16, 8), (1, 8, 8)),
            "kv.layer_sizes[0].value_head_size: is 8, kv.value_head_size is 16",
        ),
        (with_layer_sizes((2, 16, 16), (2, 16, 16)), "kv.layer_sizes: are all the same"),
    ],
)
def test_sizes_of_layers_that_contradict_the_cache_are_refused(data: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Manifest.from_json(data)
    assert message in str(caught.value)


def test_missing_and_unknown_fields_are_named() -> None:
    data: Any = json.loads(make_manifest().to_json())
    lacking = copy.deepcopy(data)
    del lacking["kv"]["capacity"]
    with pytest.raises(InputError, match=r"kv\.capacity: is missing"):
        Manifest.from_json(lacking)
    data["buckets"][0]["colour"] = "red"
    with pytest.raises(InputError, match=r"buckets\[0\]\.colour: is no field of Bucket"):
        Manifest.from_json(data)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"mask_value": NaN}', "\udcff", "[" * 100_000])
def test_a_file_that_is_no_manifest_is_refused(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"manifest\.json"):
        Manifest.load(tmp_path)


def test_a_missing_file_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="cannot read the manifest"):
        Manifest.load(tmp_path / "nothing")


def test_an_inconsistent_manifest_is_not_written(tmp_path: pathlib.Path) -> None:
    make_manifest().save(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="context"):
        dataclasses.replace(make_manifest(), context=0).save(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_bucket_is_found_by_name() -> None:
    assert make_manifest().bucket("decode_c512").seq == 1
    with pytest.raises(InputError, match="no bucket 'decode_c1'"):
        make_manifest().bucket("decode_c1")


def test_the_facts_are_there_where_some_were_given() -> None:
    plain = make_manifest()
    assert '"facts"' not in plain.to_json()
    told = dataclasses.replace(plain, facts="ab" * 32)
    assert Manifest.from_json(json.loads(told.to_json())).facts == "ab" * 32
    with pytest.raises(InputError, match="not a sha256"):
        dataclasses.replace(plain, facts="the best").to_json()
