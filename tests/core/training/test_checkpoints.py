"""The checkpoint format: what comes back, and which files are refused."""

import os
import pickle

import pytest
import safetensors.torch
import torch

from flowbridge.core.errors import ModelFileError
from flowbridge.core.training.checkpoints import read_checkpoint, write_checkpoint

STATE = {
    "module": {"layer.weight": torch.randn(3, 4).T, "empty": torch.zeros(0, 2), "flag": torch.tensor(True)},
    "optimiser": {"state": {0: {"step": torch.tensor(3.0)}, 12: {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 0.1}]},
    "numbers": [1, 0.1 + 0.2, float("inf"), None, "text", [torch.arange(3), []], {}],
    "keys with / and .": {"a/b": torch.ones(1), "a.b": torch.ones(2)},
}  # fmt: skip


def flat(value, name=""):
    if isinstance(value, dict):
        return [pair for key, one in value.items() for pair in flat(one, (*name, key))] or [(name, {})]
    if isinstance(value, list):
        return [pair for key, one in enumerate(value) for pair in flat(one, (*name, key))] or [(name, [])]
    return [(name, value)]


def test_everything_comes_back(tmp_path):
    write_checkpoint(tmp_path / "new" / "file", STATE)
    stored = flat(read_checkpoint(tmp_path / "new" / "file"), ())
    expected = flat(STATE, ())
    assert [name for name, _ in stored] == [name for name, _ in expected]
    for (name, one), (_, other) in zip(stored, expected, strict=True):
        assert type(one) is type(other), name
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other
    assert os.listdir(tmp_path / "new") == ["file"]


def test_shared_memory_is_stored_as_often_as_it_is_named(tmp_path):
    weight = torch.ones(2)
    write_checkpoint(tmp_path / "file", {"a": weight, "b": weight, "c": weight[:1]})
    stored = read_checkpoint(tmp_path / "file")
    stored["a"].zero_()
    assert stored["b"].tolist() == [1.0, 1.0]
    assert stored["c"].tolist() == [1.0]


def test_what_is_no_plain_data_is_refused_and_leaves_the_file_alone(tmp_path):
    write_checkpoint(tmp_path / "file", {"a": 1})
    for state in ({"a": object()}, {("a",): 1}, {"a": 1, 2: 3}, {True: 1}):
        with pytest.raises(TypeError):
            write_checkpoint(tmp_path / "file", state)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelFileError, match="cannot be written"):
        write_checkpoint(tmp_path / "folder", {"a": 1})
    assert read_checkpoint(tmp_path / "file") == {"a": 1}
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("size", [0, 4, 8, 100, 200, -1])
def test_truncated_files_are_refused(tmp_path, size):
    write_checkpoint(tmp_path / "file", STATE)
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:size])
    with pytest.raises(ModelFileError, match="no readable checkpoint"):
        read_checkpoint(tmp_path / "file")


class Trap:
    """Unpickling it would show."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_never_read(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save({"trap": Trap()}, "pickled", _use_new_zipfile_serialization=not legacy, pickle_module=pickle)
    with pytest.raises(
        ModelFileError, match="no readable checkpoint" if legacy else "an earlier version of flowbridge"
    ):
        read_checkpoint(tmp_path / "pickled")
    assert os.listdir() == ["pickled"]


def test_foreign_and_older_files_are_refused(tmp_path):
    file = tmp_path / "file"
    for metadata, message in (
        (None, "is not a 'flowbridge training checkpoint 2'"),
        ({"format": "pt"}, "is not a 'flowbridge training checkpoint 2'"),
        ({"format": "flowbridge training checkpoint 1", "state": "{}"}, "earlier version of flowbridge.*or remove"),
        ({"format": "flowbridge training checkpoint 2"}, "no readable checkpoint"),
        ({"format": "flowbridge training checkpoint 2", "state": "{"}, "no readable checkpoint"),
        ({"format": "flowbridge training checkpoint 2", "state": '{"a": {"$tensor": "b"}}'}, "no readable checkpoint"),
    ):
        safetensors.torch.save_file({"a": torch.ones(1)}, file, metadata)
        with pytest.raises(ModelFileError, match=message):
            read_checkpoint(file)
    with pytest.raises(ModelFileError, match="no readable checkpoint"):
        read_checkpoint(tmp_path / "missing")
