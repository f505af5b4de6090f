"""Every table and figure: its runs, its numbers, its picture.

    python tables.py demo                          # or `make demo`: Adam, SGD, clipped SGD side by side
    python tables.py gap --data=data/news          # or `make gap DATA=data/news`: five methods, tuned, three seeds
    python tables.py gap --scale=1b --nproc=8      # the paper's scale under torchrun; --dry prints the commands
    python tables.py batch --jobs=2                # two runs at a time, each with half of the cores
    python tables.py demo --steps=400              # any setting of train.py, for all runs

Each artefact is a function: it names its runs, takes their results and returns a `Page`, which lands in
results/SCALE/NAME.md, .json and .png. Running, searching and statistics are sweep.py's.
"""
import argparse
import math
import statistics
import sys
from pathlib import Path

from diagnostics import frequency_groups
from loader import DataError, read_meta, token_counts
from sweep import (LADDER, Page, Run, above, agree, below, down, execute, gap_to, largest_stable, markdown, number,
                   percent, plus_minus, publish, seeds, tune, verdict)

SEED = 42
# Batch, steps and clips of 130m, 350m and 1b are the paper's; 60m, nano and all of eval_every are ours.
SCALES = {
    "nano": {"model": "nano", "batch_size": 64, "steps": 200, "eval_every": 40},
    "60m": {"model": "60m", "batch_size": 2048, "steps": 2500, "eval_every": 250},
    "130m": {"model": "130m", "batch_size": 2048, "steps": 5000, "eval_every": 500},
    "350m": {"model": "350m", "batch_size": 2048, "steps": 15000, "eval_every": 1500},
    "1b": {"model": "1b", "batch_size": 4096, "steps": 19125, "eval_every": 1500},
}
LARGE = {"eval_tokens": 10_000_000, "save_every": 500, "micro_batch": 32}  # beyond nano

BETAS = (0.5, 0.8, 0.9, 0.95, 0.98)  # beta1, and the momentum of the others

# `start` is where the search for the best settings begins, `at` where it does at a scale (of clipped SGD the paper's),
# `axes` what is searched beside lr: thresholds in steps of sqrt(10) too, so that no method is tuned more finely than
# another, but for the paper's own values where they lie between.
METHODS = {
    "Adam": {"settings": {"optimizer": "adamw"}, "start": {"lr": 3.16e-3, "beta1": 0.9, "beta2": 0.95},
             "at": dict.fromkeys(("60m", "130m", "350m", "1b"), {"lr": 1e-3}),  # ours: the paper gives none
             "axes": {"beta1": BETAS, "beta2": (0.8, 0.9, 0.95, 0.99, 0.999)},
             "line": ("#000000", "-", "o")},
    "SGD": {"settings": {"optimizer": "sgd", "momentum": 0}, "start": {"lr": 0.316},
            "axes": {}, "line": ("#e69f00", ":", "v")},
    "SGD with momentum": {"settings": {"optimizer": "sgd"}, "start": {"lr": 1.0, "momentum": 0.9},
                          "axes": {"momentum": BETAS}, "line": ("#d55e00", ":", "s")},
    "SGD, global norm clipped": {"settings": {"optimizer": "sgd"},
                                 "start": {"lr": 31.6, "momentum": 0.9, "grad_clip": 0.1},
                                 "axes": {"grad_clip": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), "momentum": BETAS},
                                 "against": ("grad_clip",),  # where it binds, lr x grad_clip is the step
                                 "line": ("#009e73", "-.", "^")},
    "clipped SGD": {"settings": {"optimizer": "clipped_sgd"},
                    "start": {"lr": 100.0, "token_clip": 1e-3, "update_clip": 5e-4, "momentum": 0.9},
                    "at": {"350m": {"lr": 200.0}, "1b": {"lr": 300.0, "update_clip": 2e-4}},
                    "axes": {"update_clip": (1.58e-5, 5e-5, 1.58e-4, 5e-4, 1.58e-3, 5e-3, 1.58e-2),
                             "token_clip": (3.16e-6, 1e-5, 3.16e-5, 1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2),
                             "momentum": BETAS},
                    "line": ("#0072b2", "--", "D")},
}

# Of Spike No More (arXiv 2312.16903); the first is this repo's model as it is.
ARMS = {
    "N(0, 0.02)": ({}, ("#000000", "-", "o")), "Vanilla": ({"init": "small"}, ("#e69f00", ":", "v")),
    "Embed Detach": ({"init": "small", "embedding": "detach"}, ("#009e73", "-.", "^")),
    "Embed LN": ({"init": "small", "embedding": "norm"}, ("#0072b2", "--", "D")),
    "Scaled Embed": ({"init": "small", "embedding": "scale"}, ("#d55e00", ":", "s")),
}


# ---- runs -----------------------------------------------------------------------------------------------------------

