"""Token shards on disk -> batches, as a pure function of (seed, step, rank): nothing else is state, so a resumed run,
another world size or another micro-batch sees the very same sequences.

A data directory (data/prepare.py makes one) holds train_000000.bin, ..., val_000000.bin, ... and meta.json. A .bin is
llm.c's format: 256 int32 of header (magic, version, number of tokens), then the tokens as uint16. Two layouts:
    rows    one document a row of seq_len tokens, cut or padded; padding is no target (the paper's)
    stream  documents end to end, each followed by eos; a sequence is seq_len tokens and predicts the seq_len after
"""
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch

MAGIC, VERSION, HEADER = 20240520, 1, 256
IGNORE = -100  # a target that counts for nothing (PyTorch's own convention)


class DataError(Exception):
    """Bad data: one line that names the file and what to do."""


def read_meta(folder):
    """meta.json of a data directory, checked."""
    path = Path(folder) / "meta.json"
    if not Path(folder).is_dir():
        raise DataError(f"no data directory {folder}: make one with data/prepare.py, for instance "
                        f"`python data/prepare.py python --out={folder}`")
    if not path.exists():
        return foreign(Path(folder))
    try:
        meta = json.loads(path.read_text())
        if not meta.get("complete"):
            raise DataError(f"{path}: preparing was cut short; run the same data/prepare.py command again to finish it")
        kinds = {"vocab_size": int, "seq_len": int, "layout": str, "pad_id": int, "shards": dict}
        wrong = [k for k, kind in kinds.items() if not isinstance(meta.get(k), kind)]
        if wrong:
            raise ValueError(f"no valid {', '.join(wrong)}")
        if meta["layout"] not in ("rows", "stream") or meta["seq_len"] < 2 or not 0 < meta["vocab_size"] <= 65536:
            raise ValueError(f"layout {meta['layout']}, seq_len {meta['seq_len']}, vocab_size {meta['vocab_size']}")
    except (ValueError, AttributeError) as e:
        raise DataError(f"{path} is broken ({e}): prepare the data again") from None
    return meta


def find(folder, split):
    """The .bin files of a split, in order: train_000000.bin, and as others name them fineweb_train_000001.bin."""
    return sorted(p for p in Path(folder).glob("*.bin") if re.search(rf"(^|_){split}[_.]", p.name))


def foreign(folder):
    """What stands for meta.json where there is none: .bin files of llm.c or modded-nanogpt, in GPT-2's vocabulary, cut
    into sequences of the paper's length."""
    shards = {split: len(find(folder, split)) for split in ("train", "val")}
    if not all(shards.values()) or (folder / "tokenizer.model").exists():  # data/prepare.py's: its meta.json is lost
        raise DataError(f"{folder / 'meta.json'} is missing: prepare the data again with data/prepare.py, or give a "
                        "folder of llm.c's *_train_*.bin and *_val_*.bin")
    return {"vocab_size": 50257, "seq_len": 256, "layout": "stream", "pad_id": -1, "eos_id": 50256, "tokenizer": "gpt2",
            "shards": shards}


def fingerprint(folder):
    """Of the data: a sha256 of meta.json, or of the names and sizes of the shards where there is none."""
    path = Path(folder) / "meta.json"
    shards = sorted([p.name, p.stat().st_size] for p in Path(folder).glob("*.bin"))
    return hashlib.sha256(path.read_bytes() if path.exists() else json.dumps(shards).encode()).hexdigest()


def open_shard(path):
    """The tokens of one .bin file, uint16 [n]: memory-mapped, not read."""
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=HEADER)
    if len(header) < HEADER:
        raise DataError(f"{path} holds {size} bytes, less than a header: delete it and prepare the data again")
    if header[0] != MAGIC or header[1] != VERSION:
        raise DataError(f"{path} is no token shard (magic {header[0]}, version {header[1]}; expected {MAGIC}, "
                        f"{VERSION}): delete it and prepare the data again")
    n = int(header[2])
    if size != 4 * HEADER + 2 * n:
        raise DataError(f"{path} is truncated or torn: its header says {n} tokens, it has room for "
                        f"{(size - 4 * HEADER) / 2:g}: delete it and prepare the data again")
    if n == 0:
        raise DataError(f"{path} holds no tokens: delete it and prepare the data again")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER, shape=(n,))


def token_counts(folder, vocab_size):
    """How often each token is in the training set, int64 [vocab_size]; None if the directory does not say."""
    path = Path(folder) / "token_counts.npy"
    if not path.exists():
        return None
    try:
        counts = np.load(path)  # refuses pickles
        if counts.shape != (vocab_size,) or counts.dtype.kind not in "iu" or counts.min() < 0 or not counts.any():
            raise ValueError(f"{counts.dtype} {list(counts.shape)}")
    except Exception as e:  # NumPy fails in many ways
        raise DataError(f"{path} does not hold {vocab_size} counts ({e}): prepare the data again") from None
    return torch.from_numpy(counts.astype(np.int64))


