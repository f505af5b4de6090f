"""The Adam-SGD gap (Glentis et al. 2026, arXiv 2605.17787): one function per experiment.

    python -m experiments.adam_sgd_gap demo                   # four methods side by side
    python -m experiments.adam_sgd_gap gap --data=data/news   # seven methods, tuned, five seeds
    python -m experiments.adam_sgd_gap gap --scale=1b --nproc=8 --dry    # the paper's scale
    python -m experiments.adam_sgd_gap batch --jobs=2 --dtype=bfloat16   # any setting of train.py

An experiment makes its runs and returns an ExperimentResult, which is written to
results/SCALE/NAME.md, .json and .png.
"""
import argparse
import ast
import json
import math
import shlex
import signal
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import torch

import train
from experiments.sweep import (
    LR_GRID, STYLES, ExperimentResult, Run, concurrently, coordinate_search, finished, fmt, gap_to,
    interval_text, mark_diverged, markdown_table, max_stable_lr, next_below, outcomes, plot_seeds,
    rerun_with_new_seeds, run_all, save_results, stop_all)
from loader import UserError, read_meta, token_counts
from metrics import frequency_groups
from model import SIZES, Config

SEED = 42  # of searches; final runs have others
SETTINGS = {field.name for field in fields(train.Settings)}

# Batch and steps of 130m, 350m and 1b are the paper's; the others are ours.
SMALL = ("micro", "nano")  # the scales whose searches take a CPU hours
SCALES = {
    "micro": {"model": "micro", "batch_size": 32, "steps": 200},
    "nano": {"model": "nano", "batch_size": 32, "steps": 200},
    "60m": {"model": "60m", "batch_size": 2048, "steps": 2500},
    "130m": {"model": "130m", "batch_size": 2048, "steps": 5000},
    "350m": {"model": "350m", "batch_size": 2048, "steps": 15000},
    "1b": {"model": "1b", "batch_size": 4096, "steps": 19125},
}
LARGE = {"eval_tokens": 10_000_000, "micro_batch": 32}  # at other scales
NAMES = ("Adam", "SGD with momentum", "clipped SGD", "clipped SGD, all rows")  # of demo and paper
CURVE = 4  # evaluations along a run whose validation loss is drawn over the steps

