"""The benchmark of private training, in its small size: it runs, keeps its work, and says what it should say."""

import gzip
import importlib
import struct
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("opacus", reason="opacus is not installed: pip install opacus")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install scikit-learn")


@pytest.fixture
def science(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(importlib.import_module("benchmarks.harness"), "RESULTS", tmp_path)
    return importlib.import_module("benchmarks.science.private_training")


def write_idx(file: Path, values: np.ndarray, cut: int = 0) -> None:
    """Write unsigned bytes as MNIST's files hold them."""
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "wb") as stream:
        stream.write(content[: len(content) - cut])


@pytest.fixture
def mnist(tmp_path) -> Path:
    """Eighty noisy images of two bars, and twenty more, in MNIST's format."""
    random = np.random.default_rng(0)
    for part, count, suffix in (("train", 80, ".gz"), ("t10k", 20, "")):
        labels = random.integers(0, 2, count).astype(np.uint8)
        images = random.integers(0, 40, (count, 28, 28)).astype(np.uint8)
        images[labels == 0, 4:24, 13:16] = 250
        images[labels == 1, 13:16, 4:24] = 250
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", labels)
    return tmp_path


@pytest.mark.parametrize("part", ["digits", "audit", "alanine"])
def test_small_size(part, science, tmp_path, capsys):
    science.main([part, "--small", "--output", str(tmp_path / "runs")])
    assert (tmp_path / f"private_training_{part}_small.json").is_file()
    assert "DP-MAC" in capsys.readouterr().out
    science.main([part, "--small", "--output", str(tmp_path / "runs"), "--minutes", "0"])
    assert "minutes are over" not in capsys.readouterr().out  # all of it was kept
    if part == "alanine":
        assert (tmp_path / "runs" / "small" / "alanine" / "private_alanine.png").is_file()


def test_a_local_copy_of_mnist(science, mnist, tmp_path, capsys):
    """Images by way of private principal axes, whose release is on the ledger with the training."""
    science.main(["mnist", "--small", "--mnist", str(mnist), "--output", str(tmp_path / "runs")])
    assert "mnist, test accuracy" in " ".join(capsys.readouterr().out.split())
    images = importlib.import_module("benchmarks.science.private_images")
    data = images.mnist_split(mnist)
    assert data.train.inputs.shape == (80, 784)
    assert data.inputs.shape == (20, 784)
    assert 0.9 < float(data.train.inputs.max()) < 1.0
    upright = data.targets == 0
    assert float(data.inputs[upright].reshape(-1, 28, 28)[:, 20, 14].min()) > 0.9
    task = images.TASKS["mnist"]
    (release,) = images.project(task, images.network(task, 0), data.train, 8.0, 0)
    assert (release.mechanism, release.noise_multiplier) == ("principal axes", 8.0)


def test_files_that_are_not_mnist(science, mnist, tmp_path):
    files = importlib.import_module("benchmarks.science.idx_files")
    with pytest.raises(SystemExit):
        science.main(["mnist", "--small"])
    with pytest.raises(FileNotFoundError, match=r"neither train-images-idx3-ubyte nor train-images-idx3-ubyte\.gz"):
        files.read_mnist(tmp_path / "nowhere", "train")
    write_idx(tmp_path / "short", np.zeros((2, 3), dtype=np.uint8), cut=1)
    with pytest.raises(ValueError, match="is cut short: 5 numbers"):
        files.read_idx(tmp_path / "short")
    (tmp_path / "text").write_text("no images")
    with pytest.raises(ValueError, match="is no IDX file"):
        files.read_idx(tmp_path / "text")
    write_idx(mnist / "t10k-labels-idx1-ubyte", np.zeros(3, dtype=np.uint8))
    with pytest.raises(ValueError, match="test has images of shape"):
        files.read_mnist(mnist, "test")
