"""Heavy-tailed class imbalance on small problems (Kunstner et al. 2024, arXiv 2402.19449).

    python -m experiments.heavy_tails                             # all but large: two minutes
    python -m experiments.heavy_tails large --steps=50            # the paper's size: 1.5 hours
    python -m experiments.heavy_tails softmax --m=11 --steps=1000 # with the search, for a GPU

quadratic, rates: two problems with known solutions. softmax: the loss by class frequency under ten
optimizers; reweighted: with rare classes weighted up; hessian: its gradient and Hessian. large:
softmax at the paper's size and step sizes, which resumes where it was stopped. Each writes
results/toy/NAME.md, .json and .png. Images are in images.py.
"""
import argparse
import math
import os
import shlex
import sys
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.optim import SGD, Adam

from checkpoint import git_commit, hardware, replace
from experiments.sweep import LR_GRID, ExperimentResult, markdown_table, write_page
from loader import UserError, access
from optim import ClippedSGD
from train import default_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = default_dtype(torch.device(DEVICE)) == "bfloat16"  # elsewhere it is slower than fp32
COLORS = ("#bbbbbb", "#0072b2", "#d55e00", "#000000", "#009e73", "#e69f00", "#cc79a7")


# ---- full-batch training ----

def clipped_sgd(params, lr, update_clip=None):
    """SGD-LL (Glentis et al. 2026). The rows of the output layer's momentum are clipped to 1e-3."""
    *others, output, bias = params
    groups = [{"params": [output], "token_clip": 1e-3}, {"params": [*others, bias]}]
    return ClippedSGD(groups, lr, update_clip=update_clip)


# name: direction, optimizer, and where the search for the step size starts with m = 11: the
# paper's step sizes, those of the last two ours
OPTIMIZERS = {
    "GD": ("gradient", SGD, 10**-2.5),
    "GD, momentum": ("gradient", partial(SGD, momentum=0.9), 10**-3),
    "normalized GD": ("normalized", SGD, 10**-1),
    "normalized GD, momentum": ("normalized", partial(SGD, momentum=0.9), 10**-1.5),
    "sign descent": ("sign", SGD, 10**-5),
    "sign descent, momentum": ("sign", partial(SGD, momentum=0.9), 10**-5),
    "Adam, beta1 = 0": ("gradient", partial(Adam, betas=(0.0, 0.999)), 10**-4),
    "Adam": ("gradient", partial(Adam, betas=(0.9, 0.999)), 10**-3.5),
    "SGD, token clip": ("gradient", clipped_sgd, 10**0.5),
    # at a learning rate of 100 the update clip binds, so that it is the step size
    "clipped SGD": ("gradient", lambda params, clip: clipped_sgd(params, 100.0, clip), 1e-4),
}


class Problem:
    """A network and all of its data: inputs X [n, ...], labels int64 [n], and the frequency group
    of each class, int64 [classes], 0 the most frequent. Samples have weights pi^-weighting, where
    pi is the frequency of their class. `chunk` of them are in a forward pass, in bf16 or fp32."""

    def __init__(self, net, X, labels, group, weighting=0.0, chunk=10**6, bf16=False):
        self.net, self.X, self.labels, self.group = net, X, labels, group
        self.weights = labels.bincount().float()[labels] ** -weighting
        self.chunk, self.bf16 = chunk, bf16

    def backward(self, rows=slice(None)):
        """Set the gradients of the weighted mean loss of these samples. Returns the loss of each,
        nats, and whether it is classified correctly."""
        self.net.zero_grad()
        losses, correct = [], []
        X, labels, weights = self.X[rows], self.labels[rows], self.weights[rows]
        data = X, labels, weights / weights.sum()
        for x, y, weights in zip(*[t.split(self.chunk) for t in data]):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16):
                logits = self.net(x).float()
            loss = nn.functional.cross_entropy(logits, y, reduction="none")
            (loss * weights).sum().backward()
            losses.append(loss.detach())
            correct.append(logits.argmax(1) == y)
        return torch.cat(losses), torch.cat(correct)


