"""A file with random damage is either read or refused in one line that names it: no traceback, no
ten seconds, no process of twice the memory that reading the whole file takes.

    FUZZ_FILES=2000 python -m pytest -q tests/test_fuzz.py -s     # -s shows the table
"""
import gzip
import os
import random
import resource
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, documents, write_jsonl

sys.path.insert(0, str(ROOT / "data"))
import prepare  # noqa: E402
import sample  # noqa: E402
from baselines import build_optimizer  # noqa: E402
from checkpoint import Dist, RunDir  # noqa: E402
from experiments.images import read_mnist  # noqa: E402
from loader import TokenDataset, UserError, read_meta, token_counts  # noqa: E402
from model import Config, LLaMA  # noqa: E402

KINDS = ["data/train_000000.bin", "data/meta.json", "data/token_counts.npy", "run/ckpt.pt",
         "run/config.json", "text.json.gz", "mnist/train-images-idx3-ubyte.gz",
         "hf/model.safetensors", "hf/config.json"]
FILES = int(os.environ.get("FUZZ_FILES", 90)) // len(KINDS)  # of each kind


class TenSeconds(BaseException):
    """Not an Exception, so that no reader catches it."""


def ten_seconds(number, frame):
    raise TenSeconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory, stream):
    """A good file of each kind."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(stream, folder / "data")
    write_jsonl(folder / "text.json.gz", documents(300))

    (folder / "mnist").mkdir()
    for name, shape in (("train-images-idx3-ubyte.gz", [50, 28, 28]),
                        ("train-labels-idx1-ubyte.gz", [50])):
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        values = np.arange(np.prod(shape)) % 10
        content = gzip.compress(header + values.astype(np.uint8).tobytes())
        (folder / "mnist" / name).write_bytes(content)

    model = LLaMA(Config.named("nano", 500))
    tokens = torch.zeros(1, 4, dtype=torch.long)
    model(tokens, tokens).backward()
    optimizer = build_optimizer("clipped_sgd", model, 100.0)
    optimizer.step()
    run_dir = RunDir(folder / "run", {"steps": 1}, Dist("cpu"))
    run_dir.acquire({"settings": {"model": "nano", "data": str(stream)}})
    run_dir.save(1, 1.0, 5.0, model, optimizer)
    tokenizer = sample.Tokenizer(stream, read_meta(stream))
    sample.export(model, folder / "hf", 32, tokenizer)
    return folder


def reader(folder, kind):
    """The function that reads a kind of file."""
    def read_dataset():
        dataset = TokenDataset(folder / "data", "train")
        dataset[np.arange(len(dataset))]

    config = Config.named("nano", 500)
    model = LLaMA(config)
    optimizer = build_optimizer("clipped_sgd", model, 100.0)
    run_dir = RunDir(folder / "run", {"steps": 1}, Dist("cpu"))
    return {
        "data/train_000000.bin": read_dataset,
        "data/meta.json": read_dataset,
        "data/token_counts.npy": lambda: token_counts(folder / "data", 500),
        "run/ckpt.pt": lambda: run_dir.load(model, optimizer),
        "run/config.json": lambda: run_dir.acquire({}),
        "text.json.gz": lambda: list(prepare.read_documents(folder / "text.json.gz")),
        "mnist/train-images-idx3-ubyte.gz": lambda: read_mnist(folder / "mnist"),
        "hf/model.safetensors": lambda: sample.load_pretrained(folder / "hf", config),
        "hf/config.json": lambda: sample.load_pretrained(folder / "hf", config)}[kind]


def damage(content, rng):
    """Bytes with flipped bits, a cut, a block of zeros, random bytes inserted, a block reversed, or
    other digits in text."""
    content, size = bytearray(content), len(content)
    a, b = sorted(rng.randrange(size + 1) for _ in range(2))
    kind = rng.choice(["flip", "cut", "zero", "insert", "reverse", "digits"])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 8, 100])):
            end = min(size, rng.choice([64, 2048, size]))  # often in the header
            content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[a:]
    elif kind == "zero":
        content[a:b] = bytes(b - a)
    elif kind == "insert":
        content[a:a] = rng.randbytes(rng.choice([1, 100, 5000]))
    elif kind == "reverse":
        content[a:b] = content[a:b][::-1]
    else:
        digits = [i for i in range(min(size, 5000)) if content[i] in b"0123456789"]
        for i in digits[:rng.choice([1, 5])]:
            content[i] = rng.choice(b"0123456789-.e")
    return bytes(content)


@pytest.fixture(scope="module")
def table():
    lines = ["| file | damaged | refused in one line | read | bad |", "|---|---|---|---|---|"]
    yield lines
    print("", *lines, sep="\n")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_read(kind, folder, table):
    path, read, rng = folder / kind, reader(folder, kind), random.Random(kind)
    content = path.read_bytes()
    read()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, ten_seconds)
    was_read, refused, bad = 0, 0, []
    for i in range(FILES):
        if path.suffix == ".gz" and i % 2:  # what is in it, which no checksum protects then
            damaged = gzip.compress(damage(gzip.decompress(content), rng))
        else:
            damaged = damage(content, rng)
        path.write_bytes(damaged)
        signal.alarm(10)
        try:
            read()
            was_read += 1
        except (UserError, SystemExit) as e:  # prepare.py refuses by sys.exit
            if "\n" in str(e) or not (path.name in str(e) or str(path.parent) in str(e)):
                bad.append(f"{i}: {e}")
            else:
                refused += 1
        except (Exception, TenSeconds) as e:
            bad.append(f"{i}: {type(e).__name__}: {e}")
        finally:
            signal.alarm(0)
    path.write_bytes(content)
    table.append(f"| {kind} | {FILES} | {refused} | {was_read} | {len(bad)} |")
    assert not bad, "\n".join(bad)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * memory