class Sequences:
    """The sequences of one split, by number.

    Args: folder, the data directory; split, "train" or "val". Raises DataError. `len()` is their number.
    """

    def __init__(self, folder, split):
        self.meta = read_meta(folder)
        self.seq_len, self.vocab_size = self.meta["seq_len"], self.meta["vocab_size"]
        self.rows = self.meta["layout"] == "rows"
        self.paths = find(folder, split)
        if not self.paths or len(self.paths) != self.meta["shards"].get(split):
            raise DataError(f"{folder} has {len(self.paths)} {split}_*.bin where meta.json says "
                            f"{self.meta['shards'].get(split)}: prepare the data again")
        self.shards = [open_shard(path) for path in self.paths]
        self.stats = [path.stat() for path in self.paths]
        T = self.seq_len  # a stream's last sequence needs one token more, to predict
        self.starts = np.cumsum([0] + [(len(s) if self.rows else len(s) - 1) // T for s in self.shards])
        if len(self) == 0:
            raise DataError(f"{folder}: {split} is shorter than one sequence of {T} tokens: give it more text, "
                            f"or a smaller --seq_len")

    def __len__(self):
        return int(self.starts[-1])

    def unchanged(self, k):
        path, old = self.paths[k], self.stats[k]
        now = path.stat() if path.exists() else None
        if now is None or (now.st_size, now.st_mtime_ns, now.st_ino) != (old.st_size, old.st_mtime_ns, old.st_ino):
            raise DataError(f"{path} was changed while it was in use: put the old one back, or start another run")

    def __getitem__(self, numbers):
        """numbers, an array [n] -> inputs and targets, int64 [n, seq_len] each, targets IGNORE where padded."""
        T = self.seq_len
        window = np.zeros((len(numbers), T + 1), dtype=np.uint16)
        which = np.searchsorted(self.starts, numbers, side="right") - 1
        for k in set(which.tolist()):
            self.unchanged(k)  # reading what is no longer there would kill the process
        for out, number, k in zip(window, numbers, which):
            start = int(number - self.starts[k]) * T
            piece = self.shards[k][start:start + T + (not self.rows)]
            if piece.max() >= self.vocab_size:
                raise DataError(f"{self.paths[k]}: token {piece.max()} near position {start} is not below meta.json's "
                                f"vocab_size {self.vocab_size}: the shard is another tokenizer's; prepare it again")
            out[:len(piece)] = piece
        window = window.astype(np.int64)
        inputs, targets = window[:, :-1], window[:, 1:].copy()
        if self.rows:
            targets[:, -1] = IGNORE  # a row's last token has no successor
            targets[targets == self.meta["pad_id"]] = IGNORE
        return torch.from_numpy(np.ascontiguousarray(inputs)), torch.from_numpy(targets)


class Batches:
    """The training batches: step s takes the next batch_size sequences of a permutation drawn anew each epoch.

    Args: sequences; batch_size, in sequences, over all ranks; seed. Raises DataError.
    """

    def __init__(self, sequences, batch_size, seed):
        self.sequences, self.batch_size, self.seed = sequences, batch_size, seed
        self.per_epoch = len(sequences) // batch_size
        self.epoch, self.order = None, None
        if not self.per_epoch:
            raise DataError(f"the training set holds {len(sequences)} sequences, fewer than --batch_size={batch_size}: "
                            f"prepare more text or lower it")

    def numbers(self, step):
        """The sequence numbers of a step, [batch_size]."""
        epoch, k = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            order = np.arange(len(self.sequences), dtype=np.uint32)
            np.random.default_rng((self.seed, epoch)).shuffle(order)
            self.epoch, self.order = epoch, order
        return self.order[k * self.batch_size:(k + 1) * self.batch_size].astype(np.int64)

    def __call__(self, step, rank=0, world=1):
        """A rank's share: inputs, targets [batch_size / world, seq_len], and the targets that count in the WHOLE batch,
        which every rank needs for the mean."""
        numbers = self.numbers(step)
        mine = slice(rank * len(numbers) // world, (rank + 1) * len(numbers) // world)
        if not self.sequences.rows:
            return *self.sequences[numbers[mine]], self.batch_size * self.sequences.seq_len
        inputs, targets = self.sequences[numbers]  # all of it, to count the targets: no need to ask the other ranks
        return inputs[mine], targets[mine], int((targets != IGNORE).sum())


def eval_blocks(sequences, tokens, rows, rank=0, world=1):
    """A rank's blocks of a fixed evaluation set: the first sequences, as many as hold `tokens` targets.

    Yields inputs, targets [rows, seq_len]; the last block is filled up with rows that count for nothing, so that all
    have one shape and every rank yields the same number of them.
    """
    n, seen = 0, 0
    while n < len(sequences) and seen < tokens:
        block = np.arange(n, min(n + 1024, len(sequences)))
        counts = (sequences[block][1] != IGNORE).sum(1).cumsum(0).numpy() + seen
        n += min(len(block), int(np.searchsorted(counts, tokens)) + 1)
        seen = int(counts[-1])
    for start in range(0, n, rows * world):
        mine = np.arange(start + rank * rows, start + (rank + 1) * rows)
        inputs, targets = sequences[np.minimum(mine, n - 1)]
        targets[mine >= n] = IGNORE
        yield inputs, targets
