"""Speed and memory, beside peers and beside what the machine can do.

    python bench.py                          # or `make bench`: every part at nano, a quarter of an hour on two cores
    python bench.py train --model=60m        # one part
    python bench.py train --model=130m --batch=64    # on a GPU: bfloat16, and the share of its peak (MFU)

Each number is the median of --rounds rounds, taken in turn (A B A B) so that a slow minute of a shared machine falls on
all alike, with the smallest and the largest; a ratio is the median of the ratios within a round, not of the medians.
"""
import argparse
import importlib.metadata
import importlib.util
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import optim
from diagnostics import Probe
from loader import Batches, DataError, Sequences
from model import SIZES, Config, LLaMA
from run import Folder, Log, World, hardware
from sweep import markdown

HERE = Path(__file__).resolve().parent
SHAPES = {"nano": (4096, 64, 128), "60m": (32000, 8, 256)}  # vocabulary, sequences, length; others: as the paper
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}  # dense bf16, FLOP/s


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function, n=1):
    """Seconds of one of n calls."""
    sync()
    began = time.perf_counter()
    for _ in range(n):
        function()
    sync()
    return (time.perf_counter() - began) / n


def in_turn(rounds, measures):
    """{name: [a number a round]} from {name: function that measures one}."""
    found = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return found


def ratio(a, b):
    return spread([x / y for x, y in zip(a, b)], ".2f")


def spread(numbers, form=",.0f"):
    return f"{statistics.median(numbers):{form}} [{min(numbers):{form}}, {max(numbers):{form}}]"


def show(title, head, rows):
    print(f"\n{title}\n\n{markdown(head, rows)}", flush=True)


# ---- a training step ------------------------------------------------------------------------------------------------

