r"""One training run.

    a CPU      python train.py --data=data/python --optimizer=clipped_sgd --lr=100 --out=runs/first
    one GPU    python train.py --model=130m --data=data/c4 --batch_size=2048 --micro_batch=64 --steps=5000 --out=runs/a
    eight      torchrun --standalone --nproc_per_node=8 train.py ... (the same settings)
    two nodes  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_id=1 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
                   train.py ... (on both)

The world size and --micro_batch change the speed, never the batches: the losses stay the same to rounding. Started
again with the same settings, a run goes on from its last checkpoint, on a CPU bit for bit as if it had never stopped.
SIGTERM and Ctrl-C save first. OUT (on a disk that all nodes share) gets config.json, metrics.jsonl and ckpt.pt.
"""
import argparse
import contextlib
import importlib.util
import inspect
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import optim
from diagnostics import Probe, frequency_groups
from loader import Batches, DataError, Sequences, eval_blocks, fingerprint, token_counts
from model import IGNORE, SIZES, Config, LLaMA
from run import Folder, Log, UserError, World, describe


@dataclass
class Settings:
    out: str = ""                      # folder of this run; the run that it holds is continued
    data: str = "data/python"          # data directory, made by data/prepare.py, or a folder of llm.c's shards
    model: str = "nano"                # micro, nano, mini, 60m, 130m, 350m or 1b; the vocabulary is the data's
    embedding: str | None = None       # detach, norm or scale: what is done to the embedding's output; or none
    init: str | None = None            # small: weights sqrt(2/5d), those out of sub-layers / sqrt(2 layers); none: 0.02
    init_from: str | None = None       # start from the weights of this folder, in Hugging Face's LLaMA format; or none
    seed: int = 42                     # of the initial weights and of the order of the data
    optimizer: str = "clipped_sgd"     # clipped_sgd, sgd or adamw
    lr: float = 100.0                  # peak learning rate; to be given for sgd and adamw, whose scales are others
    momentum: float = 0.9              # clipped_sgd, sgd: beta of the moving average of the gradient
    token_clip: float | None = 1e-3    # clipped_sgd: largest L2 norm of a row of lm_head's momentum, or none
    update_clip: float | None = 5e-4   # clipped_sgd: largest RMS of a tensor's update (weight units), or none
    beta1: float = 0.9                 # adamw
    beta2: float = 0.95                # adamw
    weight_decay: float = 0.0          # adamw: decoupled, times lr
    grad_clip: float | None = None     # any optimizer: largest global L2 norm of the gradient; or none
    loss_weighting: str | None = None  # inv or inv_sqrt: training losses times 1/pi, 1/sqrt(pi) of the token; or none
    batch_size: int = 64               # sequences of a step, over all devices and micro-batches
    micro_batch: int | None = None     # sequences that a device takes at a time; none: its whole share
    steps: int = 200                   # optimizer steps
    warmup: float = 0.1                # fraction of the steps over which lr rises linearly
    min_lr: float = 0.1                # fraction of the peak at which the cosine ends
    eval_every: int = 50               # steps; also before the first and after the last
    eval_tokens: int = 100_000         # validation targets, the same each time
    log_every: int = 10                # steps between printed lines; metrics.jsonl has every step
    diag_every: int = 10               # steps between looks at norms, ratios and imbalance: see diagnostics.py
    save_every: int = 100              # steps between checkpoints
    wandb: str | None = None           # also log to this project of Weights & Biases, if wandb is installed; or none
    compile: bool = True               # torch.compile
    dtype: str = "auto"                # of training's matrix products: float32 or bfloat16; auto: bfloat16 on a GPU
    device: str = "auto"               # cpu or cuda; auto: cuda if there is one


USES = {"clipped_sgd": ("momentum", "token_clip", "update_clip"), "sgd": ("momentum",),
        "adamw": ("beta1", "beta2", "weight_decay")}
CHOICES = {"embedding": ("detach", "norm", "scale"), "init": ("small",), "loss_weighting": ("inv", "inv_sqrt")}
ELSEWHERE = ("out", "data", "micro_batch", "log_every", "diag_every", "save_every", "wandb",
             "compile", "device")  # may change on resume