def make_optimizer(problem, name, step_size):
    return OPTIMIZERS[name][1](list(problem.net.parameters()), step_size)


def take_step(problem, name, optimizer):
    direction, grads = OPTIMIZERS[name][0], [p.grad for p in problem.net.parameters()]
    if direction == "normalized":  # by one norm over all parameters
        torch._foreach_div_(grads, nn.utils.get_total_norm(grads))
    if direction == "sign":
        torch._foreach_sign_(grads)
    optimizer.step()


def descend(problem, name, optimizer):
    """Yield the loss of each sample [n], nats, before each step, until the run diverges: its mean
    exceeds twice the loss of a uniform guess. (Some runs would go on to 0: linear softmax
    regression with more inputs than samples is solved at almost any step size.)"""
    while (losses := problem.backward()[0]).mean() < 2 * math.log(len(problem.group)):
        yield losses
        take_step(problem, name, optimizer)


def train(problem, name, step_size, steps, path=None):
    """Returns the mean loss of all samples [steps + 1] and of each group [steps + 1, groups], nats,
    infinite once the run diverged. With a path the run is saved every 25 steps, and continues."""
    optimizer = make_optimizer(problem, name, step_size)
    group, history = problem.group[problem.labels], []  # of every step: the mean, the groups
    if path and path.exists():
        history = load(path, problem.net, optimizer)
    if len(history) <= steps:
        for losses in descend(problem, name, optimizer):
            if path and history and (len(history) % 25 == 0 or len(history) == steps):
                save(path, problem.net, optimizer, history)
            by_group = (group.bincount(losses) / group.bincount()).tolist()
            history.append([losses.mean().item(), *by_group])
            if len(history) > steps:
                break
    diverged = [[math.inf] * (1 + int(group.max() + 1))] * (steps + 1 - len(history))
    table = torch.tensor(history[:steps + 1] + diverged)
    return table[:, 0], table[:, 1:]


def save(path, net, optimizer, history):
    """A checkpoint of a run, whole or not at all."""
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
    with access("write", path):
        path.parent.mkdir(exist_ok=True)
    replace(path, lambda f: torch.save(state, f), f".{os.getpid()}.tmp")  # two may be at work
    print(f"{path}: {len(history)} steps, {time.strftime('%H:%M:%S')}", flush=True)


