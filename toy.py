"""Why Adam beats gradient descent where classes are imbalanced, on models small enough to see it (arXiv 2402.19449).

    python toy.py softmax        # or `make toy`, all five: linear softmax regression, loss by frequency of the class
    python toy.py reweighted     # the same with the rare classes' losses weighted up
    python toy.py hessian        # the gradient against the Hessian, class by class
    python toy.py quadratic      # the weighted quadratic, against its closed form
    python toy.py rates          # the two rates of the theory
    python toy.py softmax --m=11 # the paper's size (2.1 GiB of inputs); for a GPU

Everything is full batch and deterministic. The question that is new here: does clipping the rows of the gradient do to
rare classes what sign descent does? Each writes results/toy/NAME.md, .json and .png.
"""
import argparse
import copy
import functools
import math
import time
from pathlib import Path

import torch

import optim
from run import hardware
from sweep import LADDER, Page, above, agree, below, markdown, number, write

SEED = 0


# ---- the data -------------------------------------------------------------------------------------------------------

@functools.cache
def softmax_data(m, device="cpu", seed=SEED):
    """Balanced inputs, imbalanced classes: group i = 0 ... m-1 has 2^i classes of 2^(m-i) samples each.

    Returns X [n, d] ~ U[0, 1], labels [n] int64 independent of X, and the group of each class [c] int64, with
    n = m 2^m, d = (m+1) 2^m, c = 2^m - 1 (section 3 and appendix; its text says 2^(m+1) - 1 classes).
    """
    group = torch.cat([torch.full((2**i,), i) for i in range(m)])
    labels = torch.arange(len(group)).repeat_interleave(2 ** (m - group))
    X = torch.rand(m * 2**m, (m + 1) * 2**m, generator=torch.Generator().manual_seed(seed))
    return X.to(device), labels.to(device), group.to(device)


class Softmax:
    """Linear softmax regression on all of the data at once: W [c, d], a row a class, and b [c].

    PyTorch's default initial weights for a Linear. `weighting`: exponent a of the weights pi_c^-a of the samples'
    losses, normalised to a sum of 1; 0 is the plain mean.
    """

    def __init__(self, X, labels, group, weighting=0.0):
        n, d = X.shape
        self.X, self.labels, self.group, self.classes = X, labels, group, len(group)
        bound, draw = d**-0.5, torch.Generator().manual_seed(SEED)
        self.W = torch.empty(len(group), d).uniform_(-bound, bound, generator=draw).to(X.device)
        self.b = torch.empty(len(group)).uniform_(-bound, bound, generator=draw).to(X.device)
        weights = torch.bincount(labels).float()[labels] ** -weighting
        self.weights = weights / weights.sum()

    def parameters(self):
        """The tensors to train, the one with a row a class first."""
        return [self.W, self.b]

    def look(self):
        """Loss of every sample [n], and the probabilities [n, c]."""
        logits = torch.addmm(self.b, self.X, self.W.T)
        norm = logits.logsumexp(1, keepdim=True)
        return (norm.squeeze(1) - logits.gather(1, self.labels[:, None]).squeeze(1)), (logits - norm).exp()

    def gradients(self):
        """Sets W.grad and b.grad; returns the losses of the samples [n]."""
        losses, g = self.look()
        g[torch.arange(len(g)), self.labels] -= 1
        g *= self.weights[:, None]
        self.W.grad, self.b.grad = g.T @ self.X, g.sum(0)
        return losses

    def by_group(self, losses):
        """The mean loss of the samples of each group [m]."""
        which = self.group[self.labels]
        return (which.bincount(losses) / which.bincount()).float().cpu()

    def hessian_traces(self, p):
        """Trace of the diagonal Hessian block of each class's row, [c]: mean over n of p_nc (1 - p_nc) ||x_n||^2."""
        return ((p * (1 - p)).T @ self.X.square().sum(1)) / len(self.X)

    def hessian_block_traces(self, p, classes):
        """Traces of the blocks between pairs of `classes`: mean over n of p_nc (1[c = c'] - p_nc') ||x_n||^2."""
        q = p[:, classes]
        both = -(q * self.X.square().sum(1, keepdim=True)).T @ q / len(self.X)
        return both.diagonal_scatter(self.hessian_traces(p)[classes])


# ---- the rules ------------------------------------------------------------------------------------------------------

