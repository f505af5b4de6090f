"""Every table and figure: its runs, its numbers, its picture.

    python tables.py demo                    # or `make demo`: Adam, SGD, clipped SGD at their best learning rates
    python tables.py lr --data=data/news     # or `make lr DATA=data/news`: how those were found
    python tables.py demo --steps=400        # any setting of train.py, for all runs

Each artefact is a function: it names its runs, takes their results and returns a Markdown table, rows for the JSON, a
drawing and a caption, which land in results/SCALE/NAME.md, .json and .png. A run is one call of train.py in a folder
under runs/ named by all of its settings, so finished runs are not repeated and killed ones go on where they stopped.
"""
import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent  # train.py's; runs/ and results/ are in the current folder
SCALES = {"nano": {"model": "nano", "batch_size": 64, "steps": 200, "eval_every": 40}}

# Each grid goes in steps of sqrt(10) and has its best inside, as `make lr` shows. `lr` is the demo's: for Adam and SGD
# the best of the grid, for clipped SGD the paper's, though 316 is a little better.
METHODS = {
    "Adam": {"settings": {"optimizer": "adamw"},
             "grid": (1e-3, 3.16e-3, 1e-2), "lr": 3.16e-3, "line": ("#000000", "-")},
    "SGD with momentum": {"settings": {"optimizer": "sgd"},
                          "grid": (0.316, 1.0, 3.16, 10.0, 31.6), "lr": 1.0, "line": ("#d55e00", ":")},
    "clipped SGD": {"settings": {"optimizer": "clipped_sgd"},
                    "grid": (31.6, 100.0, 316.0, 1000.0), "lr": 100.0, "line": ("#0072b2", "--")},
}


# ---- runs -----------------------------------------------------------------------------------------------------------

class Run:
    """One run of train.py: its settings, and once over `final` (its last line), `steps` and `evals` (the rest)."""

    def __init__(self, label, settings):
        self.label, self.settings, self.error = label, settings, None
        meta = Path(settings["data"]) / "meta.json"
        key = json.dumps(settings, sort_keys=True) + (meta.read_text() if meta.exists() else "")
        name = "-".join(f"{settings[k]}" for k in ("model", "optimizer", "lr", "seed") if k in settings)
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

    def start(self):
        """Run train.py; what it says goes to the terminal, and its last line into `error` if it fails."""
        words = [f"--{k}={v}" for k, v in {**self.settings, "out": self.out}.items()]
        last = ""
        with subprocess.Popen([sys.executable, HERE / "train.py", *words], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) as process:
            try:
                for last in process.stdout:
                    print("   ", last, end="", flush=True)
            except KeyboardInterrupt:  # the run got it too, and is saving
                process.wait()
                sys.exit(130)
        if process.returncode or not self.read():
            self.error = last.strip() or f"exit status {process.returncode}"
            print(f"    FAILED: {self.error}", file=sys.stderr)

    @property
    def loss(self):
        """Final validation loss in nats; infinite if the run diverged or failed."""
        return self.final["val_loss"] if self.final and self.final["status"] == "done" else math.inf

    @property
    def verdict(self):
        if self.final is None:
            return f"failed: {self.error}"
        return f"{self.loss:.3f}" if self.final["status"] == "done" else f"diverged at step {self.final['step']}"

    def row(self, adam):
        """What the JSON has of every run; `gap` is (loss - Adam's) / Adam's."""
        both = self.loss < math.inf and adam.loss < math.inf
        return {"method": self.label, **self.settings, "status": self.final["status"] if self.final else "failed",
                "val_loss": self.loss if self.loss < math.inf else None,
                "gap": self.loss / adam.loss - 1 if both else None,
                "seconds": self.final["seconds"] if self.final else None,
                "tok_per_s": statistics.median(x["tok_per_s"] for x in self.steps) if self.steps else None}


def execute(runs):
    """Run what has not run yet, and say which of how many and how long it will take."""
    todo = [run for run in runs if not run.read()]
    began = time.monotonic()
    for i, run in enumerate(todo):
        left = f", about {(time.monotonic() - began) / i * (len(todo) - i) / 60:.0f} min left" if i else ""
        print(f"[{i + 1}/{len(todo)}] {run.label}, lr {run.settings['lr']:g}{left}", flush=True)
        run.start()
    return runs


def method(name, args, lr=None):
    settings = {**SCALES[args.scale], "data": args.data, "seed": 42, **METHODS[name]["settings"]}
    return Run(name, {**settings, "lr": lr or METHODS[name]["lr"], **args.override})


# ---- artefacts ------------------------------------------------------------------------------------------------------

