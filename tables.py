"""Every table and figure: its runs, its numbers, its picture.

    python tables.py demo                        # or `make demo`: Adam, SGD and clipped SGD at their best learning rates
    python tables.py lr --data=data/news         # or `make lr`: how those were found

Each artefact is a function: it names its runs, takes their results and returns a Markdown table, rows for the JSON, a
drawing and a caption, which land in results/SCALE/NAME.md, .json and .png. A run is one call of train.py in a folder
under runs/ named by all of its settings, so finished runs are not repeated and killed ones go on where they stopped.
"""
import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent  # train.py's; runs/ and results/ are in the current folder
SCALES = {"nano": {"model": "nano", "batch_size": 64, "steps": 200, "eval_every": 40}}

#          name                  settings                        best lr at nano   grid, in steps of sqrt(10)     colour, dash
METHODS = {
    "Adam":              ({"optimizer": "adamw"},                3.16e-3, (1e-3, 3.16e-3, 1e-2),                  ("#000000", "-")),
    "SGD with momentum": ({"optimizer": "sgd"},                  1.0,     (0.316, 1.0, 3.16),                     ("#d55e00", ":")),
    "clipped SGD":       ({"optimizer": "clipped_sgd"},          100.0,   (31.6, 100.0, 316.0),                   ("#0072b2", "--")),
}


# ---- runs -----------------------------------------------------------------------------------------------------------