class Direction(torch.optim.SGD):
    """Heavy-ball descent along g, g / ||g||_2 (one norm over all tensors) or sign(g): m <- 0.9 m + d, w <- w - lr m."""

    def __init__(self, params, lr, momentum, kind):
        super().__init__(params, lr, momentum)
        self.kind = kind

    def step(self):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        if self.kind == "normalised":
            torch._foreach_div_(grads, torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
        if self.kind == "sign":
            torch._foreach_sign_(grads)
        super().step()


def direction(kind, momentum):
    return lambda model, lr: Direction(model.parameters(), lr, momentum, kind)


def adam(beta1):
    return lambda model, lr: torch.optim.Adam(model.parameters(), lr, (beta1, 0.999), eps=1e-8)


def token_clipped(model, lr, update_clip=None):
    head, *rest = model.parameters()
    return optim.ClippedSGD([{"params": [head], "token_clip": 1e-3}, {"params": rest}], lr, update_clip=update_clip)


def clipped(model, size):
    """At the paper's lr of 100 the update clip binds: it is the step size."""
    return token_clipped(model, 100.0, size)


# The paper's step sizes at m = 11 and 1,000 steps, those of the last two ours.
RULES = {
    "GD": (direction("plain", 0), 10**-2.5), "GD, momentum": (direction("plain", 0.9), 10**-3),
    "normalised GD": (direction("normalised", 0), 10**-1), "normalised GD, momentum": (
        direction("normalised", 0.9), 10**-1.5),
    "sign": (direction("sign", 0), 10**-5), "sign, momentum": (direction("sign", 0.9), 10**-5),
    "Adam, beta1 0": (adam(0.0), 10**-4), "Adam": (adam(0.9), 10**-3.5),
    "SGD, token clip": (token_clipped, 10**0.5), "clipped SGD": (clipped, 10**-4),
}
WEIGHTED = {  # the paper's with weighted losses, at m = 11 and 500 steps
    0.5: {"GD": 10**-1.5, "GD, momentum": 10**-2, "Adam, beta1 0": 10**-4.5, "Adam": 10**-4},
    1.0: {"GD": 10**-0.5, "GD, momentum": 10**0, "Adam, beta1 0": 10**-4, "Adam": 10**-4},
}


def descend(model, rule, lr, steps, looks=()):
    """Run a rule from the model's start. Returns the mean loss [steps + 1] and the groups' [len(looks), m] at the steps
    of `looks`; from the step on where it left twice the loss of a uniform guess (as train.py) infinite losses, and
    nan for the groups."""
    optimizer, total, groups = rule(model, lr), [], []
    for step in range(steps + 1):
        losses = model.gradients()
        total.append(losses.mean().item())
        if not total[-1] < 2 * math.log(model.classes):
            gone = [torch.full_like(model.by_group(losses), math.nan)] * (len(looks) - len(groups))
            return total[:-1] + [math.inf] * (steps + 1 - step), groups + gone
        if step in looks:
            groups.append(model.by_group(losses))
        if step < steps:
            optimizer.step()
    return total, groups


def best_step(name, make, rule, start, steps, looks=(), search=True):
    """The best step size of the ladder by the final loss, found from `start`: both neighbours of it are worse. Or
    `start` itself, without a search. make() is a model at its start, with parameters(), gradients(), by_group() and
    `classes` as Softmax has them. Says what it found; returns the step size, the model at its end, the mean losses
    [steps + 1] and the groups' [len(looks), m]."""
    known = {}

    def final(lr):
        if lr not in known:
            model = make()
            known[lr] = model, *descend(model, rule, lr, steps, looks)
        return known[lr][1][-1]
    best = min(LADDER, key=lambda lr: abs(math.log(lr / start))) if search else start
    while search and final(best) == math.inf and below(LADDER, best):
        best, = below(LADDER, best)
    while search and final(near := min(below(LADDER, best) + above(LADDER, best), key=final)) < final(best):
        best = near
    print(f"{name}: step size {best:.3g}, loss {final(best):.4f}", flush=True)
    model, total, groups = known[best]
    return best, model, total, torch.stack(groups) if groups else None


def finite(x):
    """For JSON, which has no infinity."""
    return x if math.isfinite(x) else None


def log_steps(steps, n=40):
    return sorted({0, steps, *(round(steps ** (i / n)) for i in range(n + 1))})


# ---- artefacts ------------------------------------------------------------------------------------------------------

@functools.cache
def solve(m, steps, name, weighting, device):
    """A rule at its best step size: that, the mean losses [steps + 1], the groups' [looks, m] at log_steps(steps)."""
    rule, start = RULES[name]
    start = WEIGHTED.get(weighting, {}).get(name, start)
    search = m != 11 or name in list(RULES)[-2:]
    fewer = 12 * 2**11 / ((m + 1) * 2**m)  # inputs than at m = 11, so that steps can be as many times longer
    lr, _, total, groups = best_step(name, lambda: Softmax(*softmax_data(m, device), weighting), rule, start * fewer,
                                     steps, log_steps(steps), search)
    return lr, total, groups


def step_sizes(papers):
    """For a caption: where the step sizes come from, those of clipped SGD always from a search."""
    return "the paper's step sizes (those with clips: the best of a grid)" if papers else \
        "the best step size of a grid in steps of sqrt(10)"


def softmax(args):
    found, looks = {name: solve(args.m, args.steps, name, 0.0, args.device) for name in RULES}, log_steps(args.steps)
    first, last = 0, args.m - 1
    lines, rows, fall = [], [], {}
    for name, (lr, total, groups) in found.items():
        start, end = groups[0], groups[-1]
        fall[name] = (1 - end[last] / start[last]).item()
        rows.append({"method": name, "step_size": lr, "loss": finite(total[-1]), "groups_at_start": start.tolist(),
                     "groups": list(map(finite, end.tolist()))})
        lines.append((name, f"{lr:.3g}", f"{total[-1]:.3f}", f"{end[first]:.3f}", f"{end[last - 1]:.3f}",
                      f"{end[last]:.3f}", f"{fall[name]:.0%}"))
    table = markdown(("method", "step size", "loss", "most frequent class", "second rarest group", "rarest group",
                      "fall of the rarest"), lines)

    def draw(axes):
        for each, (name, (lr, total, groups)) in zip(axes.flat, found.items()):
            for i in range(args.m):
                each.plot([t + 1 for t in looks], groups[:, i], color=str(0.8 * i / (args.m - 1)),
                          label=f"{2**(args.m - i)} samples a class")
            each.plot(range(1, len(total) + 1), total, "--", color="#d55e00", label="all")
            each.set(xscale="log", title=f"{name}, {lr:.3g}", xlabel="step + 1", ylim=(0, 1.3 * total[0]))
        axes[0, 0].set_ylabel("loss (nats)")
        axes[1, 0].set_ylabel("loss (nats)")
        axes[0, 0].figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8,
                                 fontsize=7)
    slow, fast = max(fall["GD"], fall["normalised GD"]), min(fall["sign"], fall["Adam"])
    return Page(table, rows, [], f"Softmax regression with 2^i classes of 2^(m-i) samples, m = {args.m}: loss by "
                f"frequency of the class (panels are cut at the top), {args.steps} full-batch steps at "
                f"{step_sizes(args.m == 11)}, one run each. Paper B: GD and normalised GD barely move the rare "
                f"classes, sign descent and Adam move all. Here the loss of the rarest group falls by at most "
                f"{slow:.0%} and by at least {fast:.0%}: {agree(slow < 0.5 < fast)}; but by "
                f"{fall['GD, momentum']:.0%} and {fall['normalised GD, momentum']:.0%} with momentum. SGD with the "
                f"token clip alone, which the paper does not have: {fall['SGD, token clip']:.0%}.", draw, (2, 5))


