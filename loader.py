"""Token shards on disk -> batches, as a pure function of (seed, step, rank). Nothing else is state,
so a resumed run, another world size or another micro-batch sees the same sequences.

A data directory (see data/prepare.py) holds train_000000.bin, ..., val_000000.bin, ... and
meta.json. A .bin is in llm.c's format: 256 int32 of header (magic, version, number of tokens), then
the tokens as uint16. There are two layouts:
    rows    one document per row of seq_len tokens, cut or padded; padding is no target (paper)
    stream  documents end to end, each followed by eos; a sequence predicts its next tokens
"""
import hashlib
import json
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

MAGIC, VERSION, HEADER = 20240520, 1, 256
IGNORE_INDEX = -100  # a target that is not counted (PyTorch's convention)
PREPARE = "prepare the data again in another folder (data/prepare.py)"
REMEDY = f"restore it, or {PREPARE}"


class UserError(Exception):
    """Bad input: one line that names the file or setting, and the remedy."""
    status = 1  # of the process that ends by it


@contextmanager
def access(verb, path, problem=None, remedy=REMEDY):
    """To "read" or "write" a file. UserError says why the machine failed, or, if it was the content
    that failed and `problem` names this, why that."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        cause = e
        while cause and not isinstance(cause, OSError):  # torch and zipfile hide it
            cause = cause.__context__
        if isinstance(e, MemoryError) or re.search("(out of|allocate) memory", str(e)):
            cause = OSError(0, "memory is full")
        if cause:
            raise UserError(f"could not {verb} {cause.filename or path} ({cause.strerror or cause})"
                            ": check path and permissions, or make room, and start again") from None
        if not problem:
            raise
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise UserError(f"{path} {problem} ({reason}): {remedy}") from None


# ---- the files of a data directory ---------------------------------------------------------------

def read_meta(folder):
    """meta.json of a data directory, checked. Raises UserError."""
    folder = Path(folder)
    path = folder / "meta.json"
    with access("read", path, "is broken"):
        if not folder.is_dir():
            raise UserError(f"{folder} is no data directory: make one with data/prepare.py, for "
                            "instance `python data/prepare.py python --out=data/python`")
        if not path.exists():
            return llmc_meta(folder)
        meta = json.loads(path.read_text())
        if not meta.get("complete"):
            raise UserError(f"{path}: preparing was cut short: run the same data/prepare.py "
                            "command again to finish it")
        types = {"vocab_size": int, "seq_len": int, "layout": str, "pad_id": int, "shards": dict}
        for name, kind in types.items():
            if not isinstance(meta.get(name), kind):
                raise ValueError(f"no valid {name}")
        seq_len, vocab_size, layout = meta["seq_len"], meta["vocab_size"], meta["layout"]
        if seq_len < 2 or not 0 < vocab_size <= 65536 or layout not in ("rows", "stream"):
            raise ValueError(f"seq_len {seq_len}, vocab_size {vocab_size}, layout {layout}")
    return meta


def llmc_meta(folder):
    """Stands in for meta.json in a folder of .bin files made for llm.c or modded-nanogpt: GPT-2's
    vocabulary, cut into sequences of the paper's length."""
    shards = {split: len(find_shards(folder, split)) for split in ("train", "val")}
    if not all(shards.values()) or (folder / "tokenizer.model").exists():
        raise UserError(f"{folder / 'meta.json'} is missing: {REMEDY}, or give a folder of llm.c's "
                        "*_train_*.bin and *_val_*.bin")
    return {"vocab_size": 50257, "seq_len": 256, "layout": "stream", "pad_id": -1,
            "eos_id": 50256, "tokenizer": "gpt2", "shards": shards}


def find_shards(folder, split):
    """The .bin files of a split in order: train_000000.bin, or fineweb_train_000001.bin."""
    with access("read", folder):
        return sorted(path for path in Path(folder).iterdir()
                      if path.suffix == ".bin" and re.search(rf"(^|_){split}[_.]", path.name))