def method(name, args, **changes):
    """The run of a method at this scale, from its start, with changes."""
    spec, large = METHODS[name], {} if args.scale == "nano" else LARGE
    settings = {**SCALES[args.scale], **large, "data": args.data, "seed": SEED, **spec["settings"], **spec["start"],
                **spec.get("at", {}).get(args.scale, {}), **args.override, **changes}
    return Run(name, settings, ("lr", *spec["axes"]))


def search(name, args, axes=None, **changes):
    """The best run of a method and all that were tried: over lr and what else it has to tune, or those of `axes`."""
    ladders = {"lr": LADDER} | METHODS[name]["axes"]
    return tune(lambda **more: method(name, args, **{**changes, **more}),
                {k: ladders[k] for k in ladders if axes is None or k in axes}, args, METHODS[name].get("against", ()))


def state_bytes(s):
    """Of the optimizer's state, a parameter, in fp32."""
    return {"adamw": 8, "sgd": 4, "clipped_sgd": 4}[s["optimizer"]] if s.get("momentum", 1) else 0


def clipped(run):
    """The shares of tensors and of token rows that were clipped, means over a run, for a table."""
    return [number(run.mean(f"clipped_{what}"), ".0%") for what in ("tensors", "rows")]


def settle(found, args):
    """The final runs of methods, {name: runs}, from their searches: at other seeds than the one that they were chosen
    by; where one of them diverges, at the next lower learning rate, and so on."""
    final = {name: seeds(best, args, first=1) for name, (best, _) in found.items()}
    execute([run for runs in final.values() for run in runs], args)
    for name, (best, _) in found.items():
        final[name] = down(lambda **slower: seeds(Run(name, {**best.settings, **slower}, best.axes), args, first=1),
                           final[name], args)[-1]
    return final


# ---- artefacts ------------------------------------------------------------------------------------------------------

def demo(args):
    runs = execute([method(name, args) for name in ("Adam", "SGD with momentum", "clipped SGD")], args)
    rows = [run.row(adam=runs[0]) for run in runs]
    table = markdown(("method", "learning rate", "validation loss", "gap to Adam", "minutes", "tokens/s"),
                     [(run.label, f"{r['lr']:g}", run.verdict, percent(r["gap"]), f"{(r['seconds'] or 0) / 60:.1f}",
                       f"{r['tok_per_s'] or 0:,.0f}") for run, r in zip(runs, rows)])

    def draw(axes):
        for run in runs:
            color, dash, mark = METHODS[run.label]["line"]
            axes.plot([x["step"] for x in run.steps], [x["train_loss"] for x in run.steps], color=color, alpha=0.25)
            axes.plot([x["step"] for x in run.evals], [x["val_loss"] for x in run.evals], dash, color=color,
                      marker=mark, label=f"{run.label}, lr {run.settings['lr']:g}: {run.verdict}")
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.legend(title="validation (pale: training)")
    tuned = "the best learning rate that `make lr` found" if args.scale == "nano" else "learning rates of ours, untuned"
    papers = args.scale if args.scale in METHODS["clipped SGD"]["at"] else "130m"
    return Page(table, rows, runs, f"Adam and SGD at {tuned}, clipped SGD at the paper's for {papers}.", draw)


def gap(args):
    execute([method(name, args) for name in METHODS], args)  # side by side; from them each search goes on alone
    found = {name: search(name, args) for name in METHODS}
    again = settle(found, args)
    rows, lines = [], []
    for name, runs in again.items():
        _, tried = found[name]
        s = runs[0].settings
        ms = [1000 * run.tokens_per_step / run.tok_per_s for run in (*runs, *tried) if run.tok_per_s]
        edge = [k for k, ladder in METHODS[name]["axes"].items() if s[k] in (ladder[0], ladder[-1])]
        rows += [run.row(adam) | {"role": "seed"} for adam, run in zip(again["Adam"], runs)]
        rows += [run.row(found["Adam"][0]) | {"role": "search"} for run in tried]
        lines.append((name, runs[0].tuned + f" (the grid's edge: {', '.join(edge)})" * bool(edge), verdict(runs),
                      plus_minus([gap_to(adam, run) for adam, run in zip(again["Adam"], runs)], "+.1%"),
                      *clipped(runs[0]), str(state_bytes(s)), number(statistics.median(ms) if ms else None, ",.0f"),
                      str(len(tried))))
    table = markdown(("method", "best settings", "validation loss", "gap to Adam", "tensors clipped",
                      "token rows clipped", "state, bytes a parameter", "ms a step", "runs of the search"), lines)
    beside = " Milliseconds a step are beside other runs." * (args.jobs > 1)

    def draw(axes):
        for name, runs in again.items():
            color, dash, mark = METHODS[name]["line"]
            for run in runs:
                axes.plot([x["step"] for x in run.evals], [x["val_loss"] for x in run.evals], dash, color=color,
                          marker=mark, markersize=4, label=name if run is runs[0] else None)
        axes.set(xlabel="step", ylabel="validation loss (nats per token)")
        axes.legend()
    return Page(table, rows, [run for name in again for run in (*again[name], *found[name][1])],
                f"Each method at the best settings that a search found at seed {SEED}, run at other seeds, and if one "
                "of these diverges at the next lower learning rate (mean and 95% interval of Student's t; the gap is "
                f"taken seed by seed; shares clipped are means over the first run).{beside}", draw)


