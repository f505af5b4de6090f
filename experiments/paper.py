"""The runs of Glentis et al. at their scale, and what experiments cost before they are run.

    python -m experiments.paper --scale=130m --data=data/c4 --nproc=8    # or `make paper`
    python -m experiments.paper cost --scale=1b --target=gap             # runs nothing
"""
import argparse
import math
import re
import sys
from pathlib import Path

from experiments.adam_sgd_gap import EXPERIMENTS
from experiments.bench import PEAK_FLOPS
from experiments.methods import (
    NAMES, SCALES, SMALL, compared, data_shape, main, method, overrides, plot_losses, state_bytes)
from experiments.sweep import ExperimentResult, fmt, markdown_table, rerun_with_new_seeds
from loader import UserError
from model import Config

C4_DOCUMENTS, C4_GB = 364_868_892 / 1024, 305 / 1024  # of one of its 1,024 files (its data card)
# a run's share of the scale's tokens, where it is not all of them: half, or unlike from run to run
SHARES = {"spikes": 0.5, "thresholds": None, "length": None}


def memory(s, vocab, seq_len, gpus):
    """GiB on each of these GPUs under bf16 autocast, by part (ours).

    Each layer keeps 7 x hidden + 3 x ffn activations per token, and the logits of a micro-batch
    come with their gradient. The weights are copied in bf16 for the products, and in fp32 for the
    diagnostics.
    """
    config = Config.named(s["model"], vocab)
    tokens = (s.get("micro_batch") or s["batch_size"] // gpus) * seq_len
    parts = {"weights": 4 * config.parameters, "gradients": 4 * config.parameters,
             "optimizer state": state_bytes(s, vocab) * config.parameters,
             "copies of the weights": 6 * config.parameters,
             "activations": 2 * tokens * config.layers * (7 * config.hidden + 3 * config.ffn),
             "logits": 4 * tokens * vocab}
    return {part: size / 2**30 for part, size in parts.items()}


def number_of_runs(target, seeds, scale):
    """Of a target: four per seed for the paper's comparison, otherwise as many as its page has, of
    this scale or a smaller one."""
    if target == "paper":
        text = "one seed" if seeds == 1 else f"{seeds} seeds"
        return len(NAMES) * seeds, f"stated settings, {text}"
    folders = [Path("results", s) for s in (scale, *reversed(SMALL))]
    for page in [page for name in (f"{target}.md", f"{target}-*.md")  # then of other settings
                 for folder in folders for page in sorted(folder.glob(name))]:
        if found := re.search(r"(\d+) runs, seed", page.read_text()):
            return int(found[1]), f"as in {page}"
    return None, f"no page of {target} says how many"


def cost(args, target="paper", peak=989e12, mfu=0.4):
    """The table of what one run takes, and all runs of a target, on args.nproc GPUs of `peak`
    FLOP/s (default: an H100's, dense bf16) of which they reach the share `mfu`."""
    vocab, seq_len = data_shape(args.data)
    s = method("Adam", args).settings
    config, sequences = Config.named(s["model"], vocab), s["steps"] * s["batch_size"]
    tokens, per_token = sequences * seq_len, config.flops_per_token(seq_len)
    hours = tokens * per_token / (args.nproc * peak * mfu) / 3600
    runs, source = number_of_runs(target, args.seeds, args.scale)
    lines = [("parameters", f"{config.parameters:,}"),
             ("tokens", f"{tokens:,} ({s['steps']} x {s['batch_size']} x {seq_len})"),
             ("FLOPs", f"{tokens * per_token:.3g} ({per_token:.3g} per token)"),
             (f"hours on {args.nproc} x {peak:.3g} FLOP/s at {mfu:.0%}", f"{hours:,.2f}")]
    for name in NAMES:
        found = method(name, args).settings
        parts = memory(found, vocab, seq_len, args.nproc)
        sizes = ", ".join(f"{part} {size:.2f}" for part, size in parts.items())
        lines.append((f"GiB per GPU, {name}", f"{sum(parts.values()):.2f} ({sizes})"))
        checkpoint = (4 + state_bytes(found, vocab)) * config.parameters / 2**30
        lines.append((f"GiB of a checkpoint, {name}", f"{checkpoint:.2f}, twice while it is saved"))
    if args.scale not in SMALL:
        files = math.ceil(sequences / C4_DOCUMENTS)
        lines.append(("C4 files for one epoch, in rows", f"{files}, {files * C4_GB:,.0f} GB"))
    lines.append((f"runs of {target}, {source}", str(runs or "-")))
    if runs:
        share = SHARES.get(target, 1)
        total = f"{runs * share * hours:,.1f}" if share else "-"
        lines.append((f"hours of {target}", total))
        kept = runs * 4 * config.parameters / 2**30 if target == "paper" else 0
        lines.append(("GiB kept of finished runs", f"{kept:,.1f}" + " (weights)" * bool(kept)))
    return markdown_table((f"one run of {args.scale}", ""), lines)


def paper(args):
    """No search: clipped SGD as it was released, the others at our settings."""
    source = "No search: clipped SGD with the released settings, the others with ours, not tuned."
    if args.scale in SMALL:
        source = "No search: the best settings of an earlier one at nano."
    print(f"{cost(args)}\n\n{source}\n",
          file=sys.stderr if args.dry else sys.stdout, flush=True)
    steps = args.override.get("steps", SCALES[args.scale]["steps"])
    curve = {"eval_every": max(1, steps // 10), "keep": "weights", **args.override}
    found = {name: rerun_with_new_seeds(method(name, args, **curve), args) for name in NAMES}
    rows, cells = compared(found, args)
    if args.dry:
        return None
    (vocab, seq_len), lines = data_shape(args.data), []
    for cell, runs, row in zip(cells, found.values(), rows[args.seeds - 1::args.seeds]):
        speed = row["tok_per_s"]
        per_token = Config.named(row["model"], vocab).flops_per_token(seq_len)
        config = runs[-1].config if speed else {}
        peak = PEAK_FLOPS.get(config.get("device"))  # FLOP/s of a GPU
        mfu = speed * per_token / (config["world_size"] * peak) if speed and peak else None
        lines.append((*cell, fmt(speed, ",.0f"), fmt(mfu, ".0%")))
    table = markdown_table(("method", "settings", "validation loss", "gap to Adam", "tokens/s",
                            "MFU"), lines)
    return ExperimentResult(
        "The paper's comparison", table, rows, sum(found.values(), []), source,
        lambda axes: plot_losses(axes, found))


def cost_main(words):
    parser = argparse.ArgumentParser(
        prog="paper.py cost", usage=argparse.SUPPRESS, allow_abbrev=False,
        epilog="Any other --name=value is a setting of train.py for all runs.")
    option = parser.add_argument
    option("--scale", choices=SCALES, default="nano")
    option("--data", default="data/c4", help="data directory, made by data/prepare.py")
    option("--target", choices=("paper", *EXPERIMENTS, "length", "spikes"), default="paper")
    option("--seeds", type=int, default=1, help="of paper [1]; other targets as on their pages")
    option("--gpus", dest="nproc", type=int, default=8, help="how many [8]")
    option("--peak", type=float, default=989e12, help="their FLOP/s [989e12: H100, dense bf16]")
    option("--mfu", type=float, default=0.4, help="the share of these that is reached [0.4]")
    args, others = parser.parse_known_args(words)
    if min(args.seeds, args.nproc, args.peak, args.mfu) <= 0:
        parser.error("--seeds, --gpus, --peak and --mfu must be above 0")
    args.override = overrides(others, parser)
    try:
        print(cost(args, args.target, args.peak, args.mfu))
    except UserError as e:
        sys.exit(f"cost: {e}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["cost"]:
        cost_main(sys.argv[2:])
    else:
        main({"paper": paper})
