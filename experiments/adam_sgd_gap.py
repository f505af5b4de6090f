"""The Adam-SGD gap (Glentis et al. 2026, arXiv 2605.17787): one function per experiment.

    python -m experiments.adam_sgd_gap demo                   # four methods side by side
    python -m experiments.adam_sgd_gap gap                    # seven methods, tuned, five seeds
    python -m experiments.adam_sgd_gap one_lr --data=data/news    # the same, half of the table
    python -m experiments.adam_sgd_gap gap --scale=1b --nproc=8 --dry    # the paper's scale
    python -m experiments.adam_sgd_gap batch --jobs=2 --dtype=bfloat16   # any setting of train.py

An experiment makes its runs and returns an ExperimentResult, which is written to
results/SCALE/NAME.md, .json and .png.
"""
import json
import math
import statistics
from dataclasses import fields
from pathlib import Path

import numpy as np

from experiments.methods import (
    GAP_HEAD, METHODS, MULTIPLIER_START, MULTIPLIERS, NAMES, SEED, clip_shares, compared,
    final_runs, gap_cells, lr_grid, main, method, plot_by_lr, plot_final, plot_losses, resized,
    search, search_rows, stable_lr_text, state_bytes)
from experiments.sweep import (
    STYLES, ExperimentResult, concurrently, finished, fmt, gap_to, interval_text, markdown_table,
    max_stable_lr, outcomes, plot_seeds, rerun_with_new_seeds, run_all)
from loader import UserError, access, read_meta, token_counts
from metrics import frequency_groups
from model import SIZES
from train import Settings


def demo(args):
    pages = [Path(f"results/{args.scale}/gap{suffix}.json") for suffix in (args.data_suffix, "")]
    page = next(filter(Path.exists, pages), None)
    if page is None:
        raise UserError(f"{pages[0]} is missing, and the demo runs at its settings: restore it, or "
                        f"run `make gap SCALE={args.scale} DATA={args.data}` first")
    settings, best = {field.name for field in fields(Settings)}, {}
    with access("read", page, "is broken", "restore it, or run `make gap` again"):
        for row in json.loads(page.read_text())["rows"]:
            if row["role"] == "seed" and row["method"] in NAMES:  # the first of each
                best.setdefault(row["method"], {name: row[name] for name in row.keys() & settings})
    found = {name: rerun_with_new_seeds(
        method(name, args, **{**row, "data": args.data, **args.override}), args)
        for name, row in best.items()}
    rows, cells = compared(found, args)
    table = markdown_table(
        ("method", "settings", "validation loss", "gap to Adam", "minutes", "tokens/s"),
        [(*cell, f"{(row['seconds'] or 0) / 60:.1f}", fmt(row["tok_per_s"], ",.0f"))
         for cell, row in zip(cells, rows[::args.seeds])])
    first = "the first seed" if args.seeds == 1 else f"the first {args.seeds} seeds"
    return ExperimentResult(
        "Adam, SGD and clipped SGD side by side", table, rows, sum(found.values(), []),
        f"Four methods at the best settings and {first} of {page.with_suffix('.md')}, with "
        "one learning rate for all tensors.",
        lambda axes: plot_losses(axes, found))


TITLES = {"one": "one learning rate for all tensors",
          "separate": "embedding, lm_head and other matrices apart"}


