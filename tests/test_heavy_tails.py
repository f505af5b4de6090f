import gzip
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import experiment, one_line
from experiments import heavy_tails
from experiments.sweep import LR_GRID, next_above, next_below
from loader import UserError


def test_the_data_has_the_sizes_of_the_paper():
    X, labels, group = heavy_tails.softmax_data(7)
    assert X.shape == (896, 1024) and len(group) == 127
    assert 0 <= X.min() and X.max() <= 1
    assert labels.bincount().tolist() == [2 ** (7 - i) for i in range(7) for _ in range(2**i)]
    assert group.bincount().tolist() == [2**i for i in range(7)]
    assert group[labels].bincount().tolist() == [128] * 7


def parameters(problem):
    return [p.detach().clone() for p in problem.net.parameters()]


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("chunk", [10**6, 7])
def test_gradients_are_those_of_the_weighted_loss(a, chunk):
    problem = heavy_tails.softmax_problem(3, weighting=a)
    problem.chunk = chunk
    W, b = parameters(problem)
    pi = problem.labels.bincount().float()[problem.labels] / len(problem.labels)
    weights = pi**-a / (pi**-a).sum()
    logits = problem.X @ W.T + b
    residual = weights[:, None] * (logits.softmax(1) - F.one_hot(problem.labels))
    losses = problem.backward()
    torch.testing.assert_close(losses, F.cross_entropy(logits, problem.labels, reduction="none"))
    torch.testing.assert_close(problem.net[-1].weight.grad, residual.T @ problem.X)
    torch.testing.assert_close(problem.net[-1].bias.grad, residual.sum(0))


