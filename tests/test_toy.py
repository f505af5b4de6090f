import math
from types import SimpleNamespace

import pytest
import torch

import toy


@pytest.fixture
def model():
    torch.manual_seed(0)
    return toy.Softmax(*toy.softmax_data(3))


def loss(model, W, b, weights):
    return (torch.nn.functional.cross_entropy(model.X @ W.T + b, model.labels, reduction="none") * weights).sum()


def test_the_data_has_the_sizes_of_the_paper():
    X, labels, group = toy.softmax_data(7)
    assert X.shape == (896, 1024) and len(group) == 127 and 0 <= X.min() and X.max() <= 1
    assert labels.bincount().tolist() == [2 ** (7 - i) for i in range(7) for _ in range(2**i)]
    assert group.bincount().tolist() == [2**i for i in range(7)] and group[labels].bincount().tolist() == [128] * 7


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_gradients_are_autograds(a):
    model = toy.Softmax(*toy.softmax_data(3), weighting=a)
    pi = model.labels.bincount().float()[model.labels] / len(model.labels)
    weights = pi**-a / (pi**-a).sum()
    W, b = model.W.clone().requires_grad_(), model.b.clone().requires_grad_()
    loss(model, W, b, weights).backward()
    losses = model.gradients()
    torch.testing.assert_close(model.W.grad, W.grad)
    torch.testing.assert_close(model.b.grad, b.grad)
    assert model.by_group(losses).mean().item() == pytest.approx(losses.mean().item())  # groups of equal mass


def test_hessian_block_traces_are_autograds(model):
    c, d = model.W.shape
    plain = torch.full((len(model.X),), 1 / len(model.X))
    H = torch.autograd.functional.hessian(lambda W: loss(model, W, model.b, plain), model.W)  # [c, d, c, d]
    traces = torch.einsum("aibi->ab", H)
    _, p = model.look()
    torch.testing.assert_close(model.hessian_traces(p), traces.diagonal(), rtol=1e-4, atol=1e-6)
    some = torch.tensor([0, 2, 5])
    torch.testing.assert_close(model.hessian_block_traces(p, some), traces[some][:, some], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "normalised", "sign"])
def test_the_rules_are_those_of_the_paper(model, kind):
    W, b, rule = model.W.clone(), model.b.clone(), toy.direction(kind, 0.9)(model, 0.1)
    mW, mb = 0, 0
    for _ in range(3):
        model.gradients()
        gW, gb = model.W.grad.clone(), model.b.grad.clone()
        size = (gW.square().sum() + gb.square().sum()).sqrt() if kind == "normalised" else 1
        dW, db = (gW.sign(), gb.sign()) if kind == "sign" else (gW / size, gb / size)
        mW, mb = 0.9 * mW + dW, 0.9 * mb + db
        W, b = W - 0.1 * mW, b - 0.1 * mb
        rule.step()
        torch.testing.assert_close(model.W, W)
        torch.testing.assert_close(model.b, b)


def test_the_quadratic_follows_its_closed_form_and_the_rates_the_theory():
    for row in toy.quadratic(None).rows:
        assert row["GD"] == pytest.approx(row["GD_closed_form"], abs=1e-12)
        assert row["sign"] == pytest.approx(0, abs=1 / 200 + 1e-9)  # 200 steps of 1 / 200 from 1
    rows = toy.rates(None).rows
    assert all(row["gd_loss_times_pi_t"] == pytest.approx(1, abs=0.1) for row in rows)
    assert len({round(row["sign_rate"], 2) for row in rows}) == 1


def test_rank_correlation_and_the_search():
    x = torch.tensor([3.0, 1.0, 2.0, 10.0])
    assert toy.rank_correlation(x, x.exp()) == pytest.approx(1) and toy.rank_correlation(x, -x) == pytest.approx(-1)
    group = torch.tensor([0, 1, 1, 1])  # group 1 is one point, thrice: with group 0, a line
    x, y = torch.tensor([1.0, 5, 5, 5]), torch.tensor([3.0, 2, 2, 2])
    assert toy.log_correlation(x, x**2, group) == pytest.approx(1) and toy.log_correlation(x, y, group) == pytest.approx(-1)
    x, y = torch.tensor([1.0, 2, 1, 2]).exp(), torch.tensor([1.0, 1, 2, 2]).exp()
    assert toy.log_correlation(x, y, torch.tensor([0, 1, 2, 3])) == pytest.approx(0, abs=1e-6)
    heavy = toy.log_correlation(x, y, torch.tensor([0, 1, 1, 2]))  # weights 1, 1/2, 1/2, 1: cov 1/12, variances 1/4
    assert heavy == pytest.approx(1 / 3)
    rule, start = toy.RULES["GD"]

    def make():
        return toy.Softmax(*toy.softmax_data(3))
    best, _, total, _ = toy.best_step("GD", make, rule, start, 30)
    assert toy.best_step("GD", make, rule, 1e4, 30)[0] == best  # from where all diverge, too
    at = {lr: toy.descend(make(), rule, lr, 30)[0][-1] for lr in [best, *toy.below(toy.LADDER, best), *toy.above(toy.LADDER, best)]}
    assert min(at, key=at.get) == best and at[best] == total[-1] and toy.descend(make(), rule, 1e4, 30)[0][-1] == math.inf


def test_the_pages_of_a_small_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = SimpleNamespace(m=3, steps=8, device="cpu")
    for name in ("softmax", "hessian", "reweighted"):
        page = toy.ARTEFACTS[name](args)
        toy.write(tmp_path / name, page, page.caption, "here", "test")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") and len(page.rows) >= 10