def reweighted(args):
    names = ("GD", "GD, momentum", "Adam, beta1 0", "Adam", "clipped SGD")
    found = {label: {name: solve(args.m, args.steps, name, a, args.device) for name in names}
             for label, a in (("plain", 0.0), ("1/sqrt(pi)", 0.5), ("1/pi", 1.0))}
    rows = [{"method": name, "weights": label, "step_size": lr, "loss": finite(total[-1]),
             "groups": list(map(finite, groups[-1].tolist()))}
            for label, some in found.items() for name, (lr, total, groups) in some.items()]
    table = markdown(("method", *(f"{label}: loss, rarest group" for label in found)),
                     [(name, *(f"{some[name][1][-1]:.3f}, {some[name][2][-1][-1]:.3f}" for some in found.values()))
                      for name in names])

    def draw(axes):
        for each, (label, some) in zip(axes, found.items()):
            for (name, (lr, total, _)), dash, color in zip(some.items(), (":", "--", "-.", "-", "-"),
                                                           ("#e69f00", "#d55e00", "#999999", "#000000", "#0072b2")):
                each.plot(range(1, len(total) + 1), total, dash, color=color, label=f"{name}, {lr:.3g}")
            each.set(xscale="log", xlabel="step + 1", title=f"weights {label}")
            each.legend(fontsize=7)
        axes[0].set_ylabel("unweighted loss (nats)")
    gd = {label: [some[name][1][-1] for name in names[:2]] for label, some in found.items()}
    helps = {label: all(a < b for a, b in zip(gd[label], gd["plain"])) for label in gd}
    return Page(table, rows, [], f"Softmax regression, m = {args.m}, {args.steps} steps, one run each: losses weighted "
                f"by the class's frequency pi, at {step_sizes(args.m == 11)} for the unweighted loss, which is what "
                "is shown. Paper B: 1/sqrt(pi) always helps GD, 1/pi helps or not. Here 1/sqrt(pi) "
                f"{'helps' if helps['1/sqrt(pi)'] else 'does not always help'} GD with and without momentum "
                f"({agree(helps['1/sqrt(pi)'])}), 1/pi {'helps' if helps['1/pi'] else 'does not always help'} too.",
                draw, (1, 3))


