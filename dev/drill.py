"""Runs of nano are killed, stopped, starved of disk and robbed of their data, then continued. A run
survives if it ends bit for bit like one to which nothing happened.

    python dev/drill.py --times=20     # or `make drill`; exit status 1 if a run was lost
"""
import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from conftest import documents, launch, prepare, result, same_end, settings, wait_for, write_jsonl


def start(out, data, **options):
    words = settings(out=out, data=data, steps=30, eval_every=10, save_every=1, log_every=1)
    return launch(*words, **options)


def finishes(out, data, **options):
    return result(start(out, data, **options)).returncode == 0


def interrupted(number, out, data):
    """By a signal within the first 20 of 30 steps, or once in ten times while the run starts."""
    process = start(out, data)
    if random.random() < 0.1:
        time.sleep(random.uniform(0, 3))
    else:
        wait_for(out, random.randrange(20), process)
        time.sleep(random.uniform(0, 0.05))
    process.send_signal(number)
    result(process)
    return finishes(out, data)


def rank_killed(out, data):
    process = start(out, data, processes=2, restarts=1)
    wait_for(out, random.randrange(1, 20), process)
    ranks = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(random.choice(ranks)), signal.SIGKILL)
    return result(process).returncode == 0


def disk_full(out, data):
    limit = random.randrange(1_000, 7_000_000)  # bytes of a file; a checkpoint has 7.5 MB
    limit_files = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    full = result(start(out, data, preexec_fn=limit_files))
    refused = full.returncode != 0 and "make room" in full.stderr
    return refused and "Traceback" not in full.stderr and finishes(out, data)


def shard_cut(out, data):
    copy = shutil.copytree(data, out.with_name(f"{out.name} data"))
    shard = copy / "train_000000.bin"
    content = shard.read_bytes()
    process = start(out, copy)
    wait_for(out, 5, process)
    shard.write_bytes(content[:len(content) // 2])
    cut = result(process)
    shard.write_bytes(content)
    return cut.returncode != 0 and "was changed" in cut.stderr and finishes(out, copy)


FAULTS = {  # name: (what disturbs a run, continues it and returns whether all is well, share)
    "SIGKILL at a random moment": (partial(interrupted, signal.SIGKILL), 1),
    "SIGTERM at a random moment": (partial(interrupted, signal.SIGTERM), 1),
    "one rank of two killed, torchrun restarts": (rank_killed, 0.15),
    "no room for a file to grow": (disk_full, 0.25),
    "a shard cut in half during the run": (shard_cut, 0.15)}


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="how often each signal is sent")
    args = parser.parse_args()
    total_lost = 0
    with tempfile.TemporaryDirectory() as folder:
        data, undisturbed, two_ranks = (Path(folder, name) for name in ("data", "one", "two"))
        text = write_jsonl(Path(folder, "text.json.gz"), documents())
        done = prepare("files", text, f"--out={data}", "--tokenizer=train:500", "--seq_len=32")
        assert done.returncode == 0, done.stderr
        assert finishes(undisturbed, data) and finishes(two_ranks, data, processes=2)
        print("| fault | times | survived | lost |\n| --- | --- | --- | --- |", flush=True)
        for name, (fault, share) in FAULTS.items():
            times, survived = max(1, round(share * args.times)), 0
            expected = two_ranks if fault is rank_killed else undisturbed
            for out in [Path(folder, f"{name} {i}") for i in range(times)]:
                survived += fault(out, data) and same_end(out, expected)
            total_lost += times - survived
            print(f"| {name} | {times} | {survived} | {times - survived} |", flush=True)
    sys.exit(1 if total_lost else 0)


if __name__ == "__main__":
    main()
