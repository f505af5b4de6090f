"""What every table needs: runs of train.py, a search over their settings, statistics, and the page that comes of it.

A run is one call of train.py in a folder under runs/ named by all of its settings, so finished runs are not repeated
and killed ones go on where they stopped.
"""
import hashlib
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from train import Settings

HERE = Path(__file__).resolve().parent  # train.py's; runs/ and results/ are in the current folder
LADDER = tuple(float(f"{10 ** (k / 2):.3g}") for k in range(-12, 11))  # learning rates, in steps of sqrt(10)


# ---- runs -----------------------------------------------------------------------------------------------------------

class Run:
    """One run of train.py: its settings, and once over `final` (its last line), `steps` and `evals` (the rest)."""

    def __init__(self, label, settings, axes=("lr",)):
        self.label, self.settings, self.axes, self.error = label, settings, axes, None  # axes: what a search may change
        self.final, self.evals, self.steps = None, [], []
        meta = Path(settings["data"]) / "meta.json"
        whole = {**asdict(Settings()), **settings}  # another default in train.py is another run
        key = json.dumps(whole, sort_keys=True) + (meta.read_text() if meta.exists() else "")
        name = "-".join(f"{whole[k]}" for k in ("model", "optimizer", "lr", "seed"))
        self.out = Path("runs") / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    def read(self):
        """Take in the metrics. True if the run is over."""
        self.final, self.evals, self.steps = None, [], []
        path = self.out / "metrics.jsonl"
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
            except ValueError:  # torn by a crash: train.py will write it again
                break
            if line.get("final"):
                self.final = line
            else:
                (self.evals if "val_tokens" in line else self.steps).append(line)
        return self.final is not None

    def command(self, args):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"]
        return [*(torchrun if args.nproc > 1 else []), os.path.relpath(HERE / "train.py"),
                *(f"--{k}={'none' if v is None else v}" for k, v in {**self.settings, "out": self.out}.items())]

    def start(self, args, mark=""):
        """Run train.py; what it says goes to the terminal, and if it fails its reason into `error`."""
        more = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "270"}  # torchrun's patience with a run that saves, in seconds
        if args.jobs > 1:
            more["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.jobs // args.nproc))
        reason, told = "", 0  # the last of its most telling lines: its own word, else an exception, else any
        with subprocess.Popen([sys.executable, *self.command(args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, env={**os.environ, **more}) as process:
            RUNNING.append(process)
            if STOPPED:
                process.terminate()
            for line in process.stdout:
                print(f"   {mark} {line}", end="", flush=True)
                tells = 2 if line.startswith("train.py: ") else bool(re.match(r"(\[\w+\]: )?[\w.]*Error: .", line))
                if tells >= told:
                    reason, told = line.strip().replace("|", "/"), tells
        if process.returncode or not self.read():
            self.error = f"{reason} (exit status {process.returncode})"
            print(f"   {mark} FAILED: {self.error}", file=sys.stderr)
        return process.returncode

    @property
    def loss(self):
        """Final validation loss in nats; infinite if the run diverged or failed."""
        return self.final["val_loss"] if self.final and self.final["status"] == "done" else math.inf

    @property
    def diverged(self):
        return bool(self.final) and self.final["status"] == "diverged"

    @property
    def verdict(self):
        if self.final is None:
            return f"failed: {self.error}"
        return f"diverged at step {self.final['step']}" if self.diverged else f"{self.loss:.3f}"

    @property
    def tuned(self):
        return ", ".join(f"{k} {self.settings[k]:g}" for k in self.axes if self.settings.get(k) is not None)

    @property
    def tok_per_s(self):
        return statistics.median(x["tok_per_s"] for x in self.steps) if self.steps else None

    @property
    def tokens_per_step(self):
        return self.steps[0]["tokens"] // self.steps[0]["step"] if self.steps else 0

    @property
    def spikes(self):
        """The steps, from 1, at which the gradient norm spikes."""
        return [self.steps[i]["step"] for i in spike_steps([x["grad_norm"] or 0.0 for x in self.steps])]

    def mean(self, name):
        """The mean over the run of what some steps' lines have, or None."""
        values = [x[name] for x in self.steps if x.get(name) is not None]
        return statistics.fmean(values) if values else None

    def row(self, adam=None):
        """What the JSON has of every run; `gap` is (loss - Adam's) / Adam's."""
        return {"method": self.label, **self.settings, "status": self.final["status"] if self.final else "failed",
                "val_loss": self.loss if self.loss < math.inf else None, "gap": gap_to(adam, self),
                "seconds": self.final["seconds"] if self.final else None, "tok_per_s": self.tok_per_s}


def gap_to(adam, run):
    return run.loss / adam.loss - 1 if adam and run.loss < math.inf and adam.loss < math.inf else None


FAILED = {}  # folder: why, of the runs that failed under this command; they are not started again
RUNNING, STOPPED = [], []  # the processes of runs; the signal that came


def stop(*_):
    """On SIGTERM, which unlike Ctrl-C comes to this process alone: pass it on, so that the runs save."""
    STOPPED.append(True)
    for process in RUNNING:
        process.terminate()
    raise KeyboardInterrupt


def execute(runs, args):
    """Run what has not run yet, and say which of how many and how long it will take. A run that fails stops nothing,
    but settings that train.py refuses (by its exit status; torchrun has its own) stop everything."""
    todo = list({run.out: run for run in runs if not run.read() and run.out not in FAILED}.values())
    began, done, refused = time.monotonic(), [], []

    def go(item):
        i, run = item
        if refused:
            return
        left = (time.monotonic() - began) / len(done) * (len(todo) - len(done)) / 60 if done else None
        print(f"[{i}/{len(todo)}] {run.label}, {run.tuned}, seed {run.settings['seed']}"
              + (f", about {left:.0f} min left" if done else ""), flush=True)
        status = run.start(args, f"{i}|" if args.jobs > 1 else "")
        done.append(run)
        if run.error:
            FAILED[run.out] = run.error
        if status == 2:
            refused.append(run)
            for process in RUNNING:
                process.terminate()
    if args.dry:
        for run in todo:
            print(shlex.join(["python", *run.command(args)]))
    else:
        signal.signal(signal.SIGTERM, stop)
        with ThreadPoolExecutor(args.jobs) as pool:
            try:
                list(pool.map(go, enumerate(todo, 1)))
            except KeyboardInterrupt:  # the runs know, and are saving
                pool.shutdown(cancel_futures=True)
                sys.exit(130)
        if refused:
            sys.exit(2)
    for run in runs:  # the same run may be there twice
        run.read()
        run.error = FAILED.get(run.out)
    return runs


# ---- search ---------------------------------------------------------------------------------------------------------

def below(ladder, value):
    """The next value of a ladder below one that need not be on it; none at its end."""
    return [v for v in ladder if v < value * 0.99][-1:]


def above(ladder, value):
    return [v for v in ladder if v > value * 1.01][:1]


def down(make, runs, args):
    """Down the ladder from runs at one learning rate of which one diverged, to the first where none does: the runs of
    the way, a list for each learning rate, `runs` first; make(lr=...) gives those of the next."""
    tried = [runs]
    while any(run.diverged for run in tried[-1]) and (lower := below(LADDER, tried[-1][0].settings["lr"])):
        tried.append(execute(make(lr=lower[0]), args))
    return tried


def down_from_start(make, args):
    """make() is run, and if it diverges on down the ladder: the runs of the way."""
    return [run for [run] in down(lambda **changes: [make(**changes)], execute([make()], args), args)]


def tune(make, axes, args, against=()):
    """Search the best settings: down from a learning rate that diverges; then along one axis after the other, to the
    next value up or down while that is better, round and round until no neighbour is.

    Args: make(**changes) -> Run; axes, {setting: ladder of values}; against, the axes that are also moved against lr,
    one up and the other down, since the best may lie on a diagonal. Returns the best run and all that were tried.
    """
    axes = {axis: ladder for axis, ladder in axes.items() if axis not in args.override}
    ways = [((axis, below, above),) for axis in axes]
    ways += [(("lr", below, above), (axis, above, below)) for axis in against if axis in axes]
    tried = {run.out: run for run in down_from_start(make, args)}
    best, moved = list(tried.values())[-1], True
    while moved:
        moved = False
        for way in ways:
            while True:
                here = {k: best.settings[k] for k in axes}
                there = [{axis: value for axis, *turn in way for value in turn[i](axes[axis], here[axis])}
                         for i in (0, 1)]
                near = execute([make(**{**here, **new}) for new in there if len(new) == len(way)], args)
                tried |= {run.out: run for run in near}
                if min((run.loss for run in near), default=math.inf) >= best.loss:
                    break
                best, moved = min(near, key=lambda run: run.loss), True
    return best, list(tried.values())


def largest_stable(make, args):
    """The largest learning rate of the ladder at which make(lr=...) does not diverge, found down or up from its own,
    and all runs that this took. Without one, or if a run on the way failed, the end."""
    tried = down_from_start(make, args)
    up = LADDER if not tried[0].diverged else ()  # what is above one that came down from a divergence has diverged
    while tried[-1].loss < math.inf and (higher := above(up, tried[-1].settings["lr"])):
        tried += execute([make(lr=higher[0])], args)
    good = [run.settings["lr"] for run in tried if run.loss < math.inf]
    if not args.dry and (not good or any(run.error for run in tried)):
        sys.exit(f"tables.py: the largest stable learning rate of {tried[-1].label} is not known: at "
                 f"{tried[-1].settings['lr']:g} it {tried[-1].verdict}")
    return max(good, default=tried[0].settings["lr"]), tried


def seeds(run, args, first=0):
    """The same run at each seed, `first` seeds on: other initial weights, another order of the data."""
    return [Run(run.label, {**run.settings, "seed": run.settings["seed"] + first + i}, run.axes)
            for i in range(args.seeds)]


# ---- statistics -----------------------------------------------------------------------------------------------------

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, two-sided 95%, by n - 1


def interval(values):
    """Mean and half-width of the 95% interval of at most ten numbers; no width if there is one."""
    n = len(values)
    return statistics.fmean(values), T95[n - 2] * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def plus_minus(values, form):
    """`interval` as text; "-" if a value is missing."""
    if not values or None in values:
        return "-"
    mean, half = interval(values)
    return f"{mean:{form}}" + (f" ± {half:{form.removeprefix('+')}}" if half is not None else "")


def verdict(runs):
    """The losses of runs that differ by the seed, as text; how many did not end well, if any, and how."""
    bad = [run for run in runs if run.loss == math.inf]
    if bad and len(runs) > 1:
        steps = sorted(run.final["step"] for run in bad if run.diverged)
        said = [f"diverged at step {'-'.join(map(str, sorted({steps[0], steps[-1]})))}"] if steps else []
        said += dict.fromkeys(run.verdict for run in bad if not run.diverged)
        return f"{len(bad)} of {len(runs)}: {'; '.join(said)}"
    if bad:
        return bad[0].verdict
    return plus_minus([run.loss for run in runs], ".3f")


def spike_steps(norms, window=100, factor=5):
    """The steps, from 0, whose gradient norm exceeds `factor` times the median of the `window` before [ours]."""
    return [i for i in range(window, len(norms))
            if norms[i] > factor * statistics.median(norms[i - window:i])]


# ---- pages ----------------------------------------------------------------------------------------------------------

@dataclass
class Page:
    """What an artefact comes to. `draw` gets the axes as plt.subplots(*panels) gives them."""
    table: str
    rows: list
    runs: list
    caption: str
    draw: Callable
    panels: tuple = (1, 1)


def markdown(head, rows):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def number(x, form):
    return "-" if x is None else f"{x:{form}}"


def percent(x):
    return number(x, "+.1%")


def agree(ok):
    return "agrees" if ok else "does NOT agree"


def publish(name, args, page):
    """What is said of the runs, then results/SCALE/NAME.md, .json and .png."""
    ran = list({run.out: run for run in page.runs if run.final}.values())
    if not ran:
        sys.exit(f"tables.py: none of the {len(page.runs)} runs finished, the last one with: {page.runs[-1].error}")
    configs = [json.loads((run.out / "config.json").read_text()) for run in ran]

    def all_of(function, of=configs, join=", "):
        return join.join(dict.fromkeys(str(function(each)) for each in of))
    length = ran[0].tokens_per_step // ran[0].settings["batch_size"]
    flags = "".join(f", --{k}={v}" for k, v in args.override.items() if k not in ("model", "batch_size", "steps"))
    caption = (f"{page.caption} {all_of(lambda r: r.settings['model'], ran)}, "
               f"{all_of(lambda r: r.settings['steps'], ran, '/')} steps of "
               f"{all_of(lambda r: r.settings['batch_size'], ran, '/')} x {length} tokens of {Path(args.data).name}; "
               f"{len({run.out for run in page.runs})} runs, "
               f"seed {all_of(lambda r: r.settings['seed'], page.runs)}{flags}.")
    source = (f"{all_of(lambda c: c['device'])}; torch {all_of(lambda c: c['versions']['torch'])}; "
              f"{all_of(lambda c: c['started'][:10])}; commit {all_of(lambda c: c['git_commit'])}; "
              f"{sum(run.final['seconds'] for run in ran) / 3600:.1f} hours of runs")
    given = {k: v for k, v in (("seeds", args.seeds), ("nproc", args.nproc), ("jobs", args.jobs))
             if v != {"seeds": 3}.get(k, 1)} | args.override
    command = " ".join([f"python tables.py {name} --scale={args.scale} --data={args.data}",
                        *(f"--{k}={v}" for k, v in given.items())])
    other = [Path(args.data).name] * (args.data != "data/python") + [
        f"{k}{v}" for k, v in given.items() if k not in ("nproc", "jobs")]
    write(Path("results") / args.scale / "-".join([name, *other]), page, caption, source, command,
          {"config": configs[0]})


def write(stem, page, caption, source, command, more={}):
    """Print the table; write it with its caption to STEM.md, the rows to STEM.json, the picture to STEM.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    stem.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = page.panels
    narrow, size = columns > 3, (7, 4.5)
    if columns > 1:  # at most as wide as a page can show and still be read
        size = min(4 * columns, 12), (3 if narrow else 4) * rows
    with plt.rc_context({"font.size": 8 if narrow else 10}):
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
        page.draw(axes)
        for each in figure.axes:
            each.grid(alpha=0.3)
        figure.suptitle(caption, fontsize=9, wrap=True)
        figure.savefig(f"{stem}.png", dpi=150 if columns < 3 else 120)
        plt.close(figure)
    Path(f"{stem}.md").write_text(f"{caption}\n\n{page.table}\n\n`{command}`; {source}\n")
    Path(f"{stem}.json").write_text(json.dumps({"command": command, **more, "rows": page.rows}, indent=1,
                                               allow_nan=False) + "\n")
    print(f"\n{caption}\n\n{page.table}\n\n{source}\n{stem}.md, .json, .png")