def gap(args, blocks=tuple(TITLES)):
    reason = "the search is over this" if "separate" in blocks else "all have one learning rate"
    for name in MULTIPLIERS:
        if name in args.override:
            raise UserError(f"{reason}: drop --{name}")

    def search_blocks(name):
        runs = {"one": final_runs(name, args)}
        if "separate" in blocks:
            start = {**runs["one"][0].settings, **MULTIPLIER_START}
            axes = *MULTIPLIERS, "lr", *METHODS[name]["axes"]
            runs["separate"] = final_runs(name, args, axes, fine=False, **start)
        return runs
    found = concurrently(search_blocks, METHODS, args)
    if args.dry:
        return None
    vocab_size = read_meta(args.data)["vocab_size"]
    rows, lines, all_runs = [], [], []
    for block in blocks:
        adam, _, adams = found["Adam"][block]
        for name in METHODS:
            best, tried, runs = found[name][block]
            all_runs += runs + tried
            rows += search_rows(tried, runs, adam, adams, learning_rates=block)
            grids = METHODS[name]["axes"] | (MULTIPLIERS if block == "separate" else {})
            edges = [axis for axis, grid in grids.items()  # of two values both are at an edge
                     if len(grid) > 2 and best.settings[axis] in (grid[0], grid[-1])]
            edge = f" (the grid's edge: {', '.join(edges)})" if edges else ""
            lines.append((block, name, runs[0].settings_text + edge, *gap_cells(runs, adams),
                          *clip_shares(runs[0]), f"{state_bytes(best.settings, vocab_size):.3g}",
                          str(sum(run.settings["seed"] == SEED for run in tried))))
    table = markdown_table(
        ("learning rates", "method", "best settings", *GAP_HEAD, "tensors clipped", "rows clipped",
         "state, bytes per parameter", "runs of the search"), lines)

    def draw(panels):
        panels = np.atleast_1d(panels)
        for axes, block in zip(panels, blocks):
            plot_losses(axes, {name: runs[block][-1] for name, runs in found.items()})
            axes.sharey(panels[0])
            axes.set_title(TITLES[block])
        for axes in panels[1:]:
            axes.set_ylabel(None)
    second, alike = "", ""
    if "separate" in blocks:
        second = ("Separate learning rates: a second search, from where the first ended, over the "
                  "same settings and over multipliers of the learning rate (for clipped SGD also "
                  "of the update clip) of the embedding, lm_head and the other matrices. ")
        alike = ", one learning rate to one, separate to separate"
    return ExperimentResult(
        "Each method at its best settings", table, rows, all_runs,
        f"Each method at the best settings that a search found at seed {SEED}, run at other seeds; "
        "where one of these diverged, the search went on below that learning rate. Learning rates "
        "and clips are searched in steps of sqrt(10), then, with one learning rate for all "
        "tensors, from the best in half of these; of the two the better on the mean of the other "
        f"seeds is shown. {second}Mean and 95% interval (Student's t); gaps are taken seed by "
        f"seed{alike}; clipped shares are those of the first seed.", draw, (1, len(blocks)))


