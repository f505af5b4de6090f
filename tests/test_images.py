import gzip
import io
import json
import math
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import experiment, one_line
from PIL import Image

from experiments import heavy_tails, images
from loader import UserError


def main(monkeypatch, *words):
    """As `python -m experiments.images WORDS` in this folder, without another process."""
    monkeypatch.setattr(sys, "argv", ["images.py", *map(str, words)])
    images.command_line("images", images.__doc__, images.EXPERIMENTS, "all", images.SETTINGS,
                        "images")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Checks that main() ends with one line on stderr, and nothing on disk."""
    def check(words, expected):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit, match="[12]"):
            main(monkeypatch, *words)
        line, = capsys.readouterr().err.splitlines()
        assert [word for word in expected if str(word) not in line] == [], line
        assert not (tmp_path / "results").exists()
    return check


# ---- networks

def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts():
    assert count(images.resnet18(1000)) == 11_689_512  # torchvision's
    # embedding 295,296; twelve blocks of 1,774,464; norm 768; head 385,000
    assert count(images.ViT(1000, size=224, patch=16, width=384, depth=12)) == 21_974_632
    assert count(images.cnn(10_250)) == 832 + 80_100 + 4901 * 10_250


def test_resnet18_has_the_shapes_of_its_stages_and_uses_every_parameter():
    net, x = images.resnet18(7, width=8), torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    shapes = []
    for layer in net[:13]:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes[4:] == [(8, 16, 24)] * 3 + [(16, 8, 12)] * 2 + [(32, 4, 6)] * 2 + [(64, 2, 3)] * 2
    net[13:](x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_positions_of_the_vit():
    net = images.ViT(5, size=32, patch=4, width=128, depth=1)
    positions = net.position.view(8, 8, 4, 32)  # row, column; sine and cosine of each
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    for i, frequency in ((0, 1.0), (31, 1e-4)):
        wanted = [f(x * frequency) for x in (rows, columns) for f in (torch.sin, torch.cos)]
        torch.testing.assert_close(positions[..., i], torch.stack(wanted, dim=2))
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert net(x).shape == (2, 5)
    assert not torch.allclose(net(x), net(x.flip(3)))  # patches in another order


# ---- MNIST

def idx(array):
    sizes = np.array(array.shape, ">u4").tobytes()
    return b"\0\0\x08" + bytes([array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """200 images of noise in MNIST's files; the label is in the brightness."""
    labels = np.arange(200, dtype=np.uint8) % 10
    noise = np.random.default_rng(0).integers(0, 100, (200, 28, 28))
    digits = (noise + 15 * labels[:, None, None]).astype(np.uint8)
    for name, array in (("images-idx3", digits), ("labels-idx1", labels)):
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path


def test_barcodes_classes_and_counts(folder):
    digits, labels, part = images.read_mnist(folder)
    X, y = images.barcoded(digits, labels, bits=2, each=3)
    assert X.shape == (240, 28, 28) and np.bincount(y).tolist() == [12] * 10 + [3] * 40
    known = {image.tobytes(): label for image, label in zip(digits, labels)}
    assert all(known[x.tobytes()] == c for x, c in zip(X[:120], y[:120]))
    for x, c in zip(X[120:], y[120:]):
        code, digit = divmod(int(c) - 10, 10)
        assert x[0, :2].tolist() == [255 * (code & 1), 255 * (code >> 1)]
        same = [image for image in digits[labels == digit]
                if (image[1:] == x[1:]).all() and (image[0, 2:] == x[0, 2:]).all()]
        assert len(same) == 1
    with pytest.raises(UserError, match="--bits=10 needs 5000"):
        images.barcoded(digits, labels, bits=10)


def test_the_test_images_are_enough_for_seven_bits(folder):
    assert images.read_mnist(folder)[2] == "training"  # alone there
    for path in list(folder.glob("train-*")):
        path.with_name(path.name.replace("train", "t10k")).write_bytes(path.read_bytes())
    assert [images.read_mnist(folder, bits)[2] for bits in (7, 8)] == ["test", "training"]
    for path in folder.glob("train-*"):
        path.unlink()
    assert images.read_mnist(folder, bits=8)[2] == "test"