@pytest.mark.parametrize("sign", [1, -1])
def test_class_curvature_is_autograds(sign):
    problem = heavy_tails.softmax_problem(3)
    W, b = [sign * p for p in parameters(problem)]

    def loss(W):
        return F.cross_entropy(problem.X @ W.T + b, problem.labels)

    norms, blocks = heavy_tails.class_curvature(problem, sign)
    gradient = torch.autograd.functional.jacobian(loss, W)
    torch.testing.assert_close(norms, gradient.norm(dim=1))
    H = torch.autograd.functional.hessian(loss, W)  # [c, d, c, d]
    torch.testing.assert_close(blocks, torch.einsum("aibi->ab", H), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("name", ["GD", "normalized GD", "sign descent"])
def test_descent_is_that_of_the_paper(name, momentum):
    problem = heavy_tails.softmax_problem(3)
    w = parameters(problem)
    m = [0, 0]
    for _ in range(3):
        logits = problem.X @ w[0].T + w[1]
        residual = (logits.softmax(1) - F.one_hot(problem.labels)) / len(problem.X)
        g = [residual.T @ problem.X, residual.sum(0)]
        if name == "normalized GD":
            norm = (g[0].square().sum() + g[1].square().sum()).sqrt()
            g = [x / norm for x in g]
        if name == "sign descent":
            g = [x.sign() for x in g]
        m = [momentum * old + x for old, x in zip(m, g)]
        w = [old - 0.1 * x for old, x in zip(w, m)]
    heavy_tails.train(problem, name + ", momentum" * bool(momentum), 0.1, 3)
    for found, wanted in zip(parameters(problem), w):
        torch.testing.assert_close(found, wanted)


def test_clipped_sgd_takes_steps_of_its_step_size_and_clips_the_output_layers_rows():
    problem = heavy_tails.softmax_problem(3)
    before = parameters(problem)
    heavy_tails.train(problem, "clipped SGD", 1e-3, 1)
    for old, new in zip(before, parameters(problem)):
        assert (new - old).square().mean().sqrt().item() == pytest.approx(1e-3, rel=1e-3)

    problem = heavy_tails.softmax_problem(3)
    heavy_tails.train(problem, "SGD, token clip", 10.0, 1)
    W, b = parameters(problem)
    assert (W - before[0]).norm(dim=1).max().item() == pytest.approx(10 * 1e-3, rel=1e-3)
    assert (b - before[1]).norm() > 10 * 1e-3


def test_the_quadratic_follows_its_closed_form():
    for row in heavy_tails.quadratic(steps=200).rows:
        assert row["GD: w_k"] == pytest.approx(row["GD: (1 - lr pi_k)^t"], abs=1e-12)
        # 200 steps of 1 / 200 from 1
        assert row["sign descent: abs(w_k)"] == pytest.approx(0, abs=1 / 200 + 1e-9)


def test_the_rates_are_those_of_the_theory():
    rows = heavy_tails.rates().rows
    assert all(row["GD: loss x pi_k t at the end"] == pytest.approx(1, abs=0.1) for row in rows)
    constants = [value for row in rows for key, value in row.items() if key.startswith("sign")]
    assert len(constants) == 5 and len({round(c, 2) for c in constants}) == 1


def test_correlation():
    x, y = torch.tensor([3.0, 1, 2, 10]), torch.tensor([0.0, 2, 5, 3])
    wanted = np.corrcoef(x, y)[0, 1]
    assert heavy_tails.correlation(x, y) == pytest.approx(wanted)
    assert heavy_tails.correlation(x, -y) == pytest.approx(-wanted)
    # one point thrice, each time with a third of the weight, and another: a line
    thirds = torch.tensor([1, 1 / 3, 1 / 3, 1 / 3])
    x, y = torch.tensor([1.0, 5, 5, 5]), torch.tensor([3.0, 2, 2, 2])
    assert heavy_tails.correlation(x, y, thirds) == pytest.approx(-1)
    # covariance 1/12, variances 1/4
    x, y = torch.tensor([1.0, 2, 1, 2]), torch.tensor([1.0, 1, 2, 2])
    halves = torch.tensor([1, 1 / 2, 1 / 2, 1])
    assert heavy_tails.correlation(x, y, halves) == pytest.approx(1 / 3)
    assert heavy_tails.correlation(x, y) == pytest.approx(0, abs=1e-6)


def test_the_search_finds_a_step_size_with_worse_neighbours():
    def make():
        return heavy_tails.softmax_problem(3)

    def final(step_size):
        return heavy_tails.train(make(), "GD", step_size, 30)[0][-1].item()

    best, losses, groups = heavy_tails.tune(make, "GD", 10**-2.5, 30)
    assert heavy_tails.tune(make, "GD", 1e4, 30)[0] == best  # from where all diverge, too
    assert losses[-1].item() == final(best) < final(next_below(LR_GRID, best))
    assert final(best) < final(next_above(LR_GRID, best))
    assert final(1e4) == math.inf
    # the groups have the same number of samples
    torch.testing.assert_close(groups.mean(1), losses)


def test_the_pages_of_a_small_size(tmp_path):
    done = experiment("heavy_tails", "softmax", "hessian", "reweighted", "--m=3", "--steps=8",
                      cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, rows in (("softmax", 10), ("hessian", 12), ("reweighted", 15)):
        stem = tmp_path / "results" / "toy" / f"{name}-m3-steps8"
        assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        page = json.loads(stem.with_suffix(".json").read_text())
        assert len(page["rows"]) == rows
        assert page["command"] == f"python -m experiments.heavy_tails {name} --m=3 --steps=8"
        assert page["command"] in stem.with_suffix(".md").read_text()


def main(monkeypatch, *words):
    """As `python -m experiments.heavy_tails WORDS` in this folder, without another process."""
    monkeypatch.setattr(sys, "argv", ["heavy_tails.py", *words])
    heavy_tails.main()


@pytest.mark.parametrize("steps, stem", [(200, "quadratic"), (10, "quadratic-steps10")])
def test_a_page_is_named_by_the_settings_that_are_not_the_default(
        tmp_path, monkeypatch, steps, stem):
    monkeypatch.chdir(tmp_path)
    main(monkeypatch, "quadratic", f"--steps={steps}")
    path, = (tmp_path / "results" / "toy").glob("*.json")
    page = json.loads(path.read_text())
    words = "quadratic" if steps == 200 else "quadratic --steps=10"
    assert page["command"] == f"python -m experiments.heavy_tails {words}"
    assert path.stem == stem and page["rows"][-1]["GD: w_k"] == pytest.approx(0.999**steps)


@pytest.mark.parametrize("words, message", [
    ("quadratic --m=7", "--m does nothing for quadratic"),
    ("softmax quadratic rates --m=8", "--m does nothing for quadratic, rates"),
    ("rates --steps=10", "--steps does nothing for rates"),
    ("softmax --bits=4", "--bits does nothing for softmax"),
    ("hessian --data=data/mnist", "--data does nothing for hessian"),
    ("mnist --m=7", "--m does nothing for mnist")])
def test_a_setting_that_does_nothing_is_refused(monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, *words.split())
    assert capsys.readouterr().err == f"heavy_tails.py: error: {message}\n"


@pytest.mark.parametrize("words, expected", [
    (["softmin"], ["softmin", "choose from quadratic"]), (["quadratic", "--steps=0"], ["--steps"]),
    (["--bits=3"], ["--bits does nothing for quadratic, rates, softmax, hessian, reweighted"])])
def test_bad_options_are_one_line(tmp_path, words, expected):
    done = experiment("heavy_tails", *words, cwd=tmp_path)
    one_line(done, *expected)
    assert done.returncode == 2 and not list(tmp_path.iterdir())


# ---- barcoded MNIST

def idx(array):
    sizes = np.array(array.shape, ">u4").tobytes()
    return b"\0\0\x08" + bytes([array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """200 images of noise in MNIST's files; the label is in the brightness."""
    labels = np.arange(200, dtype=np.uint8) % 10
    noise = np.random.default_rng(0).integers(0, 100, (200, 28, 28))
    images = (noise + 15 * labels[:, None, None]).astype(np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path


def test_barcodes_classes_and_counts(folder):
    images, labels = heavy_tails.read_mnist(folder)
    X, y = heavy_tails.barcoded(images, labels, bits=2, each=3)
    assert X.shape == (240, 28, 28) and np.bincount(y).tolist() == [12] * 10 + [3] * 40
    digits = {image.tobytes(): label for image, label in zip(images, labels)}
    assert all(digits[x.tobytes()] == c for x, c in zip(X[:120], y[:120]))
    for x, c in zip(X[120:], y[120:]):
        code, digit = divmod(int(c) - 10, 10)
        assert x[0, :2].tolist() == [255 * (code & 1), 255 * (code >> 1)]
        same = [image for image in images[labels == digit]
                if (image[1:] == x[1:]).all() and (image[0, 2:] == x[0, 2:]).all()]
        assert len(same) == 1
    with pytest.raises(UserError, match="--bits=10 needs 5000"):
        heavy_tails.barcoded(images, labels, bits=10)


def test_gradients_of_the_cnn_in_chunks_are_those_of_the_mean_loss(folder):
    images, classes = heavy_tails.barcoded(*heavy_tails.read_mnist(folder), bits=1)
    problem = heavy_tails.mnist_problem(images, classes, chunk=7)
    losses = problem.backward()
    grads = [p.grad.clone() for p in problem.net.parameters()]
    problem.net.zero_grad()
    inputs = torch.from_numpy(images)[:, None] / 255.0
    F.cross_entropy(problem.net(inputs), problem.labels).backward()
    for grad, p in zip(grads, problem.net.parameters()):
        torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-5)
    assert problem.net[-1].weight.shape == (30, 4900)
    assert problem.group.tolist() == [0] * 10 + [1] * 20
    rare = problem.group[problem.labels] == 1
    assert rare.float().mean() == 0.5 and losses.shape == (200,)


@pytest.mark.parametrize("data", ["data/mnist", "my/mnist b"])
def test_the_page_of_barcoded_mnist(folder, tmp_path, monkeypatch, data):
    few = {name: heavy_tails.OPTIMIZERS[name] for name in ("normalized GD", "Adam", "clipped SGD")}
    monkeypatch.setattr(heavy_tails, "OPTIMIZERS", few)
    monkeypatch.chdir(tmp_path)
    (tmp_path / data).parent.mkdir()
    (tmp_path / data).symlink_to(folder)
    main(monkeypatch, "mnist", f"--data={data}", "--bits=1", "--steps=1")
    picture, = (tmp_path / "results" / "toy").glob("*.png")
    # another folder is in the name and in the command
    other = data != "data/mnist"
    assert picture.stem == "mnist-bits1-steps1" + "-datamy-mnist b" * other
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = picture.with_suffix(".md").read_text()
    assert "mnist --bits=1 --steps=1" + " '--data=my/mnist b'" * other + "`" in text
    assert "200 images of 30 classes" in text
    rows = json.loads(picture.with_suffix(".json").read_text())["rows"]
    assert len(rows) == 3 and all(row["loss"] < math.log(30) + 1 for row in rows)


def test_bad_files_are_named(folder, tmp_path):
    path = folder / "train-images-idx3-ubyte.gz"
    packed = path.read_bytes()
    good = gzip.decompress(packed)
    for bad in (good[:-1], good + b"1", b"", b"\0\0\x0d" + good[3:], good[:9]):
        path.write_bytes(gzip.compress(bad))
        with pytest.raises(UserError, match=path.name):
            heavy_tails.read_mnist(folder)
    for bad in (packed[:-9], good):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=path.name):
            heavy_tails.read_mnist(folder)
    path.write_bytes(gzip.compress(idx(np.zeros((3, 28, 28), np.uint8))))
    with pytest.raises(UserError, match=r"\(3, 28, 28\) and 200 labels"):
        heavy_tails.read_mnist(folder)
    path.write_bytes(packed)
    labels = folder / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.full(200, 10, np.uint8))))
    with pytest.raises(UserError, match="labels up to 10"):
        heavy_tails.read_mnist(folder)
    path.unlink()
    done = experiment("heavy_tails", "mnist", f"--data={folder}", cwd=tmp_path)
    one_line(done, path.name, "prepare.py mnist", "--data")