# start: where a search begins; at: what differs at a scale (for clipped SGD the paper's values; at
# nano, and so at micro, the best of an earlier search); axes: what is searched beside lr, step
# sizes and clips in steps of sqrt(10) for every method; together: what is moved at once, too, in
# which directions; tied: a setting that is always as large as another.
MOMENTA = (0.5, 0.8, 0.9, 0.95, 0.98)
GRAD_CLIPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
UPDATE_CLIPS = (1.58e-5, 5e-5, 1.58e-4, 5e-4, 1.58e-3, 5e-3, 1.58e-2)
ROW_CLIPS = (3.16e-6, 1e-5, 3.16e-5, 1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2)
METHODS = {
    "Adam": {
        "start": {"optimizer": "adamw", "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0},
        "at": {"nano": {"lr": 3.16e-3, "beta1": 0.8, "beta2": 0.99, "grad_clip": 0.3}},
        "axes": {"beta1": MOMENTA, "beta2": (0.8, 0.9, 0.95, 0.99, 0.999),
                 "grad_clip": GRAD_CLIPS}},
    "SGD": {"start": {"optimizer": "sgd", "momentum": 0, "lr": 0.316}, "axes": {}},
    "SGD with momentum": {
        "start": {"optimizer": "sgd", "lr": 1.0, "momentum": 0.9},
        "at": {"nano": {"momentum": 0.8}},
        "axes": {"momentum": MOMENTA}},
    "SGD, global norm clipped": {  # where the clip binds, lr x grad_clip is the length of a step
        "start": {"optimizer": "sgd", "lr": 31.6, "momentum": 0.9, "grad_clip": 0.1},
        "at": {"nano": {"lr": 316.0, "grad_clip": 0.03}},
        "axes": {"grad_clip": GRAD_CLIPS, "momentum": MOMENTA},
        "together": ({"lr": -1, "grad_clip": 1},)},
    "clipped SGD": {
        "start": {"optimizer": "clipped_sgd", "lr": 100.0, "token_clip": 1e-3,
                  "update_clip": 5e-4, "momentum": 0.9},
        "at": {"nano": {"lr": 1000.0, "token_clip": 3.16e-4, "momentum": 0.8},
               "350m": {"lr": 200.0}, "1b": {"lr": 300.0, "update_clip": 2e-4}},
        "axes": {"update_clip": UPDATE_CLIPS, "token_clip": ROW_CLIPS, "momentum": MOMENTA}},
    "clipped SGD, all rows": {  # ours: one row clip for all matrices, which nearly always binds
        "start": {"optimizer": "clipped_sgd", "lr": 316.0, "token_clip": 1e-4, "row_clip": 1e-4,
                  "update_clip": 1e-3, "momentum": 0.9, "schedule_update_clip": True},
        "tied": {"token_clip": "row_clip"},
        "at": {"nano": {"update_clip": 5e-4, "momentum": 0.8, "schedule_update_clip": False}},
        "axes": {"update_clip": UPDATE_CLIPS, "row_clip": ROW_CLIPS, "momentum": MOMENTA,
                 "schedule_update_clip": (False, True)},
        "together": ({"schedule_update_clip": 1, "update_clip": 1},)},
    "SCALE": {
        "start": {"optimizer": "scale", "lr": 1e-3, "momentum": 0.9},
        "axes": {"momentum": MOMENTA}},
}
# Separate learning rates: multipliers in steps of 2; start: where most methods were best in an
# earlier search, of the multipliers alone.
FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
MULTIPLIERS = dict.fromkeys(("embedding_mult", "lm_head_mult", "matrix_mult"), FACTORS)
MULTIPLIER_START = {"embedding_mult": 16.0, "lm_head_mult": 4.0, "matrix_mult": 1.0}


# ---- parts of experiments ----

def method(name, args, **changes):
    """The Run of a method at this scale, with changes to where its search starts."""
    spec, small = METHODS[name], args.scale in SMALL
    at = spec.get("at", {}).get("nano" if small else args.scale, {})
    settings = {**SCALES[args.scale], **({} if small else LARGE), "eval_every": None,
                "data": args.data, "seed": SEED, "keep": "nothing", **spec["start"], **at,
                **args.override, **changes}
    settings |= {name: settings[other] for name, other in spec.get("tied", {}).items()
                 if settings[other] is not None}
    return Run(name, settings, ("lr", *spec["axes"], *spec.get("tied", ()), *MULTIPLIERS))


def search(name, args, only=None, below=math.inf, **changes):
    """The best run of a method and all that were tried, over lr and its axes or `only` some, at
    learning rates below `below`."""
    grids = {"lr": [lr for lr in LR_GRID if lr < below], **METHODS[name]["axes"], **MULTIPLIERS}
    axes = {axis: grids[axis] for axis in only or ("lr", *METHODS[name]["axes"]) if axis in grids}
    return coordinate_search(lambda **more: method(name, args, **{**changes, **more}), axes, args,
                             METHODS[name].get("together", ()))


def final_runs(name, args, only=None, **changes):
    """A method at the best settings that a search finds, at other seeds than the search's; where
    one of these diverges, at the best settings below that learning rate, and so on. Returns the
    best run of the search, all its runs and the seeds that were given up, and the other seeds."""
    best, tried = search(name, args, only, **changes)
    curve = {"eval_every": max(1, best.settings["steps"] // CURVE)} | args.override
    while True:
        runs = run_all(rerun_with_new_seeds(best, args, first=1, **curve), args)
        lower = next_below(LR_GRID, best.lr)
        if not any(run.diverged for run in runs) or lower is None:
            return best, tried, runs
        best, more = search(name, args, only, best.lr, **{**best.settings, "lr": lower})
        tried += runs + more


def search_rows(tried, runs, adam, adams, **more):
    """The rows of a search and of its final runs for a page's JSON. adam and adams are Adam's best
    run and final runs; gaps are taken seed by seed."""
    rows = [run.row(other) | {"role": "seed"} for run, other in zip(runs, adams)]
    rows += [run.row(adam) | {"role": "search" if run.settings["seed"] == SEED else "given up"}
             for run in tried]
    return [row | more for row in rows]


def gap_cells(runs, adams):
    """Loss, perplexity and gap of final runs, as text."""
    return (outcomes(runs), interval_text([math.exp(run.loss) for run in runs], ".1f"),
            interval_text(map(gap_to, adams, runs), "+.1%"),
            interval_text([run.loss - other.loss for run, other in zip(runs, adams)], "+.3f"))


GAP_HEAD = "validation loss", "perplexity", "gap to Adam", "gap, nats"


def lr_grid(name, args, **changes):
    """Runs of a method at five learning rates, from one below its start to three above."""
    start = method(name, args).lr
    i = LR_GRID.index(min(LR_GRID, key=lambda value: abs(math.log(value / start))))
    return [method(name, args, **changes, lr=value)
            for value in (LR_GRID[i - 1], start, *LR_GRID[i + 1:i + 4])]


def stable_lr(runs):
    """Of runs by rising learning rate: the largest below the first that diverged, as text."""
    diverged = [run.diverged for run in runs]
    below = runs[:diverged.index(True)] if any(diverged) else runs
    lrs = [f"{run.lr:g}" for run in finished(below)] or ["-"]
    return f"at least {lrs[-1]}" if finished(runs) and below == runs else lrs[-1]


def resized(s, args, batch_size, steps):
    """What changes in settings s for a batch size and steps."""
    if batch_size < args.nproc or steps < 1:
        raise UserError(f"{steps} steps of {batch_size} sequences with --nproc={args.nproc} cannot "
                        "be run: give more --steps or a larger --batch_size")
    changes = {"batch_size": batch_size, "steps": steps}
    if s.get("micro_batch"):
        changes["micro_batch"] = min(s["micro_batch"], batch_size // args.nproc)
    return changes


def batch_sizes(args):
    """Changes for batches of 1/16, 1/4, 1 and 4 times the scale's, at its number of tokens."""
    s = method("Adam", args).settings
    size = s["batch_size"]
    return [resized(s, args, n, size * s["steps"] // max(1, n))
            for n in (size // 16, size // 4, size, 4 * size)]


def state_bytes(s, vocab_size):
    """Bytes of optimizer state per parameter: Adam has two fp32 averages, momentum is one, which
    SCALE has for lm_head alone (we leave out its averages for the norm gains)."""
    if not s.get("momentum", 1):
        return 0
    config = Config.named(s["model"], vocab_size)
    head = vocab_size * config.hidden / config.parameters
    return {"adamw": 8, "sgd": 4, "clipped_sgd": 4, "scale": 4 * head}[s["optimizer"]]


def clip_shares(run):
    """The shares of tensors and of rows that were clipped, means over a run, as text."""
    return [fmt(run.average(name), ".0%") for name in ("clipped_tensors", "clipped_rows")]


def plot_losses(axes, runs_by_method):
    """Validation loss along training, for {method: runs at some seeds}."""
    for name, runs in runs_by_method.items():
        if done := finished(runs):
            plot_seeds(axes, [line["step"] for line in done[0].evals],
                       [[line["val_loss"] for line in run.evals] for run in done],
                       STYLES[name], name)
        mark_diverged(axes, [run.final["step"] for run in runs if run.diverged], STYLES[name])
    axes.set(xlabel="step", ylabel="validation loss (nats per token)")


def plot_final(axes, x, runs, style, label):
    """The final losses of runs against x(run)."""
    done = finished(runs)
    axes.plot([x(run) for run in done], [run.loss for run in done], label=label, **style)
    mark_diverged(axes, [x(run) for run in runs if run.diverged], style)
    axes.set_ylabel("final loss (nats per token)")


def plot_by_lr(axes, runs, style, label):
    plot_final(axes, lambda run: run.lr, runs, style, label)
    axes.set(xscale="log", xlabel="peak learning rate (log scale)")


# ---- experiments ----

def demo(args):
    page = Path(f"results/{args.scale}/gap.json")
    if not page.exists():
        raise UserError(f"{page} is missing, and the demo runs at its settings: restore it, or run "
                        f"`make gap SCALE={args.scale}` first")
    best = {}  # the first row of each method at its best settings
    for row in json.loads(page.read_text())["rows"]:
        if row["role"] == "seed" and row["method"] in NAMES:
            best.setdefault(row["method"], {name: row[name] for name in row.keys() & SETTINGS})
    runs = run_all([method(name, args, **{**row, "data": args.data, **args.override})
                    for name, row in best.items()], args)
    rows = [run.row(adam=runs[0]) for run in runs]
    table = markdown_table(
        ("method", "settings", "validation loss", "gap to Adam", "minutes", "tokens/s"),
        [(run.label, run.settings_text, run.outcome, fmt(row["gap"], "+.1%"),
          f"{(row['seconds'] or 0) / 60:.1f}", fmt(row["tok_per_s"], ",.0f"))
         for run, row in zip(runs, rows)])
    return ExperimentResult(
        "Adam, SGD and clipped SGD side by side", table, rows, runs,
        f"The first seed of four methods of {page.with_suffix('.md')}, with one learning rate for "
        "all tensors, each at its best settings.",
        lambda axes: plot_losses(axes, {run.label: [run] for run in runs}))


def gap(args):
    for name in MULTIPLIERS:
        if name in args.override:
            raise UserError(f"the search is over this: drop --{name}")

    def both(name):
        one = final_runs(name, args)
        start = {**one[0].settings, **MULTIPLIER_START}
        axes = *MULTIPLIERS, "lr", *METHODS[name]["axes"]
        return {"one": one, "separate": final_runs(name, args, axes, **start)}
    found = concurrently(both, METHODS, args)
    if args.dry:
        return None
    vocab_size = read_meta(args.data)["vocab_size"]
    rows, lines, all_runs = [], [], []
    for block in ("one", "separate"):
        adam, _, adams = found["Adam"][block]
        for name in METHODS:
            best, tried, runs = found[name][block]
            all_runs += runs + tried
            rows += search_rows(tried, runs, adam, adams, learning_rates=block)
            grids = METHODS[name]["axes"] | (MULTIPLIERS if block == "separate" else {})
            edges = [axis for axis, grid in grids.items() if len(grid) > 2
                     and best.settings[axis] in (grid[0], grid[-1])]
            edge = f" (the grid's edge: {', '.join(edges)})" if edges else ""
            lines.append((block, name, runs[0].settings_text + edge, *gap_cells(runs, adams),
                          *clip_shares(runs[0]), f"{state_bytes(best.settings, vocab_size):.3g}",
                          str(sum(run.settings["seed"] == SEED for run in tried))))
    table = markdown_table(
        ("learning rates", "method", "best settings", *GAP_HEAD, "tensors clipped", "rows clipped",
         "state, bytes per parameter", "runs of the search"), lines)

    def draw(panels):
        titles = {"one": "one learning rate for all tensors",
                  "separate": "embedding, lm_head and other matrices apart"}
        for axes, (block, title) in zip(panels, titles.items()):
            plot_losses(axes, {name: blocks[block][-1] for name, blocks in found.items()})
            axes.sharey(panels[0])
            axes.set_title(title)
        panels[1].set_ylabel(None)
    return ExperimentResult(
        "Each method at its best settings", table, rows, all_runs,
        f"Each method at the best settings that a search found at seed {SEED}, run at other seeds; "
        "where one of these diverged, the search went on below that learning rate. Separate "
        "learning rates: a second search, from where the first ended, over the same settings and "
        "over multipliers of the learning rate (for clipped SGD also of the update clip) of the "
        "embedding, lm_head and the other matrices. Mean and 95% interval (Student's t); gaps are "
        "taken seed by seed, one learning rate to one, separate to separate; shares clipped are of "
        "the first seed.", draw, (1, 2))


def lr(args):
    grids = {name: lr_grid(name, args) for name in METHODS}
    runs = run_all(sum(grids.values(), []), args)
    best = {name: min(grid, key=lambda run: run.loss) for name, grid in grids.items()}
    rows = [run.row(best["Adam"]) | {"best": run is best[run.label],
                                     "effective_lr": run.average("effective_lr")} for run in runs]
    lines = []
    for name, grid in grids.items():
        top, at_best = best[name], ("-", "-")
        if finished(grid):
            at_best = (f"{top.lr:g}", fmt(top.average("effective_lr"), ".2g"))
        lines.append((name, "; ".join(f"{run.lr:g}: {run.outcome}" for run in grid),
                      fmt(gap_to(best["Adam"], top), "+.1%"), stable_lr(grid), *at_best))
    table = markdown_table(
        ("method", "validation loss by learning rate", "gap to Adam",
         "maximum stable learning rate", "best", "effective learning rate at the best"), lines)

    def draw(axes):
        for name, grid in grids.items():
            plot_by_lr(axes, grid, STYLES[name], name)
    return ExperimentResult("Final loss against the learning rate", table, rows, runs,
                            "Final validation loss against the peak learning rate.", draw)


def ablation(args):
    """Is it the clipping or the learning rate?"""
    small, searched = max_stable_lr(lambda **c: method("SGD with momentum", args, **c), args)
    large = method("clipped SGD", args).lr
    # searched, all but Adam over the update clip alone; at lr 1e9 every update is clipped: each
    # tensor's is scaled to one RMS
    clips = {"only": ["update_clip"]}
    options = {"Adam": ("Adam", {}), "per-tensor normalized": (
        "clipped SGD", {**clips, "lr": 1e9, "token_clip": None})}
    for clipped, changes in (("lm_head", {"row_clip": None}),
                             ("lm_head and embedding", {"row_clip_on": "embedding"}),
                             ("all", {})):
        options[f"{clipped} rows"] = "clipped SGD, all rows", {**clips, **changes}
        options[f"{clipped} rows, scheduled"] = "clipped SGD, all rows", {
            **clips, **changes, "update_clip": 1.58e-3, "schedule_update_clip": True}
    found = concurrently(lambda key: search(options[key][0], args, **options[key][1]),
                         options, args)
    searched += sum([tried for _, tried in found.values()], [])
    best_adam = found["Adam"][0]

    cells = {}  # (clip, learning rate or "searched"): runs
    for clip, name, changes in (
            ("no clip", "clipped SGD", {"token_clip": None, "update_clip": None}),
            ("token clip", "clipped SGD", {"update_clip": None}),
            ("update clip", "clipped SGD", {"token_clip": None}),
            ("both clips", "clipped SGD", {}),
            ("global norm", "SGD, global norm clipped", {})):
        for value in (small, large):
            run = method(name, args, lr=value, **changes)
            all_seeds = clip in ("no clip", "both clips")
            cells[clip, value] = rerun_with_new_seeds(run, args) if all_seeds else [run]
    for key, (best, _) in found.items():
        cells[key, "searched"] = rerun_with_new_seeds(best, args)
    adams = cells["Adam", "searched"]
    runs = run_all(sum(cells.values(), []), args) + searched

    rows, lines = [], []
    for (clip, _), cell in cells.items():
        rows += [run.row(adam) | {"cell": clip, "clipped_tensors": run.average("clipped_tensors"),
                                  "clipped_rows": run.average("clipped_rows")}
                 for run, adam in zip(cell, adams)]
        lines.append((clip, cell[0].settings_text, outcomes(cell),
                      interval_text(map(gap_to, adams, cell), "+.1%"), str(len(cell)),
                      *clip_shares(cell[0])))
    rows += [run.row(best_adam) | {"cell": "search"} for run in searched]
    table = markdown_table(("clip", "settings", "validation loss", "gap to Adam", "seeds",
                            "tensors clipped", "rows clipped"), lines)

    def draw(panels):
        panels[1].sharey(panels[0])
        for value, color, label in (
                (small, "#d55e00", "at SGD's maximum stable lr"),
                (large, "#0072b2", "at clipped SGD's lr"),
                ("searched", "black", "searched")):
            axes = panels[int(value == "searched")]
            clips = list(dict.fromkeys(clip for clip, lr in cells
                                       if (lr == "searched") == (value == "searched")))
            clip_of = {run: clips.index(clip) for (clip, lr), cell in cells.items() if lr == value
                       for run in cell}
            style = {"color": color, "marker": "o", "linestyle": ""}
            plot_final(axes, clip_of.get, list(clip_of), style, label)
            axes.set_xticks(range(len(clips)), [clip.replace(" ", "\n") for clip in clips])
    return ExperimentResult(
        "Which clip, at which learning rate", table, rows, runs,
        "Clips at the maximum stable learning rate of SGD with momentum and at clipped SGD's. "
        "Searched: Adam; per-tensor normalized SGD; and clipped SGD by whose rows are clipped, "
        "with the update clip constant or on the schedule. Shares clipped are of the first seed.",
        draw, (2, 1))


BATCH_AXES = ("lr", "update_clip")  # what is searched at each batch size


def batch(args):
    names, shapes = ("Adam", "SGD", "SGD with momentum", "clipped SGD"), batch_sizes(args)

    def at_each_size(name):
        found, start = [], {}
        for shape in shapes:  # from the best at the batch size before
            found.append(search(name, args, BATCH_AXES, **shape, **start))
            start = {axis: found[-1][0].settings[axis] for axis in BATCH_AXES
                     if axis in found[-1][0].settings}
        return found
    found = concurrently(at_each_size, names, args)
    best = {name: [run for run, _ in found[name]] for name in names}
    rows, lines, runs = [], [], []
    for i, shape in enumerate(shapes):
        line, adam = [str(shape["batch_size"])], best["Adam"][i]
        for name in names:
            run, tried = found[name][i]
            rows += [each.row(adam) | {"best": each.out == run.out} for each in tried]
            runs += tried
            line.append(f"{run.outcome} ({run.lr:g}), {fmt(gap_to(adam, run), '+.1%')}")
        lines.append(line)
    table = markdown_table(
        ("sequences per batch", *(f"{name}: loss (lr), gap" for name in names)), lines)

    def draw(axes):
        for name in names:
            gaps = [gap_to(adam, run) for adam, run in zip(best["Adam"], best[name])]
            axes.plot([line[0] for line in lines],
                      [math.nan if gap is None else 100 * gap for gap in gaps],
                      label=name, **STYLES[name])
        axes.set(xlabel="sequences per batch", ylabel="gap to Adam (% of its loss)")
    return ExperimentResult(
        "The gap to Adam against the batch size", table, rows, runs,
        "The gap to Adam against the batch size at a fixed number of tokens, each method at its "
        "best learning rate (clipped SGD: and update clip) at that size.", draw)


def dynamics(args):
    small, _, large, _ = batch_sizes(args)  # the largest has too few steps
    shapes = {"small batch": small, "large batch": large}
    keys = [(name, size) for size in shapes for name in ("Adam", "clipped SGD")]
    found = concurrently(lambda key: search(key[0], args, BATCH_AXES, **shapes[key[1]]),
                         keys, args)
    quantities = {"grad_norm": "gradient norm", "weight_to_gradient": "weight-to-gradient ratio",
                  "effective_lr": "effective learning rate", "imbalance": "token-class imbalance"}
    rows, lines = [], []
    for (name, size), (run, _) in found.items():
        medians = {key: run.average(key, statistics.median) for key in quantities}
        rows.append(run.row(found["Adam", size][0])
                    | {"size": size, "spikes": run.spikes, **medians})
        lines.append((name, str(run.settings["batch_size"]), f"{run.lr:g}", run.outcome,
                      *(fmt(median, ".3g") for median in medians.values()),
                      f"{len(run.spikes)} of {max(0, len(run.logged('step')) - 100)}"))
    table = markdown_table(
        ("method", "sequences per batch", "lr", "validation loss",
         *(f"{text} (median)" for text in quantities.values()),
         "spikes among the steps from 100 on"), lines)

    def draw(panels):
        for axes, (key, text) in zip(panels.flat, quantities.items()):
            for (name, size), (run, _) in found.items():
                steps = run.logged("tokens", key)
                axes.plot([tokens / 1e6 for tokens, _ in steps], [value for _, value in steps],
                          color="black" if name == "Adam" else "#56b4e9", label=f"{name}, {size}",
                          linewidth=0.5 if size == "small batch" else 1.5)
            axes.set(yscale="log", xlabel="million tokens", ylabel=f"{text} (log scale)")
    return ExperimentResult(
        "Training dynamics in small and large batches", table, rows,
        sum([tried for _, tried in found.values()], []),
        "Each method at its best learning rate (clipped SGD: and update clip) at that batch size. "
        "A spike is a gradient norm above 5 x the median of the 100 steps before.", draw, (2, 2))


def thresholds(args):
    """How the best settings of clipped SGD move with the width, the batch and the steps."""
    s, axes = method("Adam", args).settings, ("lr", "update_clip", "token_clip")
    size, steps, i = s["batch_size"] // 2, s["steps"] // 2, list(SIZES).index(s["model"])
    points = [{"model": model} for model in list(SIZES)[max(0, i - 1):i + 2] if model != s["model"]]
    points += [resized(s, args, n, steps) for n in (size // 4, 4 * size)]
    points += [resized(s, args, size, n) for n in (steps // 4, 4 * steps)]
    base = resized(s, args, size, steps)
    found = [search("clipped SGD", args, axes, **base)]
    centre = found[0][0]
    base |= {axis: centre.settings[axis] for axis in axes}
    found += concurrently(lambda i: search("clipped SGD", args, axes, **{**base, **points[i]}),
                          range(len(points)), args).values()

    rows, lines = [], []
    for best, tried in found:
        rows += [run.row() | {"best": run.out == best.out} for run in tried]
        s = best.settings
        lines.append((s["model"], str(s["batch_size"]), str(s["steps"]), best.outcome,
                      *(f"{s[axis]:g}" for axis in axes)))
    table = markdown_table(("model", "sequences per batch", "steps", "validation loss", "best lr",
                            "update clip", "token clip"), lines)

    def draw(panels):
        varied = {"model": "model, by width", "batch_size": "sequences per batch", "steps": "steps"}
        for panel, (key, label) in zip(panels, varied.items()):
            # the centre, and the points that differ from it in this
            line = [run for run in finished(best for best, _ in found)
                    if run is centre or run.settings[key] != centre.settings[key]]
            line.sort(key=lambda run: (list(SIZES).index(run.settings["model"]),
                                       run.settings["batch_size"], run.settings["steps"]))
            for axis, style in (("update_clip", "clipped SGD"), ("token_clip", "Adam")):
                panel.plot([str(run.settings[key]) for run in line],
                           [run.settings[axis] for run in line],
                           label=axis.replace("_", " "), **STYLES[style])
            panel.sharey(panels[0])
            panel.set(yscale="log", xlabel=label)
        panels[0].set_ylabel("best update clip (weight units),\nbest token clip (gradient units)")
    return ExperimentResult(
        "Best clips against width, batch and steps", table, rows,
        sum([tried for _, tried in found], []),
        "The best settings of clipped SGD by a search in steps of sqrt(10), one seed.",
        draw, (1, 3))


def frequency(args):
    """Figure 1 of Kunstner et al. 2024, with clipped SGD as one more optimizer; gap's runs."""
    names = NAMES[:3]
    if not args.dry and not Path(args.data, "token_counts.npy").exists():
        raise UserError(f"{args.data}/token_counts.npy is missing: restore it, or prepare the data "
                        "again with data/prepare.py into another folder")
    found = concurrently(lambda name: final_runs(name, args), names, args)
    if args.dry:
        return None
    final = {name: runs for name, (_, _, runs) in found.items()}
    counts = token_counts(args.data, read_meta(args.data)["vocab_size"])
    rows, losses = [], {}
    for name, runs in final.items():
        for adam, run in zip(final["Adam"], runs):
            by_group = run.evals[-1]["group_losses"] if run.evals else None
            rows.append(run.row(adam) | {"group_losses": by_group})
        # [seeds][groups, then all tokens]; None where the run did not finish
        losses[name] = [[*run.evals[-1]["group_losses"], run.loss] if finished([run])
                        else [None] * 11 for run in runs]
    group, lines = frequency_groups(counts), []
    for i in range(11):
        closed = []  # share of the gap of SGD with momentum to Adam that clipped SGD closes
        for adam, sgd, clipped in zip(*losses.values()):
            known = None not in (adam[i], sgd[i], clipped[i]) and sgd[i] != adam[i]
            closed.append((sgd[i] - clipped[i]) / (sgd[i] - adam[i]) if known else None)
        lines.append((str(i + 1), f"{(group == i).sum():,}",
                      *(interval_text([seed[i] for seed in losses[name]], ".3f") for name in names),
                      interval_text(closed, ".0%")))
    lines[10] = ("all", f"{len(group):,}", *map(outcomes, final.values()), lines[10][-1])
    table = markdown_table(("group, frequent to rare", "token classes", *names,
                            "of the gap of SGD with momentum, clipped SGD closes"), lines)

    def draw(panels):
        for axes, name in zip(panels, names):
            done = [run.evals for run in finished(final[name])]
            for i in range(10):
                series = [[line["group_losses"][i] for line in evals] for evals in done]
                if done and None not in series[0]:
                    plot_seeds(axes, [line["step"] for line in done[0]], series,
                               {"color": str(0.08 * i)}, f"group {i + 1}")
            axes.set(title=name, xlabel="step")
            axes.sharey(panels[0])
        panels[0].set_ylabel("validation loss of the group (nats per token)")
    return ExperimentResult(
        "Validation loss by token frequency", table, rows, sum(final.values(), []),
        "Ten groups of token classes, each about a tenth of the training text, from frequent (1, "
        "dark) to rare (10, pale).", draw, (1, 3))


# ---- the command line ----

EXPERIMENTS = {f.__name__: f for f in (demo, gap, lr, ablation, batch, dynamics, thresholds,
                                       frequency)}
SEEDED = ("gap", "ablation", "frequency", "spikes", "paper", "length")  # --seeds acts in these


def overrides(words, parser):
    """The settings of train.py for all runs among the words of a command line, as a dict."""
    found = {}
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals or name in ("lr", "seed", "out"):
            parser.error(f"{word}: give settings of train.py as --name=value; lr, seed and out are "
                         "the experiment's")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):  # a word
            found[name] = None if text == "none" else text
    return found


def main(experiments, data="data/python", **more):
    """The command line: one of {name: function}, its options, and settings of train.py. data is
    the default of --data; `more`, {name: (type, default)}, are options of these alone."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, epilog="Any other --name=value is a setting of train.py for all runs.")
    option, cores = parser.add_argument, min(8, torch.get_num_threads())
    option("name", choices=experiments, nargs="?", default=next(iter(experiments)))
    option("--scale", choices=SCALES, default="nano")
    option("--data", default=data, help="data directory, made by data/prepare.py")
    for name, (kind, value) in more.items():
        option(f"--{name}", type=kind, default=value, help=str(value))
    option("--seeds", type=int, choices=range(1, 11), metavar="N",
           help="of final runs [3; 5 in gap and frequency, 1 in paper]")
    option("--nproc", type=int, default=1, help="processes per run, by torchrun [1]")
    option("--jobs", type=int, default=torch.cuda.device_count() or cores,
           help="runs at a time [one per GPU, or per core of a CPU, at most 8]")
    option("--dry", action="store_true", help="print the commands of the runs that are missing")
    option("--tune", action="store_true", help="begin a search at a scale beyond nano")
    args, others = parser.parse_known_args()
    if args.seeds and args.name not in SEEDED:
        parser.error(f"--seeds does nothing in {args.name}: drop it")
    if min(args.jobs, args.nproc) < 1:
        parser.error("--jobs and --nproc start at 1")
    args.override, args.data = overrides(others, parser), args.data.rstrip("/")
    # what is not the default is in the page's name
    args.suffix = "" if args.data == data else f"-{Path(args.data).name}"
    for name, (_, value) in more.items():
        if getattr(args, name) != value:
            args.suffix += f"-{name}" + ",".join(f"{x:g}" for x in getattr(args, name))
    default = {"paper": 1, "gap": 5, "frequency": 5}.get(args.name, 3)
    args.suffix += "" if args.seeds in (None, default) else f"-seeds{args.seeds}"
    args.seeds = args.seeds or default
    args.suffix += "".join(f"-{name}{value}" for name, value in args.override.items())
    args.command = f"python -m experiments.{Path(sys.argv[0]).stem} {shlex.join(sys.argv[1:])}"
    args.pool = ThreadPoolExecutor(args.jobs)

    try:
        if args.scale not in SMALL and args.name not in ("demo", "paper") and not (
                args.dry or args.tune):
            raise UserError(f"at {args.scale} this is many runs: `make cost TARGET={args.name} "
                            f"SCALE={args.scale}` says how many and how long, TUNE=1 or --tune "
                            "begins, `make paper` has four runs")
        for name in METHODS:  # a setting that does not suit them all ends it here
            method(name, args)
        if not args.dry:
            signal.signal(signal.SIGTERM, stop_all)
            signal.signal(signal.SIGINT, stop_all)
        result = experiments[args.name](args)
        if result and not args.dry:
            save_results(args.name, args, result)
    except UserError as e:
        sys.exit(f"{args.name}: {e}")
    if args.dry:
        print("the first runs only: a search continues from what it finds", file=sys.stderr)
    elif result:
        sys.exit(any(run.final is None for run in result.runs))


if __name__ == "__main__":
    main(EXPERIMENTS)