# ---- settings -------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the settings", 2)


def reader(kind):
    """What argparse calls to read a field of this type: `float | None` takes "none" too."""
    options = getattr(kind, "__args__", (kind,))

    def read(text):
        if text.lower() == "none" and len(options) > 1:
            return None
        return ("false", "true").index(text.lower()) == 1 if options[0] is bool else options[0](text)
    read.__name__ = {int: "whole number", float: "number", bool: "true or false", str: "text"}[options[0]]
    return read


def parse(argv):
    """argv -> Settings, checked as far as they can be without the data."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Settings), re.M))
    for f in fields(Settings):
        parser.add_argument(f"--{f.name}", type=reader(f.type), metavar="", help=f"{comments[f.name]} [{f.default}]")
    given = vars(parser.parse_args(argv))
    s = Settings(**given)

    def need(ok, message):
        if not ok:
            raise UserError(message, 2)
    need(s.out, "--out is missing: name a folder for the run, for instance --out=runs/first")
    need(s.model in SIZES, f"--model={s.model}: choose from {', '.join(SIZES)}")
    for name, choices in CHOICES.items():
        need(getattr(s, name) in (None, *choices), f"--{name}={getattr(s, name)}: choose {', '.join(choices)} or none")
    need(s.optimizer in USES, f"--optimizer={s.optimizer}: choose from {', '.join(USES)}")
    for optimizer, names in USES.items():
        for name in names:
            need(name not in given or name in USES[s.optimizer],
                 f"--{name} does nothing for --optimizer={s.optimizer}: drop it, or use {optimizer}")
    need("lr" in given or s.optimizer == "clipped_sgd", f"--lr is missing: --optimizer={s.optimizer} has no default")
    for name in ("lr", "token_clip", "update_clip", "grad_clip", "batch_size", "micro_batch", "steps", "eval_every",
                 "eval_tokens", "log_every", "diag_every", "save_every"):
        value = getattr(s, name)
        need(value is None or 0 < value < math.inf, f"--{name}={value}: it must be above 0")
    size = int(os.environ.get("WORLD_SIZE", 1))
    need(s.batch_size % size == 0,
         f"--batch_size={s.batch_size} does not divide among {size} processes: choose a multiple")
    need(s.batch_size // size % (s.micro_batch or 1) == 0, f"--micro_batch={s.micro_batch} does not divide the "
         f"{s.batch_size // size} sequences of a process (--batch_size={s.batch_size} over {size}): choose a divisor")
    for name in ("momentum", "beta1", "beta2"):
        need(0 <= getattr(s, name) < 1, f"--{name}={getattr(s, name)}: it must be at least 0 and below 1")
    need(0 <= s.warmup <= 1, f"--warmup={s.warmup}: it is a fraction of the run, from 0 to 1, not longer")
    need(0 <= s.min_lr <= 1, f"--min_lr={s.min_lr}: it is a fraction of the peak, from 0 to 1")
    need(s.weight_decay >= 0, f"--weight_decay={s.weight_decay}: it must be at least 0")
    need(0 <= s.seed < 2**63, f"--seed={s.seed}: it must be at least 0 and below 2^63")
    need(s.dtype in ("auto", "float32", "bfloat16"), f"--dtype={s.dtype}: choose auto, float32 or bfloat16")
    need(s.device in ("auto", "cpu", "cuda"), f"--device={s.device}: choose auto, cpu or cuda")
    need(s.device != "cuda" or torch.cuda.is_available(), "--device=cuda: PyTorch sees no GPU here; use --device=cpu")
    need(s.wandb is None or importlib.util.find_spec("wandb"), "--wandb needs wandb: `pip install wandb`, or drop it")
    return s


# ---- the parts of a step ------------------------------------------------------------------------------------------

def learning_rate(s, step):
    """The lr of step 0, 1, ...: linear over the first warmup * steps, then a cosine to min_lr of the peak."""
    rise = round(s.warmup * s.steps)
    if step < rise:
        return s.lr * (step + 1) / rise
    share = (step + 1 - rise) / max(1, s.steps - rise)
    return s.lr * (s.min_lr + (1 - s.min_lr) * 0.5 * (1 + math.cos(math.pi * share)))


def compiles(device):
    """Whether torch.compile works here: it needs a compiler, Python's headers, on a GPU Triton. Try, don't guess."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        return True
    except Exception:
        return False


