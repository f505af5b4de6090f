"""Trains one model.

    CPU         python train.py --data=data/python --optimizer=clipped_sgd --lr=100 --out=runs/a
    one GPU     python train.py --model=130m --data=data/c4 --batch_size=2048 --micro_batch=64 \\
                    --steps=5000 --out=runs/b
    eight GPUs  torchrun --standalone --nproc_per_node=8 train.py ...   (the same settings)
    two nodes   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_id=1 --rdzv_backend=c10d \\
                    --rdzv_endpoint=HOST:29500 train.py ...             (on both)

The number of processes and --micro_batch change the speed, not the batches: the losses stay the
same to rounding. Started again with the same settings, a run continues from its last checkpoint, on
a CPU bit for bit as if it had never stopped. On SIGTERM or Ctrl-C it drops the step that it is in,
saves a checkpoint and exits; torchrun gives it 30 seconds for that, or as many as the environment
variable TORCH_ELASTIC_SHUTDOWN_TIMEOUT says. That a run diverged is a result: it ends there, with
exit status 0. OUT, on a disk that all nodes share, gets config.json, metrics.jsonl, ckpt.pt and a
lock file.
"""
import argparse
import importlib.util
import math
import os
import re
import signal
import sys
import time
import typing
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from baselines import build_optimizer
from checkpoint import Dist, RunDir, StopSignal, code_hashes, describe
from loader import (BatchSampler, TokenDataset, UserError, eval_batches, fingerprint,
                    token_counts)
from metrics import Metrics, frequency_groups
from model import IGNORE_INDEX, SIZES, Config, LLaMA


# ---- settings ------------------------------------------------------------------------------------

def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    out: str = setting("", "folder of this run; an unfinished run in it is continued")
    data: str = setting("data/python", "data directory, or a folder of llm.c's shards")
    model: str = setting("nano", "micro, nano, mini, 60m, 130m, 350m or 1b")
    embedding: str | None = setting(None, "its variants (model.py): detach, norm, scale, large")
    init: str | None = setting(None, "small: initial weights of Takase et al.; none: N(0, 0.02)")
    init_from: str | None = setting(None, "start from this folder in Hugging Face's LLaMA format")
    seed: int = setting(42, "random seed of the initial weights and the data order")
    # optimizer
    optimizer: str = setting("clipped_sgd", "clipped_sgd, sgd, adamw or scale")
    lr: float = setting(100.0, "peak learning rate; this default is for clipped_sgd only")
    embedding_mult: float = setting(1.0, "factor of the embedding's lr and update_clip")
    lm_head_mult: float = setting(1.0, "the same for the output layer")
    matrix_mult: float = setting(1.0, "the same for the other matrices")
    norm_mult: float = setting(1.0, "the same for the gains of the norms")
    momentum: float = setting(0.9, "clipped_sgd, sgd, scale: decay of the averaged gradient")
    token_clip: float | None = setting(
        1e-3, "clipped_sgd: max. norm of a row of lm_head's momentum, or none")
    row_clip: float | None = setting(
        None, "clipped_sgd: the same for the other matrices, or none; all rows: set both")
    row_clip_on: str = setting("all", "matrices that row_clip acts on: all of these, or embedding")
    update_clip: float | None = setting(5e-4, "clipped_sgd: max. RMS of a tensor's update, or none")
    schedule_update_clip: bool = setting(False, "clipped_sgd: true: update_clip is scheduled as lr")
    beta1: float = setting(0.9, "adamw: decay of the average of gradients")
    beta2: float = setting(0.95, "adamw: decay of the average of squared gradients")
    weight_decay: float = setting(0.0, "adamw: w -= lr * weight_decay * w, of all weights")
    grad_clip: float | None = setting(None, "max. global norm of the gradient, or none")
    # batch and schedule
    batch_size: int = setting(32, "sequences per step, over all devices and micro-batches")
    micro_batch: int | None = setting(None, "sequences at once per process; none: all (CPU: <=16)")
    steps: int = setting(200, "optimizer steps")
    warmup: float = setting(0.1, "fraction of the steps in which the learning rate rises")
    min_lr: float = setting(0.1, "fraction of the peak at which the cosine ends")
    # evaluation, log, checkpoints
    eval_every: int | None = setting(50, "steps between evaluations; none: only at the end")
    eval_tokens: int = setting(100_000, "targets per evaluation, the same ones each time")
    log_every: int = setting(10, "steps between printed lines; metrics.jsonl has every step")
    diag_every: int = setting(10, "steps between diagnostics (metrics.py)")
    save_every: int | None = setting(None, "steps between checkpoints; none: about 5 minutes")
    keep: str = setting("all", "what stays of a finished run's checkpoint: all, weights or nothing")
    wandb: str | None = setting(None, "project of Weights & Biases to log to as well, or none")
    # machine
    compile: bool = setting(True, "use torch.compile")
    dtype: str = setting("auto", "of matrix products; auto: bfloat16 where the machine has it")
    device: str = setting("auto", "cpu or cuda; auto: cuda if there is a GPU")