def lr_grid(name, args, **changes):
    """Runs of a method over learning rates, from one below its start to three above."""
    centre = method(name, args).settings["lr"]
    i = min(range(len(LADDER)), key=lambda i: abs(math.log(LADDER[i] / centre)))
    return [method(name, args, **changes, lr=value) for value in (LADDER[i - 1], centre, *LADDER[i + 1:i + 4])]


def stable(runs):
    """Of runs by rising lr: the largest below the first that diverged, or None, and "at least " if none did."""
    first = next((i for i, run in enumerate(runs) if run.diverged), len(runs))
    good = [run.settings["lr"] for run in runs[:first] if run.final]
    return good[-1] if good else None, "" if first < len(runs) else "at least "


def plot_by_lr(axes, runs, line, label):
    """The final losses of runs against their lr, and an x at the top, a row for each line, where they diverged."""
    color, dash, mark = line
    height = 0.98 - 0.03 * len(axes.get_legend_handles_labels()[0])
    good = [run for run in runs if run.loss < math.inf]
    axes.plot([r.settings["lr"] for r in good], [r.loss for r in good], dash, color=color, marker=mark, label=label)
    for run in runs:
        if run.diverged:
            axes.plot(run.settings["lr"], height, "x", color=color, transform=axes.get_xaxis_transform())


def lr(args):
    runs = {name: lr_grid(name, args) for name in METHODS}
    every = execute([run for some in runs.values() for run in some], args)
    best = {name: min(some, key=lambda run: run.loss) for name, some in runs.items()}
    rows = [run.row(best["Adam"]) | {"best": run is best[run.label], "effective_lr": run.mean("effective_lr")}
            for run in every]
    base, unknown = stable(runs["SGD with momentum"])
    lines = []
    for name, some in runs.items():
        top, least = stable(some)
        ok = best[name].loss < math.inf
        lines.append((name, "; ".join(f"{run.settings['lr']:g}: {run.verdict}" for run in some),
                      f"{best[name].settings['lr']:g}" if ok else "-", percent(gap_to(best["Adam"], best[name])),
                      "yes" if ok and best[name] not in (some[0], some[-1]) else "no",
                      f"{least}{top:g}" if top else "-", f"{least}{float(f'{top / base:.3g}'):g}"
                      if top and base and not unknown and name != "Adam" else "-",
                      number(best[name].mean("effective_lr") if ok else None, ".2g")))
    table = markdown(("method", "validation loss by learning rate", "best", "gap to Adam", "best inside the grid",
                      "largest stable", "x SGD with momentum's", "effective lr at the best"), lines)

    def draw(axes):
        for name, some in runs.items():
            plot_by_lr(axes, some, METHODS[name]["line"], name)
        axes.set(xscale="log", xlabel="peak learning rate (x at the top: diverged)",
                 ylabel="final validation loss (nats per token)")
        axes.figure.legend(loc="outside lower center", ncols=3)
    return Page(table, rows, every, "Final validation loss against the learning rate.", draw)


