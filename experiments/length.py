"""The gap to Adam against the length of training, in tokens per parameter (ours).

    python -m experiments.length --scale=micro      # options as in adam_sgd_gap.py
    python -m experiments.length                    # nano, from micro's settings, moved
    python -m experiments.length --lengths=0.4,2    # tokens per parameter

Every length is a run of its own, with its own schedule. At micro, up to FULL tokens per parameter
all settings of a method are searched, beyond that its step size and the settings in LONG; the
search begins at the best settings of the length before. At other scales only the step size is
searched, from where the best settings at micro point.
"""
import argparse
import json
import math
from pathlib import Path
from statistics import fmean

from experiments.methods import (
    FINE, GAP_HEAD, METHODS, data_shape, gap_cells, main, method, resized, search,
    search_rows)
from experiments.sweep import (
    LR_GRID, STYLES, ExperimentResult, concurrently, finished, gap_to, mark_diverged,
    markdown_table, rerun_with_new_seeds, run_all)
from loader import UserError, access
from model import Config

NAMES = "Adam", "SGD with momentum", "clipped SGD", "clipped SGD, all rows", "SCALE"
LONG = "beta1", "beta2", "momentum", "schedule_update_clip"  # searched at every length
LENGTHS = 0.4, 2.0, 7.0, 20.0  # tokens per parameter; the paper's are 15 to 21
NANO = LENGTHS[:3]  # data/packages has 12 tokens per parameter of nano
FULL = 2.0  # up to here all settings are searched (at micro), and the best run at other seeds, too
MICRO = Path("results/micro/length.json")


def step_size(name):
    """The setting that sets the size of a method's steps."""
    return "update_clip" if "update_clip" in METHODS[name]["axes"] else "lr"


def moved(name, args, n):
    """Where the search begins at another scale than micro: at the scale's best settings for its
    200 steps, moved as micro's best moved from the shortest length to n tokens per parameter;
    learning rates and clips by the same factor."""
    if not MICRO.exists():
        raise UserError(f"{MICRO} is missing, from whose settings this starts: restore it, or run "
                        "`make length SCALE=micro` first")
    with access("read", MICRO, "is broken", "restore it, or run `make length SCALE=micro` again"):
        best = {row["tokens_per_parameter"]: row for row in json.loads(MICRO.read_text())["rows"]
                if row["role"] == "seed" and row["method"] == name}
    if n not in best:
        raise UserError(f"--lengths: {MICRO} has {', '.join(map('{:g}'.format, best))}, not {n:g}")
    short, long, settings, start = best[min(best)], best[n], method(name, args).settings, {}
    for axis, grid in {"lr": LR_GRID, **METHODS[name]["axes"]}.items():
        if axis in args.override or long[axis] == short[axis]:
            continue
        start[axis] = long[axis]
        if axis in FINE:
            value = settings[axis] * long[axis] / short[axis]
            start[axis] = min(grid, key=lambda x: abs(math.log(x / value)))
    return start


def at_other_seeds(tried, args):
    """Of the runs of a search the one with the lowest mean at other seeds, its runs there, and the
    runs there of others. Those are tried whose loss in the search is below the lowest mean so far:
    near the largest stable step size one seed may be lucky."""
    best, runs, others, lowest = None, [], [], math.inf
    for run in sorted(tried, key=lambda run: run.loss):
        unknown = args.dry and lowest == math.inf
        if best and (unknown or run.loss >= lowest):
            break
        seeds = run_all(rerun_with_new_seeds(run, args, first=1), args)
        mean = fmean(seed.loss for seed in seeds)
        if best is None or mean < lowest:
            best, runs, others, lowest = run, seeds, others + runs, mean
        else:
            others += seeds
    return best, runs, others