class Run:
    """One run of train.py: its settings, and once it has run, `final` (its last line), `steps` and `evals` (the others)."""

    def __init__(self, label, settings):
        self.label, self.settings, self.final, self.error = label, settings, None, None
        name = "-".join(f"{settings[k]:g}" if isinstance(settings[k], float) else str(settings[k])
                        for k in ("model", "optimizer", "lr", "seed") if k in settings)
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        self.out = Path("runs") / f"{name}-{key}"

    def read(self):
        """Take in the metrics. True if the run is over."""
        path = self.out / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.final = next((line for line in lines if line.get("final")), None)
        self.evals = [line for line in lines if "val_tokens" in line]
        self.steps = [line for line in lines if "train_loss" in line]
        return self.final is not None

    def start(self):
        """Run train.py; what it says goes to the terminal, its last line into `error` if it fails."""
        command = [sys.executable, HERE / "train.py", *(f"--{k}={v}" for k, v in self.settings.items()), f"--out={self.out}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
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
        return self.final["val_loss"] if self.final and self.final["status"] == "done" else float("inf")

    @property
    def verdict(self):
        if self.final is None:
            return f"failed: {self.error}"
        return f"{self.loss:.3f}" if self.final["status"] == "done" else f"diverged at step {self.final['step']}"

    def row(self, adam):
        """What the JSON has of every run; `gap` is (loss - Adam's) / Adam's."""
        ok = self.loss < float("inf")
        return {"method": self.label, **self.settings, "status": self.final["status"] if self.final else "failed",
                "val_loss": self.loss if ok else None, "gap": self.loss / adam.loss - 1 if ok and adam.loss < float("inf") else None,
                "seconds": self.final["seconds"] if self.final else None,
                "tok_per_s": statistics.median(x["tok_per_s"] for x in self.steps) if self.steps else None}


def execute(runs):
    """Run what has not run yet, and say which of how many and how long it will take."""
    todo = [run for run in runs if not run.read()]
    began = time.time()
    for i, run in enumerate(todo):
        left = f", about {(time.time() - began) / i * (len(todo) - i) / 60:.0f} min left" if i else ""
        print(f"[{i + 1}/{len(todo)}] {run.label}, lr {run.settings['lr']:g}{left}", flush=True)
        run.start()
    return runs


def method(name, args, lr=None):
    settings, best, _, _ = METHODS[name]
    return Run(name, {**SCALES[args.scale], "data": args.data, "seed": 42, **settings, "lr": lr or best, **args.override})


# ---- artefacts ------------------------------------------------------------------------------------------------------

def demo(args):
    runs = execute([method(name, args) for name in METHODS])
    rows = [run.row(adam=runs[0]) for run in runs]
    table = markdown(("method", "learning rate", "validation loss", "gap to Adam", "minutes", "tokens/s"),
                     [(run.label, f"{r['lr']:g}", run.verdict, percent(r["gap"]), f"{(r['seconds'] or 0) / 60:.1f}",
                       f"{r['tok_per_s'] or 0:,.0f}") for run, r in zip(runs, rows)])

    def draw(axes):
        for run in runs:
            color, dash = METHODS[run.label][3]
            axes.plot([x["step"] for x in run.steps], [x["train_loss"] for x in run.steps], color=color, alpha=0.25, lw=1)
            axes.plot([x["step"] for x in run.evals], [x["val_loss"] for x in run.evals], dash, color=color, marker="o",
                      ms=4, label=f"{run.label}, lr {run.settings['lr']:g}: {run.verdict}")
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.legend(title="validation (pale: training)")
    return table, rows, draw, "Adam, SGD and clipped SGD, each at the best learning rate of its grid.", runs


def lr(args):
    runs = {name: [method(name, args, lr) for lr in METHODS[name][2]] for name in METHODS}
    every = execute([run for some in runs.values() for run in some])
    best = {name: min(some, key=lambda run: run.loss) for name, some in runs.items()}
    rows = [run.row(best["Adam"]) | {"best": run in best.values()} for run in every]
    table = markdown(("method", "validation loss by learning rate", "best", "gap to Adam", "best inside the grid"),
                     [(name, "; ".join(f"{run.settings['lr']:g}: {run.verdict}" for run in some),
                       f"{best[name].settings['lr']:g}", percent(best[name].row(best["Adam"])["gap"]),
                       "yes" if best[name] not in (some[0], some[-1]) else "no") for name, some in runs.items()])

    def draw(axes):
        for name, some in runs.items():
            color, dash = METHODS[name][3]
            good = [run for run in some if run.loss < float("inf")]
            axes.plot([r.settings["lr"] for r in good], [r.loss for r in good], dash, color=color, marker="o", label=name)
            for run in some:
                if run not in good:
                    axes.plot(run.settings["lr"], 0.97, "x", color=color, transform=axes.get_xaxis_transform())
        axes.set(xlabel="peak learning rate (x at the top: diverged)", ylabel="final validation loss (nats per token)", xscale="log")
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
    meta = json.loads((Path(args.data) / "meta.json").read_text())
    s, seq_len = config["settings"], meta["seq_len"]
    caption += (f" {s['model']}, {s['steps']} steps of {s['batch_size']} x {seq_len} tokens, {Path(args.data).name}; "
                f"{len(runs)} runs, seed {s['seed']}.")
    source = f"{config['device']}; torch {config['versions']['torch']}; {config['started'][:10]}; commit {config['git_commit']}"
    command = f"python tables.py {name} --scale={args.scale} --data={args.data}"

    folder = Path("results") / args.scale
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / (name if args.data == "data/python" else f"{name}-{Path(args.data).name}")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    axes.set_title(caption, fontsize=9, wrap=True)
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    stem.with_suffix(".md").write_text(f"{caption}\n\n{table}\n\n`{command}`; {source}\n")
    stem.with_suffix(".json").write_text(json.dumps({"command": command, "config": config, "rows": rows}, indent=1) + "\n")
    print(f"\n{caption}\n\n{table}\n\n{source}\n{stem}.md, .json, .png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ARTEFACTS)
    parser.add_argument("--scale", choices=SCALES, default="nano")
    parser.add_argument("--data", default="data/python", help="data directory, made by data/prepare.py")
    args, other = parser.parse_known_args()
    args.override = dict(word.removeprefix("--").partition("=")[::2] for word in other)  # of train.py, for every run
    publish(args.name, args, *ARTEFACTS[args.name](args))


if __name__ == "__main__":
    main()
