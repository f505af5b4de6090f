"""Runs of train.py, searches over their settings, statistics and result pages.

A run is one call of train.py in a folder under runs/. The folder's name holds a hash of its
settings, the data and the code that it executes: finished runs are not repeated, and killed ones
continue where they stopped. A run takes one thread, so that its numbers do not depend on how many
run at a time.
"""
import ast
import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

import train
from checkpoint import CODE, Busy, replace
from loader import TokenDataset, UserError, access, fingerprint, read_meta

TRAIN = Path(train.__file__)
LR_GRID = tuple(float(f"{10 ** (k / 2):.3g}") for k in range(-12, 11))  # 1e-6 ... 1e5 by sqrt(10)
THREADS = 1  # of a process of a run


# ---- runs ----

@cache
def code_hash():
    """sha256 of the files that a run executes, without their comments, docstrings and layout."""
    trees = [ast.parse(TRAIN.with_name(name).read_text()) for name in CODE]
    for node in itertools.chain.from_iterable(map(ast.walk, trees)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant("")  # a docstring
    return hashlib.sha256("".join(map(ast.dump, trees)).encode()).hexdigest()


@cache
def all_settings(*words):
    """The settings of a run as a dict, defaults included."""
    return asdict(train.parse([*words, "--out=runs"]))


@cache
def content(folder):
    """The fingerprint of a data directory or a Hugging Face model; of none, None."""
    return folder and fingerprint(folder)


@cache
def sequences(data):
    """The number of training sequences of a data directory."""
    return len(TokenDataset(data, "train"))


class Run:
    """One run of train.py, whose errors in the settings end the program; `axes` are the settings
    that a search may change. read() sets `final` (the last line of the metrics, or None), `evals`
    (its evaluations) and `loss` (the final validation loss in nats per token, infinite if the run
    diverged or failed)."""

    def __init__(self, label, settings, axes=("lr",)):
        self.label, self.settings, self.axes = label, settings, axes
        self.lr = settings["lr"]
        self.words = [f"--{k}={'none' if v is None else v}" for k, v in settings.items()]
        every = all_settings(*self.words)
        key = json.dumps([every, content(every["data"]), content(every["init_from"]), code_hash(),
                          THREADS])
        name = "-".join(str(every[k]) for k in ("model", "optimizer", "lr", "seed"))
        self.out = Path("runs") / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        self.words.append(f"--out={self.out}")

    def lines(self, *words):
        """The lines of metrics.jsonl that contain any of these keys, in order."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            with open(path) as file:
                for text in file:
                    if any(f'"{word}":' in text for word in words):
                        try:
                            yield json.loads(text)
                        except ValueError:  # torn by a crash; train.py will write it again
                            return

    def logged(self, *names):
        """Tuples of these values, of the steps that have them all."""
        rows = (tuple(map(line.get, names)) for line in self.lines("train_loss"))
        return [row for row in rows if None not in row]

    def average(self, name, average=statistics.fmean):
        """Of a value over the steps that have it, or None."""
        values = [value for value, in self.logged(name)]
        return average(values) if values else None

    def read(self):
        """Read the metrics. Returns whether the run is over."""
        lines = list(self.lines("val_tokens", "final"))
        self.evals = [line for line in lines if "val_tokens" in line]
        self.final = lines[-1] if lines and lines[-1].get("final") else None
        self.diverged = self.final is not None and self.final["status"] == "diverged"
        self.loss = self.final["val_loss"] if self.final and not self.diverged else math.inf
        self.outcome = f"{self.loss:.3f}"
        if self.diverged:
            self.outcome = f"diverged at step {self.final['step']}"
        elif not self.final:
            self.outcome = f"failed: {FAILED.get(self.out)}"
        return self.final is not None

    @property
    def epochs(self):
        s = self.settings
        return s["steps"] * s["batch_size"] / sequences(s["data"])

    @property
    def settings_text(self):
        values = {name: self.settings.get(name) for name in self.axes}
        return ", ".join(f"{name} {value}" if value is True else f"{name} {value:g}"
                         for name, value in values.items()
                         if value is not None and value is not False)

    @property
    def config(self):
        """config.json: its settings, hardware and versions."""
        path = self.out / "config.json"
        with access("read", path, "is broken", "restore it, or move its folder and start again"):
            return json.loads(path.read_text())

    @property
    def spikes(self):
        """The steps, from 1, at which the gradient norm spikes."""
        logged = self.logged("step", "grad_norm")
        return [logged[i][0] for i in spike_steps([norm for _, norm in logged])]

    def row(self, adam=None):
        """The run in a page's JSON."""
        final = self.final or {"status": "failed", "seconds": None}
        return {"method": self.label, **self.settings, "status": final["status"],
                "val_loss": self.loss if self.loss < math.inf else None,
                "gap": gap_to(adam, self), "seconds": final["seconds"],
                "tok_per_s": self.average("tok_per_s", statistics.median)}


# ---- the processes that run them ----

STARTED, FAILED = {}, {}  # folder -> its Future; folder -> why it failed (it is not started again)
PROCESSES, STOPPING = [], threading.Event()  # those of runs; set when they are to stop
NUMBERS, GPUS = itertools.count(1), itertools.count()
thread = threading.local()


def launcher(nproc):
    """What comes before the words of a run, after `python`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return [*(torchrun if nproc > 1 else []), os.path.relpath(TRAIN)]


def execute(run, nproc, show):
    """Run it, and show(line) its output. Returns the exit status."""
    env = {**os.environ, "OMP_NUM_THREADS": str(THREADS),
           "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "270"}  # seconds to save in
    if nproc == 1:  # a GPU for each thread of the pool
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES",
                              ",".join(map(str, range(torch.cuda.device_count())))).split(",")
        thread.gpu = getattr(thread, "gpu", None) or gpus[next(GPUS) % len(gpus)]
        env["CUDA_VISIBLE_DEVICES"] = thread.gpu
    process = subprocess.Popen([sys.executable, *launcher(nproc), *run.words], env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    PROCESSES.append(process)
    if STOPPING.is_set():
        process.terminate()
    for line in process.stdout:
        show(line)
    return process.wait()


def start(run, nproc):
    """Run it, with its output on stdout. If it fails, FAILED says why. Returns the exit status."""
    if STOPPING.is_set():
        return None
    if code_hash.__wrapped__() != code_hash():
        raise UserError("the code was edited since this began: start again, finished runs are kept")
    number, reason = f"[{next(NUMBERS)}]", "see its output"

    def show(line):
        nonlocal reason
        print(f"   {number} {line}", end="", flush=True)
        if line.startswith("train.py: "):
            reason = line.strip().replace("|", "/")  # it goes into a table

    seed = run.settings["seed"]
    head = f"{number} {run.label}, {run.settings_text}, seed {seed}\n"
    if run.epochs > 1:
        head += f"   {number} READS ITS TEXT {run.epochs:.1f} TIMES\n"
    print(head, end="", flush=True)  # in one piece: other threads print, too
    status = execute(run, nproc, show)
    if status and "another process is at work" in reason:  # another table; torchrun exits with 1
        status = Busy.status
        STOPPING.wait(timeout=10)
    elif (status or not run.read()) and not STOPPING.is_set():
        FAILED[run.out] = f"{reason} (exit status {status})"
        print(f"   {number} FAILED: {FAILED[run.out]}", file=sys.stderr)
    return status


def stop_all(signal_number, frame):
    """Let the runs save, and leave. Ctrl-C reaches them without this, SIGTERM does not."""
    STOPPING.set()
    for process in PROCESSES if signal_number != signal.SIGINT else []:
        process.terminate()
    sys.exit(130)


def run_all(runs, args):
    """Run in args.pool what has not run yet, or with args.dry print the commands. A failed run
    stops nothing."""
    todo = {run.out: run for run in runs if not run.read() and run.out not in FAILED}
    if args.dry:
        for run in todo.values():
            print(shlex.join(["python", *launcher(args.nproc), *run.words]))
        return runs
    for out, run in todo.items():
        if out not in STARTED:
            STARTED[out] = args.pool.submit(start, run, args.nproc)
    for out, run in todo.items():
        while STARTED[out].result() == Busy.status:  # wait for it, behind those that nobody runs
            STARTED[out] = args.pool.submit(start, run, args.nproc)
    if STOPPING.is_set():
        sys.exit(130)
    for run in runs:  # the same run may be there twice
        run.read()
    return runs


def concurrently(function, items, args):
    """{item: function(item)}, in threads: while one waits for a run, the others start theirs."""
    if args.dry:
        return {item: function(item) for item in items}
    with ThreadPoolExecutor(len(items)) as threads:
        return dict(zip(items, threads.map(function, items)))


def finished(runs):
    """Those that have a loss: they neither diverged nor failed."""
    return [run for run in runs if run.loss < math.inf]


# ---- search: make(**changes) returns the Run of a method with these changes to its settings ----

def next_below(grid, value):
    """The next value of a grid below one that need not be on it, or None."""
    return max((x for x in grid if x < value), default=None)


def next_above(grid, value):
    return min((x for x in grid if x > value), default=None)


def stable_start(make, args):
    """make(), and while that diverges make(lr=...) at the next lower learning rate: the runs."""
    tried = run_all([make()], args)
    while tried[-1].diverged and (lr := next_below(LR_GRID, tried[-1].lr)):
        tried += run_all([make(lr=lr)], args)
    return tried


def neighbour(settings, direction, axes, way):
    """The settings on the axes one step further, up (way 1) or down (-1), along a direction,
    {setting: 1 or -1}; None at the end of a grid."""
    moved = {name: settings[name] for name in axes}
    for name, sign in direction.items():
        step = next_above if sign * way > 0 else next_below
        moved[name] = step(axes[name], moved[name])
    return None if None in moved.values() else moved


def coordinate_search(make, axes, args, together=()):
    """From the first stable learning rate move along one axis after the other, to the next value
    below or above while that is better, round and round until no neighbour is. Failed runs are
    passed over.

    axes is {setting: grid of values}. Those of a dict in `together`, {setting: 1 or -1}, are also
    moved at once, since the best may lie on a diagonal. Returns the best run and all.
    """
    axes = {name: grid for name, grid in axes.items() if name not in args.override}
    directions = [{name: 1} for name in axes]
    directions += [move for move in together if axes.keys() >= move.keys()]
    tried = stable_start(make, args)
    best, improved = tried[-1], True
    while improved:
        improved = False
        for direction in directions:
            while True:
                moves = [neighbour(best.settings, direction, axes, way) for way in (-1, 1)]
                near = run_all([make(**move) for move in moves if move], args)
                tried += near
                lowest = min(near, key=lambda run: run.loss, default=best)
                if lowest.loss >= best.loss:
                    break
                best, improved = lowest, True
    return best, list({run.out: run for run in tried}.values())


def max_stable_lr(make, args):
    """The largest learning rate of the grid at which make(lr=...) does not diverge, searched down
    or up from its own, and the runs that this took."""
    tried = stable_start(make, args)
    while finished(tried) == tried and (lr := next_above(LR_GRID, tried[-1].lr)):
        tried += run_all([make(lr=lr)], args)
    stable, last = [run.lr for run in finished(tried)], tried[-1]
    if not args.dry and (not stable or any(run.final is None for run in tried)):
        raise UserError(f"the maximum stable learning rate of {last.label} is not known: at "
                        f"{last.lr:g} it {last.outcome}")
    return max(stable, default=tried[0].lr), tried


def rerun_with_new_seeds(run, args, first=0, **changes):
    """args.seeds Runs like this one, not run yet, from `first` above its seed."""
    start = run.settings["seed"] + first
    return [Run(run.label, {**run.settings, **changes, "seed": seed}, run.axes)
            for seed in range(start, start + args.seeds)]


# ---- statistics ----

# Student's t, two-sided 95%, for 2 to 10 numbers
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def gap_to(adam, run):
    """(loss - Adam's) / Adam's, or None if one of the two has no loss."""
    if adam is None or max(run.loss, adam.loss) == math.inf:
        return None
    return run.loss / adam.loss - 1


def mean_interval(values):
    """Mean and half-width of the 95% interval of at most ten numbers; of one number, None."""
    n = len(values)
    half = T95[n - 2] * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return statistics.fmean(values), half


def interval_text(values, form):
    """mean_interval as text, or "-" if a value is None or infinite."""
    values = list(values)
    if not values or not all(x is not None and math.isfinite(x) for x in values):
        return "-"
    mean, half = mean_interval(values)
    return f"{mean:{form}}" + ("" if half is None else f" ± {half:{form.removeprefix('+')}}")


def outcomes(runs):
    """The losses of runs that differ in the seed; or how many did not finish, and how."""
    bad = [run.outcome for run in runs if run.loss == math.inf]
    if not bad:
        return interval_text([run.loss for run in runs], ".3f")
    return bad[0] if len(runs) == 1 else f"{len(bad)} of {len(runs)}: {distinct(bad)}"


def spike_steps(norms, window=100, factor=5):
    """Indices of the gradient norms above `factor` x the median of the `window` before [ours]."""
    return [i for i in range(window, len(norms))
            if norms[i] > factor * statistics.median(norms[i - window:i])]


# ---- pages and pictures ----

@dataclass
class ExperimentResult:
    title: str      # at most eight words, above the picture
    table: str      # Markdown
    rows: list      # dicts, for the JSON file
    runs: list      # every Run that was made for it
    caption: str    # what was run, for the page
    draw: callable  # draws on the axes that Figure.subplots(*panels) gives
    panels: tuple = (1, 1)


STYLES = {
    "Adam": {"color": "#000000", "linestyle": "-", "marker": "o"},
    "SGD": {"color": "#e69f00", "linestyle": ":", "marker": "v"},
    "SGD with momentum": {"color": "#d55e00", "linestyle": ":", "marker": "s"},
    "SGD, global norm clipped": {"color": "#009e73", "linestyle": "-.", "marker": "^"},
    "clipped SGD": {"color": "#0072b2", "linestyle": "--", "marker": "D"},
    "clipped SGD, all rows": {"color": "#56b4e9", "linestyle": "-", "marker": "d"},
    "SCALE": {"color": "#cc79a7", "linestyle": "-.", "marker": "P"},
}


def distinct(values):
    return ", ".join(dict.fromkeys(str(value) for value in values))


def markdown_table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def fmt(x, form):
    return "-" if x is None else f"{x:{form}}"


def plot_seeds(axes, x, ys, style, label=None):
    """The mean of the seeds' series ys over x as a line, and their range as a band."""
    points = list(zip(*ys, strict=True))
    axes.plot(x, [statistics.fmean(point) for point in points], label=label, **style)
    if len(ys) > 1:
        axes.fill_between(x, [min(point) for point in points], [max(point) for point in points],
                          color=style["color"], alpha=0.2, linewidth=0)


def mark_diverged(axes, xs, style):
    """Crosses at xs in a strip above the axes, labelled "diverged", each call in its own row."""
    if not xs:
        return
    if not axes.child_axes:
        strip = axes.inset_axes((0, 1.03, 1, 0.15), sharex=axes)
        strip.set_yticks([])
        strip.tick_params(which="both", bottom=False, labelbottom=False)
        strip.set_ylabel("diverged", rotation=0, ha="right", va="center")
    strip = axes.child_axes[0]
    strip.plot(xs, [len(strip.lines)] * len(xs), "x", color=style["color"], markersize=5)
    strip.set_ylim(max(5, len(strip.lines)) - 0.3, -0.7)


def save_results(name, args, result):
    """Write results/SCALE/NAME.md, .json and .png; options that change the result are in NAME."""
    runs = {run.out: run for run in result.runs}.values()
    ran = [run for run in runs if run.final]
    if not ran:
        raise UserError(f"none of {len(runs)} runs finished, the last: {result.runs[-1].outcome}")
    # where and when they ran
    configs = {run.out: run.config for run in ran}
    devices = [("" if c["world_size"] == 1 else f"{c['world_size']} x ") + c["device"]
               for c in configs.values()]
    hours = sum(run.final["seconds"] for run in ran) / 3600  # without evaluations
    source = (f"{distinct(devices)} per run; "
              f"torch {distinct(c['versions']['torch'] for c in configs.values())}; "
              f"{distinct(c['started'][:10] for c in configs.values())}; "
              f"commit {args.commit}; "  # the runs may be older, but of the same code
              f"{hours:.1f} hours of training")
    if there := [run.out for run in ran if run.out not in STARTED]:
        print(f"{len(there)} of {len(runs)} runs were there, from commit "
              f"{distinct(configs[out]['git_commit'] for out in there)}")
    # what was run
    settings, data = [run.settings for run in runs], Path(args.data)
    shapes = distinct(f"{s['steps']} steps of {s['batch_size']}" for s in settings)
    caption = (f"{result.caption} {distinct(s['model'] for s in settings)}; {shapes} x "
               f"{read_meta(data)['seq_len']} tokens of {data.name}; "
               f"{distinct(c['identity']['dtype'] for c in configs.values())}; {len(runs)} runs, "
               f"seed {distinct(sorted(s['seed'] for s in settings))}.")
    if (epochs := max(run.epochs for run in runs)) > 1:
        caption += f" **The longest runs read their text {epochs:.1f} times.**"
    if failed := [run for run in runs if not run.final]:
        caption += (f" **{len(failed)} of {len(runs)} runs failed** "
                    f"({distinct(run.label for run in failed)}): a search passes over a failed "
                    "run, so better settings may exist.")
    stem = Path(f"results/{args.scale}/{name}{args.suffix}")
    write_page(stem, result, caption, source, args.command, {"config": configs[ran[0].out]})


def write_page(stem, result, caption, source, command, extra={}):
    """Print the table; write it with its caption to STEM.md, the rows and what is in `extra` to
    STEM.json, the picture with its title to STEM.png. Raises UserError."""
    from matplotlib.figure import Figure  # imported here: the searches do without it
    rows, columns = result.panels
    # a page shows 9 inches at about 900 pixels, so that text of 10 points stays as large
    figure = Figure((7 if columns == 1 else 9, 1.5 + 3 * rows), layout="constrained")
    result.draw(figure.subplots(rows, columns))
    labels = {}
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>":
            axes.grid(alpha=0.3)
        labels |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
    if labels:
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3)
    figure.suptitle(result.title)
    page = f"{caption}\n\n{result.table}\n\n`{command}`; {source}\n"
    content = json.dumps({"command": command, **extra, "rows": result.rows}, indent=1,
                         allow_nan=False) + "\n"
    print(f"\n{page}")
    with access("write", stem):
        stem.parent.mkdir(parents=True, exist_ok=True)
    own = f".{os.getpid()}.tmp"  # two processes may share a table and write its page
    replace(Path(f"{stem}.png"), lambda f: figure.savefig(f, dpi=150), own)
    replace(Path(f"{stem}.json"), lambda f: f.write(content.encode()), own)
    replace(Path(f"{stem}.md"), lambda f: f.write(page.encode()), own)
    print(f"{stem}.md, .json, .png")