def test_gradients_of_the_cnn_in_chunks_are_those_of_the_mean_loss(folder):
    digits, classes = images.barcoded(*images.read_mnist(folder)[:2], bits=1)
    problem = images.image_problem(images.cnn, digits[:, None], classes, chunk=7)
    problem.bf16 = False
    losses, _ = problem.backward()
    grads = [p.grad.clone() for p in problem.net.parameters()]
    problem.net.zero_grad()
    inputs = torch.from_numpy(digits)[:, None] / 255
    F.cross_entropy(problem.net[1:](inputs), problem.labels).backward()
    for grad, p in zip(grads, problem.net.parameters()):
        torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-5)
    assert problem.net[-1].weight.shape == (30, 4900) and losses.shape == (200,)
    # ten classes of ten, a twentieth each, then twenty of five
    assert problem.group.tolist() == [i // 2 for i in range(10)] + [5 + i // 4 for i in range(20)]


@pytest.mark.parametrize("data", ["data/mnist", "my/mnist", "my/mnist b"])
def test_the_page_of_barcoded_mnist(folder, tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(heavy_tails, "LR_GRID", (1e-3,))  # no search
    Path(data).parent.mkdir()
    Path(data).symlink_to(folder)
    main(monkeypatch, "mnist", f"--data={data}", "--bits=1", "--steps=2")
    picture, = Path("results/images").glob("*.png")
    # the name tells folders of another name apart, the command any other
    assert picture.stem == "mnist" + "-datamnist b" * (data[-1] == "b") + "-bits1-steps2"
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = picture.with_suffix(".md").read_text()
    assert (f"--data={data}" in text) == (data != "data/mnist")
    assert "--bits=1 --steps=2" in text and "200 images, from the training images, of 30 cl" in text
    rows = json.loads(picture.with_suffix(".json").read_text())["rows"]
    assert [row["method"] for row in rows] == 2 * list(images.METHODS)
    assert all(row["loss"] < math.log(30) + 1 for row in rows)
    for row in rows:  # five groups of two digits, five of four classes with barcodes
        assert len(row["losses of all groups"]) == len(row["accuracies of all groups"]) == 10
        assert row["loss"] == pytest.approx(np.mean(row["losses of all groups"]), rel=1e-5)


def test_bad_files_are_named(folder, tmp_path):
    path = folder / "train-images-idx3-ubyte.gz"
    packed = path.read_bytes()
    good = gzip.decompress(packed)
    for bad in (good[:-1], good + b"1", b"", b"\0\0\x0d" + good[3:], good[:9]):
        path.write_bytes(gzip.compress(bad))
        with pytest.raises(UserError, match=path.name):
            images.read_mnist(folder)
    for bad in (packed[:-9], good):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=path.name):
            images.read_mnist(folder)
    path.write_bytes(gzip.compress(idx(np.zeros((3, 28, 28), np.uint8))))
    with pytest.raises(UserError, match=r"\(3, 28, 28\) and 200 labels"):
        images.read_mnist(folder)
    path.write_bytes(packed)
    labels = folder / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.full(200, 10, np.uint8))))
    with pytest.raises(UserError, match="labels up to 10"):
        images.read_mnist(folder)
    path.unlink()
    done = experiment("images", "mnist", f"--data={folder}", cwd=tmp_path)
    one_line(done, "t10k-images-idx3-ubyte.gz", "prepare.py mnist", "--data")


# ---- a folder of images