def load(path, net, optimizer):
    try:
        state = torch.load(path, map_location=DEVICE, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        return state["history"]
    except Exception as e:  # a torn or foreign file fails in many ways
        raise UserError(f"{path} is damaged or another run's ({type(e).__name__}): move it to "
                        "another folder, and the run starts again") from None


def tune(train, name, start):
    """train(step_size) at the step size of LR_GRID next to `start`, lower while that diverges, then
    at the better neighbour. Returns the best step size and what train() returned for it, of which
    the first is the losses."""
    @cache
    def run(i):
        return train(LR_GRID[i])

    def final_loss(i):
        return run(i)[0][-1].item()

    best = min(range(len(LR_GRID)), key=lambda i: abs(math.log(LR_GRID[i] / start)))
    while final_loss(best) == math.inf and best > 0:
        best -= 1
    tried = None
    while tried != best:
        tried = best
        best = min((best, max(best - 1, 0), min(best + 1, len(LR_GRID) - 1)), key=final_loss)
    print(f"{name}: step size {LR_GRID[best]:.3g}, loss {final_loss(best):.4f}", flush=True)
    return LR_GRID[best], *run(best)


def page(title, caption, rows, draw, panels):
    """A page with a table of the rows, dicts with the same keys; infinite: the run diverged."""
    cells = [["diverged" if x in (math.inf, -math.inf) else
              f"{x:.4f}" if isinstance(x, float) and key != "step size" else str(x)
              for key, x in row.items()] for row in rows]
    rows = [{key: None if x in (math.inf, -math.inf) else x for key, x in row.items()}
            for row in rows]
    table = markdown_table(list(rows[0]), cells)
    return ExperimentResult(title, table, rows, [], caption, draw, panels)


def line_page(title, caption, rows, panels, columns, shape, **settings):
    """A page with a picture of columns {label: index} of panels {title: [steps + 1, n]}."""
    def draw(axes):
        for ax, (name, y) in zip(axes.flat, panels.items()):
            ax.sharey(axes.flat[0])
            for color, (label, i) in zip(COLORS, columns.items()):
                ax.plot(y[:, i], color=color, label=label)
            ax.set(title=name, xlabel="step", **settings)
            ax.set_xscale("log" if len(y) > 10_000 else "linear")
            ax.label_outer()
    return page(title, caption, rows, draw, shape)


# ---- problems with known solutions ----

def frequencies(c):
    """pi_k proportional to 1/k, float64 [c]."""
    pi = 1 / torch.arange(1, c + 1, dtype=torch.float64)
    return pi / pi.sum()


def quadratic(steps):
    """GD at 1 / pi_max and sign descent at 1 / steps [ours]."""
    pi = frequencies(1000)
    lr = 1 / pi.max()
    columns = {f"k = {k}": k - 1 for k in (1, 3, 10, 30, 100, 300, 1000)}
    gd, sign = [torch.ones_like(pi)], [torch.ones_like(pi)]
    for _ in range(steps):
        gd.append(gd[-1] - lr * pi * gd[-1])
        sign.append(sign[-1] - sign[-1].sign() / steps)
    rows = [{"coordinate k": i + 1, "GD: w_k": gd[-1][i].item(),
             "GD: (1 - lr pi_k)^t": ((1 - lr * pi[i]) ** steps).item(),
             "sign descent: abs(w_k)": sign[-1][i].abs().item()} for i in columns.values()]
    caption = (
        f"f(w) = sum_k pi_k w_k^2 / 2 with pi_k ~ 1/k, {len(pi)} coordinates, {steps} steps from "
        "w = 1. Kunstner et al. 2024: GD contracts coordinate k by 1 - lr pi_k per step; the step "
        "of sign descent does not depend on pi, so that all of its lines coincide.")
    paths = {"GD": torch.stack(gd), "sign descent": torch.stack(sign)}
    return line_page("GD and sign descent on a weighted quadratic", caption, rows, paths, columns,
                     (1, 2), ylabel="w_k (1 at the start)")


def rates():
    """Softmax regression from W = 0, where the one input of class k is e_k."""
    pi, one_hot = frequencies(100), torch.eye(100, dtype=torch.float64)
    columns = {f"k = {k}": k - 1 for k in (1, 3, 10, 30, 100)}
    paths, rows = {}, []
    for name, step_size, steps in (("GD", 1.0, 60_000), ("sign descent", 1e-2, 1_000)):
        W, losses = torch.zeros_like(one_hot), []
        for _ in range(steps + 1):
            log_p = W.log_softmax(1)
            losses.append(-log_p.diagonal())
            gradient = pi[:, None] * (log_p.exp() - one_hot)
            W -= step_size * (gradient if name == "GD" else gradient.sign())
        paths[name] = torch.stack(losses)
    for i in columns.values():
        gd, sign = paths["GD"][:, i], paths["sign descent"][:, i]
        # slopes of log loss against log t and t, where the loss is below 0.1
        late, end = torch.nonzero(gd < 0.1)[:, 0], torch.nonzero(sign < 0.1)[:, 0]
        exponent, _ = np.polyfit(late.log(), gd[late].log(), 1)
        rate, _ = np.polyfit(1e-2 * end, sign[end].log(), 1)
        rows.append({"class k": i + 1, "pi_k": pi[i].item(),
                     "GD: exponent of t where the loss is below 0.1 (theory: -1)": exponent,
                     "GD: loss x pi_k t at the end": (gd[-1] * pi[i] * 60_000).item(),
                     "sign descent: c in exp(-c t), t in step sizes (theory: all equal)": -rate})
    caption = (
        f"The rates of the theory: {len(pi)} classes, pi_k ~ 1/k, one input per class. Kunstner et "
        "al. 2024: the loss of class k falls as 1/(pi_k t) under gradient flow and as exp(-c t) "
        "under sign flow, with one c for all classes, so that all of its lines coincide.")
    return line_page("GD and sign descent: rates by class", caption, rows, paths, columns, (1, 2),
                     ylabel="loss (nats)", yscale="log")


# ---- linear softmax regression ----

@cache
def softmax_data(m):
    """Group i = 0 ... m-1 has 2^i classes of 2^(m-i) samples (section 3). Returns inputs X [n, d]
    ~ U[0, 1], independent of the labels [n], and the group of each class [c]; n = m 2^m,
    d = (m+1) 2^m, c = 2^m - 1 (the paper's text says 2^(m+1) - 1)."""
    group = torch.cat([torch.full((2**i,), i) for i in range(m)])
    labels = torch.arange(len(group)).repeat_interleave(2 ** (m - group))
    X = torch.rand(m * 2**m, (m + 1) * 2**m, generator=torch.Generator().manual_seed(0))
    return X.to(DEVICE), labels.to(DEVICE), group.to(DEVICE)


def softmax_problem(m, weighting=0.0):
    X, labels, group = softmax_data(m)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(X.shape[1], len(group))).to(DEVICE)
    return Problem(net, X, labels, group, weighting)