def ablation(args):
    """Which clip, at which learning rate: the four cells that a referee asked for, and their neighbours."""
    start = method("clipped SGD", args).settings
    large, token, update = start["lr"], start["token_clip"], start["update_clip"]
    small, tried = largest_stable(lambda **c: method("SGD with momentum", args, **c), args)
    best, others = search("Adam", args)  # those of gap
    alone, scaled = tune(lambda **c: method("clipped SGD", args, **{"lr": 1e9, "token_clip": None, **c}),
                         {"update_clip": METHODS["clipped SGD"]["axes"]["update_clip"]}, args)
    same_rms = f"every update scaled to RMS {alone.settings['update_clip']:g}"
    clips = {"no clip": {"token_clip": None, "update_clip": None}, "token clip": {"update_clip": None},
             "update clip": {"token_clip": None}, "both clips": {}}
    cells = {(clip, rate): method("clipped SGD", args, lr=rate, **changes)
             for clip, changes in clips.items() for rate in (small, large)}
    cells |= {("global norm", rate): method("SGD, global norm clipped", args, lr=rate) for rate in (small, large)}
    cells[same_rms, math.inf] = alone
    cells["Adam", None] = best
    main = {key: seeds(run, args) if key[0] not in ("token clip", "update clip", "global norm") else [run]
            for key, run in cells.items()}
    execute([run for runs in main.values() for run in runs], args)
    adam = main["Adam", None]
    rows, lines = [], []
    for (clip, rate), runs in main.items():
        gaps = [gap_to(a, run) for a, run in zip(adam, runs)]
        rows += [{**run.row(a), "cell": clip, "clipped_tensors": run.mean("clipped_tensors"),
                  "clipped_rows": run.mean("clipped_rows")} for a, run in zip(adam, runs)]
        shown = "any" if rate == math.inf else f"{runs[0].settings['lr']:g}"
        lines.append((clip, shown, verdict(runs), plus_minus(gaps, "+.1%"), str(len(runs)), *clipped(runs[0])))
    table = markdown(("clip", "learning rate", "validation loss", "gap to Adam", "seeds", "tensors clipped",
                      "token rows clipped"), lines)

    def draw(axes):
        names = list(dict.fromkeys(clip for clip, _ in main))[::-1]
        for (clip, rate), runs in main.items():
            mark, fill = ("o", "none") if rate == small else ("o", "black") if rate == large else ("D", "black")
            y = names.index(clip)
            for run in runs:
                if run.loss < math.inf:
                    axes.plot(run.loss, y, mark, color="black", markerfacecolor=fill)
            if any(run.loss == math.inf for run in runs):
                axes.text(0.98, y + (0.2 if rate == small else -0.2), f"lr {runs[0].settings['lr']:g}: {verdict(runs)}",
                          transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8)
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel="final validation loss (nats per token)")
        axes.set_title(f"open: lr {small:g}, SGD's largest stable; full: lr {large:g}", fontsize=9)
    searched = tried + others + scaled
    rows += [run.row(best) | {"cell": "search"} for run in searched]
    return Page(table, rows, [run for runs in main.values() for run in runs] + searched,
                f"The clips and the learning rate (token clip {token:g}, update clip {update:g}, global norm "
                f"{main['global norm', large][0].settings['grad_clip']:g}), beside Adam; shares clipped are means "
                "over the run.", draw)