def png(color, size=(40, 40), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


@pytest.fixture
def tree(tmp_path):
    """Classes a/x, a/y and b of 2, 3 and 4 images: the class is the red, the image the green."""
    for number, (label, images_of_it) in enumerate((("a/x", 2), ("a/y", 3), ("b", 4))):
        path = tmp_path / "tree" / label
        path.mkdir(parents=True)
        for i in range(images_of_it):
            (path / f"{i}.png").write_bytes(png((80 * number, 20 * i, 200)))
        (path / "notes.txt").write_text("no image")
    return tmp_path / "tree"


def test_the_counts_of_a_heavy_tail_and_of_its_balanced_twin():
    counts = images.heavy_tailed(classes=6, most=12)
    assert counts.tolist() == [12, 6, 4, 3, 2, 2]
    assert images.balanced(counts).tolist() == [5, 5, 5, 5, 5, 4]
    counts = images.heavy_tailed(1000, 1300)
    assert counts.sum() == images.balanced(counts).sum() == sum(1300 // k for k in range(1, 1001))
    pi = counts / counts.sum()
    assert pi[9] / pi[99] == 10 and pi.min() > 0


def test_a_class_is_a_folder_with_images(tree, tmp_path):
    found = images.image_files(tree)
    assert {label: len(files) for label, files in found.items()} == {"a/x": 2, "a/y": 3, "b": 4}
    assert [file.name for file in found["b"]] == ["0.png", "1.png", "2.png", "3.png"]
    # the same in two zip files, each with a folder of its own on top, that share images
    (tmp_path / "zips").mkdir()
    for name, labels in (("one", ["a/x", "a/y"]), ("two", ["a/y", "b"])):
        with zipfile.ZipFile(tmp_path / "zips" / f"{name}.zip", "w") as archive:
            for label in labels:
                for path in sorted((tree / label).iterdir()):
                    archive.write(path, f"{name}/{label}/{path.name}")
    packed = images.image_files(tmp_path / "zips")
    assert {k: [f.read_bytes() for f in v] for k, v in packed.items()} == {
        k: [f.read_bytes() for f in v] for k, v in found.items()}


def test_samples_are_of_their_class_and_repeat_only_if_they_must(tree):
    classes = images.choose_classes(tree, 3, seed=0)
    assert sorted(map(len, classes)) == [2, 3, 4]
    X, labels = images.sample(classes, [5, 2, 2], 32, seed=0)
    assert X.shape == (9, 3, 32, 32) and X.dtype == np.uint8
    assert labels.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2]
    names = list(images.image_files(tree).values())
    for k, files in enumerate(classes):
        reds, greens = X[labels == k, 0, 0, 0], X[labels == k, 1, 0, 0]
        assert set(reds) == {80 * names.index(files)}
        assert len(set(greens)) == min(len(files), len(greens))
    again, _ = images.sample(images.choose_classes(tree, 3, 0), [5, 2, 2], 32, 0)
    assert (X == again).all()
    orders = {tuple(map(len, images.choose_classes(tree, 3, seed))) for seed in range(9)}
    assert len(orders) > 1


def test_images_are_resized_and_cropped(tmp_path):
    # left half black, right half white, twice as wide as high
    image = Image.new("L", (160, 80))
    image.paste(255, (80, 0, 160, 80))
    for kind in ("png", "jpeg"):
        image.save(tmp_path / f"image.{kind}")
        x = images.read_image(tmp_path / f"image.{kind}", 28)  # 32 x 64, then 28 x 28
        assert x.shape == (3, 28, 28) and (x[0] == x[2]).all()
        assert x[:, :, :12].max() < 20 and x[:, :, 16:].min() > 235  # the middle
        assert images.read_image(tmp_path / f"image.{kind}", 28, (0, 0)).max() < 20
        assert images.read_image(tmp_path / f"image.{kind}", 28, (1, 1)).min() > 235


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "bytes"])
def test_a_damaged_image_is_named(tree, refused, damage):
    path = tree / "b" / "2.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(path)
    good = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no image", "cut": good[:len(good) // 2],
                      "bytes": good[:300] + bytes(50) + good[350:]}[damage])
    refused(["resnet18", f"--data={tree}", "--classes=3", "--most=12"], [path, "replace or remove"])