def one_lr(args):
    """The first half of gap's table, in a third of its time."""
    return gap(args, ["one"])


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
                      fmt(gap_to(best["Adam"], top), "+.1%"), stable_lr_text(grid), *at_best))
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
    # variants at both of these learning rates: method, changes
    fixed = {"no clip": ("clipped SGD", {"token_clip": None, "update_clip": None}),
             "token clip": ("clipped SGD", {"update_clip": None}),
             "update clip": ("clipped SGD", {"token_clip": None}),
             "both clips": ("clipped SGD", {}),
             "global norm": ("SGD, global norm clipped", {})}
    # variants that are searched, all but Adam over the update clip alone; at lr 1e9 every update is
    # clipped: each tensor's is scaled to one RMS
    tuned = {"Adam": ("Adam", {}),
             "per-tensor normalized": ("clipped SGD", {"lr": 1e9, "token_clip": None})}
    scheduled = {"update_clip": 1.58e-3, "schedule_update_clip": True}
    for name, changes in (("lm_head rows", {"row_clip": None}),
                          ("lm_head and embedding rows", {"row_clip_on": "embedding"}),
                          ("all rows", {})):
        tuned[name] = "clipped SGD, all rows", changes
        tuned[f"{name}, scheduled"] = "clipped SGD, all rows", changes | scheduled

    def tune(variant):
        name, changes = tuned[variant]
        return search(name, args, None if name == "Adam" else ["update_clip"], **changes)
    found = concurrently(tune, tuned, args)
    searched += sum([tried for _, tried in found.values()], [])
    best_adam = found["Adam"][0]

    cells = {}  # (variant, learning rate or "searched"): runs
    for variant, (name, changes) in fixed.items():
        for value in (small, large):
            seeds = rerun_with_new_seeds(method(name, args, lr=value, **changes), args, first=1)
            cells[variant, value] = seeds if variant in ("no clip", "both clips") else seeds[:1]
    for variant, (best, _) in found.items():
        cells[variant, "searched"] = rerun_with_new_seeds(best, args, first=1)
    adams = cells["Adam", "searched"]
    runs = run_all(sum(cells.values(), []), args) + searched

    rows, lines = [], []
    for (variant, _), cell in cells.items():
        for run, adam in zip(cell, adams):
            shares = {name: run.average(name) for name in ("clipped_tensors", "clipped_rows")}
            rows.append(run.row(adam) | {"cell": variant, **shares})
        lines.append((variant, cell[0].settings_text, outcomes(cell),
                      interval_text(map(gap_to, adams, cell), "+.1%"), str(len(cell)),
                      *clip_shares(cell[0])))
    rows += [run.row(best_adam) | {"cell": "search"} for run in searched]
    table = markdown_table(("clip", "settings", "validation loss", "gap to Adam", "seeds",
                            "tensors clipped", "rows clipped"), lines)

    def draw(panels):
        panels[1].sharey(panels[0])
        series = ((small, "", "#d55e00", "at SGD's maximum stable lr"),
                  (large, "", "#0072b2", "at clipped SGD's lr"),
                  ("searched", "", "black", "searched"),
                  ("searched", ", scheduled", "#999999", "searched, scheduled"))
        for value, ending, color, label in series:
            axes = panels[int(value == "searched")]
            names = [name for name in (found if value == "searched" else fixed)
                     if not name.endswith(", scheduled")]
            place = {run: i for i, name in enumerate(names)
                     for run in cells.get((name + ending, value), [])}
            style = {"color": color, "marker": "o", "linestyle": ""}
            plot_final(axes, place.get, list(place), style, label)
            axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    return ExperimentResult(
        "Which clip, at which learning rate", table, rows, runs,
        "Clips at the maximum stable learning rate of SGD with momentum and at clipped SGD's. "
        "Searched: Adam; per-tensor normalized SGD; and clipped SGD by which matrices' rows are "
        "clipped, with the update clip constant or on the schedule. Final runs have other seeds "
        "than the search. Clipped shares are those of the first seed.",
        draw, (2, 1))


