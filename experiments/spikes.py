"""Spikes of the gradient norm (Takase et al. 2023, arXiv 2312.16903): models that differ in their
initial weights and embedding, over learning rates, at a quarter of the scale's batch for twice its
steps.

    python -m experiments.spikes     # options as in adam_sgd_gap.py
"""
from experiments.methods import lr_grid, main, method, plot_by_lr, resized, stable_lr_text
from experiments.sweep import (
    LR_GRID, STYLES, ExperimentResult, finished, markdown_table, next_below, outcomes,
    rerun_with_new_seeds, run_all)
from loader import UserError
from model import SIZES

# The first is this repo's model as it is; the others are the paper's.
VARIANTS = {
    "N(0, 0.02)": {},
    "Vanilla": {"init": "small"},
    "Embed Detach": {"init": "small", "embedding": "detach"},
    "Embed LN": {"init": "small", "embedding": "norm"},
    "Scaled Embed": {"init": "small", "embedding": "scale"},
    # ours. Scaled Embed both enlarges the embedding and, under Adam, speeds up its steps: Large
    # Embed does the first alone, Fast Embed (below) the second
    "Large Embed": {"init": "small", "embedding": "large"},
}
METHODS = ("Adam", "SGD with momentum", "clipped SGD")


def spikes(args):
    for name in ("embedding", "init", "embedding_mult", "grad_clip"):
        if name in args.override:
            raise UserError(f"it sets {name} itself: drop --{name}")
    s = method("Adam", args).settings
    factor = SIZES[s["model"]][0] ** 0.5
    variants = VARIANTS | {"Fast Embed": {"init": "small", "embedding_mult": factor}}
    styles = dict(zip(variants, STYLES.values(), strict=True))
    shape = resized(args, s["batch_size"] // 4, 2 * s["steps"]) | {"grad_clip": None}
    grids = {(name, variant): lr_grid(name, args, **shape, **changes)
             for name in METHODS for variant, changes in variants.items()}
    run_all(sum(grids.values(), []), args)
    for (name, variant), grid in grids.items():  # on down, until the best is not the lowest
        while (grid[0].loss < min(run.loss for run in grid[1:])
               and (lower := next_below(LR_GRID, grid[0].lr))):
            run = method(name, args, **shape, **variants[variant], lr=lower)
            grid.insert(0, run_all([run], args)[0])
    best = {key: min(grid, key=lambda run: run.loss) for key, grid in grids.items()}
    final = {key: rerun_with_new_seeds(run, args, first=1) if finished([run]) else []
             for key, run in best.items()}
    run_all(sum(final.values(), []), args)

    rows, lines = [], []
    for (name, variant), grid in grids.items():
        runs, adams = final[name, variant], final["Adam", variant] or [None] * args.seeds
        here = [run.row(best["Adam", variant]) | {"role": "grid"} for run in grid]
        here += [run.row(adam) | {"role": "seed"} for run, adam in zip(runs, adams)]
        rows += [row | {"variant": variant, "spikes": run.spikes}
                 for row, run in zip(here, grid + runs)]
        by_lr = [f"{run.lr:g}: {run.outcome} ({len(run.spikes)})" for run in grid]
        at_seeds = ("-", "-", "-")
        if runs:
            at_seeds = (f"{runs[0].lr:g}", outcomes(runs),
                        ", ".join(str(len(run.spikes)) for run in runs))
        lines.append((name, variant, "; ".join(by_lr), stable_lr_text(grid), *at_seeds))
    table = markdown_table(
        ("method", "variant", "validation loss (spikes) by learning rate",
         "maximum stable learning rate", "best", "loss at other seeds", "spikes at them"), lines)

    def draw(panels):
        for axes, name in zip(panels.flat, METHODS):
            for variant, style in styles.items():
                plot_by_lr(axes, grids[name, variant], style, variant)
            axes.sharey(panels[0, 0])
            axes.set_title(name)
        for variant, style in styles.items():
            grid = grids["Adam", variant]
            panels[1, 1].plot([run.lr for run in grid], [len(run.spikes) for run in grid], **style)
        panels[1, 1].set(title="Adam", xscale="log", xlabel="peak learning rate (log scale)",
                         ylabel="spikes of the gradient norm (steps)")
    return ExperimentResult(
        "Final loss and spikes of seven models", table, rows,
        sum([*grids.values(), *final.values()], []),
        "The initial weights of this repo; the paper's small sub-layers (Vanilla), with a tenth of "
        "the embedding's gradient (Embed Detach), with a large shortcut (Embed LN, Scaled Embed); "
        "ours: with the embedding as large at the start (Large Embed), or its steps as many times "
        "larger (Fast Embed). "
        "A spike is a gradient norm above 5 x the median of the 100 steps before.", draw, (2, 2))


if __name__ == "__main__":
    main({"spikes": spikes})
