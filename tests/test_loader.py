import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from loader import (IGNORE_INDEX, BatchSampler, TokenDataset, UserError, eval_batches, fingerprint,
                    open_shard, token_counts)


def shard(path, tokens, magic=20240520, version=1, claim=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if claim is None else claim
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


@pytest.fixture
def numbers(tmp_path):
    """A stream whose tokens are their own positions: two shards, sequences of 4, so 4 + 2 of them."""
    shard(tmp_path / "train_000000.bin", range(19))
    shard(tmp_path / "train_000001.bin", range(100, 109))
    shard(tmp_path / "val_000000.bin", range(41))
    (tmp_path / "meta.json").write_text(json.dumps({"complete": True, "vocab_size": 200, "layout": "stream", "seq_len": 4,
                                                    "pad_id": 0, "eos_id": 1, "shards": {"train": 2, "val": 1}}))
    return tmp_path


def test_stream_sequences_predict_the_next_token_and_stay_in_their_shard(numbers):
    sequences = TokenDataset(numbers, "train")
    x, y = sequences[np.arange(len(sequences))]
    assert x.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [100, 101, 102, 103], [104, 105, 106, 107]]
    assert torch.equal(y, x + 1)


def test_rows_ignore_padding_and_the_last_position(rows):
    meta = json.loads((rows / "meta.json").read_text())
    sequences = TokenDataset(rows, "train")
    x, y = sequences[np.arange(len(sequences))]
    assert torch.equal(y[:, :-1][y[:, :-1] != IGNORE_INDEX], x[:, 1:][x[:, 1:] != meta["pad_id"]])
    assert (y[:, -1] == IGNORE_INDEX).all() and ((y == meta["eos_id"]).sum(1) == 1).all()
    counts = np.load(rows / "token_counts.npy")
    assert counts.sum() == (x != meta["pad_id"]).sum() and counts[meta["pad_id"]] == 0