def batch_sizes(args):
    """Changes for batches of 1/16, 1/4, 1 and 4 times the scale's, at its number of tokens."""
    s = method("Adam", args).settings
    size = s["batch_size"]
    return [resized(args, n, size * s["steps"] // max(1, n))
            for n in (size // 16, size // 4, size, 4 * size)]


def batch(args):
    names, shapes = ("Adam", "SGD", "SGD with momentum", "clipped SGD"), batch_sizes(args)
    keys = [(name, i) for i in range(len(shapes)) for name in names]
    found = concurrently(lambda key: search(key[0], args, **shapes[key[1]]), keys, args)
    rows, lines, runs = [], [], []
    for name, i in keys:
        (best, tried), adam = found[name, i], found["Adam", i][0]
        rows += [run.row(adam) | {"best": run.out == best.out} for run in tried]
        runs += tried
        lines.append((str(shapes[i]["batch_size"]), name, best.settings_text, best.outcome,
                      fmt(gap_to(adam, best), "+.1%"), str(len(tried))))
    table = markdown_table(("sequences per batch", "method", "best settings", "validation loss",
                            "gap to Adam", "runs of the search"), lines)

    def draw(axes):
        for name in names:
            gaps = [gap_to(found["Adam", i][0], found[name, i][0]) for i in range(len(shapes))]
            axes.plot([str(shape["batch_size"]) for shape in shapes],
                      [math.nan if gap is None else 100 * gap for gap in gaps],
                      label=name, **STYLES[name])
        axes.set(xlabel="sequences per batch", ylabel="gap to Adam (% of its loss)")
    return ExperimentResult(
        "The gap to Adam against the batch size", table, rows, runs,
        "The gap to Adam against the batch size at a fixed number of tokens, each method at the "
        "best settings of a search at that size.", draw)


def dynamics(args):
    small, _, large, _ = batch_sizes(args)  # the largest has too few steps
    shapes = {"small batch": small, "large batch": large}
    keys = [(name, size) for size in shapes for name in ("Adam", "clipped SGD")]
    found = concurrently(lambda key: search(key[0], args, **shapes[key[1]]), keys, args)
    quantities = {"grad_norm": "gradient norm", "weight_to_gradient": "weight-to-gradient ratio",
                  "effective_lr": "effective learning rate", "imbalance": "token-class imbalance"}
    rows, lines = [], []
    for (name, size), (run, _) in found.items():
        medians = {key: run.average(key, statistics.median) for key in quantities}
        rows.append(run.row(found["Adam", size][0])
                    | {"size": size, "spikes": run.spikes, **medians})
        lines.append((name, str(run.settings["batch_size"]), run.settings_text, run.outcome,
                      *(fmt(median, ".3g") for median in medians.values()),
                      f"{len(run.spikes)} of {max(0, len(run.logged('step')) - 100)}"))
    table = markdown_table(
        ("method", "sequences per batch", "best settings", "validation loss",
         *(f"{text} (median)" for text in quantities.values()),
         "spikes among the steps after the first 100"), lines)

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
        "Each method at the best settings of a search at that batch size. A spike is a gradient "
        "norm above 5 x the median of the 100 steps before.",
        draw, (2, 2))


def thresholds(args):
    """How the best settings of clipped SGD move with the width, the batch and the steps."""
    s, axes = method("Adam", args).settings, ("lr", "update_clip", "token_clip")
    size, steps, i = s["batch_size"] // 2, s["steps"] // 2, list(SIZES).index(s["model"])
    points = [{"model": model} for model in list(SIZES)[max(0, i - 1):i + 2] if model != s["model"]]
    points += [resized(args, n, steps) for n in (size // 4, 4 * size)]
    points += [resized(args, size, n) for n in (steps // 4, 4 * steps)]
    base = resized(args, size, steps)
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
    if not args.dry:
        counts = token_counts(args.data, read_meta(args.data)["vocab_size"])
        if counts is None:
            raise UserError(f"{args.data}/token_counts.npy is missing: restore it, or prepare the "
                            "data again with data/prepare.py into another folder")
    found = concurrently(lambda name: final_runs(name, args), names, args)
    if args.dry:
        return None
    final = {name: runs for name, (_, _, runs) in found.items()}
    searched = sum([tried for _, tried, _ in found.values()], [])
    for run in finished(sum(final.values(), [])):
        if "group_losses" not in run.evals[-1]:
            raise UserError(f"{run.out} ran while token_counts.npy was missing: move it and its "
                            "like away, and start again")
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
                            "share of the gap of SGD with momentum that clipped SGD closes"), lines)

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
        "Validation loss by token frequency", table, rows, sum(final.values(), []) + searched,
        "Ten groups of token classes, each about a tenth of the training text, from frequent (1, "
        "dark) to rare (10, pale).", draw, (1, 3))


EXPERIMENTS = {f.__name__: f for f in (demo, gap, one_lr, lr, ablation, batch, dynamics,
                                       thresholds, frequency)}

if __name__ == "__main__":
    main(EXPERIMENTS)