def resized(s, args, batch_size, steps):
    """What changes in the settings s for another batch size and number of steps: as many evaluations, and the same
    micro-batch, or less where it does not fit."""
    return {"batch_size": batch_size, "steps": steps, "eval_every": max(1, steps * s["eval_every"] // s["steps"])} | (
        {"micro_batch": min(s["micro_batch"], batch_size // args.nproc)} if s.get("micro_batch") else {})


BATCH_AXES = "lr", "update_clip"  # what is searched at each batch size


def sizes(args):
    """Batch sizes that span a factor of 64 around the scale's, with the steps that keep the number of tokens."""
    s = method("Adam", args).settings
    shapes = []
    for size in (s["batch_size"] // 16, s["batch_size"] // 4, s["batch_size"], 4 * s["batch_size"]):
        steps = s["steps"] * s["batch_size"] // max(1, size)
        if steps == 0 or size < args.nproc:
            sys.exit(f"tables.py: {s['steps']} steps of {s['batch_size']} sequences leave no batches 4 times as large "
                     f"and 16 times as small on {args.nproc} processes: give more --steps or a larger --batch_size")
        shapes.append(resized(s, args, size, steps))
    return shapes


def batch(args):
    names, every = ("Adam", "SGD", "SGD with momentum", "clipped SGD"), []
    best = {name: [] for name in names}
    shapes = sizes(args)
    for shape in shapes:
        for name in names:
            start = {k: best[name][-1].settings[k] for k in BATCH_AXES if best[name] and k in best[name][-1].axes}
            run, tried = search(name, args, BATCH_AXES, **shape, **start)
            best[name].append(run)
            every += tried
    rows = [run.row(adam) | {"best": run in best[run.label]} for run in every
            for adam in best["Adam"] if adam.settings["batch_size"] == run.settings["batch_size"]]
    table = markdown(("sequences a batch", *(f"{name}: loss (lr), gap" for name in names)),
                     [(str(shape["batch_size"]), *(f"{best[name][i].verdict} ({best[name][i].settings['lr']:g}), "
                                                   f"{percent(gap_to(best['Adam'][i], best[name][i]))}"
                                                   for name in names)) for i, shape in enumerate(shapes)])

    def draw(axes):
        for name in names[1:]:
            color, dash, mark = METHODS[name]["line"]
            axes.plot([run.settings["batch_size"] for run in best[name]],
                      [100 * (gap_to(adam, run) or math.nan) for adam, run in zip(best["Adam"], best[name])], dash,
                      color=color, marker=mark, label=name)
        axes.axhline(0, color="black", linewidth=1)
        axes.set(xscale="log", xlabel="batch size (sequences)", ylabel="gap to Adam (% of its loss)",
                 xticks=[shape["batch_size"] for shape in shapes],
                 xticklabels=[shape["batch_size"] for shape in shapes])
        axes.minorticks_off()
        axes.figure.legend(loc="outside lower center", ncols=3)
    return Page(table, rows, every, "The gap to Adam against the batch size at a fixed number of tokens, each method "
                "at its best learning rate (clipped SGD: and update clip) at that size.", draw)


def dynamics(args):
    shapes = sizes(args)
    chosen = {"small batch": shapes[0], "large batch": shapes[2]}  # four times that leaves few steps
    found = {(name, size): search(name, args, BATCH_AXES, **form)
             for size, form in chosen.items() for name in ("Adam", "clipped SGD")}
    runs = {key: best for key, (best, _) in found.items()}
    looks = {"grad_norm": "gradient norm", "weight_to_gradient": "weight-to-gradient ratio",
             "effective_lr": "effective learning rate", "imbalance": "token-class imbalance"}
    rows, lines = [], []
    for (name, size), run in runs.items():
        seen = {k: [x[k] for x in run.steps if x.get(k) is not None] for k in looks}
        middle = {k: statistics.median(values) if values else None for k, values in seen.items()}
        rows.append(run.row(runs["Adam", size]) | {"size": size, "spikes": run.spikes, **middle})
        lines.append((name, f"{run.settings['batch_size']}", f"{run.settings['lr']:g}", run.verdict,
                      *(number(middle[k], ".3g") for k in looks),
                      f"{len(run.spikes)} of {max(0, len(run.steps) - 100)}"))
    table = markdown(("method", "batch", "lr", "validation loss", *(f"{v} (median)" for v in looks.values()),
                      "spikes among the steps from 100 on"), lines)

    def draw(axes):
        for each, (key, title) in zip(axes, looks.items()):
            for (name, size), run in runs.items():
                color = "black" if name == "Adam" else "#56b4e9"  # apart in grey too
                steps = [x for x in run.steps if x.get(key) is not None]
                tokens = [x["tokens"] / 1e6 for x in steps]
                each.plot(tokens, [x[key] for x in steps], "-" if size == "large batch" else ":", color=color,
                          linewidth=1.6 if size == "large batch" else 0.9,
                          label=f"{name}, batch {run.settings['batch_size']}")
                if key == "grad_norm":
                    for x in (run.steps[i - 1] for i in run.spikes):
                        each.plot(x["tokens"] / 1e6, x[key], "x", color="red", markersize=5)
            each.set(yscale="log", xlabel="million tokens", title=title)
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return Page(table, rows, [run for _, tried in found.values() for run in tried],
                "Along training, in small and in large batches, each at its best learning rate (clipped SGD: and "
                "update clip); a spike (red x) is above 5 times the median norm of the 100 steps before.", draw, (1, 4))


def minimum(run, axis, tried):
    """Between the steps of its ladder: where along an axis, in logarithms, a parabola through the losses of a run and
    its two neighbours has its minimum; None if one of them is missing."""
    rest = {**run.settings, axis: None}
    losses = {other.settings[axis]: other.loss for other in tried if {**other.settings, axis: None} == rest}
    ladder, x = METHODS[run.label]["axes"][axis], run.settings[axis]
    sides = below(ladder, x) + above(ladder, x)
    if len(sides) < 2 or run.loss == math.inf:
        return None
    low, high = (losses.get(value, math.inf) - run.loss for value in sides)
    return x * 10 ** ((low - high) / (low + high) / 4) if 0 < low + high < math.inf else None


def thresholds(args):
    """How the best settings of clipped SGD move with the width of the model, the batch and the steps: short runs."""
    from model import SIZES, Config
    s, models, axes = method("Adam", args).settings, list(SIZES), ("lr", "update_clip", "token_clip")
    size, steps, i = s["batch_size"] // 2, s["steps"] // 2, models.index(s["model"])
    if steps < 8 or size // 4 < args.nproc:
        sys.exit(f"tables.py: half of {s['steps']} steps and of {s['batch_size']} sequences is too little to divide "
                 f"by 4 on {args.nproc} processes: give more --steps or a larger --batch_size")
    base = resized(s, args, size, steps)
    points = [{"model": models[k]} for k in (i - 1, i + 1) if 0 <= k < len(models)]
    points += [resized(s, args, n, steps) for n in (size // 4, 4 * size)]
    points += [resized(s, args, size, n) for n in (steps // 4, 4 * steps)]
    centre, every = search("clipped SGD", args, axes, **base)
    found = {centre: every}
    for changes in points:
        run, tried = search("clipped SGD", args, axes, **{**base, **{k: centre.settings[k] for k in axes}, **changes})
        found[run] = tried
        every = every + tried
    between = {run: {k: minimum(run, k, tried) for k in axes[1:]} for run, tried in found.items()}
    rows = [run.row() | {"best": run.out in {best.out for best in found}} for run in every]
    table = markdown(("model", "sequences a batch", "steps", "validation loss", "best lr", "update clip", "token clip"),
                     [(run.settings["model"], str(run.settings["batch_size"]), str(run.settings["steps"]), run.verdict,
                       f"{run.settings['lr']:g}",
                       *(f"{number(run.settings[k], 'g')} ({number(x, '.2g')})" for k, x in between[run].items()))
                      for run in found])

    def draw(panels):
        looks = {"hidden size": lambda s: Config.named(s["model"], 8).hidden,
                 "sequences a batch": lambda s: s["batch_size"], "steps": lambda s: s["steps"]}
        for panel, (label, x) in zip(panels, looks.items()):
            line = [run for run in sorted(found, key=lambda run: x(run.settings))
                    if run.loss < math.inf and (run is centre or x(run.settings) != x(centre.settings))]
            ticks = [x(run.settings) for run in line]
            for key, dash, mark in (("update_clip", "-", "o"), ("token_clip", "--", "D")):
                panel.plot(ticks, [between[run][key] or run.settings[key] for run in line], dash, color="black",
                           marker=mark, label=key)
            panel.set(xscale="log", yscale="log", ylim=(1e-5, 2e-2), xlabel=label, xticks=ticks, xticklabels=ticks)
            panel.minorticks_off()
        panels[0].legend(title="best")
    return Page(table, rows, every, "The best settings of clipped SGD by a search in steps of sqrt(10), one seed, as "
                "the width of the model, the batch or the number of steps moves; drawn, and in brackets, is the "
                "minimum of a parabola through the losses beside the best.", draw, (1, 3))


def frequency(args):
    """Paper B's figure 1 with clipped SGD as one more optimizer; the runs are those of gap."""
    counts = token_counts(args.data, shape(args)[0])
    if counts is None and not args.dry:
        raise DataError(f"{args.data}/token_counts.npy is missing: make another data directory with data/prepare.py")
    found = settle({name: search(name, args) for name in ("Adam", "SGD with momentum", "clipped SGD")}, args)
    every = [run for runs in found.values() for run in runs]
    if args.dry:
        return None
    if old := [str(run.out) for run in every if run.evals and "group_losses" not in run.evals[0]]:
        sys.exit(f"tables.py: {', '.join(old)}: run before there were groups of tokens: delete it")

    def loss(run, i, when=-1):
        """Of group i, or of all tokens if i is None; None if the run did not end well, or no target is of the group."""
        if run.loss == math.inf:
            return None
        return run.evals[when]["val_loss"] if i is None else run.evals[when]["group_losses"][i]

    def closed(i):
        """How much of the gap between SGD and Adam clipped SGD closes, seed by seed."""
        parts = [[loss(run, i) for run in runs] for runs in
                 zip(*(found[name] for name in ("SGD with momentum", "clipped SGD", "Adam")))]
        return plus_minus([None if None in x or x[0] == x[2] else (x[0] - x[1]) / (x[0] - x[2]) for x in parts], ".0%")
    group = frequency_groups(counts)
    lines = [(f"{i + 1}", f"{(group == i).sum():,}",
              *(plus_minus([loss(run, i) for run in runs], ".3f") for runs in found.values()), closed(i))
             for i in range(10)]
    lines.append(("all", f"{len(group):,}", *(verdict(runs) for runs in found.values()), closed(None)))
    table = markdown(("group, frequent to rare", "token classes", *found, "of the gap between SGD with momentum and "
                      "Adam, clipped SGD closes"), lines)
    rows = [run.row(adam) | {"group_losses": run.evals[-1]["group_losses"] if run.evals else None}
            for runs in found.values() for adam, run in zip(found["Adam"], runs)]
    ends = {name: [(loss(run, 9, 0), loss(run, 9)) for run in runs] for name, runs in found.items()}
    falls = {name: [None if None in pair else pair[0] - pair[1] for pair in pairs] for name, pairs in ends.items()}
    told = ", ".join(f"{plus_minus(fall, '.2f')} ({name})" for name, fall in falls.items())
    far = {name: statistics.fmean(fall) > 0.5 for name, fall in falls.items() if None not in fall}

    def draw(axes):
        top = max(x or 0 for runs in found.values() for line in runs[0].evals for x in line["group_losses"])
        for each, (name, runs) in zip(axes, found.items()):
            if not runs[0].evals:  # it failed
                continue
            for i in range(10):
                seen = [x for x in runs[0].evals if x["group_losses"][i] is not None]
                each.plot([x["step"] for x in seen], [x["group_losses"][i] for x in seen], color=str(0.08 * i),
                          label=f"group {i + 1}" if i in (0, 9) else None, linewidth=2 if i in (0, 9) else 1)
            each.set(title=name, xlabel="step", ylim=(0, 1.05 * top))
        axes[0].set_ylabel("validation loss of the group (nats per token)")
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return Page(table, rows, every,
                "Ten groups of tokens, each about a tenth of the training text, from frequent (1, dark) to rare (10, "
                f"pale); seed {found['Adam'][0].settings['seed']} is drawn. Paper B: SGD hardly learns the rare groups,"
                f" Adam all. Here group 10's loss falls by {told} nats: "
                f"SGD {agree(not far.get('SGD with momentum', True))}, Adam {agree(far.get('Adam', False))}.",
                draw, (1, 3))


def spikes(args):
    """Paper C's arms over learning rates, at half of the tokens: a quarter of the batch, twice the steps."""
    if fixed := {"embedding", "init"} & set(args.override):
        sys.exit(f"tables.py: spikes compares models that differ by --embedding and --init: drop --{min(fixed)}")
    s = method("Adam", args).settings
    short = resized(s, args, s["batch_size"] // 4, 2 * s["steps"])
    names = ("Adam", "SGD with momentum", "clipped SGD")
    grid = {(name, arm): lr_grid(name, args, **short, **ARMS[arm][0]) for name in names for arm in ARMS}
    execute([run for runs in grid.values() for run in runs], args)
    for (name, arm), runs in grid.items():  # on down, until the best is not the lowest
        while runs[0].loss < min(run.loss for run in runs[1:]) and (lower := below(LADDER, runs[0].settings["lr"])):
            runs[:0] = execute([method(name, args, **short, **ARMS[arm][0], lr=lower[0])], args)
    every = [run for runs in grid.values() for run in runs]
    best = {key: min(runs, key=lambda run: run.loss) for key, runs in grid.items()}
    again = {key: seeds(run, args, first=1) for key, run in best.items() if run.loss < math.inf}
    execute([run for runs in again.values() for run in runs], args)

    lines = []
    for (name, arm), runs in grid.items():
        top, least = stable(runs)
        last = again.get((name, arm), [])
        by_lr = "; ".join(f"{run.settings['lr']:g}: {run.verdict} ({len(run.spikes)})" for run in runs)
        lines.append((name, arm, by_lr,
                      f"{best[name, arm].settings['lr']:g}" if last else "-", verdict(last) if last else "-",
                      ", ".join(str(len(run.spikes)) for run in last) or "-", f"{least}{top:g}" if top else "-"))
    table = markdown(("method", "arm", "validation loss (spikes) by learning rate", "best", "loss at other seeds",
                      "spikes at them", "largest stable"), lines)
    rows = [run.row(best["Adam", arm]) | {"arm": arm, "role": "grid", "spikes": run.spikes}
            for (_, arm), runs in grid.items() for run in runs]
    rows += [run.row(adam) | {"arm": arm, "role": "seed", "spikes": run.spikes} for (_, arm), runs in again.items()
             for adam, run in zip(again.get(("Adam", arm), [None] * len(runs)), runs)]

    def draw(axes):
        for row in axes:
            for each in row[1:]:
                each.sharey(row[0])
        for column, name in zip(axes.T, names):
            for arm, (_, line) in ARMS.items():
                plot_by_lr(column[0], grid[name, arm], line, arm)
                color, dash, mark = line
                good = [run for run in grid[name, arm] if run.loss < math.inf]
                column[1].plot([run.settings["lr"] for run in good], [len(run.spikes) for run in good], dash,
                               color=color, marker=mark)
            column[0].set(title=name, xscale="log")
            column[1].set(xscale="log", xlabel="peak learning rate (x above: diverged)")
        axes[0, 0].set_ylabel("final validation loss (nats)")
        axes[1, 0].set_ylabel("spikes of the gradient norm")
        axes[0, 0].legend(fontsize=8)
    count = {arm: sum(len(run.spikes) for run in grid["Adam", arm]) for arm in ARMS}
    top = {arm: stable(grid["SGD with momentum", arm])[0] or 0 for arm in ARMS}
    told = "; ".join(f"{arm} {count[arm]}, {top[arm]:g}" for arm in ARMS)
    rarer = max(count["Embed LN"], count["Scaled Embed"]) < count["Vanilla"]
    larger = min(top["Embed LN"], top["Scaled Embed"]) > top["Vanilla"]
    return Page(table, rows, every + [run for runs in again.values() for run in runs],
                "The initial weights of this repo; paper C's small sub-layers (Vanilla), with a tenth of the "
                "embedding's gradient (Detach), with a large shortcut (LN, Scaled). A spike is above 5 times the "
                "median norm of the 100 steps before. Paper C: with the large shortcut spikes are rarer and learning "
                "rates may be larger. Here Adam's spikes on the grid, and the largest stable learning rate of SGD with "
                f"momentum: {told}. The first {agree(rarer)}, the second {agree(larger)}.", draw, (2, 3))


# ---- before anything is run -----------------------------------------------------------------------------------------

def memory(s, vocab, length, gpu=True):
    """Bytes on each device: weights, gradients, optimizer state, copies of the weights (bf16 for the products, fp32
    for diagnostics.py), activations of a micro-batch, a chunk of logits.

    Activations: 7 * hidden + 3 * ffn numbers a token and layer, of 2 bytes under bf16 autocast, 4 in fp32 [ours: nano
    on a CPU takes 1.8 times the sum, compiled code and PyTorch's caches included; not checked on a GPU]. Logits: 4,096
    rows (256 on a CPU) in fp32, twice, and in bf16.
    """
    from model import Config
    c = Config.named(s["model"], vocab)
    rows = (s.get("micro_batch") or s["batch_size"]) * length
    return {"weights": 4 * c.parameters, "gradients": 4 * c.parameters,
            "optimizer state": state_bytes(s) * c.parameters, "copies": (6 if gpu else 4) * c.parameters,
            "activations": (2 if gpu else 4) * rows * c.layers * (7 * c.hidden + 3 * c.ffn),
            "logits": (4096 * 10 if gpu else 256 * 12) * vocab}


def shape(args):
    """Vocabulary and length: the data's, or where there is none yet the paper's."""
    found = read_meta(args.data) if Path(args.data).is_dir() else {"vocab_size": 32000, "seq_len": 256}
    return found["vocab_size"], found["seq_len"]


def cost(args):
    """Prints what one run takes; nothing is run."""
    from model import Config
    vocab, length = shape(args)
    s = method("Adam", args).settings
    c, tokens = Config.named(s["model"], vocab), s["steps"] * s["batch_size"] * length
    flops = c.flops_per_token(length) * tokens
    of = {name: memory(method(name, args).settings, vocab, length, args.scale != "nano")
          for name in ("Adam", "clipped SGD")}
    lines = [("parameters", f"{c.parameters:,}"),
             ("tokens", f"{tokens:,} ({s['steps']} x {s['batch_size']} x {length})"),
             ("FLOPs a token", f"{c.flops_per_token(length):.3g} (6 a weight in a product, "
              "and 6 x layers x length x hidden)"), ("FLOPs", f"{flops:.3g}"),
             (f"hours on {args.gpus} x {args.peak:.3g} FLOP/s at {args.mfu:.0%} of it",
              f"{flops / (args.gpus * args.peak * args.mfu) / 3600:,.2f}")]
    lines += [(f"{part}, GiB a device", ", ".join(f"{parts[part] / 2**30:.2f} ({name})" for name, parts in of.items())
               if part == "optimizer state" else f"{of['Adam'][part] / 2**30:.2f}") for part in of["Adam"]]
    lines.append(("together, GiB a device", ", ".join(f"{sum(parts.values()) / 2**30:.2f} ({name})"
                                                      for name, parts in of.items())))
    print(markdown((f"one run of {args.scale}", f"micro-batch {s.get('micro_batch') or s['batch_size']}"), lines))


def check_memory(args):
    """Refuse a scale beyond nano where no GPU can hold it."""
    import torch
    vocab, length = shape(args)
    s = method("Adam", args).settings
    need = sum(memory(s, vocab, length).values()) / 2**30
    have = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0
    if need > have:
        sys.exit(f"tables.py: {args.scale} needs about {need:.0f} GiB on a GPU at --micro_batch={s['micro_batch']}, "
                 f"and here is {f'one of {have:.0f} GiB' if have else 'no GPU'}: lower --micro_batch, print the "
                 f"commands with --dry, or run it on the CPU with --device=cpu")


ARTEFACTS = {f.__name__: f for f in (demo, gap, lr, ablation, batch, dynamics, thresholds, frequency, spikes, cost)}


def value(text):
    """A setting's text as a number or None where it is one."""
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("name", choices=ARTEFACTS)
    parser.add_argument("--scale", choices=SCALES, default="nano")
    parser.add_argument("--data", default="data/python", help="data directory, made by data/prepare.py")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 11), metavar="N", help="of the final runs [3]")
    parser.add_argument("--nproc", type=int, default=1, help="processes of a run, by torchrun")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on a CPU")
    parser.add_argument("--gpus", type=int, default=8, help="cost: how many")
    parser.add_argument("--peak", type=float, default=989e12, help="cost: their FLOP/s [an H100's, dense bf16]")
    parser.add_argument("--mfu", type=float, default=0.4, help="cost: the share of it that is reached")
    parser.add_argument("--dry", action="store_true", help="print the commands of the runs that are missing")
    args, other = parser.parse_known_args()
    args.data = args.data.rstrip("/")
    if min(args.jobs, args.nproc, args.gpus) < 1:
        parser.error("--jobs, --nproc and --gpus start at 1")
    args.override = {name: value(text) for name, _, text in (word.removeprefix("--").partition("=") for word in other)}
    if not all(word.startswith("--") and "=" in word for word in other) or {"lr", "out", "seed"} & set(args.override):
        parser.error(f"{' '.join(other)}: give train.py's settings as --name=value; lr, seed and out are the table's")
    try:
        if args.scale != "nano" and args.name != "cost" and not args.dry and args.override.get("device") != "cpu":
            check_memory(args)
        page = ARTEFACTS[args.name](args)
    except DataError as e:
        sys.exit(f"tables.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
    if args.name == "cost":
        return
    if args.dry:
        if not Path(args.data).is_dir():
            print(f"{args.data} is not there: with it, the runs' folders have other names", file=sys.stderr)
        if args.name not in ("demo", "lr"):
            print("a search goes on from what it finds: these are the runs that it begins with", file=sys.stderr)
        return
    publish(args.name, args, page)
    sys.exit(any(run.final is None for run in page.runs))


if __name__ == "__main__":
    main()
