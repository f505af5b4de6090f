"""Speed and memory, beside baselines and beside what the machine can do.

    python -m experiments.bench                       # or `make bench`: every part, at nano
    python -m experiments.bench train --model=130m    # one part; on a GPU with MFU
    python -m experiments.bench train --dtype=float32 # not what train.py chooses here

Numbers are medians over rounds [smallest, largest]. A round measures everything once, in turn,
so that a slow minute of the machine hits all of it; a ratio is taken within a round.
"""
import functools
import importlib.util
import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.benchmark import Timer

from baselines import build_optimizer
from checkpoint import hardware
from experiments.methods import SMALL
from experiments.sweep import markdown_table
from model import SIZES, Config, LLaMA
from train import default_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # per second, bfloat16


def seconds(function, repeats):
    """Seconds per call, after two calls to warm up."""
    timer = Timer("function()", globals=locals(), num_threads=torch.get_num_threads())
    return timer.timeit(repeats).mean


def compare(title, unit, form, rounds, measurements, baselines=()):
    """Measure in turn; print a table of the numbers and of their ratios to the baselines'."""
    def spread(values, form):
        return f"{np.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"

    numbers, rows = {name: [] for name in measurements}, []
    for name in rounds * list(measurements):  # A, B, A, B, ...
        numbers[name].append(measurements[name]())
    for name, values in numbers.items():
        ratios = [spread(np.divide(values, numbers[other]), ".2f") for other in baselines]
        rows.append([name, spread(values, form), *ratios])
    head = ["", unit, *(f"x {other}" for other in baselines)]
    print(f"\n{title}\n\n{markdown_table(head, rows)}", flush=True)


def matmul_flops(dtype):
    """FLOP/s of square products; on a CPU in float32 by the better of PyTorch and NumPy, whose BLAS
    differ."""
    n = 8192 if DEVICE == "cuda" else 2048
    a = torch.randn(n, n, device=DEVICE, dtype=getattr(torch, dtype))
    times = [seconds(lambda: a @ a, 10)]
    if DEVICE == "cpu" and dtype == "float32":
        times.append(seconds(lambda: a.numpy() @ a.numpy(), 10))
    return 2 * n**3 / min(times)


@functools.cache  # a process makes its model once
def training_step(library, size, vocab, B, T, dtype):
    """A function that takes a training step with fused AdamW on random tokens."""
    x, y = torch.randint(vocab, (2, B, T)).to(DEVICE)
    if library == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM
        hidden, ffn, layers, heads = SIZES[size]
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
            num_attention_heads=heads, use_cache=False)).to(DEVICE)
    else:
        model = LLaMA(Config.named(size, vocab)).to(DEVICE)
    model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ddp_model = DDP(model) if torch.distributed.is_initialized() else model

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            if library == "transformers":
                loss = model(x, labels=y, shift_labels=y).loss
            else:
                loss = ddp_model(x, y) / y.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def take_steps(store, processes, step_args, rank):
    """In a worker process: seconds per step, and the process's peak of memory in MiB."""
    if processes > 1 and not torch.distributed.is_initialized():
        torch.set_num_threads(max(1, os.cpu_count() // processes))
        torch.distributed.init_process_group("gloo", store, rank=rank, world_size=processes)
    per_step = seconds(training_step(*step_args), 5)
    if DEVICE == "cuda":
        return per_step, torch.cuda.max_memory_allocated() / 2**20
    return per_step, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux: KiB


def bench_train(args):
    vocab, B, T = (4096, 32, 128) if args.model in SMALL else (32000, 64, 256)
    B = args.batch or B
    candidates = {"this repo": ("this repo", 1)}  # library, processes
    if importlib.util.find_spec("transformers"):
        candidates["transformers, compiled"] = ("transformers", 1)
    if DEVICE == "cpu":
        candidates["this repo, 2 processes of half the threads"] = ("this repo", 2)
    folder, speed, memory = tempfile.TemporaryDirectory(), {}, {}
    for name, (library, processes) in candidates.items():  # each in new processes
        pool = ProcessPoolExecutor(processes, get_context("forkserver"))
        work = functools.partial(take_steps, f"file://{folder.name}/store", processes,
                                 (library, args.model, vocab, B // processes, T, args.dtype))

        def tokens_per_second(name=name, pool=pool, work=work, ranks=range(processes)):
            times, peaks = zip(*pool.map(work, ranks))
            memory[name] = sum(peaks)
            return B * T / max(times)
        speed[name] = tokens_per_second
    flops = Config.named(args.model, vocab).flops_per_token(T)
    speed["matmul roofline"] = lambda: matmul_flops(args.dtype) / flops
    if DEVICE == "cuda" and torch.cuda.get_device_name() in PEAK_FLOPS:
        speed["bfloat16 peak (MFU)"] = lambda: PEAK_FLOPS[torch.cuda.get_device_name()] / flops
    baselines = [name for name in speed if not name.startswith("this repo")]
    compare(f"Training step of {args.model}: {B} x {T} tokens, vocabulary {vocab:,}, {args.dtype}",
            "tokens/s", ",.0f", args.rounds, speed, baselines)
    compare("Peak memory of these processes", "MiB", ",.0f", 1,
            {name: functools.partial(memory.get, name) for name in memory}, ["this repo"])


def bench_optimizer(args):
    model = LLaMA(Config.named(args.model, 32000)).to(DEVICE)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-6
    measurements = {}
    for label, name, foreach in (
            ("AdamW, fused", "adamw", False), ("ClippedSGD", "clipped_sgd", True),
            ("ClippedSGD, reference", "clipped_sgd", False), ("SGD", "sgd", True)):
        optimizer = build_optimizer(name, model, lr=1e-9)  # so small that nothing drifts
        for group in optimizer.param_groups:
            group["foreach"] = foreach
        optimizer.step()
        state = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
        label += f" ({state / model.config.parameters:.0f} bytes per parameter)"
        measurements[label] = lambda step=optimizer.step: 1000 * seconds(step, 20)
    compare(f"Optimizer step of {args.model}, {model.config.parameters:,} parameters", "ms", ".1f",
            args.rounds, measurements, [next(iter(measurements))])


def bench_start(args):
    """Seconds of a run of one step, first with an empty compile cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        for cache in ("empty", *args.rounds * ["filled"]):
            words = ["train.py", f"--data={args.data}", f"--model={args.model}", "--steps=1",
                     f"--out={tempfile.mkdtemp(dir=folder)}"]
            began = time.perf_counter()
            run = subprocess.run([sys.executable, *words], env=environment,
                                 stdout=subprocess.DEVNULL)
            if run.returncode:
                sys.exit(run.returncode)  # train.py has said why
            print(f"\ntrain.py --steps=1, {cache} compile cache: "
                  f"{time.perf_counter() - began:.1f} s", flush=True)


def main():
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__,
                            formatter_class=RawDescriptionHelpFormatter)
    parts = {"train": bench_train, "optimizer": bench_optimizer, "start": bench_start}
    parser.add_argument("part", nargs="*", choices=parts, default=parts)
    parser.add_argument("--model", choices=SIZES, default="nano")
    parser.add_argument("--batch", type=int, help="sequences of a training step, even")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        default=default_dtype(torch.device(DEVICE)), help="of the part train")
    parser.add_argument("--data", default="data/python", help="data directory")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.batch is not None and (args.batch < 2 or args.batch % 2):
        parser.error(f"--batch={args.batch}: two processes share it: give an even number")
    if args.rounds < 1:
        parser.error("--rounds starts at 1")
    for part in args.part:
        parts[part](args)
    print(f"\n{hardware(DEVICE)}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
