import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import experiment, one_line
from experiments import heavy_tails
from experiments.sweep import LR_GRID, next_above, next_below


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
    losses, correct = problem.backward()
    torch.testing.assert_close(losses, F.cross_entropy(logits, problem.labels, reduction="none"))
    assert torch.equal(correct, logits.argmax(1) == problem.labels)
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
    def train(step_size):
        return heavy_tails.train(heavy_tails.softmax_problem(3), "GD", step_size, 30)

    def final(step_size):
        return train(step_size)[0][-1].item()

    best, losses, groups = heavy_tails.tune(train, "GD", 10**-2.5)
    assert heavy_tails.tune(train, "GD", 1e4)[0] == best  # from where all diverge, too
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


def test_large_continues_from_its_checkpoints(tmp_path, monkeypatch, capsys):
    """60 steps at once, and 30 steps first, of which the last 25 are saved, give the same page."""
    pages = []
    for folder, all_steps in (("once", [60]), ("twice", [30, 60])):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        for steps in all_steps:
            main(monkeypatch, "large", "--m=3", f"--steps={steps}")
        page = json.loads(Path("results/toy/large-m3-steps60.json").read_text())
        pages.append(page["rows"])
    path = f"runs/large-m3-sign-descent-0.00768{'-bf16' * heavy_tails.BF16}.pt"
    assert f"{path}: 25 steps" in capsys.readouterr().out
    assert pages[0] == pages[1] and [row["method"] for row in pages[0]] == [
        "GD", "sign descent", "Adam"]
    # the paper's step sizes at m = 11, as much larger as there are fewer inputs: too large for GD
    for row, step_size in zip(pages[0], (10**-2.5, 10**-5, 10**-3.5)):
        assert row["step size"] == pytest.approx(step_size * 12 * 2**11 / (4 * 2**3))
        losses, _ = heavy_tails.train(heavy_tails.softmax_problem(3), row["method"],
                                      row["step size"], 60)
        in_fp32 = losses[-1].item()
        assert (row["loss"] or math.inf) == pytest.approx(in_fp32, rel=0.1)
    assert pages[0][0]["loss"] is None

    [path] = Path("runs").glob("large-m3-Adam-*.pt")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SystemExit, match="1"):
        main(monkeypatch, "large", "--m=3", "--steps=61")
    assert capsys.readouterr().err.startswith(f"large: {path} is damaged")
    Path("runs").rename("elsewhere")
    Path("runs").touch()  # where the folder should be
    with pytest.raises(SystemExit):
        main(monkeypatch, "large", "--m=3", "--steps=30")
    assert capsys.readouterr().err.startswith("large: could not write runs (File exists)")
    Path("results").rename("pages")
    Path("results").touch()
    with pytest.raises(SystemExit):
        main(monkeypatch, "quadratic", "--steps=10")
    printed = capsys.readouterr()
    assert printed.err.startswith("quadratic: could not write results") and "| " in printed.out


@pytest.mark.parametrize("words, message", [
    ("quadratic --m=7", "--m does nothing for quadratic"),
    ("softmax quadratic rates --m=8", "--m does nothing for quadratic, rates"),
    ("rates --steps=10", "--steps does nothing for rates"),
    ("rates --m=7 --steps=3", "--m does nothing for rates")])
def test_a_setting_that_does_nothing_is_refused(monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, *words.split())
    assert capsys.readouterr().err == f"heavy_tails.py: error: {message}\n"


@pytest.mark.parametrize("words, expected", [
    (["softmin"], ["softmin", "choose from quadratic"]), (["quadratic", "--steps=0"], ["--steps"]),
    (["--m=7"], ["--m does nothing for quadratic, rates"]), (["softmax", "--m=2"], ["--m"])])
def test_bad_options_are_one_line(tmp_path, words, expected):
    done = experiment("heavy_tails", *words, cwd=tmp_path)
    one_line(done, *expected)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