@torch.no_grad()
def evaluate(model, sequences, tokens, rows, world, group=None):
    """Validation loss in nats, in fp32, the number of its targets and the loss of each group of tokens: sums of the
    token losses of a fixed set over their number, on all ranks; `rows` sequences at a time.

    `group`, int64 [vocab], is the group of each token; without it there are no groups' losses. A group that no target
    is of has the loss nan.
    """
    groups = 1 if group is None else int(group.max()) + 1
    total = torch.zeros(2, groups, dtype=torch.float64, device=world.device)  # losses, targets
    for x, y in eval_blocks(sequences, tokens, rows, world.rank, world.size):
        x, y = x.to(world.device), y.to(world.device)
        which = torch.zeros_like(y) if group is None else group[y.clamp(min=0)]
        both = model(x, y, reduction="none").double(), (y != IGNORE).double()
        total += torch.stack([torch.bincount(which.flatten(), each.flatten(), groups) for each in both])
    losses, counts = world.sum(total)
    return (losses.sum() / counts.sum()).item(), int(counts.sum()), [] if group is None else (losses / counts).tolist()


def open_data(s):
    """The training batches and the validation sequences, after a look at one of each."""
    batches, valid = Batches(Sequences(s.data, "train"), s.batch_size, s.seed), Sequences(s.data, "val")
    batches(0), next(eval_blocks(valid, 1, 1))
    return batches, valid


