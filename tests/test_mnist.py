import gzip
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mnist
from conftest import ROOT, one_line, prepare, python
from loader import DataError
from test_prepare import Server


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """200 images of noise in MNIST's four files, two of them gzip'd; the label is in the brightness."""
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        labels = np.arange(200, dtype=np.uint8) % 10
        images = (rng.integers(0, 100, (200, 28, 28)) + 15 * labels[:, None, None]).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_barcodes_classes_and_counts(folder):
    images, labels = mnist.read_mnist(folder, "train")
    X, y = mnist.barcoded(images, labels, bits=2, each=3)
    assert X.shape == (240, 28, 28) and np.bincount(y).tolist() == [12] * 10 + [3] * 40
    assert {x.tobytes() for x in X[:120]} <= {x.tobytes() for x in images}
    for x, c in zip(X[120:], y[120:]):
        code, digit = divmod(int(c) - 10, 10)
        assert x[0, :2].tolist() == [255 * (code & 1), 255 * (code >> 1)]
        same = [i for i in images[labels == digit] if (i[1:] == x[1:]).all() and (i[0, 2:] == x[0, 2:]).all()]
        assert len(same) == 1
    with pytest.raises(DataError, match="--bits=10 needs 5000"):
        mnist.barcoded(images, labels, bits=10)


def test_gradients_in_parts_are_autograds(folder):
    model = mnist.Barcoded(*mnist.barcoded(*mnist.read_mnist(folder, "train"), bits=1), rows=7)
    losses = model.gradients()
    grads = [p.grad.clone() for p in model.parameters()]
    model.net.zero_grad()
    torch.nn.functional.cross_entropy(model.net(model.X[:, None] / 255.0), model.labels).backward()
    for a, b in zip(grads, model.parameters()):
        torch.testing.assert_close(a, b.grad, rtol=1e-3, atol=1e-5)
    assert model.classes == 30 and len(model.parameters()) == 6 and model.parameters()[0].shape == (30, 4900)
    assert model.by_group(losses).mean().item() == pytest.approx(losses.mean().item(), rel=1e-5)  # halves


def test_the_page(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "STEPS", {k: v for k, v in mnist.STEPS.items() if "momentum" not in k and "beta1" not in k})
    page = mnist.mnist(SimpleNamespace(data=folder, bits=0, steps=1, device="cpu"))  # 0: each digit once more
    mnist.write(tmp_path / "mnist", page, page.caption, "here", "test")
    assert (tmp_path / "mnist.png").read_bytes().startswith(b"\x89PNG") and "100 images of 20 classes" in page.caption
    assert len(page.rows) == 5 and all(row["loss"] < math.log(20) + 1 and 0 <= row["test_error"] <= 1 for row in page.rows)


def test_bad_files_are_named(folder, tmp_path):
    name = "train-images-idx3-ubyte"
    good = (folder / name).read_bytes()
    for bad in (good[:-1], good + b"1", b"", b"\0\0\x0d" + good[3:], good[:9]):
        (folder / name).write_bytes(bad)
        with pytest.raises(DataError, match=f"{name} is no whole IDX file"):
            mnist.read_mnist(folder, "train")
    (folder / name).unlink()
    one_line(python(ROOT / "mnist.py", f"--data={folder}", cwd=tmp_path), name, "prepare.py mnist")
    (folder / f"{name}.gz").write_bytes(gzip.compress(good)[:-9])
    with pytest.raises(DataError, match=f"{name}.gz cannot be read"):
        mnist.read_mnist(folder, "train")
    (folder / f"{name}.gz").write_bytes(gzip.compress(idx(np.zeros((3, 28, 28), np.uint8))))
    with pytest.raises(DataError, match=r"\[3, 28, 28\]"):
        mnist.read_mnist(folder, "train")


def test_the_download(tmp_path):
    files = {f"{part}-{kind}-ubyte.gz": gzip.compress(b"x") for part in ("train", "t10k")
             for kind in ("images-idx3", "labels-idx1")}
    server = Server(files)
    server.faults["train-images-idx3-ubyte.gz"] = ["breaks off"]
    done = prepare("mnist", f"--out={tmp_path}", f"--url={server.url}")
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
