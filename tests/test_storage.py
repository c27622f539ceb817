"""Files by URI: a local folder and a store that is not one behave alike."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from recspark import storage
from recspark.errors import SetupError, SourceError


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def test_bytes_json_and_arrays_come_back(root: str) -> None:
    place = storage.join(root, "a", "b")
    storage.write_json(storage.join(place, "x.json"), {"b": 1})
    storage.write_array(storage.join(place, "y.npy"), np.arange(6).reshape(2, 3))
    assert storage.read_json(storage.join(place, "x.json")) == {"b": 1}
    assert storage.read_array(storage.join(place, "y.npy"), mmap=True).tolist() == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    assert [f.rsplit("/", 1)[1] for f in storage.list_files(root)] == ["x.json", "y.npy"]
    assert (
        next((name.rsplit("/", 1)[-1], size) for name, size, _ in storage.fingerprint(place))[0]
        == "x.json"
    )


def test_a_folder_is_complete_once_marked(root: str) -> None:
    folder = storage.join(root, "model")
    assert not storage.is_complete(folder)
    storage.write_bytes(storage.join(folder, "w"), b"1")
    assert not storage.is_complete(folder)
    storage.mark_complete(folder)
    assert storage.is_complete(folder)
    storage.remove(folder)
    storage.remove(folder)
    assert not storage.exists(folder)


def test_complete_folders_are_listed_by_name(root: str) -> None:
    assert storage.complete_folders(root) == storage.complete_folders("") == []
    for name in ("b", "a", "torn"):
        storage.write_bytes(storage.join(root, name, "w"), b"1")
        if name != "torn":
            storage.mark_complete(storage.join(root, name))
    assert storage.complete_folders(root) == [storage.join(root, name) for name in "ab"]


def test_signs_of_a_pattern_or_a_chain_are_part_of_a_name(tmp_path: Path) -> None:
    place = f"{tmp_path}/a::b/{{c,d}}/x[1]*?\\.csv"
    storage.write_bytes(place, b"1")
    storage.write_bytes(f"{tmp_path}/a::b/c/x1.csv", b"22")
    assert storage.is_file(place)
    assert storage.read_bytes(place) == b"1"
    assert [size for _, size, _ in storage.fingerprint(f"{tmp_path}/a::b")] == [2, 1]
    escaped = f"{tmp_path}/a::b/\\{{c,d\\}}/x\\[1\\]\\*\\?\\\\.csv"
    assert storage.for_spark(place) == escaped
    assert storage.for_spark("s3://b/10:30.csv") == "s3://b/10:30.csv"
    with pytest.raises(SourceError, match="whose name has a ':'"):
        storage.for_spark("/b/10:30.csv")


def test_a_folder_is_writable_or_named(root: str, tmp_path: Path) -> None:
    storage.check_writable(root)
    assert not storage.list_files(root)
    file = tmp_path / "file"
    file.write_text("in the way")
    for folder in (file, file / "root"):
        with pytest.raises(SetupError, match=f"^{folder}: nothing can be written there"):
            storage.check_writable(str(folder))


def test_two_that_look_at_one_folder_at_once_do_not_meet(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other looks, and removes its probe, while this one is between its two steps."""
    remove, steps = storage.remove, []

    def look_in_between(uri: str) -> None:
        if not steps:
            steps.append(uri)
            storage.check_writable(root)
            assert storage.exists(uri)
        remove(uri)

    monkeypatch.setattr(storage, "remove", look_in_between)
    storage.check_writable(root)
    assert steps
    assert not storage.list_files(root)


def test_objects_are_never_pickled(root: str) -> None:
    with pytest.raises(ValueError, match="pickle"):
        storage.write_array(storage.join(root, "o.npy"), np.array([{}], dtype=object))


def test_a_store_whose_package_is_missing_is_named() -> None:
    if importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is here")
    with pytest.raises(SetupError, match="s3://lake/x: Install s3fs"):
        storage.exists("s3://lake/x")