def train(s):
    world = World(s.device)
    device = world.device
    if s.dtype == "auto":
        s.dtype = "bfloat16" if device.type == "cuda" else "float32"

    # batches, and how a batch falls on processes and micro-batches
    world.first(lambda: open_data(s) and None)
    batches, valid = open_data(s)
    share = s.batch_size // world.size
    rows = s.micro_batch or share

    # token classes: groups by frequency, and weights of the training losses, whose mean over the training set is 1
    counts = world.first(lambda: token_counts(s.data, valid.vocab_size))
    token_group = None if counts is None else frequency_groups(counts).to(device)
    weights = None
    if s.loss_weighting:
        if counts is None:
            raise UserError(f"--loss_weighting={s.loss_weighting} needs {s.data}/token_counts.npy: make another data "
                            "directory with data/prepare.py")
        pi = counts.double() / counts.sum()
        weights = (pi ** {"inv": -1, "inv_sqrt": -0.5}[s.loss_weighting]).where(counts > 0, 0)
        weights = (weights / (pi * weights).sum()).float().to(device)

    # model and optimizer; the weights are drawn on the CPU, so that a seed means the same everywhere
    torch.manual_seed(s.seed)
    model = LLaMA(Config.named(s.model, valid.vocab_size, embedding=s.embedding, init=s.init)).to(device)
    if s.init_from and not world.first((Path(s.out) / "ckpt.pt").exists):
        from sample import pretrained  # no other run needs the tokenizers' packages
        world.first(lambda: pretrained(s.init_from, model.config) and None)
        model.load_state_dict(pretrained(s.init_from, model.config))
    optimizer = optim.build(s.optimizer, model, s.lr, **{name: getattr(s, name) for name in USES[s.optimizer]})
    optimizer.report = True
    parameters, probe = list(model.parameters()), Probe(model)

    # the folder: refuse another run's, leave a finished one alone, else go on where it stopped
    identity = {k: v for k, v in asdict(s).items() if k not in ELSEWHERE} | {"data_sha256": fingerprint(s.data)}
    folder = Folder(s.out, identity, world)
    log = Log(s, folder, valid)
    if final := folder.claim(describe(s, world)):
        return log.say(f"{s.out} is finished: {final['status']}, validation loss {final['val_loss']}")
    start, seconds, loss = folder.load(model, optimizer)
    log.start_wandb()
    if not (Path(s.data) / "meta.json").exists():
        log.say(f"{s.data} has no meta.json: taken for llm.c's shards, in GPT-2's vocabulary of {valid.vocab_size:,}, "
                f"in sequences of {valid.seq_len}")

    compiled = s.compile and not world.any(not compiles(device))
    if s.compile and not compiled:
        log.say("torch.compile does not work here (it needs a C++ compiler and Python's headers): running eagerly")
    if compiled:
        model.compile()
    replica = model
    if world.size > 1:
        replica = DDP(model, [device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    log.say(f"{s.model}, {sum(p.numel() for p in parameters):,} parameters; {s.optimizer}, lr {s.lr:g}; {s.steps} "
            f"steps of {s.batch_size} x {valid.seq_len} tokens, {s.steps / batches.per_epoch:.2f} epochs; "
            f"{world.size} x {device.type}, {s.dtype}, {'compiled' if compiled else 'eager'}"
            + (f"; from step {start}" if start else ""))

    stop = []  # the signal that came: finish the step, save, leave; a second Ctrl-C ends the run at once
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, frame: (stop.append(n), signal.signal(signal.SIGINT, signal.SIG_DFL)))

    if start == 0:
        log.evaluation(0, *evaluate(model, valid, s.eval_tokens, rows, world, token_group))
    began = time.perf_counter()
    for step in range(start, s.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, step)

        # forward and backward: the mean over the targets of the whole batch; DDP's mean over ranks is undone
        x, y, targets = batches(step, world.rank, world.size)
        if device.type == "cuda":
            x, y = (t.pin_memory().to(device, non_blocking=True) for t in (x, y))
        total = torch.zeros((), device=device)
        for i in range(0, share, rows):
            quiet = replica.no_sync() if world.size > 1 and i + rows < share else contextlib.nullcontext()
            with quiet:
                with torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bfloat16"):
                    part = replica(x[i:i + rows], y[i:i + rows], weights) / targets
                (part * world.size).backward()
            total += part.detach()

        # step
        looks = probe.before() if (step + 1) % s.diag_every == 0 else {}
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if s.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, s.grad_clip, norm)
        optimizer.step()
        if looks:
            looks |= probe.after()
        optimizer.zero_grad(set_to_none=True)
        clipped = {f"clipped_{k}": v for k, v in getattr(optimizer, "clipped", {}).items() if v is not None}
        log.add(optimizer.param_groups[0]["lr"], {"train_loss": total, "grad_norm": norm, **clipped}, looks)

        # log, evaluate, save
        step += 1
        last, leave = step == s.steps, world.any(bool(stop))
        to_eval, to_save = last or step % s.eval_every == 0, last or leave or step % s.save_every == 0
        if to_eval or to_save or step % s.log_every == 0:
            spent, diverged = log.flush(step, began)
            seconds += spent
            if to_eval and not diverged:
                loss, *more = evaluate(model, valid, s.eval_tokens, rows, world, token_group)
                log.evaluation(step, loss, *more)
                diverged = None if math.isfinite(loss) else step
            if diverged:
                return log.final("diverged", diverged, None, seconds)
            if to_save:
                folder.save(step, seconds, loss, model, optimizer)
            began = time.perf_counter()
        if leave and not last:
            log.say(f"stopped by a signal after step {step}, saved in {s.out}: the same command goes on from here")
            sys.exit(128 + (stop or [signal.SIGTERM])[0])
    log.final("done", s.steps, loss, seconds)


def main():
    try:
        train(parse(sys.argv[1:]))
    except (UserError, DataError) as e:
        status = getattr(e, "status", 1)
        if status != 2 or int(os.environ.get("RANK", 0)) == 0:  # bad settings are the same on every rank
            print(f"train.py: {e}", file=sys.stderr)
        sys.exit(status)
    except torch.OutOfMemoryError:
        sys.exit("train.py: the GPU's memory is full: lower --micro_batch")
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads may still hold tensors, and abort while Python goes down (pytorch issue 179291)


if __name__ == "__main__":
    main()