# the settings that an optimizer has beside --lr and --grad_clip, as build_optimizer takes them
OPTIMIZER_SETTINGS = {"clipped_sgd": ("momentum", "token_clip", "row_clip", "row_clip_on",
                                      "update_clip", "schedule_update_clip"),
                      "sgd": ("momentum",),
                      "adamw": ("beta1", "beta2", "weight_decay"),
                      "scale": ("momentum",)}
# allowed values of text settings
CHOICES = {"model": tuple(SIZES), "optimizer": tuple(OPTIMIZER_SETTINGS),
           "embedding": (None, "detach", "norm", "scale", "large"), "init": (None, "small"),
           "row_clip_on": ("all", "embedding"), "keep": ("all", "weights", "nothing"),
           "dtype": ("auto", "float32", "bfloat16"), "device": ("auto", "cpu", "cuda")}
# may change when a run continues, data and init_from in their path alone: the other settings and
# the content of these two identify it
MAY_CHANGE = ("out", "data", "init_from", "micro_batch", "log_every", "diag_every", "save_every",
              "keep", "wandb", "compile", "device")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(5)  # let rank 0 speak: when it exits, torchrun ends this process
        print(f"train.py: {message}; --help lists the settings", file=sys.stderr)
        sys.exit(2)


def converter(annotation):
    """The function by which argparse reads a field of this type, such as `int | None`."""
    types = typing.get_args(annotation) or (annotation,)

    def convert(text):
        if text.lower() == "none" and type(None) in types:
            return None
        if types[0] is bool:
            if text.lower() not in ("true", "false"):
                raise ValueError
            return text.lower() == "true"
        return types[0](text)
    names = {int: "whole number", float: "number", bool: "value (true or false)", str: "text"}
    convert.__name__ = names[types[0]]  # argparse says: invalid whole number value: '1e3'
    return convert


parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False, argument_default=argparse.SUPPRESS)  # only what is given
for f in fields(Settings):
    parser.add_argument(f"--{f.name}", type=converter(f.type), metavar="",
                        help=f"{f.metadata['help']} [{f.default}]")


def parse(argv):
    """argv -> Settings, checked as far as is possible without the data. Exits with status 2."""
    given = vars(parser.parse_args(argv))
    s = Settings(**given)

    def require(ok, name, remedy):
        if not ok:
            parser.error(f"--{name}={getattr(s, name)}: {remedy}")

    # each setting by itself
    require(s.out, "out", "name a folder for the run, such as --out=runs/first")
    for name, value in asdict(s).items():
        if name in CHOICES:
            choices = ", ".join(str(choice).lower() for choice in CHOICES[name])
            require(value in CHOICES[name], name, f"choose from {choices}")
        elif name in ("momentum", "beta1", "beta2"):
            require(0 <= value < 1, name, "it must be at least 0 and below 1")
        elif name in ("warmup", "min_lr"):
            require(0 <= value <= 1, name, "it is a fraction, from 0 to 1")
        elif name == "weight_decay":
            require(0 <= value < math.inf, name, "it must be at least 0, and finite")
        elif name == "seed":
            require(0 <= value < 2**63, name, "it must be at least 0 and below 2^63")
        elif type(value) in (int, float):
            require(0 < value < math.inf, name, "it must be above 0, and finite")

    # settings that need others: require(a or not b) says that b needs a
    for optimizer, names in OPTIMIZER_SETTINGS.items():
        for name in names:
            require(name not in given or name in OPTIMIZER_SETTINGS[s.optimizer], name,
                    f"it does nothing for {s.optimizer}: drop it, or use --optimizer={optimizer}")
    require(s.row_clip or "row_clip_on" not in given, "row_clip_on",
            "it does nothing without --row_clip: give that, too")
    require(not s.schedule_update_clip or (s.update_clip and s.min_lr), "schedule_update_clip",
            "it needs an --update_clip, and a --min_lr above 0, as no clip may be 0")
    require(not s.init_from or not s.init, "init", "--init_from has the weights: drop one of them")
    require("lr" in given or s.optimizer == "clipped_sgd", "optimizer",
            "--lr is missing, this optimizer has no default")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    sequences = s.batch_size // processes
    require(s.batch_size % processes == 0, "batch_size",
            f"it does not divide among {processes} processes: choose a multiple")
    require(sequences % (s.micro_batch or 1) == 0, "micro_batch",
            f"it does not divide the {sequences} sequences of a process: choose a divisor")

    # what this machine has
    require(s.device != "cuda" or torch.cuda.is_available(), "device",
            "PyTorch finds no GPU here: use --device=cpu")
    require(s.wandb is None or importlib.util.find_spec("wandb"), "wandb",
            "wandb is not installed: `pip install wandb`, or drop the setting")
    return s