def rank_correlation(x, y):
    """Spearman's: the correlation of the ranks of two vectors without ties."""
    ranks = torch.stack([v.argsort().argsort().double() for v in (x, y)])
    return torch.corrcoef(ranks)[0, 1].item()


def log_correlation(x, y, group):
    """The correlation of the logs of two vectors [c], with all groups of classes weighing the same: most classes are
    rare, and how those few look at the start would else decide the number [ours]."""
    logs, weight = torch.stack([x, y]).double().log(), (1 / group.bincount().double())[group]
    centred = logs - (weight * logs).sum(1, keepdim=True) / weight.sum()
    (xx, xy), (_, yy) = (weight * centred @ centred.T).tolist()
    return xy / math.sqrt(xx * yy)


def hessian(args):
    data, times = softmax_data(args.m, args.device), (0, 1, 5, 10, 50, 100)
    group = data[2].cpu()
    paths = {}
    for name in ("Adam", "GD"):
        lr = RULES[name][1] if args.m == 11 else solve(args.m, args.steps, name, 0.0, args.device)[0]
        model = Softmax(*data)
        optimizer, seen = RULES[name][0](model, lr), {}
        for t in range(max(times) + 1):
            model.gradients()
            if t in times:
                _, p = model.look()
                x, y = torch.linalg.vector_norm(model.W.grad, dim=1).cpu(), model.hessian_traces(p).cpu()
                classes = torch.linspace(0, len(group) - 1, 40).round().long().unique()
                blocks = model.hessian_block_traces(p, classes.to(p.device)).abs().cpu()
                off = blocks[~torch.eye(len(classes), dtype=torch.bool)]
                mirror = copy.copy(model)  # the same data
                mirror.W, mirror.b = -model.W, -model.b
                mirror.gradients()
                a = torch.linalg.vector_norm(mirror.W.grad, dim=1).cpu()
                b = mirror.hessian_traces(mirror.look()[1]).cpu()
                seen[t] = {"gradient": x, "trace": y, "ranks": rank_correlation(x, y),
                           "ranks_mirrored": rank_correlation(a, b),
                           "logs": log_correlation(x, y, group), "mirrored": log_correlation(a, b, group),
                           "blocks": (blocks.diagonal().median() / off.median()).item()}
            optimizer.step()
        paths[name] = lr, seen
    rows = [{"path": name, "step_size": lr, "t": t, **{k: v for k, v in look.items() if isinstance(v, float)}}
            for name, (lr, seen) in paths.items() for t, look in seen.items()]
    table = markdown(("path", *(f"t = {t}" for t in times)),
                     [(f"{name}, step size {lr:.3g}: {what}", *(f"{seen[t][key]:{form}}" for t in times))
                      for name, (lr, seen) in paths.items()
                      for what, key, form in (("correlation of the logs, groups alike", "logs", "+.2f"),
                                              ("the same at -W", "mirrored", "+.2f"),
                                              ("rank correlation, classes alike", "ranks", "+.2f"),
                                              ("the same at -W", "ranks_mirrored", "+.2f"),
                                              ("diagonal / off-diagonal blocks", "blocks", ",.0f"))])

    def draw(axes):
        for line, (name, (_, seen)) in zip(axes, paths.items()):
            for each, (t, look) in zip(line, seen.items()):
                dots = each.scatter(look["gradient"], look["trace"], c=group, s=8, cmap="viridis")
                each.set(xscale="log", yscale="log", title=f"{name}, t = {t}: {look['logs']:+.2f}")
                each.xaxis.set_minor_formatter("")
            line[0].set_ylabel("trace of the class's Hessian block")
        for each in axes[-1]:
            each.set_xlabel("gradient norm of the class")
        axes[0, 0].figure.colorbar(dots, ax=axes[:, -1], label="group (0: frequent)")
    first, *_, last = paths["Adam"][1].values()
    ok = abs(first["logs"]) < 0.2 and last["logs"] > 0.8 and last["mirrored"] < -0.2
    return Page(table, rows, [], f"Gradient against Hessian, a dot a class, m = {args.m}, one run each; above each "
                "panel the correlation of the logs, each group of classes weighing the same [ours]. Paper B: none at "
                "the start, strong later, negative along -W. Here along Adam's path "
                f"{first['logs']:+.2f} at the start, {last['logs']:+.2f} at t = {max(times)}, {last['mirrored']:+.2f} "
                f"at -W: {agree(ok)}. Spearman's over the classes alike, the first statistic tried, is "
                f"{first['ranks']:+.2f}, {last['ranks']:+.2f} and {last['ranks_mirrored']:+.2f}: "
                f"{agree(abs(first['ranks']) < 0.2 and last['ranks'] > 0.8 and last['ranks_mirrored'] < -0.2)}; most "
                "classes are rare, and how those few look among themselves decides it. Blocks: median trace on the "
                f"diagonal over the median size off it, {len(classes)} classes.", draw, (2, len(times)))


