"""The fault drill and the fuzz: what is done to runs and to files here, and what is lost by it. Nothing should be.

    python tests/drill.py              # or `make drill`: both
    python tests/drill.py faults --times=20
    python tests/drill.py fuzz --files=2000

faults: runs of nano are killed, stopped, starved of disk and robbed of their data, then continued; survived is what ends
bit for bit as a run to which nothing happened. fuzz: files with random damage are read; good is a clear error or a
result, bad a traceback, ten seconds, or a process of twice the memory that reading the whole file took.
"""
import argparse
import collections
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from conftest import ROOT, documents, launch, prepare, result, same_end, settings, wait_for, write_jsonl

SETTINGS = dict(steps=30, eval_every=10, save_every=1, log_every=1)  # saving is half of the time


# ---- faults ---------------------------------------------------------------------------------------------------------

def start(out, data, **options):
    return launch(*settings(out=out, data=data, **SETTINGS), **options)


def ends_well(out, data):
    return result(start(out, data)).returncode == 0


def struck_by(number):
    """Signal `number` within the first four fifths of a run's steps, or once in ten times while it starts."""
    def fault(out, data, seconds):
        process = start(out, data)
        if random.random() > 0.1:
            wait_for(out, random.randrange(0, 25), process)
            time.sleep(random.uniform(0, 0.1))
        else:
            time.sleep(random.uniform(0, seconds / 4))
        struck = process.poll() is None
        process.send_signal(number)
        result(process)
        if not struck:  # it was done before
            shutil.rmtree(out)
            return fault(out, data, seconds)
        return ends_well(out, data)
    return fault