# ---- the parts of training -----------------------------------------------------------------------

def schedule(s, step):
    """The share of the peak learning rate at step 1, 2, ..., s.steps: linear warm-up, then a
    cosine."""
    warmup_steps = round(s.warmup * s.steps)
    if step <= warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (s.steps - warmup_steps)
    return s.min_lr + (1 - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def compile_problem(device):
    """Why torch.compile does not work on a device, in one line; None if it does."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as e:  # it fails in many ways
        error = re.search(".* error: .*", str(e))  # of the C++ compiler
        return error[0] if error else f"{type(e).__name__}: {e}".splitlines()[0]


def default_dtype(device):
    """bfloat16 where the hardware multiplies in it, a CPU by AVX512-BF16 or AMX; else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", lambda: {})  # 2.11 may lack it
        native = capabilities().get("avx512_bf16") or capabilities().get("amx_bf16")
    return "bfloat16" if native else "float32"


def choose_dtype(s, device):
    """What --dtype says. Raises UserError for bfloat16 on a GPU that only emulates it."""
    default = default_dtype(device)
    if device.type == "cuda" and s.dtype == "bfloat16" and default == "float32":
        raise UserError(f"--dtype=bfloat16: {torch.cuda.get_device_name()} does not multiply in "
                        "it: use --dtype=float32")
    return default if s.dtype == "auto" else s.dtype


def default_micro_batch(sequences, device):
    """All at once; on a CPU, whose caches are small, the largest divisor up to 16 (dev/LOG.md)."""
    if device.type == "cuda":
        return sequences
    return max(n for n in range(1, 17) if sequences % n == 0)


def open_data(s):
    """The training batches, the validation set, and the group by frequency of each token class,
    int64 [vocab]: one group if the counts are not known. Reads the first batches, as a check."""
    sampler = BatchSampler(TokenDataset(s.data, "train"), s.batch_size, s.seed)
    val_data = TokenDataset(s.data, "val")
    sampler(0)  # it counts steps from 0
    next(eval_batches(val_data, tokens=1, batch_size=1))
    groups = torch.zeros(val_data.vocab_size, dtype=torch.long)
    if (counts := token_counts(s.data, val_data.vocab_size)) is not None:
        groups = frequency_groups(counts)
    return sampler, val_data, groups


def next_batch(sampler, step, dist):
    """This process's part of the batch of step 1, 2, ...: inputs and targets on the device, and the
    number of targets in the whole batch."""
    inputs, targets, num_targets = sampler(step - 1, dist.rank, dist.size)
    if dist.device.type == "cuda":
        inputs = inputs.pin_memory().to(dist.device, non_blocking=True)
        targets = targets.pin_memory().to(dist.device, non_blocking=True)
    return inputs, targets, num_targets


@torch.no_grad()
def evaluate(model, dataset, groups, tokens, batch_size, dist, stop_signal):
    """Validation loss in nats, in fp32, over the same targets each time (about `tokens` of them),
    batch_size sequences at a time: the sum of the losses of all ranks / the number of targets.

    groups, int64 [vocab], assigns each token class to a group. Returns the loss, the number of
    targets, and the loss of each group (nan if it has no target); None if a signal cut it short.
    """
    num_groups = int(groups.max()) + 1
    sums = torch.zeros(2, num_groups, dtype=torch.float64, device=dist.device)  # losses, targets
    for x, y in eval_batches(dataset, tokens, batch_size, dist.rank, dist.size):  # as many on each
        if dist.any_rank(stop_signal.number is not None):  # a signal to one rank stops all
            return None
        x, y = x.to(dist.device), y.to(dist.device)
        losses = model(x, y, reduction="none").double()  # [B * T], 0 where padded
        counted = (y != IGNORE_INDEX).flatten().double()
        group = groups[y.clamp(min=0)].flatten()  # padding is in some group, with loss and count 0
        sums[0] += group.bincount(weights=losses, minlength=num_groups)
        sums[1] += group.bincount(weights=counted, minlength=num_groups)
    losses, counts = dist.sum(sums)
    return (losses.sum() / counts.sum()).item(), int(counts.sum()), (losses / counts).tolist()


def train(s):
    """Returns the exit status: 0, or 128 + the number of the signal that stopped the run."""
    # processes, device, precision
    dist = Dist(s.device)
    device = dist.device
    s.dtype = dist.rank0_first(choose_dtype, s, device)  # it is part of the run's identity
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bfloat16")

    # data; rank0_first: rank 0 first, so that an error is reported once, then the others
    sampler, val_data, groups = dist.rank0_first(open_data, s)
    groups = groups.to(device)
    micro_batch = s.micro_batch or default_micro_batch(s.batch_size // dist.size, device)

    # what identifies the run, checked to be the same on all ranks
    identity = {name: value for name, value in asdict(s).items() if name not in MAY_CHANGE}
    identity["data_sha256"] = fingerprint(s.data)
    identity["init_from_sha256"] = s.init_from and fingerprint(s.init_from)
    dist.check_same({**asdict(s), **identity, **code_hashes(), "device": device.type,
                     "data": f"{len(sampler.dataset)} + {len(val_data)} sequences"},
                    "start all with the same settings, data and code")
    run_dir = RunDir(s.out, identity, dist)

    # model and optimizer; weights are drawn on the CPU, so that a seed means the same everywhere
    torch.manual_seed(s.seed)
    config = Config.named(s.model, val_data.vocab_size, embedding=s.embedding, init=s.init)
    model = LLaMA(config).to(device)
    if s.init_from and not dist.broadcast(os.path.exists(run_dir.ckpt)):  # when resuming, not again
        from sample import load_pretrained  # imported here, as it needs more packages
        model.load_state_dict(dist.rank0_first(load_pretrained, s.init_from, config))
    options = {name: getattr(s, name) for name in OPTIMIZER_SETTINGS[s.optimizer]}
    options["multipliers"] = {name.removesuffix("_mult"): value
                              for name, value in asdict(s).items() if name.endswith("_mult")}
    optimizer = build_optimizer(s.optimizer, model, s.lr, **options)

    # the run's folder: refuse another run's, leave a finished one alone, else continue
    metrics = Metrics(s, run_dir, val_data, model, optimizer)
    if final := run_dir.acquire(describe(s, dist), metrics.start_wandb):
        dist.print0(f"{s.out} is finished: {final['status']}, validation loss {final['val_loss']}")
        return 0
    metrics.step, metrics.seconds, metrics.last_eval = run_dir.load(model, optimizer)
    start = metrics.step

    # compile, and wrap for several processes
    problem = compile_problem(device) if s.compile else None
    compiled = s.compile and not dist.any_rank(problem is not None)
    if compiled:
        model.compile(dynamic=False)  # all but the embedding (model.py)
    elif s.compile:
        dist.print0("running eagerly: torch.compile, which needs a compiler, Python's headers and "
                    f"a cache folder without spaces, fails: {problem or 'on another process'}")
    ddp_model = model
    if dist.size > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        ddp_model = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)

    # say what runs
    dist.print0(f"{s.data}: vocabulary {val_data.vocab_size:,}, sequences of {val_data.seq_len}, "
                f"{s.steps / sampler.steps_per_epoch:.2f} epochs")
    dist.print0(f"{s.model}, {config.parameters:,} parameters; {s.optimizer}, lr {s.lr:g}; "
                f"{s.steps} steps of {s.batch_size} sequences; {dist.size} x {device.type}, "
                f"{s.dtype}, {'compiled' if compiled else 'eager'}; from step {start}")

    # how a run evaluates, saves and ends
    stop_signal = StopSignal()  # until here a signal ends the process at once

    def is_eval_due(step):
        return step == s.steps or (s.eval_every and step % s.eval_every == 0)

    def is_save_due(step):
        if step == s.steps:
            return True
        if s.save_every:
            return step % s.save_every == 0
        return step % s.log_every == 0 and run_dir.is_save_due()  # after five minutes

    def finish():
        """The end of a run that is done or diverged. Returns the exit status."""
        metrics.finish()
        run_dir.discard(s.keep, model)
        return 0

    def stop(step):
        """Saves after this step, since a signal came. Returns the exit status."""
        metrics.flush(step)
        if metrics.diverged:
            return finish()
        run_dir.save(step, metrics.seconds, metrics.last_eval, model, optimizer)
        dist.print0(f"stopped by a signal after step {step}, saved in {s.out}: the same command "
                    "goes on from here")
        return 128 + (stop_signal.number or signal.SIGTERM)  # it may have come to another rank

    def run_eval(step):
        """Returns the exit status if the run ends here, else None."""
        result = evaluate(model, val_data, groups, s.eval_tokens, micro_batch, dist, stop_signal)
        if result is None:
            return stop(step)
        metrics.log_eval(step, *result)
        return finish() if metrics.diverged else None

    # evaluate at the start, or when resuming from a checkpoint saved before its step's evaluation
    if is_eval_due(start) and metrics.last_eval[0] != start:
        if (status := run_eval(start)) is not None:
            return status
    metrics.start_clock()
    for step in range(start + 1, s.steps + 1):
        # set the learning rate, and with --schedule_update_clip the update clip: group["peak"],
        # which build_optimizer made, has the options that are scheduled
        factor = schedule(s, step)
        for group in optimizer.param_groups:
            group.update({name: factor * peak for name, peak in group["peak"].items()})

        # get this process's part of the batch
        inputs, targets, num_targets = next_batch(sampler, step, dist)

        # forward and backward: micro-batches add up to the gradient of the mean loss of the batch
        loss = torch.zeros((), device=device)
        for i in range(0, len(inputs), micro_batch):
            if dist.any_rank(stop_signal.number is not None):
                return stop(step - 1)  # the weights are still those of that step
            # DDP exchanges gradients in the last micro-batch only; one process has no DDP
            ddp_model.require_backward_grad_sync = i + micro_batch >= len(inputs)
            x, y = inputs[i:i + micro_batch], targets[i:i + micro_batch]
            with autocast:
                micro_loss = ddp_model(x, y) / num_targets  # the model returns a sum
            (micro_loss * dist.size).backward()  # DDP averages over the processes, this undoes it
            loss += micro_loss.detach()

        # clip the gradient, update the weights; the norm that is logged is the one before clipping
        metrics.before_step(step)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        if s.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), s.grad_clip, grad_norm)
        optimizer.step()
        metrics.after_step(step, factor * s.lr, loss, grad_norm)
        optimizer.zero_grad()

        # log, save, evaluate, each every so many steps
        to_log, to_eval, to_save = step % s.log_every == 0, is_eval_due(step), is_save_due(step)
        if to_log or to_eval or to_save:
            metrics.flush(step)  # stops the clock, and sees whether the run has diverged
            if metrics.diverged:
                return finish()
            if to_save:
                run_dir.save(step, metrics.seconds, metrics.last_eval, model, optimizer)
            if to_eval and (status := run_eval(step)) is not None:
                return status
            metrics.start_clock()
    return finish()


def main(argv):
    """Returns the exit status."""
    s = parse(argv)
    try:
        status = train(s)
    except UserError as e:
        print(f"train.py: {e}", file=sys.stderr)
        return e.status
    except RuntimeError as e:
        if not (isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e)):
            raise
        print("train.py: memory is full: lower --micro_batch", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the loop
        return 130
    except OSError as e:
        print(f"train.py: {e}: start again, it continues from its last checkpoint", file=sys.stderr)
        os._exit(1)  # a normal exit would flush standard output, which may be what failed
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)  # gloo's threads may abort at a normal exit (pytorch issue 179291)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