def quadratic(args, c=1000):
    """f(w) = sum_k pi_k w_k^2 / 2 with pi_k ~ 1/k, w = 1 at first; GD at 1 / pi_max, sign descent at 1 / 200 [ours]."""
    pi = 1 / torch.arange(1, c + 1, dtype=torch.float64)
    pi /= pi.sum()
    lrs, steps = {"GD": 1 / pi.max().item(), "sign": 1 / 200}, 200
    paths = {}
    for name, lr in lrs.items():
        w, path = torch.ones(c, dtype=torch.float64), []
        for _ in range(steps + 1):
            path.append(w.clone())
            w -= lr * (pi * w if name == "GD" else w.sign())
        paths[name] = torch.stack(path)
    closed = (1 - lrs["GD"] * pi) ** steps
    ks = [k for k in (1, 3, 10, 30, 100, 300, 1000) if k <= c]
    rows = [{"k": k, "GD": paths["GD"][-1][k - 1].item(), "GD_closed_form": closed[k - 1].item(),
             "sign": paths["sign"][-1][k - 1].item()} for k in ks]
    table = markdown(("coordinate k", "GD: w_k", "GD: (1 - lr pi_k)^t", "sign: w_k"),
                     [(str(r["k"]), f"{r['GD']:.4f}", f"{r['GD_closed_form']:.4f}", f"{abs(r['sign']):.4f}")
                      for r in rows])

    def draw(axes):
        for each, (name, path) in zip(axes, paths.items()):
            for i, k in enumerate(ks):
                each.plot(path[:, k - 1].abs(), "-" if name == "GD" else "--", color=str(0.8 * i / len(ks)),
                          label=f"k = {k}")
            each.set(title=f"{name}, step size {lrs[name]:.3g}", xlabel="step", ylabel="|w_k|")
        axes[1].legend(fontsize=8)  # all lines there are one
    return Page(table, rows, [], f"The quadratic sum of pi_k w_k^2 / 2 with pi_k ~ 1/k, {c} coordinates, {steps} steps "
                "from w = 1. Paper B: GD contracts coordinate k by 1 - lr pi_k a step, sign descent's step does not "
                f"depend on pi. Here GD leaves {rows[-1]['GD']:.0%} of coordinate {c}, sign descent "
                f"{abs(rows[-1]['sign']):.0%}: {agree(abs(rows[-1]['sign']) < 0.1 < rows[-1]['GD'])}.", draw, (1, 2))