def matrix_rate(device):
    """FLOP/s of square products, by the better of PyTorch and NumPy on a CPU (they call different libraries)."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    out = torch.empty_like(a)
    ways = [lambda: torch.mm(a, a, out=out)]
    if device == "cpu":
        ways.append(lambda: np.matmul(a.numpy(), a.numpy(), out=out.numpy()))
    for way in ways:
        way()
    return 2 * n**3 / min(timed(way, 10) for way in ways)


def train_step(peer, size, shape, device, bf16):
    """A function that takes one step: forward, backward, fused AdamW."""
    vocab, B, T = shape
    torch.manual_seed(0)
    x, y = (torch.randint(vocab, (B, T)).to(device) for _ in "xy")
    with torch.device(device):
        if peer.startswith("transformers"):
            from transformers import LlamaConfig, LlamaForCausalLM
            hidden, ffn, layers, heads = SIZES[size]
            model = LlamaForCausalLM(LlamaConfig(
                vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=T, use_cache=False,
                tie_word_embeddings=False))
            run = torch.compile(model) if peer.endswith("compiled") else model

            def loss():
                return run(input_ids=x, labels=y, shift_labels=y).loss
        else:
            model = LLaMA(Config.named(size, vocab))
            if peer.startswith("this repo"):
                model.compile()
                replica = model
                if torch.distributed.is_initialized():
                    replica = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

                def loss():
                    return replica(x, y) / y.numel()
            else:
                loss = torch.compile(lambda: F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten()))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()
    return step


def peak_memory(device):
    """Bytes: on a GPU what PyTorch had at most; else of the whole process, Python and libraries included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, not what the parent had before
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def worker(pipe, rank, ranks, folder, args):
    """A process that takes n steps of a peer when told n; so each has its own peak of memory."""
    if ranks > 1:
        torch.set_num_threads(max(1, os.cpu_count() // ranks))
        torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=ranks)
    device = args[3]
    step = train_step(*args)
    first = [step().item() for _ in range(3)][0]
    assert abs(first - math.log(args[2][0])) < 0.5, f"{args[0]} starts at a loss of {first}"  # do all do the same?
    pipe.send(None)
    try:
        while True:
            seconds = timed(step, pipe.recv())
            pipe.send((seconds, peak_memory(device)))
    except EOFError:  # the bench is over
        pass


class Peer:
    """A training step in its own process, or one half of it in each of two."""

    def __init__(self, name, size, shape, device, folder):
        self.name = name
        ranks, bf16 = 2 if "processes" in name else 1, device == "cuda" or "bfloat16" in name
        shape = shape[0], shape[1] // ranks, shape[2]
        context, self.tokens = get_context("spawn"), ranks * shape[1] * shape[2]
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            mine, its = context.Pipe()
            self.pipes.append(mine)
            self.processes.append(context.Process(
                target=worker, daemon=True, args=(its, rank, ranks, folder, (name, size, shape, device, bf16))))
            self.processes[-1].start()
            its.close()  # so that a process that died is noticed
        self.ask()

    def close(self):
        for pipe, process in zip(self.pipes, self.processes):
            pipe.close()
            process.join()

    def ask(self):
        try:
            return [pipe.recv() for pipe in self.pipes]
        except EOFError:
            sys.exit(f"bench.py: the process of `{self.name}` died; if memory ran out, lower --batch")

    def speed(self, n):
        for pipe in self.pipes:
            pipe.send(n)
        seconds, peaks = zip(*self.ask())
        self.memory = sum(peaks)
        return self.tokens / max(seconds)


def train(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocab, B, T = shape = SHAPES.get(args.model, (32000, 64, 256))
    shape = vocab, args.batch or B, T
    names = ["this repo", "plain PyTorch, whole logits, compiled"]
    if importlib.util.find_spec("transformers"):
        names += ["transformers, compiled", "transformers, eager"]
    else:
        print("no transformers here, so without that peer: `pip install transformers` and run this again")
    if device == "cpu":
        names += ["this repo, 2 processes of half the threads", "this repo, bfloat16 (the others fp32)"]
    need = Config.named(args.model, vocab).flops_per_token(T)
    with tempfile.TemporaryDirectory() as folder:
        peers = {name: Peer(name, args.model, shape, device, folder) for name in names}
        first = peers["this repo"].speed(1)
        steps = max(1, round(3 * first / (shape[1] * T)))  # three seconds a round
        found = in_turn(args.rounds, {"limit": lambda: matrix_rate(device) / need} |
                        {name: lambda peer=peer: peer.speed(steps) for name, peer in peers.items()})
        for peer in peers.values():
            peer.close()
    against = [name for name in names if name.endswith("compiled")]  # the peers that one would train with
    kind = next((k for k in PEAK if device == "cuda" and torch.cuda.get_device_name() == k), None)

    def share(name):
        """Of the limit, which is fp32's on a CPU, and of the GPU's peak (MFU)."""
        own = "-" if "bfloat16" in name else ratio(found[name], found["limit"])
        return (own, f"{statistics.median(found[name]) * need / PEAK[kind]:.1%}") if kind else (own,)
    show(f"Training step, {args.model}: {shape[1]} x {T} tokens, vocabulary {vocab:,}, fused AdamW. Limit: "
         f"{statistics.median(found['limit']):,.0f} tokens/s, if all were matrix products at the rate measured in "
         f"between ({statistics.median(found['limit']) * need / 1e9:,.0f} GFLOP/s).",
         ("", "tokens/s", *(f"x {name}" for name in against), "x limit", *(["MFU"] if kind else []),
          "peak memory, MiB", *(f"x {name}" for name in against)),
         [(name, spread(found[name]), *(ratio(found[name], found[other]) for other in against), *share(name),
           f"{peers[name].memory / 2**20:,.0f}",
           *(f"{peers[name].memory / peers[other].memory:.2f}" for other in against)) for name in names])


# ---- the optimizer --------------------------------------------------------------------------------------------------

def optimizer(args):
    """Steps at this model's shapes; the lr is tiny, so that nothing drifts away."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = "60m" if args.model == "nano" else args.model  # at nano there is nothing to measure
    model = LLaMA(Config.named(size, SHAPES.get(size, (32000,))[0])).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-6
    loop = optim.build("clipped_sgd", model, 1e-9)
    for group in loop.param_groups:
        group["foreach"] = False
    steps = {"AdamW, fused": optim.build("adamw", model, 1e-9), "ClippedSGD": optim.build("clipped_sgd", model, 1e-9),
             "the same rule, a loop over the tensors": loop,
             "SGD without clips": optim.build("sgd", model, 1e-9)}
    for each in steps.values():
        each.step()
    found = in_turn(args.rounds, {name: lambda each=each: 1e3 * timed(each.step, 20) for name, each in steps.items()})
    n = sum(p.numel() for p in model.parameters())
    state = {name: sum(t.nbytes for s in each.state.values() for t in s.values()) / n for name, each in steps.items()}
    show(f"Optimizer step, {size}: {n:,} parameters, {device}.",
         ("", "ms", "x AdamW, fused", "state, bytes a parameter"),
         [(name, spread(found[name], ".1f"), ratio(found[name], found["AdamW, fused"]), f"{state[name]:.1f}")
          for name in steps])


# ---- data -----------------------------------------------------------------------------------------------------------

def data(args):
    """The loader, and tokenizing beside the library's own batch call."""
    sys.path.insert(0, str(HERE / "data"))
    import prepare
    sequences = Sequences(args.data, "train")
    batches = Batches(sequences, 64, seed=0)
    batches(0)
    count = iter(range(10**9))
    found = in_turn(args.rounds, {"load": lambda: 64 * sequences.seq_len / timed(
        lambda: batches(next(count) % batches.per_epoch), 50)})
    print(f"\nLoading {args.data}: {spread(found['load'])} tokens/s.")

    texts = list(prepare.python_files(8_000_000))
    tokenizer = prepare.Tokenizer("tokenizer.model", (Path(args.data) / "tokenizer.model").read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        def ours():
            writer = prepare.ShardWriter(SimpleNamespace(out=Path(folder), shard_chars=10**9, seq_len=128,
                                                         layout="stream"), "train", tokenizer)
            for text in texts:
                writer.add(text)
            writer.close()
            os.unlink(writer.path)
        characters = sum(map(len, texts)) / 1e6
        found = in_turn(args.rounds, {"prepare.py, to shards on disk": lambda: characters / timed(ours),
                                      "SentencePiece's batch call alone":
                                      lambda: characters / timed(lambda: tokenizer.encode(texts))})
    library = found["SentencePiece's batch call alone"]
    show(f"Tokenizing {characters:.1f} million characters on {os.cpu_count()} cores.",
         ("", "million characters/s", "x SentencePiece"),
         [(name, spread(numbers, ".2f"), ratio(numbers, library)) for name, numbers in found.items()])


# ---- a run ----------------------------------------------------------------------------------------------------------

def start(args):
    """Seconds from the command to the end of the first step, with an empty compile cache and with the one it left."""
    def first_step(cache, out):
        words = [f"--data={args.data}", f"--model={args.model}", f"--out={out}", "--steps=1", "--log_every=1"]
        began = time.perf_counter()
        with subprocess.Popen([sys.executable, HERE / "train.py", *words], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}) as run:
            lines = [(time.perf_counter() - began, line) for line in run.stdout]
        if run.returncode:
            sys.exit("bench.py: train.py failed, see above")
        return next(seconds for seconds, line in lines if line.startswith("step 1/1  loss"))
    with tempfile.TemporaryDirectory() as folder:
        cold = first_step(folder + "/cache", folder + "/0")
        warm = [first_step(folder + "/cache", f"{folder}/{i}") for i in range(1, args.rounds + 1)]
    show(f"Start of train.py at {args.model}, to the end of the first step, the first evaluation included.",
         ("compile cache", "s"), [("empty (one run)", f"{cold:.1f}"), ("filled", spread(warm, ".1f"))])


def overhead(args):
    """What train.py does beside the bare step, at its default intervals."""
    import train as script
    s = script.Settings(data=args.data, model=args.model)
    world = World("auto")
    device = world.device
    batches, valid = script.open_data(s)
    model = LLaMA(Config.named(args.model, valid.vocab_size)).to(device)
    model.compile()
    clipped = optim.build("clipped_sgd", model, 1e-9)
    parameters, probe = list(model.parameters()), Probe(model)
    x, y, targets = batches(0)
    x, y = x.to(device), y.to(device)

    def bare():
        clipped.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(x, y) / targets
        loss.backward()
        clipped.step()
    bare(), bare()
    with tempfile.TemporaryDirectory() as folder:
        log = Log(s, Folder(folder, {}, world), valid)
        log.say = lambda text: None

        def step(report):
            clipped.report = report
            return timed(clipped.step, 10)

        def flush():
            zero = torch.zeros((), device=device)
            for _ in range(s.log_every):
                log.add(1.0, dict.fromkeys(("train_loss", "grad_norm", "clipped_tensors", "clipped_rows"), zero))
            return timed(lambda: log.flush(s.log_every, time.perf_counter() - 1)) / s.log_every
        evaluation = f"evaluation, each {s.eval_every} steps"
        found = in_turn(args.rounds, {
            "forward, backward, optimizer": lambda: timed(bare, 3),
            "the batch": lambda: timed(lambda: batches(1)),
            "norm of the gradient": lambda: timed(
                lambda: torch.nn.utils.get_total_norm([p.grad for p in parameters])),
            "share clipped": lambda: step(True) - step(False),
            f"diagnostics, each {s.diag_every} steps": lambda: timed(
                lambda: (probe.before(), probe.after())) / s.diag_every,
            f"metrics.jsonl, each {s.log_every} steps": flush,
            f"checkpoint, each {s.save_every} steps": lambda: timed(
                lambda: log.folder.save(0, 0.0, None, model, clipped)) / s.save_every,
            evaluation: lambda: timed(
                lambda: script.evaluate(model, valid, s.eval_tokens, s.batch_size, world)) / s.eval_every})
    bare_step = found["forward, backward, optimizer"]
    extra = [sum(t) for t in zip(*(t for name, t in found.items() if name != evaluation and t is not bare_step))]
    show(f"A step of train.py at {args.model}, on {device.type}.", ("", "ms a step", "x the bare step"),
         [(name, spread([1e3 * t for t in numbers], ".2f"),
           f"{statistics.median(t / b for t, b in zip(numbers, bare_step)):.4f}")
          for name, numbers in [*found.items(), ("all but the bare step and the evaluation", extra)]])


PARTS = {"train": train, "optimizer": optimizer, "data": data, "start": start, "overhead": overhead}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; none: all")
    parser.add_argument("--model", choices=SIZES, default="nano")
    parser.add_argument("--batch", type=int, help="sequences of a training step")
    parser.add_argument("--data", default="data/python", help="data directory, made by data/prepare.py")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if wrong := set(args.part) - set(PARTS):
        parser.error(f"no part {', '.join(wrong)}: choose from {', '.join(PARTS)}")
    parts = args.part or list(PARTS)
    try:
        if {"data", "start", "overhead"} & set(parts):
            Sequences(args.data, "train")
    except DataError as e:
        sys.exit(f"bench.py: {e}")
    for name in parts:
        PARTS[name](args)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "transformers", "sentencepiece")
                if importlib.util.find_spec(name)}
    gpu = f"{torch.cuda.get_device_name()}; " if torch.cuda.is_available() else ""
    print(f"\n{gpu}{hardware()}; {', '.join(f'{k} {v}' for k, v in versions.items())}; {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