def test_bad_folders_and_settings_are_one_line(tree, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    (tmp_path / "zips").mkdir()
    (tmp_path / "zips" / "broken.zip").write_bytes(b"PK")
    for words, wanted in (
            (["resnet18"], ["data/omniglot has 0 folders", "github.com/brendenlake/omniglot"]),
            (["vit", "--data=empty"], ["empty has 0 folders", "--classes=242", "--data"]),
            (["vit", "--data=tree"], ["tree has 3 folders", "--classes=242"]),
            (["vit", "--data=zips"], ["zips/broken.zip"]),
            (["vit", "--data=tree", "--classes=3", "--most=2"], ["--most=2", "--most=3"]),
            (["vit", "--size=30"], ["--size=30", "--patch=8"]),
            (["vit", "--width=100"], ["--width=100", "64"]),
            (["mnist", "--size=30"], ["--size does nothing for mnist"]),
            (["resnet18", "--batch=0"], ["--batch", "at least 1"]),
            (["resnet18", "--data=tree", "--classes=3", "--most=12", "--batch=1"], ["--batch=1"]),
            (["resnet18", "--seed=-1"], ["--seed", "at least 0"])):
        refused(words, wanted)
    (tree / "c").mkdir()
    (tree / "c" / "1.png").write_bytes((tree / "b" / "0.png").read_bytes())
    with pytest.raises(UserError, match="begin with the same image"):
        images.choose_classes(tree, 4, seed=0)


def test_full_batch_training_is_that_of_the_toys():
    X = np.random.default_rng(0).integers(0, 256, (11, 3, 32, 32), np.uint8)
    labels = np.repeat([0, 1, 2], [6, 3, 2])

    def problem():
        problem = images.image_problem(partial(images.resnet18, width=8), X, labels)
        problem.bf16 = False
        return problem

    for name, step_size in (("GD, momentum", 1e-2), ("clipped SGD", 1e-3)):
        mean, losses, accuracies = images.train(problem(), name, step_size, epochs=4, batch=11)
        wanted, by_group = heavy_tails.train(problem(), name, step_size, steps=3)
        torch.testing.assert_close(mean, wanted, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(losses, by_group, rtol=1e-3, atol=1e-4)
    assert problem().group.tolist() == [0, 1, 2]  # tenths 2, 6 and 9: those between are empty
    correct = problem().backward()[1].float().split([6, 3, 2])
    assert accuracies[0].tolist() == pytest.approx([part.mean().item() for part in correct])


def test_batches_use_every_image_once_per_epoch(tree):
    X, labels = images.sample(images.choose_classes(tree, 3, 0), [6, 3, 2], 32, 0)
    problem = images.image_problem(partial(images.resnet18, width=8), X, labels)
    backward, seen = problem.backward, []

    def record(rows):
        seen.append(rows)
        return backward(rows)

    problem.backward = record
    images.train(problem, "GD", 1e-2, epochs=2, batch=5)
    assert [len(rows) for rows in seen] == [4, 4, 3] * 2  # nearly equal: none of one image
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert first.sort()[0].tolist() == second.sort()[0].tolist() == list(range(11))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("name, words", [
    ("resnet18", ["--width=8"]), ("vit", ["--patch=16", "--width=64", "--depth=1"])])
def test_the_page_of_a_folder(tree, tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(heavy_tails, "LR_GRID", (1e-3,))  # no search
    main(monkeypatch, name, "--data=tree", "--classes=3", "--most=6", "--epochs=2", "--batch=4",
         *words)
    picture, = Path("results/images").glob("*.png")
    assert picture.stem.startswith(f"{name}-datatree-classes3-most6-epochs2-batch4-")
    text = picture.with_suffix(".md").read_text()
    assert "11 images of 3 classes of tree, where class k has 6/k" in text
    assert "2 epochs per row" in text and "in 3 groups by frequency" in text
    page = json.loads(picture.with_suffix(".json").read_text())
    assert [(row["classes"], row["method"]) for row in page["rows"]] == [
        (kind, method) for kind in ("heavy-tailed", "balanced classes")
        for method in ("SGD", "SGD, momentum", "sign descent", "Adam", "clipped SGD")]
    assert [len(row["losses of all groups"]) for row in page["rows"]] == [3] * 10
    assert words[0] in page["command"]