def rates(args, c=100):
    """The simple setting of the theory: class k has the one input e_k and frequency pi_k ~ 1/k; W [c, c] from 0."""
    pi = 1 / torch.arange(1, c + 1, dtype=torch.float64)
    pi /= pi.sum()
    runs = {"GD": (1.0, 60_000), "sign": (1e-2, 1_000)}
    ks, seen = (1, 3, 10, 30, 100), {}
    for name, (lr, steps) in runs.items():
        # by symmetry row k of the logits has one value at its own class, u_k, and another at the c - 1 others, v_k
        u, v, path = torch.zeros(c, dtype=torch.float64), torch.zeros(c, dtype=torch.float64), []
        for t in range(steps + 1):
            loss = torch.log1p((c - 1) * (v - u).exp())
            path.append(loss)
            q = (-loss).exp()
            own, other = pi * (q - 1), pi * (1 - q) / (c - 1)
            u = u - lr * (own if name == "GD" else own.sign())
            v = v - lr * (other if name == "GD" else other.sign())
        seen[name] = torch.stack(path)

    def slope(x, y):
        x, y = x - x.mean(), y - y.mean()
        return (x @ y / (x @ x)).item()
    rows = []
    for k in ks:
        gd, sign = seen["GD"][:, k - 1], seen["sign"][:, k - 1]
        t = torch.arange(len(gd), dtype=torch.float64)
        late = gd < 0.1
        s = torch.arange(len(sign), dtype=torch.float64)
        end = sign < 0.1
        rows.append({"k": k, "pi": pi[k - 1].item(),
                     "gd_exponent": slope(t[late].log(), gd[late].log()) if late.sum() > 10 else None,
                     "gd_loss_times_pi_t": (gd[-1] * pi[k - 1] * t[-1]).item(),
                     "sign_rate": -slope(s[end], sign[end].log()) / runs["sign"][0]})
    table = markdown(("class k", "pi_k", "GD: exponent of t where the loss is below 0.1 (theory -1)",
                      "GD: loss x pi_k t at the end",
                      "sign: c in exp(-c t), t in step sizes (theory: the same for all)"),
                     [(str(r["k"]), f"{r['pi']:.4f}", number(r["gd_exponent"], ".3f"), f"{r['gd_loss_times_pi_t']:.2f}",
                       f"{r['sign_rate']:.3f}") for r in rows])

    def draw(axes):
        for each, (name, path) in zip(axes, seen.items()):
            for i, k in enumerate(ks):
                each.plot(path[:, k - 1], "-" if name == "GD" else ("-", "--", ":", "-.", "-")[i],
                          color=str(0.8 * i / len(ks)), label=f"k = {k}")
            each.set(yscale="log", xscale="log" if name == "GD" else "linear", xlabel="step", title=name)
        axes[0].set_ylabel("loss of the class (nats)")
        axes[0].legend(fontsize=8)
    products, cs = [r["gd_loss_times_pi_t"] for r in rows], [r["sign_rate"] for r in rows]
    return Page(table, rows, [], f"The rates of the theory: {c} classes, pi_k ~ 1/k, one input a class. Paper B: the "
                "loss of class k falls as 1/(pi_k t) under gradient flow, as exp(-c t) under sign flow, c the same "
                f"for all. Here loss x pi_k t is {min(products):.2f} to {max(products):.2f}, c {min(cs):.2f} to "
                f"{max(cs):.2f}: {agree(max(products) < 1.2 * min(products) and max(cs) < 1.01 * min(cs))}.",
                draw, (1, 2))


ARTEFACTS = {f.__name__: f for f in (quadratic, rates, softmax, hessian, reweighted)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", metavar="name", help=f"{', '.join(ARTEFACTS)}; none: all")
    parser.add_argument("--m", type=int, default=7, choices=range(3, 13), metavar="M", help="groups of classes [7]")
    parser.add_argument("--steps", type=int, help="[1000 at m = 11, the paper's, else 200, ours]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.steps = (1000 if args.m == 11 else 200) if args.steps is None else args.steps
    if args.steps < 1 or args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--steps starts at 1, and --device=cuda needs a GPU")
    torch.set_flush_denormal(True)  # probabilities below 1e-38 are slow, and nothing here
    if wrong := set(args.name) - set(ARTEFACTS):
        parser.error(f"no {', '.join(wrong)}: choose from {', '.join(ARTEFACTS)}")
    for name in args.name or ARTEFACTS:
        began = time.perf_counter()
        page = ARTEFACTS[name](args)
        size = f"-m{args.m}" * (args.m != 7 and name not in ("quadratic", "rates"))
        write(Path("results/toy") / f"{name}{size}", page, page.caption,
              f"{hardware(args.device)}; torch {torch.__version__}; {time.strftime('%Y-%m-%d')}; "
              f"{time.perf_counter() - began:.0f} s", f"python toy.py {name} --m={args.m} --steps={args.steps}")


if __name__ == "__main__":
    main()