def length(args):
    if "steps" in args.override:
        raise UserError("--lengths sets the steps: drop --steps")
    s, (vocab_size, seq_len) = method("Adam", args).settings, data_shape(args.data)
    per_step = s["batch_size"] * seq_len
    parameters = Config.named(s["model"], vocab_size).parameters
    shapes = {n: resized(args, s["batch_size"], round(n * parameters / per_step))
              for n in args.lengths or (NANO if args.scale == "nano" else LENGTHS)}

    def along(name):
        found, start = {}, {}
        for n, shape in shapes.items():
            only = None if n <= FULL else (step_size(name), *LONG)
            if args.scale != "micro":
                only, start = (step_size(name),), moved(name, args, n)
            best, tried = search(name, args, only, **start, **shape)
            runs = [best]
            if n <= FULL:
                best, runs, others = at_other_seeds(tried, args)
                tried = tried + others
            start = {axis: best.settings[axis] for axis in ("lr", *METHODS[name]["axes"])}
            found[n] = best, tried, runs
        return found
    found = concurrently(along, NAMES, args)
    if args.dry:
        return None

    rows, lines, all_runs = [], [], []
    for n in shapes:
        adam, _, adams = found["Adam"][n]
        for name in NAMES:
            best, tried, runs = found[name][n]
            all_runs += tried + runs
            rows += search_rows(tried, runs, adam, adams, tokens_per_parameter=n)
            lines.append((f"{n:g}", str(best.settings["steps"]), name, best.settings_text,
                          *gap_cells(runs, adams), str(len(runs)), str(len(tried))))
    table = markdown_table(("tokens per parameter", "steps", "method", "best settings", *GAP_HEAD,
                            "seeds", "runs of the search"), lines)

    def draw(panels):
        for name in NAMES:
            losses = {n: [run.loss for run in finished(found[name][n][-1])] for n in shapes}
            gaps = {n: [100 * gap_to(adam, run) for adam, run
                        in zip(found["Adam"][n][-1], found[name][n][-1])
                        if gap_to(adam, run) is not None] for n in shapes}
            for axes, series in zip(panels, (losses, gaps)):
                points = {n: values for n, values in series.items() if values}
                axes.plot(list(points), [fmean(values) for values in points.values()],
                          label=name, **STYLES[name])
                axes.vlines(list(points), [min(values) for values in points.values()],
                            [max(values) for values in points.values()],
                            color=STYLES[name]["color"])
            mark_diverged(panels[0], [n for n in shapes if any(
                run.diverged for run in found[name][n][-1])], STYLES[name])
        panels[0].set_ylabel("final loss (nats per token)")
        panels[1].set_ylabel("gap to Adam (% of its loss)")
        for axes in panels:
            axes.set(xscale="log", xlabel="tokens per parameter (log scale)")
            axes.set_xticks(list(shapes), [f"{n:g}" for n in shapes])
            axes.minorticks_off()
    how = (f"Up to {FULL:g} tokens per parameter every setting is searched, from the best of the "
           "length before, and the best taken on the mean of other seeds; above, at one seed, "
           "the step size (of clipped SGD the update clip, of others lr), momentum or betas, and "
           "whether the update clip of clipped SGD on all rows is scheduled.")
    if args.scale != "micro":
        how = (f"From the best settings for {args.scale}'s 200 steps, moved as micro's best moved "
               f"from {min(LENGTHS):g} tokens per parameter to each length (learning rates and "
               "clips by the same factor), the step size is searched (of clipped SGD the update "
               f"clip, of others lr); up to {FULL:g} the best is taken on the mean of other seeds.")
    return ExperimentResult(
        "The gap to Adam against the length of training", table, rows, all_runs,
        f"{how} Mean and 95% interval (Student's t) in the table, mean and range in the picture. "
        f"{parameters:,} parameters.", draw, (1, 2))


def lengths(text):
    """The numbers that text such as 0.4,2 lists, in order."""
    numbers = sorted({float(part) for part in text.split(",")})
    if not all(0 < n < 1e6 for n in numbers):
        raise argparse.ArgumentTypeError("give tokens per parameter, such as 0.4,2")
    return numbers


if __name__ == "__main__":
    main({"length": length}, data="data/packages",
         lengths=(lengths, "tokens per parameter [0.4,2,7,20; nano up to 7]"))