def fingerprint(folder, block=2**16):
    """sha256 of meta.json; without one, as of a Hugging Face model, of the files' names and sizes
    and a block at the start, in the middle and at the end of each."""
    path, digest = Path(folder) / "meta.json", hashlib.sha256()
    with access("read", path):
        if path.exists():
            return hashlib.sha256(path.read_bytes()).hexdigest()
        for file in sorted(Path(folder).glob("*")):
            if file.suffix in (".bin", ".safetensors") or file.name == "config.json":
                size = file.stat().st_size
                digest.update(f"{file.name} {size} ".encode())
                with open(file, "rb") as f:
                    for start in (0, (size - block) // 2, size - block):
                        f.seek(max(0, start))
                        digest.update(f.read(block))
    return digest.hexdigest()


def open_shard(path):
    """The tokens of a .bin file, uint16 [n], memory-mapped. Raises UserError."""
    with access("read", path), open(path, "rb") as f:
        header, size = f.read(4 * HEADER), path.stat().st_size
    magic, version, length = np.frombuffer(header[:12].ljust(12, b"\0"), "<i4").tolist()
    remedy = REMEDY
    if len(header) < 4 * HEADER:
        problem = f"holds {size} bytes, less than a header"
    elif (magic, version) == (20240801, 7):
        problem, remedy = "holds uint32 tokens, as llm.c writes them for Llama 3", PREPARE
    elif magic != MAGIC and any(header[12:]):  # llm.c's header ends in zeros
        problem, remedy = "has no header, as if nanoGPT had written it", PREPARE
    elif magic != MAGIC or version != VERSION:
        problem = f"is no token shard (magic {magic}, version {version})"
    elif size != 4 * HEADER + 2 * length:
        problem = f"is truncated or torn ({length} tokens in {size} bytes)"
    elif length == 0:
        problem = "holds no tokens"
    else:
        return np.memmap(path, "<u2", "r", offset=4 * HEADER, shape=length)
    raise UserError(f"{path} {problem}: {remedy}")


def token_counts(folder, vocab_size):
    """How often each token occurs in the training set, int64 [vocab_size], or None if the directory
    does not say. Raises UserError."""
    path = Path(folder) / "token_counts.npy"
    with access("read", path, f"does not hold {vocab_size} counts"):
        if not path.exists():
            return None
        counts = np.load(path, mmap_mode="r", allow_pickle=False).astype(np.int64, casting="safe")
        if counts.shape != (vocab_size,) or counts.min() < 0 or not counts.any():
            raise ValueError(f"shape {list(counts.shape)}, or negative, or all zero")
    return torch.from_numpy(counts)


# ---- sequences and batches -----------------------------------------------------------------------

def file_state(path):
    """What changes when a file is written or replaced; None if it is gone."""
    with access("read", path), suppress(FileNotFoundError):
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns, stat.st_ino


class TokenDataset:
    """The sequences of one split, "train" or "val", by index. Raises UserError for bad files."""

    def __init__(self, folder, split):
        self.meta = read_meta(folder)
        self.seq_len, self.vocab_size = self.meta["seq_len"], self.meta["vocab_size"]
        self.rows = self.meta["layout"] == "rows"
        self.paths, expected = find_shards(folder, split), self.meta["shards"].get(split)
        if not self.paths or len(self.paths) != expected:
            raise UserError(f"{folder} has {len(self.paths)} {split}_*.bin where meta.json says "
                            f"{expected}: {REMEDY}")
        self.states = [file_state(path) for path in self.paths]
        self.lookahead = 0 if self.rows else 1  # a stream's last target is beyond the sequence
        lengths = [(len(open_shard(p)) - self.lookahead) // self.seq_len for p in self.paths]
        self.starts = np.cumsum([0] + lengths)  # index of the first sequence of each shard
        if len(self) == 0:
            raise UserError(f"{folder}: {split} is shorter than one sequence of {self.seq_len} "
                            "tokens: prepare more text, or a smaller --seq_len")

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, indices):
        """indices, an array [n] -> inputs and targets, int64 [n, seq_len] each, the targets
        IGNORE_INDEX where padded."""
        T = self.seq_len
        window = np.zeros((len(indices), T + 1), dtype="<u2")
        shard_of = np.searchsorted(self.starts, indices, side="right") - 1
        starts = (indices - self.starts[shard_of]) * T
        for k in np.unique(shard_of):  # a file at a time is open
            path = self.paths[k]
            with access("read", path), suppress(FileNotFoundError), open(path, "rb") as f:
                for i in np.flatnonzero(shard_of == k):
                    f.seek(4 * HEADER + 2 * starts[i])
                    f.readinto(window[i, :T + self.lookahead])
            if file_state(path) != self.states[k]:
                raise UserError(f"{path} was changed while it was in use: put the old one back, or "
                                "start another run")
        if window.max(initial=0) >= self.vocab_size:
            i = window.max(1).argmax()
            raise UserError(f"{self.paths[shard_of[i]]}: token {window[i].max()} near position "
                            f"{starts[i]} is not below meta.json's vocab_size {self.vocab_size}: "
                            f"{REMEDY}")
        window = torch.from_numpy(window.astype(np.int64))
        inputs, targets = window[:, :-1].contiguous(), window[:, 1:].clone()
        if self.rows:
            targets[:, -1] = IGNORE_INDEX  # the last token of a row has no successor
            targets[targets == self.meta["pad_id"]] = IGNORE_INDEX
        return inputs, targets


class BatchSampler:
    """The training batches: step s takes the next batch_size sequences (over all ranks) of a
    permutation that is drawn anew for each epoch. Raises UserError if there are too few."""

    def __init__(self, dataset, batch_size, seed):
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.steps_per_epoch = len(dataset) // batch_size
        self.epoch, self.order = None, None
        if self.steps_per_epoch == 0:
            raise UserError(f"the training set holds {len(dataset)} sequences, fewer than "
                            f"--batch_size={batch_size}: prepare more text, or lower it")

    def indices(self, step):
        """The sequences of a step, [batch_size]."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            order = np.arange(len(self.dataset), dtype=np.uint32)
            np.random.default_rng((self.seed, epoch)).shuffle(order)
            self.epoch, self.order = epoch, order
        return self.order[k * self.batch_size:(k + 1) * self.batch_size].astype(np.int64)

    def __call__(self, step, rank=0, world=1):
        """A rank's share of a batch: inputs and targets [batch_size / world, seq_len], and
        num_targets of the WHOLE batch, which every rank needs for the mean."""
        indices = self.indices(step)
        share = slice(rank * len(indices) // world, (rank + 1) * len(indices) // world)
        if not self.dataset.rows:
            inputs, targets = self.dataset[indices[share]]
            return inputs, targets, self.batch_size * self.dataset.seq_len
        # Padding differs from row to row: read all of the batch to count, rather than communicate.
        inputs, targets = self.dataset[indices]
        return inputs[share], targets[share], int((targets != IGNORE_INDEX).sum())


def eval_batches(dataset, tokens, batch_size, rank=0, world=1):
    """A rank's batches of a fixed evaluation set: the first sequences that hold `tokens` targets.

    Yields inputs and targets [batch_size, seq_len]. The last batch is filled up with sequences that
    are not counted, so that all have one shape and every rank yields the same number of them.
    """
    size, seen = 0, 0
    while size < len(dataset) and seen < tokens:
        block = np.arange(size, min(size + 1024, len(dataset)))
        targets_seen = seen + (dataset[block][1] != IGNORE_INDEX).sum(1).cumsum(0).numpy()
        size += min(len(block), int(np.searchsorted(targets_seen, tokens)) + 1)
        seen = int(targets_seen[-1])
    for start in range(0, size, batch_size * world):
        indices = start + rank * batch_size + np.arange(batch_size)
        inputs, targets = dataset[np.minimum(indices, size - 1)]
        targets[indices >= size] = IGNORE_INDEX
        yield inputs, targets
