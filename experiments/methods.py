"""What the experiments on language models share: the methods that are compared, with their settings
and searches; cells and curves of the pages; the command line.
"""
import argparse
import hashlib
import math
import shlex
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import torch

import train
from checkpoint import git_commit
from experiments.sweep import (
    LR_GRID, STYLES, Run, coordinate_search, finished, fmt, gap_to, interval_text, mark_diverged,
    next_below, outcomes, plot_seeds, rerun_with_new_seeds, run_all, save_results, stop_all)
from loader import UserError, read_meta
from model import Config

SEED = 42  # of searches; final runs have others

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

# start     where a search begins
# at        what differs at a scale: the best of an earlier search at nano, and so at micro; the
#           paper's values for clipped SGD beyond
# axes      what is searched beside lr; learning rates and clips in steps of sqrt(10)
# together  what is also moved at once, and in which directions
# tied      a setting that is always as large as another
MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
GRAD_CLIPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
UPDATE_CLIPS = (1.58e-5, 5e-5, 1.58e-4, 5e-4, 1.58e-3, 5e-3, 1.58e-2)
ROW_CLIPS = (3.16e-6, 1e-5, 3.16e-5, 1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2)
METHODS = {
    "Adam": {
        "start": {"optimizer": "adamw", "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0},
        "at": {"nano": {"lr": 3.16e-3, "beta1": 0.8, "beta2": 0.99, "grad_clip": 0.3}},
        "axes": {"beta1": MOMENTA, "beta2": (0.8, 0.9, 0.95, 0.99, 0.999, 0.9999),
                 "grad_clip": GRAD_CLIPS}},
    "SGD": {"start": {"optimizer": "sgd", "momentum": 0, "lr": 0.316}, "axes": {}},
    "SGD with momentum": {
        "start": {"optimizer": "sgd", "lr": 1.0, "momentum": 0.9},
        "at": {"nano": {"lr": 0.316, "momentum": 0.5}},
        "axes": {"momentum": MOMENTA}},
    "SGD, global norm clipped": {  # where the clip binds, lr x grad_clip is the length of a step
        "start": {"optimizer": "sgd", "lr": 31.6, "momentum": 0.9, "grad_clip": 0.1},
        "at": {"nano": {"lr": 316.0, "grad_clip": 0.03}},
        "axes": {"grad_clip": GRAD_CLIPS, "momentum": MOMENTA},
        "together": ({"lr": -1, "grad_clip": 1},)},
    "clipped SGD": {
        "start": {"optimizer": "clipped_sgd", "lr": 100.0, "token_clip": 1e-3,
                  "update_clip": 5e-4, "momentum": 0.9},
        "at": {"nano": {"lr": 316.0, "momentum": 0.8},
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
FINE = "lr", "grad_clip", "update_clip", "token_clip", "row_clip"  # finally also in half steps


# ---- parts of experiments ----

def method(name, args, **changes):
    """The Run of a method at this scale, with changes to where its search starts."""
    spec, small = METHODS[name], args.scale in SMALL
    at = spec.get("at", {}).get("nano" if small else args.scale, {})
    settings = {**SCALES[args.scale], **({} if small else LARGE), "eval_every": None,
                "data": args.data, "seed": SEED, "keep": "nothing", **spec["start"], **at,
                **args.override, **changes}
    for setting, other in spec.get("tied", {}).items():
        if settings[other] is not None:
            settings[setting] = settings[other]
    share, rest = divmod(settings["batch_size"], args.nproc)
    if rest:
        raise UserError(f"a batch of {settings['batch_size']} sequences does not divide among "
                        f"{args.nproc} processes: change --batch_size or their number")
    if settings.get("micro_batch"):  # at most this many
        settings["micro_batch"] = math.gcd(settings["micro_batch"], share)
    return Run(name, settings, ("lr", *spec["axes"], *spec.get("tied", ()), *MULTIPLIERS))


def search(name, args, only=None, below=math.inf, fine=False, **changes):
    """The best run of a method and all that were tried, over lr and its axes or `only` some, at
    learning rates below `below`. With fine, over those in FINE, in half of their steps."""
    grids = {"lr": LR_GRID, **METHODS[name]["axes"], **MULTIPLIERS}
    if fine:
        grids = {axis: halved(grid) for axis, grid in grids.items() if axis in FINE}
    grids["lr"] = [lr for lr in grids["lr"] if lr < below]
    axes = {axis: grids[axis] for axis in only or ("lr", *METHODS[name]["axes"]) if axis in grids}
    return coordinate_search(lambda **more: method(name, args, **{**changes, **more}), axes, args,
                             METHODS[name].get("together", ()))


def halved(grid):
    """A grid with the geometric means of its neighbours added, to three digits."""
    return sorted([*grid, *(float(f"{math.sqrt(a * b):.3g}") for a, b in zip(grid, grid[1:]))])


def final_runs(name, args, only=None, fine=True, **changes):
    """A method at the best settings that a search finds, at other seeds than the search's. With
    fine, these are also searched in half steps, and the better on the mean of the other seeds is
    taken, since one seed may be lucky near the largest stable learning rate. Where a seed diverges
    all goes on below that learning rate. Returns the best run of the search, all its runs and the
    seeds that were given up, and the other seeds."""
    tried, below = [], math.inf
    while True:
        best, found = search(name, args, only, below, **changes)
        candidates, tried = {best.out: best}, tried + found
        if fine:
            finer, found = search(name, args, only, below, fine=True, **best.settings)
            candidates, tried = {**candidates, finer.out: finer}, tried + found
        curve = {"eval_every": max(1, best.settings["steps"] // CURVE)} | args.override
        finals = [(run, run_all(rerun_with_new_seeds(run, args, first=1, **curve), args))
                  for run in candidates.values()]
        best, runs = min(finals, key=lambda final: sum(run.loss for run in final[1]))
        tried += sum([seeds for run, seeds in finals if run is not best], [])
        lower, below = next_below(LR_GRID, best.lr), best.lr
        if not any(run.diverged for run in runs) or lower is None:
            return best, list({run.out: run for run in tried}.values()), runs
        tried += runs
        changes = {**best.settings, "lr": lower}


def search_rows(tried, runs, adam, adams, **more):
    """The rows of a search and of its final runs for a page's JSON. adam and adams are Adam's best
    run and final runs; gaps are taken seed by seed."""
    rows = [run.row(other) | {"role": "seed"} for run, other in zip(runs, adams)]
    rows += [run.row(adam) | {"role": "search" if run.settings["seed"] == SEED else "given up"}
             for run in tried]
    return [row | more for row in rows]


def gap_cells(runs, adams):
    """Loss, perplexity and gap of final runs, as text."""
    perplexities = [math.exp(run.loss) if run.loss < 700 else math.inf for run in runs]
    return (outcomes(runs), interval_text(perplexities, ".1f"),
            interval_text(map(gap_to, adams, runs), "+.1%"),
            interval_text([run.loss - other.loss for run, other in zip(runs, adams)], "+.3f"))


def compared(found, args):
    """Runs {method: one per seed}, run: their rows for a page's JSON, and for each method its name,
    settings, loss and gap as text."""
    run_all(sum(found.values(), []), args)
    adams = found["Adam"]
    rows = [run.row(adam) for runs in found.values() for run, adam in zip(runs, adams)]
    return rows, [(name, runs[0].settings_text, outcomes(runs),
                   interval_text(map(gap_to, adams, runs), "+.1%"))
                  for name, runs in found.items()]


GAP_HEAD = "validation loss", "perplexity", "gap to Adam", "gap, nats"


def lr_grid(name, args, **changes):
    """Runs of a method at five learning rates, from one below its start to three above."""
    start = method(name, args).lr
    above = [value for value in LR_GRID if value > start]
    return [method(name, args, **changes, lr=value)
            for value in (next_below(LR_GRID, start), start, *above[:3])]


def stable_lr_text(runs):
    """Of runs by rising learning rate: the largest below the first that diverged, as text."""
    diverged = [run.diverged for run in runs]
    below = runs[:diverged.index(True)] if any(diverged) else runs
    lrs = [f"{run.lr:g}" for run in finished(below)] or ["-"]
    return f"at least {lrs[-1]}" if finished(runs) and below == runs else lrs[-1]


def data_shape(data):
    """Vocabulary and sequence length of the data, or of the paper's if it is not there yet."""
    if not Path(data).is_dir():
        return 32000, 256
    meta = read_meta(data)
    return meta["vocab_size"], meta["seq_len"]


def resized(args, batch_size, steps):
    """The changes for a batch size and a number of steps. Raises UserError if no run has them."""
    if min(batch_size, steps) < 1:
        raise UserError(f"{steps} steps of {batch_size} sequences cannot be run: give more --steps "
                        "(length: --lengths) or a larger --batch_size")
    changes = {"batch_size": batch_size, "steps": steps}
    method("Adam", args, **changes)
    return changes


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


# ---- the command line ----

# how many final runs, where --seeds changes it
SEEDS = {"demo": 1, "gap": 5, "one_lr": 5, "frequency": 5, "ablation": 3, "spikes": 3, "length": 3,
         "paper": 1}
SEARCHES = (  # over all axes
    "gap", "one_lr", "frequency", "ablation", "batch", "dynamics", "length")


def overrides(words, parser):
    """The settings of train.py for all runs among the words of a command line, as a dict."""
    converters = {field.name: train.converter(field.type) for field in fields(train.Settings)}
    found = {}
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        if (not word.startswith("--") or not equals or name not in converters
                or name in ("lr", "seed", "out")):
            parser.error(f"{word if equals else shlex.join(words)}: give settings of train.py as "
                         "--name=value; lr, seed and out are the experiment's")
        try:
            found[name] = converters[name](text)
        except ValueError:
            parser.error(f"--{name}: invalid {converters[name].__name__} value: {text!r}")
    return found


def in_name(value):
    """A setting as a part of a page's name: of a path, its last part; of one that is not in data/,
    also four digits that tell it from others that end alike."""
    *folders, last = str(value).rstrip("/").split("/")
    digits = hashlib.sha256("/".join(folders).encode()).hexdigest()[:4]
    return last if folders in ([], ["data"]) else f"{last}-{digits}"


def main(experiments, data="data/python", **more):
    """The command line: one of {name: function}, its options, and settings of train.py. data is
    the default of --data; `more`, {name: (type, help)}, are options of these alone."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, allow_abbrev=False,
        epilog="Any other --name=value is a setting of train.py for all runs.")
    option = parser.add_argument
    option("name", choices=experiments, nargs="?", default=next(iter(experiments)))
    option("--scale", choices=SCALES, default="nano")
    option("--data", default=data, help="data directory, made by data/prepare.py")
    for name, (kind, text) in more.items():
        option(f"--{name}", type=kind, help=text)
    option("--seeds", type=int, choices=range(1, 11), metavar="N",
           help=f"of final runs [{', '.join(f'{name} {n}' for name, n in SEEDS.items())}]")
    option("--nproc", type=int, default=1, help="processes per run, by torchrun [1]")
    option("--jobs", type=int,
           help="runs at a time [1 of several processes, else one per GPU or core, of cores at "
                "most 8]")
    option("--dry", action="store_true", help="print the commands of the runs that are missing")
    option("--tune", action="store_true", help="begin a search at a scale beyond nano")
    args, others = parser.parse_known_args()
    if args.seeds and args.name not in SEEDS:
        parser.error(f"--seeds does nothing in {args.name}: drop it")
    if args.jobs is None:
        devices = torch.cuda.device_count() or min(8, torch.get_num_threads())
        args.jobs = devices if args.nproc == 1 else 1
    if min(args.jobs, args.nproc) < 1:
        parser.error("--jobs and --nproc start at 1")
    args.override, args.data = overrides(others, parser), args.data.rstrip("/")
    # what is not the default is in the page's name
    args.data_suffix = "" if args.data == data else f"-{in_name(args.data)}"
    args.suffix = args.data_suffix
    for name in more:
        if values := getattr(args, name):
            args.suffix += f"-{name}" + ",".join(f"{value:g}" for value in values)
    default = SEEDS.get(args.name)
    args.suffix += "" if args.seeds in (None, default) else f"-seeds{args.seeds}"
    args.seeds = args.seeds or default
    for name, value in args.override.items():
        args.suffix += f"-{name}{in_name(value)}"
    module = f"experiments.{Path(sys.argv[0]).stem}"
    args.command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    args.pool, args.commit = ThreadPoolExecutor(args.jobs), git_commit()

    try:
        if args.scale not in SMALL and args.name not in ("demo", "paper") and not (
                args.dry or args.tune):
            raise UserError(f"at {args.scale} this is many runs: `make cost TARGET={args.name} "
                            f"SCALE={args.scale}` says how many and how long, TUNE=1 or --tune "
                            "begins, `make paper` has four runs")
        for name, spec in METHODS.items():  # a setting that does not suit them all ends it here
            method(name, args)
            if args.name in SEARCHES:
                method(name, args, **{axis: grid[-1] for axis, grid in spec["axes"].items()
                                      if axis not in args.override})
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
