"""What is logged and how: metrics.jsonl, the progress line, and the papers' diagnostics.

For a tensor W with gradient g (of the mean loss of the batch, before any clipping) that a step
changes by dW:
    weight-to-gradient ratio  ||W||_F / ||g||_F, mean over the tensors    (the paper: "Avg.")
    effective learning rate   rms(dW) / rms(g), over all tensors          (our definition)
    token-class imbalance     max_i ||g_i|| / mean_i ||g_i|| over the rows of lm_head's g (Fig. 7)
The paper is Glentis et al. 2026. For SGD without momentum the effective learning rate is lr.
"""
import hashlib
import math
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch

from loader import UserError


def frequency_groups(counts, groups=10):
    """Splits the token classes into groups that each hold about 1/groups of the training tokens
    (Kunstner et al. 2024, appendix).

    counts int64 [vocab] -> int64 [vocab], 0 for the most frequent group. With the classes sorted by
    frequency, a class falls where the middle of its share of the tokens does (the middle is ours).
    """
    order = counts.argsort(descending=True, stable=True)
    share = counts[order].double() / counts.sum()
    middle = share.cumsum(0) - share / 2
    group = torch.empty_like(order)
    group[order] = (middle * groups).long().clamp(max=groups - 1)
    return group


class Diagnostics:
    """The quantities above. Call before_step() when the gradients are there, after_step() when the
    optimizer has used them; each returns a dict of 0-d tensors."""

    def __init__(self, model):
        self.parameters, self.lm_head = list(model.parameters()), model.lm_head.weight

    @torch.no_grad()
    def before_step(self):
        self.weights = [p.clone() for p in self.parameters]
        grad_norms = torch.stack(torch._foreach_norm([p.grad for p in self.parameters]))
        ratios = torch.stack(torch._foreach_norm(self.weights)) / grad_norms
        row_norms = torch.linalg.vector_norm(self.lm_head.grad, dim=1)
        self.grad_norm = torch.linalg.vector_norm(grad_norms)
        return {"weight_to_gradient": ratios.mean(),
                "imbalance": row_norms.max() / row_norms.mean()}

    @torch.no_grad()
    def after_step(self):
        torch._foreach_sub_(self.weights, self.parameters)
        update_norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.weights)))
        self.weights = None
        return {"effective_lr": update_norm / self.grad_norm}


class Metrics:
    """Collects a line per step on the device, without waiting for it, and writes them at flush().

    `step` is the last one written and `seconds` the training time so far, without evaluations and
    checkpoints; `last_eval` is the step and the loss of the last evaluation."""

    def __init__(self, s, run_dir, dataset, model, optimizer):
        self.s, self.run_dir, self.dist, self.optimizer = s, run_dir, run_dir.dist, optimizer
        self.pending, self.step, self.seconds, self.diverged = [], 0, 0.0, False
        self.last_eval = None, None
        self.diagnostics = Diagnostics(model)
        self.tokens_per_step = s.batch_size * dataset.seq_len  # padding included, as in the paper
        self.max_loss = 2 * math.log(dataset.vocab_size)
        self.wandb = None

    def start_wandb(self):
        """Called before the run's folder is claimed, on rank 0. Raises UserError."""
        if not self.s.wandb:
            return
        name = f"{Path(self.s.out).resolve()} {self.run_dir.identity}"
        try:
            import wandb
            run_id = hashlib.sha256(name.encode()).hexdigest()[:16]
            self.wandb = wandb.init(project=self.s.wandb, name=self.s.out, config=asdict(self.s),
                                    id=run_id, resume="allow")
        except Exception as e:  # wandb's own, or the network's
            reason = " ".join(f"{type(e).__name__}: {e}".split())
            raise UserError(f"--wandb={self.s.wandb} does not start ({reason}): try `wandb login`, "
                            "set WANDB_MODE=offline, or drop the setting") from None

    def start_clock(self):
        self.started = time.perf_counter()

    def before_step(self, step):
        """When the gradients are there, not yet clipped."""
        self.extra = {}
        if step % self.s.diag_every == 0:
            self.extra = self.diagnostics.before_step()

    def after_step(self, step, lr, loss, grad_norm):
        """loss: this process's part of the loss of the batch, a 0-d tensor like grad_norm."""
        if step % self.s.diag_every == 0:
            self.extra |= self.diagnostics.after_step()
        for name, fraction in getattr(self.optimizer, "clip_fraction", {}).items():
            if fraction is not None:
                self.extra[f"clipped_{name}"] = fraction
        self.pending.append((lr, loss, {"grad_norm": grad_norm, **self.extra}))

    def flush(self, step):
        """Writes the lines up to `step`, or to the one where the run diverged, and stops the clock.
        A run has diverged when the loss of a batch exceeds twice that of a uniform guess over the
        vocabulary, or a loss or a gradient norm is not finite."""
        if not self.pending:
            return
        losses = self.dist.sum(torch.stack([loss for _, loss, _ in self.pending])).tolist()
        seconds = time.perf_counter() - self.started
        self.seconds += seconds
        tok_per_s = len(self.pending) * self.tokens_per_step / seconds
        self.step, lines = step - len(self.pending), []
        for loss, (lr, _, values) in zip(losses, self.pending):
            self.step += 1
            values = {name: value.item() for name, value in values.items()}
            lines.append({"step": self.step, "lr": lr, "tokens": self.step * self.tokens_per_step,
                          "tok_per_s": round(tok_per_s), "train_loss": loss, **values})
            if not (loss <= self.max_loss and math.isfinite(values["grad_norm"])):
                self.diverged = True
                break
        self.pending = []
        self.write(lines)
        if step % self.s.log_every == 0 or self.diverged:
            left = (self.s.steps - self.step) * self.tokens_per_step / tok_per_s
            self.print_step(f"loss {loss:.4f}  lr {lr:<8.3g}  grad norm {values['grad_norm']:<8.2g}"
                            f"  {tok_per_s:,.0f} tok/s  {timedelta(seconds=int(left))} left")

    def log_eval(self, step, val_loss, num_targets, group_losses):
        """An evaluation. A loss that is not finite is a divergence, too."""
        line = {"step": step, "val_loss": val_loss, "val_tokens": num_targets}
        if len(group_losses) > 1:
            line["group_losses"] = group_losses
        self.step = step
        self.write([line])
        self.print_step(f"validation loss {val_loss:.4f}")
        self.last_eval, self.diverged = (step, val_loss), not math.isfinite(val_loss)

    def finish(self):
        """The last line: status "done" or "diverged"."""
        status, val_loss = ("diverged", None) if self.diverged else ("done", self.last_eval[1])
        self.run_dir.append([{"final": True, "status": status, "step": self.step,
                              "val_loss": val_loss, "seconds": round(self.seconds, 1)}])
        if self.wandb is not None:
            self.wandb.finish()
        result = "" if val_loss is None else f", validation loss {val_loss:.4f}"
        took = timedelta(seconds=int(self.seconds))
        self.dist.print0(f"{status} at step {self.step} after {took}{result}")

    def write(self, lines):
        lines = [{k: finite(v) for k, v in line.items()} for line in lines]
        self.run_dir.append(lines)
        if self.wandb is not None:
            for line in lines:
                self.wandb.log(line, step=line["step"])

    def print_step(self, text):
        self.dist.print0(f"step {self.step:>{len(str(self.s.steps))}}/{self.s.steps}  {text}")


def finite(value):
    """JSON has neither nan nor infinity: None instead, in lists too."""
    if isinstance(value, list):
        return [finite(x) for x in value]
    return value if math.isfinite(value) else None