@pytest.mark.parametrize("layout", ["stream", "rows"])
@pytest.mark.parametrize("world", [2, 4])
def test_world_size_does_not_change_the_batches(layout, world, request):
    sequences = TokenDataset(request.getfixturevalue(layout), "train")
    for step in (0, 3, 1000):  # 1000 lies epochs ahead
        x, y, n = BatchSampler(sequences, 8, seed=1)(step)
        parts = [BatchSampler(sequences, 8, seed=1)(step, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([p[0] for p in parts]), x) and torch.equal(torch.cat([p[1] for p in parts]), y)
        assert n == (y != IGNORE_INDEX).sum() and all(p[2] == n for p in parts)


def test_an_epoch_takes_each_sequence_once_and_the_next_another_order(stream):
    sequences = TokenDataset(stream, "train")
    batches = BatchSampler(sequences, 8, seed=1)
    epochs = [np.concatenate([batches.indices(e * batches.steps_per_epoch + k) for k in range(batches.steps_per_epoch)]) for e in (0, 1)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == batches.steps_per_epoch * 8 <= len(sequences) < len(epoch) + 8
    assert (epochs[0] != epochs[1]).any()
    assert (BatchSampler(sequences, 8, seed=2).indices(0) != batches.indices(0)).any()


@pytest.mark.parametrize("layout", ["stream", "rows"])
def test_the_evaluation_set_is_the_same_for_any_world_and_block(layout, request):
    sequences = TokenDataset(request.getfixturevalue(layout), "val")

    def seen(rows, world):
        blocks = [list(eval_batches(sequences, 300, rows, rank, world)) for rank in range(world)]
        assert len({len(b) for b in blocks}) == 1 and all(x.shape == y.shape == (rows, 32) for b in blocks for x, y in b)
        return sorted(tuple(row.tolist()) for b in blocks for _, y in b for row in y if (row != IGNORE_INDEX).any())
    whole = seen(1, 1)
    assert 300 <= sum(t != IGNORE_INDEX for row in whole for t in row) < 300 + 32
    assert all(seen(rows, world) == whole for rows, world in ((4, 1), (3, 2), (16, 4)))


def test_more_evaluation_tokens_than_there_are_takes_all(numbers):
    assert sum(int((y != IGNORE_INDEX).sum()) for _, y in eval_batches(TokenDataset(numbers, "val"), 10**9, 3)) == 40


@pytest.mark.parametrize("make, words", [
    (lambda p: shard(p, range(9), magic=20240801, version=7), "uint32 tokens, as llm.c .* Llama 3: prepare"),
    (lambda p: p.write_bytes(np.arange(9000, dtype="<u2").tobytes()), "no header.* nanoGPT.*: prepare"),
    (lambda p: p.symlink_to("nowhere"), "No such file"),
    (lambda p: p.mkdir(), "Is a directory"),
    (lambda p: p.symlink_to("/proc/self/mem"), "Input/output error"),  # as from a failing disk
    (lambda p: shard(p, range(9), magic=1), "magic"),
    (lambda p: shard(p, range(9), version=2), "version"),
    (lambda p: shard(p, range(9), claim=10), "truncated"),
    (lambda p: shard(p, range(9), claim=8), "torn"),
    (lambda p: shard(p, []), "no tokens"),
    (lambda p: p.write_bytes(b""), "header"),
    (lambda p: p.write_bytes(b"x" * 100), "header")])
def test_bad_shards_are_named(tmp_path, make, words):
    make(tmp_path / "train_000000.bin")
    with pytest.raises(UserError, match=f"train_000000.bin.*{words}"):
        open_shard(tmp_path / "train_000000.bin")


def test_files_without_permission_are_named(numbers):
    """Root may read anything, so it becomes another user."""
    np.save(numbers / "token_counts.npy", np.ones(200, int))
    for name, read in {"train_000001.bin": lambda: TokenDataset(numbers, "train"), "token_counts.npy": lambda: token_counts(numbers, 200),
                       "meta.json": lambda: fingerprint(numbers), ".": lambda: TokenDataset(numbers, "val")}.items():
        mode = (numbers / name).stat().st_mode
        (numbers / name).chmod(0)
        user = os.geteuid()
        if not user:
            os.seteuid(65534)
        try:
            with pytest.raises(UserError, match="could not read .*Permission denied.*check path and permissions"):
                read()
        finally:
            os.seteuid(user)
            (numbers / name).chmod(mode)
        read()


def test_hundreds_of_shards_hold_neither_files_nor_memory_maps(numbers):
    for k in range(300):
        shard(numbers / f"train_{k:06d}.bin", range(9))
    meta = json.loads((numbers / "meta.json").read_text())
    (numbers / "meta.json").write_text(json.dumps({**meta, "shards": {"train": 300, "val": 1}}))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        sequences = TokenDataset(numbers, "train")
        x, y = sequences[np.arange(len(sequences))]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert x.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] * 300 and torch.equal(y, x + 1)
    assert str(numbers) not in Path("/proc/self/maps").read_text()


def test_a_token_outside_the_vocabulary_is_named(numbers):
    shard(numbers / "train_000001.bin", [100, 101, 102, 103, 104, 250, 106, 107, 108])
    sequences = TokenDataset(numbers, "train")
    with pytest.raises(UserError, match="train_000001.bin.*250.*vocab_size 200"):
        sequences[np.array([5])]


def test_a_shard_that_changes_is_named(numbers):
    sequences = TokenDataset(numbers, "train")
    path = numbers / "train_000001.bin"
    old = path.read_bytes()
    for change in (lambda: path.write_bytes(old[:-4]), path.unlink):
        change()
        assert sequences[np.array([1])][0].tolist() == [[4, 5, 6, 7]]  # the other shard is as it was
        with pytest.raises(UserError, match="train_000001.bin was changed"):
            sequences[np.array([1, 5])]


def test_bad_directories_are_named(numbers, tmp_path):
    with pytest.raises(UserError, match="is no data directory"):
        TokenDataset(tmp_path / "none", "train")
    meta = json.loads((numbers / "meta.json").read_text())
    for change, words in (({"complete": False}, "again to finish"), ({"layout": "heap"}, "heap"), ({"vocab_size": 70000}, "70000"),
                          ({"seq_len": "many"}, "seq_len"), ({"vocab_size": "4096"}, "vocab_size"), ({"pad_id": None}, "pad_id"),
                          ({"shards": 2}, "shards"), ({"shards": {"val": 1}}, "says None"),
                          ({"shards": {"train": 3, "val": 1}}, "has 2 train_")):
        (numbers / "meta.json").write_text(json.dumps({**meta, **change}))
        with pytest.raises(UserError, match=words):
            TokenDataset(numbers, "train")
    (numbers / "meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json is broken"):
        TokenDataset(numbers, "train")
    (numbers / "meta.json").unlink()
    for path in numbers.glob("val_*.bin"):
        path.unlink()
    with pytest.raises(UserError, match="meta.json is missing"):
        TokenDataset(numbers, "train")


def test_shards_of_llm_c_as_they_are(tmp_path):
    shard(tmp_path / "fineweb_train_000002.bin", range(1000, 1600))
    shard(tmp_path / "fineweb_train_000001.bin", range(600))
    shard(tmp_path / "tiny_shakespeare_val.bin", [50256] * 300)
    train, val = TokenDataset(tmp_path, "train"), TokenDataset(tmp_path, "val")
    assert len(train) == 4 and len(val) == 1 and train.vocab_size == 50257
    x, y = train[np.array([0, 3])]
    assert x[0, 0] == 0 and x[1, 0] == 1256 and torch.equal(y, x + 1) and token_counts(tmp_path, 50257) is None
    first = fingerprint(tmp_path)
    for tokens in (range(700), range(1, 701)):  # another length, and other tokens
        shard(tmp_path / "fineweb_train_000001.bin", tokens)
        assert fingerprint(tmp_path) != first
        first = fingerprint(tmp_path)
    with open(tmp_path / "fineweb_train_000001.bin", "r+b") as f:
        for place in (0, 10**6, 2 * 10**6):  # of a large file it reads the start, middle and end
            f.seek(place)
            f.write(b"x")
            f.flush()
            assert fingerprint(tmp_path) != first
            first = fingerprint(tmp_path)


def test_too_little_text_is_said(numbers):
    with pytest.raises(UserError, match="6 sequences, fewer than --batch_size=7"):
        BatchSampler(TokenDataset(numbers, "train"), 7, seed=0)
    shard(numbers / "val_000000.bin", range(4))
    with pytest.raises(UserError, match="val is shorter than one sequence"):
        TokenDataset(numbers, "val")