def demo(args):
    runs = execute([method(name, args) for name in METHODS])
    rows = [run.row(adam=runs[0]) for run in runs]
    table = markdown(("method", "learning rate", "validation loss", "gap to Adam", "minutes", "tokens/s"),
                     [(run.label, f"{r['lr']:g}", run.verdict, percent(r["gap"]), f"{(r['seconds'] or 0) / 60:.1f}",
                       f"{r['tok_per_s'] or 0:,.0f}") for run, r in zip(runs, rows)])

    def draw(axes):
        for run in runs:
            color, dash = METHODS[run.label]["line"]
            axes.plot([x["step"] for x in run.steps], [x["train_loss"] for x in run.steps], color=color, alpha=0.25)
            axes.plot([x["step"] for x in run.evals], [x["val_loss"] for x in run.evals], dash, color=color, marker="o",
                      label=f"{run.label}, lr {run.settings['lr']:g}: {run.verdict}")
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.legend(title="validation (pale: training)")
    return table, rows, draw, "Adam and SGD at the best learning rate of their grids, clipped SGD at the paper's.", runs


def lr(args):
    runs = {name: [method(name, args, lr) for lr in METHODS[name]["grid"]] for name in METHODS}
    every = execute([run for some in runs.values() for run in some])
    best = {name: min(some, key=lambda run: run.loss) for name, some in runs.items()}
    rows = [run.row(best["Adam"]) | {"best": run in best.values()} for run in every]
    table = markdown(("method", "validation loss by learning rate", "best", "gap to Adam", "best inside the grid"),
                     [(name, "; ".join(f"{run.settings['lr']:g}: {run.verdict}" for run in some),
                       f"{best[name].settings['lr']:g}", percent(best[name].row(best["Adam"])["gap"]),
                       "no" if best[name] in (some[0], some[-1]) else "yes") for name, some in runs.items()])

    def draw(axes):
        for name, some in runs.items():
            color, dash = METHODS[name]["line"]
            good = [run for run in some if run.loss < math.inf]
            axes.plot([r.settings["lr"] for r in good], [r.loss for r in good], dash, color=color, marker="o",
                      label=name)
            for run in some:
                if run not in good:
                    axes.plot(run.settings["lr"], 0.97, "x", color=color, transform=axes.get_xaxis_transform())
        axes.set(xscale="log", xlabel="peak learning rate (x at the top: diverged)",
                 ylabel="final validation loss (nats per token)")
        axes.legend()
    return table, rows, draw, "Final validation loss against the learning rate.", every


ARTEFACTS = {"demo": demo, "lr": lr}


# ---- output ---------------------------------------------------------------------------------------------------------

def markdown(head, rows):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def percent(x):
    return "-" if x is None else f"{x:+.1%}"


def publish(name, args, table, rows, draw, caption, runs):
    """Print the table; write results/SCALE/NAME.md, .json and .png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    ran = [run for run in runs if run.final]
    if not ran:
        sys.exit(f"tables.py: none of the {len(runs)} runs finished, the last one with: {runs[-1].error}")
    config = json.loads((ran[0].out / "config.json").read_text())
    s, seq_len = config["settings"], json.loads((Path(args.data) / "meta.json").read_text())["seq_len"]
    caption += (f" {s['model']}, {s['steps']} steps of {s['batch_size']} x {seq_len} tokens of {Path(args.data).name}; "
                f"{len(runs)} runs, seed {s['seed']}.")
    source = (f"{config['device']}; torch {config['versions']['torch']}; {config['started'][:10]}; "
              f"commit {config['git_commit']}")
    command = " ".join([f"python tables.py {name} --scale={args.scale} --data={args.data}",
                        *(f"--{k}={v}" for k, v in args.override.items())])

    folder = Path("results") / args.scale
    folder.mkdir(parents=True, exist_ok=True)
    other = [Path(args.data).name] * (args.data != "data/python") + [f"{k}{v}" for k, v in args.override.items()]
    stem = folder / "-".join([name, *other])
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    axes.set_title(caption, fontsize=9, wrap=True)
    figure.savefig(f"{stem}.png", dpi=150)
    Path(f"{stem}.md").write_text(f"{caption}\n\n{table}\n\n`{command}`; {source}\n")
    Path(f"{stem}.json").write_text(json.dumps({"command": command, "config": config, "rows": rows}, indent=1) + "\n")
    print(f"\n{caption}\n\n{table}\n\n{source}\n{stem}.md, .json, .png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ARTEFACTS)
    parser.add_argument("--scale", choices=SCALES, default="nano")
    parser.add_argument("--data", default="data/python", help="data directory, made by data/prepare.py")
    args, other = parser.parse_known_args()
    args.override = dict(word.removeprefix("--").partition("=")[::2] for word in other)
    if not all(word.startswith("--") and "=" in word for word in other) or {"lr", "out"} & set(args.override):
        parser.error(f"{' '.join(other)}: give train.py's settings as --name=value; lr and out are the table's")
    table, rows, draw, caption, runs = ARTEFACTS[args.name](args)
    publish(args.name, args, table, rows, draw, caption, runs)
    sys.exit(any(run.final is None for run in runs))


if __name__ == "__main__":
    main()