def rank_killed(out, data, seconds):
    process = start(out, data, processes=2, restarts=1)
    wait_for(out, random.randrange(1, 20), process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    if not workers:  # it was done before
        result(process)
        shutil.rmtree(out)
        return rank_killed(out, data, seconds)
    os.kill(int(random.choice(workers)), signal.SIGKILL)
    return result(process).returncode == 0


def disk_full(out, data, seconds):
    """No file may grow beyond a random size, less than a checkpoint's 7.5 MB."""
    limit = random.randrange(1_000, 7_000_000)
    full = result(start(out, data, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
    return full.returncode != 0 and "make room" in full.stderr and "Traceback" not in full.stderr and ends_well(out, data)


def shard_changed(out, data, seconds):
    shard = shutil.copytree(data, out.parent / f"{out.name}-data") / "train_000000.bin"
    good, about = shard.read_bytes(), shard.stat()
    process = start(out, shard.parent)
    wait_for(out, 5, process)
    shard.write_bytes(good[:len(good) // 2])
    cut = result(process)
    shard.write_bytes(good)
    os.utime(shard, ns=(about.st_atime_ns, about.st_mtime_ns))
    return cut.returncode != 0 and "was changed" in cut.stderr and ends_well(out, shard.parent)


def two_at_once(out, data, seconds):
    first = start(out, data)
    wait_for(out, 1, first)
    first.send_signal(signal.SIGSTOP)  # so that it is at work for as long as the second takes to start
    second = result(start(out, data))
    first.send_signal(signal.SIGCONT)
    return result(first).returncode == 0 and second.returncode != 0 and "another process is at work" in second.stderr


FAULTS = {"SIGKILL at a random moment": (struck_by(signal.SIGKILL), 1),
          "SIGTERM at a random moment": (struck_by(signal.SIGTERM), 1),
          "one rank of two killed, torchrun restarts": (rank_killed, 0.15), "no room for a file to grow": (disk_full, 0.25),
          "a shard cut in half under the run": (shard_changed, 0.15), "two runs in one folder": (two_at_once, 0.15)}


def faults(folder, data, times):
    """Prints the table; returns how many runs were lost."""
    whole, pair = folder / "whole", folder / "pair"
    began = time.monotonic()
    assert ends_well(whole, data)
    seconds = time.monotonic() - began
    assert result(start(pair, data, processes=2)).returncode == 0
    print("| fault | times | survived | lost |\n| --- | --- | --- | --- |", flush=True)
    lost = 0
    for i, (name, (fault, share)) in enumerate(FAULTS.items()):
        ok, n = 0, max(1, round(share * times))
        for j in range(n):
            out = folder / f"{i}-{j}"
            if fault(out, data, seconds) and same_end(out, pair if fault is rank_killed else whole):
                ok += 1
            else:
                print(f"lost: {name}, the {j + 1}th of {n}", file=sys.stderr)
        lost += n - ok
        print(f"| {name} | {n} | {ok} | {n - ok} |", flush=True)
    return lost


# ---- fuzz -----------------------------------------------------------------------------------------------------------

def damage(data, rng):
    """Bytes with one of: flipped bits, a cut, a zeroed block, an inserted block, a block moved, other numbers in text."""
    data, n = bytearray(data), len(data)
    kind, a, b = rng.randrange(6), *sorted(rng.randrange(n + 1) for _ in range(2))
    if kind == 0:
        for _ in range(rng.choice([1, 1, 8, 100])):
            data[rng.randrange(min(n, rng.choice([64, 2048, n])))] ^= 1 << rng.randrange(8)  # often in the header
    elif kind == 1:
        del data[a:]
    elif kind == 2:
        data[a:b] = bytes(b - a)
    elif kind == 3:
        data[a:a] = rng.randbytes(rng.choice([1, 100, 5000]))
    elif kind == 4:
        data[a:b] = data[a:b][::-1]
    else:
        for digit in [i for i in range(min(n, 5000)) if 48 <= data[i] < 58][:rng.choice([1, 5])]:
            data[digit] = rng.choice(b"0123456789-.e")
    return bytes(data)


def fuzz(folder, data, files, seed=0):
    """Prints the table; returns how many files were read badly."""
    sys.path[:0] = [str(ROOT), str(ROOT / "data")]
    import loader
    import mnist
    import optim
    import prepare as preparing
    import run
    import sample
    from model import Config, LLaMA
    model = LLaMA(Config.named("nano", 500))
    optimizer = optim.build("clipped_sgd", model, 100.0)
    world, identity = run.World("cpu"), {"steps": 1}
    made = run.Folder(folder / "run", identity, world)
    made.claim({"settings": {"model": "nano", "data": str(data)}})
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    made.save(1, 1.0, 5.0, model, optimizer)
    sample.export(model, folder / "hf", 32, sample.Tokenizer(loader.read_meta(data), data))
    write_jsonl(folder / "text.json.gz", documents(300))
    array = np.arange(50 * 28 * 28, dtype=np.uint8).reshape(50, 28, 28)
    (folder / "idx").write_bytes(b"\0\0\x08\x03" + np.array(array.shape, ">u4").tobytes() + array.tobytes())

    def shards():
        sequences = loader.Sequences(data, "train")
        sequences[np.arange(len(sequences))]
    readers = {
        data / "train_000000.bin": shards, data / "meta.json": shards,
        data / "token_counts.npy": lambda: loader.token_counts(data, 500),
        folder / "run" / "ckpt.pt": lambda: made.load(model, optimizer),
        folder / "run" / "config.json": lambda: made.claim({}),
        folder / "text.json.gz": lambda: collections.deque(preparing.read_documents(folder / "text.json.gz"), 0),
        folder / "idx": lambda: mnist.read_idx(folder, "idx"),
        folder / "hf" / "model.safetensors": lambda: sample.pretrained(folder / "hf", model.config),
        folder / "hf" / "config.json": lambda: sample.pretrained(folder / "hf", model.config)}
    rng, bad, rows = random.Random(seed), 0, []
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("ten seconds"))
    quiet = open(os.devnull, "w")
    for path, read in readers.items():
        good, seen = path.read_bytes(), collections.Counter()
        read()
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(files // len(readers)):
            path.write_bytes(damage(good, rng))
            signal.alarm(10)
            kind, sys.stderr = "read", quiet
            try:
                read()
            except (loader.DataError, run.UserError, SystemExit) as e:
                kind = "bad" if str(e) == "ten seconds" or not str(e) else "refused"
            except Exception as e:
                kind = "bad"
                print(f"bad: {path.name}: {type(e).__name__}: {e}")
            finally:
                sys.stderr = sys.__stderr__
                signal.alarm(0)
            seen[kind] += 1
        path.write_bytes(good)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / size
        if grown > 2:
            seen["bad"] += 1
            print(f"bad: {path.name}: {grown:.1f} x the memory")
        bad += seen["bad"]
        rows.append(f"| {path.name} | {sum(seen.values())} | {seen['refused']} | {seen['read']} | {seen['bad']} |")
    print("| file | damaged | refused in a line | read | bad |\n| --- | --- | --- | --- | --- |", *rows, sep="\n")
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["faults", "fuzz"], help="none: both")
    parser.add_argument("--times", type=int, default=20, help="of the frequent faults")
    parser.add_argument("--files", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text = write_jsonl(folder / "first.json.gz", documents())
        done = prepare("files", text, f"--out={folder / 'data'}", "--tokenizer=train:500", "--seq_len=32")
        assert done.returncode == 0, done.stderr
        bad = 0
        if args.what != "fuzz":
            bad += faults(folder, folder / "data", args.times)
        if args.what != "faults":
            bad += fuzz(folder, folder / "data", args.files)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