def paper_step_size(name, m):
    return OPTIMIZERS[name][2] * 12 * 2**11 / ((m + 1) * 2**m)  # half the inputs, twice the step


@cache
def solve(name, m, steps, weighting=0.0):
    """Softmax regression at the optimizer's best step size, as tune() returns it."""
    def run(step_size):
        return train(softmax_problem(m, weighting), name, step_size, steps)
    return tune(run, name, paper_step_size(name, m))


def softmax_page(title, caption, m, runs, shown,
                 step_sizes="the best step size of a grid in factors of sqrt(10)"):
    """The page of runs {name: what tune() returns}; the picture has a panel for each of the three
    or six in `shown`."""
    groups = {f"most frequent class, {2**m} samples": 0, "4 samples per class": m - 2,
              "rarest group, 2 samples per class": m - 1}
    rows, panels = [], {}
    for name, (step_size, losses, by_group) in runs.items():
        rows.append({"method": name, "step size": step_size, "loss": losses[-1].item(),
                     **{label: by_group[-1, i].item() for label, i in groups.items()},
                     "decrease of the rarest": (1 - by_group[-1, -1] / by_group[0, -1]).item()})
        if name in shown:
            panels[f"{name}, step size {step_size:.3g}"] = by_group
    caption = (
        f"Linear softmax regression, 2^i classes of 2^(m-i) samples for i = 0 ... m-1, m = {m}. "
        f"{caption} One run of {len(losses) - 1} full-batch steps per row, at {step_sizes}. A loss "
        "above twice that of a uniform guess counts as diverged. Runs that oscillate amplify "
        "rounding errors: their numbers change with the processor and the number of threads.")
    return line_page(title, caption, rows, panels, groups, (len(panels) // 3, 3),
                     ylabel="loss (nats)", ylim=(0, 1.3 * by_group[0].max().item()))


def softmax(m, steps):
    runs = {name: solve(name, m, steps) for name in OPTIMIZERS}
    shown = ("GD", "normalized GD", "sign descent", "Adam", "SGD, token clip", "clipped SGD")
    caption = (
        "Kunstner et al. 2024: GD and normalized GD hardly learn the rare classes, sign descent "
        "and Adam learn all alike. Not in that paper: clipped SGD (SGD-LL), and its row-wise "
        "clipping of the output layer's momentum (token clip) alone.")
    return softmax_page("Softmax regression: loss by class frequency", caption, m, runs, shown)


def large(m, steps):
    """Three methods at the paper's step sizes. runs/large-*.pt are checkpoints: the same command,
    also with more steps, continues from them."""
    runs = {}
    for name in ("GD", "sign descent", "Adam"):
        problem = softmax_problem(m)
        problem.chunk, problem.bf16 = 4096, BF16
        if BF16:
            problem.X = problem.X.bfloat16()
        step_size = paper_step_size(name, m)
        path = Path(f"runs/large-m{m}-{name.replace(' ', '-')}-{step_size:.3g}"
                    f"{'-bf16' * BF16}.pt")
        runs[name] = step_size, *train(problem, name, step_size, steps, path)
    caption = (
        "Kunstner et al. 2024 (m = 11, 1,000 steps): GD hardly learns the rare classes, sign "
        f"descent and Adam learn all alike. Matrix products in {'bfloat16' if BF16 else 'fp32'}, "
        "weights in fp32.")
    return softmax_page("Softmax regression at the paper's step sizes", caption, m, runs,
                        tuple(runs), "the paper's step size for m = 11, without a search")


def reweighted(m, steps):
    runs = {name + label: solve(name, m, steps, weighting)
            for name in ("GD", "GD, momentum", "Adam, beta1 = 0", "Adam", "clipped SGD")
            for label, weighting in (("", 0.0), (", 1/sqrt(pi)", 0.5), (", 1/pi", 1.0))}
    shown = ("GD", "GD, 1/sqrt(pi)", "GD, 1/pi", "Adam", "Adam, 1/sqrt(pi)", "Adam, 1/pi")
    caption = (
        "Where it says so, samples are weighted by the frequency pi of their class; the losses "
        "shown are unweighted. Kunstner et al. 2024: 1/sqrt(pi) always helps GD, 1/pi sometimes.")
    return softmax_page("Softmax regression with reweighted losses", caption, m, runs, shown)


def class_curvature(problem, sign=1):
    """At `sign` times the weights, for the plain mean loss: the gradient norm of the row w_c of
    each class [c], and the traces of the Hessian's blocks (w_c, w_c') [c, c], which are the mean
    over the samples of p_nc (1[c = c'] - p_nc') ||x_n||^2."""
    X = problem.X
    with torch.no_grad():
        p = (sign * problem.net(X)).softmax(1)
    gradient = (p - nn.functional.one_hot(problem.labels)).T @ X / len(X)
    squares = X.square().sum(1)
    blocks = (-(p.T * squares) @ p).diagonal_scatter((p * (1 - p)).T @ squares) / len(X)
    return gradient.norm(dim=1).cpu(), blocks.cpu()


def correlation(x, y, weights=None):
    (xx, xy), (_, yy) = torch.cov(torch.stack([x, y]).double(), aweights=weights).tolist()
    return xy / math.sqrt(xx * yy)


def hessian(m, steps):
    group = softmax_data(m)[2].cpu()
    equal_groups = 1 / group.bincount().double()[group]
    some = torch.linspace(0, len(group) - 1, 40).round().long().unique()  # classes
    diagonal = torch.eye(len(some), dtype=torch.bool)
    rows, dots = [], {}
    for name in ("Adam", "GD"):
        step_size = solve(name, m, steps)[0]
        problem = softmax_problem(m)
        optimizer = make_optimizer(problem, name, step_size)
        for t, _ in zip(range(101), descend(problem, name, optimizer)):
            if t in (0, 1, 5, 10, 50, 100):
                row = {"path": name, "step size": step_size, "t": t}
                for at, sign in (("W", 1), ("-W", -1)):
                    norms, blocks = class_curvature(problem, sign)
                    x, y = norms.log(), blocks.diagonal().log()
                    row[f"log correlation at {at}, groups alike"] = correlation(x, y, equal_groups)
                    row[f"rank correlation at {at}, classes alike"] = correlation(
                        x.argsort().argsort(), y.argsort().argsort())
                norms, blocks = class_curvature(problem)
                if t in (0, 10, 100):
                    dots[f"{name}, t = {t}"] = norms, blocks.diagonal()
                blocks = blocks[some][:, some].abs()
                ratio = blocks[diagonal].median() / blocks[~diagonal].median()
                rows.append({**row, "diagonal / off-diagonal blocks": round(ratio.item())})

    def draw(axes):
        for ax, (title, (x, y)) in zip(axes.flat, dots.items()):
            ax.sharex(axes[0, 0])
            ax.sharey(axes[0, 0])
            points = ax.scatter(x, y, c=group, s=8, cmap="viridis")
            ax.set(xscale="log", yscale="log", title=title,
                   xlabel="gradient norm of the class", ylabel="trace of its Hessian block")
            ax.label_outer()
        points.figure.colorbar(points, ax=axes, label="group of classes, 0 the most frequent")

    caption = (
        f"Gradient against Hessian of each class, softmax regression, m = {m}, along one run each. "
        "Kunstner et al. 2024: unrelated at the start, strongly correlated later, negatively at "
        "-W. The correlation of the logs gives all groups of classes the same weight [ours]. "
        f"Blocks: median trace on the diagonal over the median size off it, {len(some)} classes. "
        "GD oscillates, which amplifies rounding errors: its later numbers change with the "
        "processor.")
    return page("Gradient norm against Hessian trace, by class", caption, rows, draw, (2, 3))


# each with the settings it has and their defaults; other values are in the page's name
EXPERIMENTS = {
    "quadratic": partial(quadratic, steps=200), "rates": partial(rates),
    "softmax": partial(softmax, m=7, steps=200), "hessian": partial(hessian, m=7, steps=200),
    "reweighted": partial(reweighted, m=7, steps=200), "large": partial(large, m=11, steps=300)}


def at_least(low):
    """The function by which argparse reads a whole number."""
    def convert(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}")
        return int(text)
    convert.__name__ = "whole number"
    return convert


SETTINGS = {"m": {"type": int, "choices": range(3, 13), "help": "groups [7, large 11]"},
            "steps": {"type": at_least(1), "help": "[200, large 300]"}}


def main(module="heavy_tails", about=__doc__, experiments=EXPERIMENTS, default="all but large",
         settings=SETTINGS, folder="toy"):
    """The command line of this file, and of images.py."""
    parser = argparse.ArgumentParser(
        f"{module}.py", usage=argparse.SUPPRESS, description=about, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"default: {default}")
    for name, options in settings.items():
        parser.add_argument(f"--{name}", **options)
    given = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    names = given.pop("names") or [name for name in experiments if name != "large"]
    for name in set(names) - set(experiments):
        parser.error(f"no experiment {name}: choose from {', '.join(experiments)}")
    for key in given:
        if without := [name for name in names if key not in experiments[name].keywords]:
            parser.error(f"--{key} does nothing for {', '.join(without)}")
    torch.set_flush_denormal(True)  # probabilities below 1e-38 are slow, and nothing here
    commit = git_commit()
    for name in names:
        began = time.perf_counter()
        try:
            result = experiments[name](**given)
            source = (f"{hardware(DEVICE)}; torch {torch.__version__}; "
                      f"{time.strftime('%Y-%m-%d')}; commit {commit}; "
                      f"{time.perf_counter() - began:.0f} s")
            defaults = experiments[name].keywords
            changed = {k: v for k, v in given.items() if v != defaults[k]}
            words = ["python", "-m", f"experiments.{module}", name,
                     *(f"--{k}={v}" for k, v in changed.items())]
            stem = name + "".join(f"-{k}{Path(str(v)).name}" for k, v in changed.items()
                                  if k != "data" or v.name != defaults[k].name)
            write_page(Path("results", folder, stem), result, result.caption, source,
                       shlex.join(words))
        except UserError as e:
            parser.exit(1, f"{name}: {e}\n")
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
