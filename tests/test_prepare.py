import fcntl
import gzip
import hashlib
import http.server
import importlib.util
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tiktoken_ext.openai_public
import torch

from conftest import ROOT, documents, one_line, prepare, write_jsonl
from loader import TokenDataset, UserError, open_shard

END = "<|endoftext|>"


def tokens(folder, split):
    return np.concatenate([open_shard(p) for p in sorted(folder.glob(f"{split}_*.bin"))]).tolist()


def split_documents(ids, eos):
    out = [[]]
    for i in ids:
        if i == eos:
            out.append([])
        else:
            out[-1].append(i)
    assert out.pop() == []
    return out


def is_val(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < 0.05 * 2**64


def digest(folder):
    """What is in the files of a folder, but for the lock, which is there once it was worked in."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.glob("*") if p.is_file() and p.name != "lock"}


@pytest.fixture
def module():
    """data/prepare.py, imported anew."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- what is written

def test_stream_is_lossless_in_order_and_split_by_hash(stream):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(stream / "tokenizer.model"))
    meta = json.loads((stream / "meta.json").read_text())
    for split in ("train", "val"):
        wanted = [text for text in documents() if is_val(text) == (split == "val")]
        ids = tokens(stream, split)
        assert [sp.decode(i) for i in split_documents(ids, meta["eos_id"])] == wanted
        assert meta["documents"][split] == len(wanted) and meta["tokens"][split] == len(ids)
    model = (stream / "tokenizer.model").read_bytes()
    assert meta["tokenizer_sha256"] == hashlib.sha256(model).hexdigest()
    assert meta["vocab_size"] == 500
    counts = np.bincount(tokens(stream, "train"), minlength=500)
    assert np.load(stream / "token_counts.npy").tolist() == counts.tolist()


def test_rows_are_documents_cut_or_padded(rows, stream):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(stream / "tokenizer.model"))
    meta = json.loads((rows / "meta.json").read_text())
    got = np.array(tokens(rows, "train")).reshape(-1, 32)
    train = [text for text in documents() if not is_val(text)]
    assert len(got) == len(train) == meta["documents"]["train"]
    assert meta["shards"]["train"] >= 3
    for row, text in zip(got.tolist(), train):
        ids = sp.encode(text)[:31] + [meta["eos_id"]]
        assert row == ids + [meta["pad_id"]] * (32 - len(ids))
    padding = got == meta["pad_id"]
    assert meta["padding_share"] == pytest.approx(padding.mean())
    counts = np.bincount(got[~padding], minlength=500)
    assert np.load(rows / "token_counts.npy").tolist() == counts.tolist()


def test_the_tokenizer_is_trained_with_these_settings(stream):
    """A change of them would change all data: pad, eos and unk first, the newline, 256 bytes."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(stream / "tokenizer.model"))
    assert [sp.pad_id(), sp.eos_id(), sp.unk_id(), sp.bos_id()] == [0, 1, 2, -1]
    assert sp.id_to_piece(3) == "\n" and sp.id_to_piece(4) == "<0x00>"
    assert sp.decode(sp.encode(" a  b\n\n\tc é🙂 ")) == " a  b\n\n\tc é🙂 "


def test_it_goes_on_where_it_stopped_and_then_has_nothing_to_do(text, stream, tmp_path):
    words = ("files", text, f"--out={tmp_path}", f"--tokenizer={stream / 'tokenizer.model'}",
             "--layout=rows", "--seq_len=32", "--shard_chars=20000")
    assert prepare(*words).returncode == 0
    whole = digest(tmp_path)
    # as if killed while it wrote the third shard
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta = {"complete": False, "settings": meta["settings"]}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    os.rename(tmp_path / "train_000002.bin", tmp_path / "train_000002.bin.tmp")
    for gone in ("train_000003.bin", "val_000000.bin"):
        (tmp_path / gone).unlink()
    (tmp_path / "token_counts.npy").write_bytes(b"torn")
    os.link(tmp_path / "token_counts.npy", tmp_path / "torn")
    kept = (tmp_path / "train_000001.bin").stat()
    assert prepare(*words).returncode == 0
    after = (tmp_path / "train_000001.bin").stat()
    # what was there is replaced, never written into
    assert (tmp_path / "torn").read_bytes() == b"torn"
    (tmp_path / "torn").unlink()
    assert digest(tmp_path) == whole
    assert (kept.st_mtime_ns, kept.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert "nothing to do" in prepare(*words).stdout


def test_other_data_in_the_directory_is_left_alone(text, stream, tmp_path):
    words = ("files", text, f"--out={tmp_path}", f"--tokenizer={stream / 'tokenizer.model'}")
    (tmp_path / "tokenizer.model").write_bytes(b"somebody's")
    one_line(prepare(*words), tmp_path, "choose another --out")
    assert digest(tmp_path).keys() == {"tokenizer.model"}
    (tmp_path / "tokenizer.model").unlink()
    assert prepare(*words).returncode == 0
    whole = digest(tmp_path)
    one_line(prepare(*words, "--seq_len=64"), "other settings", "--out")
    assert digest(tmp_path) == whole
    (tmp_path / "meta.json").write_text("{")
    one_line(prepare(*words), "choose another --out")
    assert digest(tmp_path).keys() == whole.keys()


def test_a_directory_of_others_or_without_its_shards_is_left_alone(text, stream, tmp_path):
    words = ("files", text, f"--out={tmp_path}", f"--tokenizer={stream / 'tokenizer.model'}")
    (tmp_path / "meta.json").write_text('{"mine": 1}')
    one_line(prepare(*words), tmp_path, "choose another --out")
    assert (tmp_path / "meta.json").read_text() == '{"mine": 1}'
    (tmp_path / "meta.json").unlink()
    assert prepare(*words).returncode == 0
    for path in tmp_path.glob("*.bin"):
        path.unlink()  # they lie on another disk now
    left = digest(tmp_path)
    one_line(prepare(*words, "--seq_len=64"), tmp_path, "choose another --out")
    assert digest(tmp_path) == left


def test_the_tokenizer_of_settings_that_were_given_up_is_not_used(text, tmp_path):
    def small_files(size):
        return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}
    words = ("files", text, f"--out={tmp_path}")
    model = tmp_path / "tokenizer.model"
    one_line(prepare(*words, "--tokenizer=train:300", **small_files(5_200)), "File too large")
    assert model.exists() and not list(tmp_path.glob("*.bin"))
    one_line(prepare(*words, "--tokenizer=train:600", **small_files(2_000)), "File too large")
    assert not list(tmp_path.glob("*.tmp"))  # which would keep a full disk full
    done = prepare(*words, "--tokenizer=train:600")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "meta.json").read_text())["vocab_size"] == 600


def test_a_tokenizer_is_known_by_its_content(text, stream, tmp_path):
    mine, copy, out = tmp_path / "mine.model", tmp_path / "copy.model", tmp_path / "out"
    for path in (mine, copy):
        path.write_bytes((stream / "tokenizer.model").read_bytes())
    words = ("files", text, f"--out={out}")
    assert prepare(*words, f"--tokenizer={mine}").returncode == 0
    assert "nothing to do" in prepare(*words, f"--tokenizer={copy}").stdout
    other = prepare("files", text, f"--out={tmp_path / 'b'}", "--tokenizer=train:300")
    assert other.returncode == 0
    mine.write_bytes((tmp_path / "b" / "tokenizer.model").read_bytes())
    one_line(prepare(*words, f"--tokenizer={mine}"), "other settings", "choose another --out")


def test_settings_can_change_as_long_as_there_is_no_shard(text, stream, tmp_path):
    words = [f"--out={tmp_path}", f"--tokenizer={stream / 'tokenizer.model'}"]
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(text.read_bytes()[:-100])  # it is damaged after the first documents
    one_line(prepare("files", cut, *words), "cut.json.gz", "damaged gzip")
    assert "cut.json.gz" in (tmp_path / "meta.json").read_text()
    assert prepare("files", text, *words).returncode == 0


def test_text_files_and_plain_json_lines(tmp_path):
    paragraphs = [d for d in documents(60) if "\n\n" not in d]
    (tmp_path / "a.txt").write_text("\n\nOne paragraph\nof two lines.\n\n\nAnother.\n\n"
                                    + "\n\n".join(paragraphs) + "\n \t\nlast")
    write_jsonl(tmp_path / "b.jsonl", [*documents(60, seed=1), " \n"])
    with open(tmp_path / "b.jsonl", "a") as f:
        f.write("\n \n")  # blank lines and blank documents do not count
    out = tmp_path / "out"
    done = prepare("files", tmp_path / "a.txt", tmp_path / "b.jsonl", f"--out={out}",
                   "--tokenizer=train:400", "--val_fraction=0.2")
    assert done.returncode == 0, done.stderr
    sp = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    texts = [sp.decode(ids) for split in ("train", "val")
             for ids in split_documents(tokens(out, split), 1)]
    wanted = ["One paragraph\nof two lines.\n", "Another.\n", *(p + "\n" for p in paragraphs),
              "last", *documents(60, seed=1)]
    assert sorted(texts) == sorted(wanted)


def test_a_text_without_blank_lines_is_no_endless_document(tmp_path, module):
    (tmp_path / "a.txt").write_text("a line of text\n" * 40_000)
    found = list(module.read_documents(tmp_path / "a.txt"))
    assert "".join(found) == "a line of text\n" * 40_000 and max(map(len, found)) < 100_100


def test_the_embedded_corpus_is_the_same_twice(tmp_path):
    for name in "ab":
        done = prepare("python", f"--out={tmp_path / name}", "--max_chars=400000",
                       "--tokenizer=train:600", "--val_fraction=0.3")
        assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_the_library_of_another_python_is_used_once_complete(tmp_path):
    words = ("python", f"--out={tmp_path}", "--max_chars=400000", "--tokenizer=train:600",
             "--val_fraction=0.3")
    assert prepare(*words).returncode == 0
    meta = json.loads((tmp_path / "meta.json").read_text())
    here, meta["settings"]["python"] = meta["settings"]["python"], "3.11.0"
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    whole = digest(tmp_path)
    done = prepare(*words)
    assert done.returncode == 0 and done.stdout == (
        f"{tmp_path} is ready; its text is the library of Python 3.11.0, this is {here}\n")
    one_line(prepare(*words, "--seq_len=64"), "other settings", "--out")
    assert digest(tmp_path) == whole
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "complete": False}))
    one_line(prepare(*words), "other settings", "--out")


def decoded(out, *splits):
    """The documents of a directory in the stream layout."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    return [sp.decode(ids) for split in splits or ("train", "val")
            for ids in split_documents(tokens(out, split), 1)]


@pytest.mark.parametrize("name, opener", [
    ("a.txt", open), ("a.txt.gz", gzip.open), ("a.jsonl", open), ("a.json.gz", gzip.open)])
def test_a_byte_order_mark_is_no_text(tmp_path, name, opener):
    lines = documents(60)[:40] + ["a\ufeff mark within the text is kept"]
    lines = [" ".join(line.split()) for line in lines]
    sep = "\n\n" if "txt" in name else "\n"
    with opener(tmp_path / name, "wt", encoding="utf-8-sig") as f:
        f.write(sep.join(lines if "txt" in name else (json.dumps({"text": t}) for t in lines)))
    done = prepare("files", tmp_path / name, f"--out={tmp_path}", "--tokenizer=train:400")
    assert done.returncode == 0, done.stderr
    assert sorted(text.strip("\n") for text in decoded(tmp_path)) == sorted(lines)


ODD = ["nul \0 x", "\r\n dos \r", "</s><unk><pad><s>", "<0x41>", "tab\t", "\x85\u2028\u3000\xa0 x",
       "\ufeff", "\ufffd\U0010ffff", " \u2047 ", "e\u0301", "\u2585"]


def test_characters_that_mean_something_to_sentencepiece(tmp_path):
    texts = [f"{odd} {text}" for text in documents(40) for odd in ODD]
    for name, more in (("same", []), ("said", ["a\u2581b"])):
        path = write_jsonl(tmp_path / f"{name}.json", texts + more)
        done = prepare("files", path, f"--out={tmp_path / name}", "--tokenizer=train:500")
        assert done.returncode == 0, done.stderr
        # all come back but U+2581, and it says so
        assert sorted(decoded(tmp_path / name)) == sorted(texts + (["a b"] if more else []))
        assert ("U+2581" in done.stdout) == bool(more)


def test_chinese_has_more_characters_than_pieces(tmp_path):
    rng = random.Random(0)
    characters = [chr(0x4e00 + i) for i in range(6000)]
    weights = [1 / (k + 1) for k in range(6000)]
    texts = ["".join(rng.choices(characters, weights, k=400)) for _ in range(200)]
    texts += ["".join(characters[i::10]) for i in range(10)] + ["a space", "\u3000\n "]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    done = prepare("files", path, f"--out={tmp_path}", "--tokenizer=train:4096")
    assert done.returncode == 0, done.stderr
    assert sorted(decoded(tmp_path)) == sorted(filter(str.strip, texts))  # a space is one, too
    meta = json.loads((tmp_path / "meta.json").read_text())
    # few characters are spelled in bytes, which are three each
    assert meta["vocab_size"] == 4096
    assert sum(meta["tokens"].values()) < 1.2 * sum(map(len, texts))
    small = prepare("files", path, f"--out={tmp_path / 'b'}", "--tokenizer=train:262")
    assert small.returncode == 0 and sorted(decoded(tmp_path / "b")) == sorted(decoded(tmp_path))


@pytest.mark.parametrize("name", ["a.txt", "a.json"])
@pytest.mark.parametrize("layout", ["stream", "rows"])
def test_one_line_of_200000_characters_is_training_and_validation_text(tmp_path, name, layout):
    line = "".join(random.Random(0).choices("etaoin shrdlu", k=200_010))
    (tmp_path / name).write_text(json.dumps({"text": line}) if name == "a.json" else line)
    done = prepare("files", tmp_path / name, f"--out={tmp_path}", "--tokenizer=train:300",
                   f"--layout={layout}")
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["documents"] == {"train": 2, "val": 1}
    if layout == "stream":
        found = sorted(decoded(tmp_path), key=line.index)
        assert "".join(found) == line and {len(text) for text in found} == {66_670}


def test_of_few_documents_the_longest_is_for_validation(tmp_path, stream):
    path, long = tmp_path / "a.json", "the longest of them"
    words = ("files", path, f"--out={tmp_path}", f"--tokenizer={stream / 'tokenizer.model'}")
    write_jsonl(path, ["one"])
    one_line(prepare(*words), "no documents for training: give it more text")
    write_jsonl(path, ["one", long, "two", long] * 2)
    one_line(prepare(*words, "--val_fraction=1"), "another --val_fraction")
    for name, fraction in (("0", "0"), ("5%", "0.05")):
        out = tmp_path / name
        done = prepare(*words, f"--out={out}", f"--val_fraction={fraction}")
        assert done.returncode == 0, done.stderr
        assert decoded(out, "val") == [long] * 4  # equal ones are on the same side
        assert decoded(out, "train") == ["one", "two"] * 2


# ---- two at once

def start(*words):
    return subprocess.Popen([sys.executable, ROOT / "data" / "prepare.py", *words], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGKILL])
def test_a_second_one_waits_for_the_first_and_takes_over_if_it_is_killed(text, tmp_path, number):
    words = ["files", text, "--tokenizer=train:500", "--shard_chars=20000"]
    assert prepare(*words, f"--out={tmp_path / 'alone'}").returncode == 0
    first = start(*words, f"--out={tmp_path / 'out'}")
    while not list(tmp_path.glob("out/val*")):  # the first is in the middle of its work
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)
    second = start(*words, f"--out={tmp_path / 'out'}")
    assert second.stdout.readline() == (f"another prepare.py is at work in {tmp_path / 'out'}: "
                                        "waiting for it\n")
    first.send_signal(number)
    second_out, second_err = second.communicate(timeout=60)
    assert (second.returncode, second_err) == (0, "")
    assert ("nothing to do" in second_out) == (number == signal.SIGCONT)
    first.communicate(timeout=60)
    assert digest(tmp_path / "out") == digest(tmp_path / "alone")


def test_many_at_once(text, tmp_path):
    words = ["files", text, "--tokenizer=train:500", "--shard_chars=20000"]
    assert prepare(*words, f"--out={tmp_path / 'alone'}").returncode == 0
    for process in [start(*words, f"--out={tmp_path / 'out'}") for _ in range(4)]:
        assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert digest(tmp_path / "out") == digest(tmp_path / "alone")


@pytest.fixture
def gpt2(monkeypatch):
    """Stands in for a download: GPT-2's form and pattern, without its 50,000 merges."""
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=tiktoken_ext.openai_public.r50k_pat_str, special_tokens={END: 256},
        mergeable_ranks={bytes([i]): i for i in range(256)})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)


@pytest.mark.parametrize("layout", ["stream", "rows"])
def test_gpt2_gets_a_piece_for_padding_if_needed(tmp_path, text, layout, module, gpt2, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare.py", "files", str(text), f"--out={tmp_path}",
                                      "--tokenizer=gpt2", f"--layout={layout}", "--seq_len=64"])
    module.main()
    meta = json.loads((tmp_path / "meta.json").read_text())
    train = [t.encode() for t in documents() if not is_val(t)]
    assert (meta["eos_id"], meta["tokenizer"]) == (256, "gpt2")
    if layout == "rows":
        assert (meta["vocab_size"], meta["pad_id"]) == (258, 257)
        wanted = [[*t[:63], 256] + [257] * (63 - len(t[:63])) for t in train]
        assert np.array(tokens(tmp_path, "train")).reshape(-1, 64).tolist() == wanted
    else:
        assert meta["vocab_size"] == 257
        assert [bytes(ids) for ids in split_documents(tokens(tmp_path, "train"), 256)] == train
    assert not (tmp_path / "tokenizer.model").exists()


@pytest.mark.parametrize("middle", [" ", "\n", "a", "\u4e00", "1", "!"])
def test_gpt2_takes_a_million_of_one_character(tmp_path, module, gpt2, monkeypatch, middle):
    path = write_jsonl(tmp_path / "a.json", [f"a{middle * 1_000_000}b", f"text and {END}"])
    monkeypatch.setattr(sys, "argv", ["prepare.py", "files", str(path), f"--out={tmp_path}",
                                      "--tokenizer=gpt2", "--val_fraction=0.5"])
    module.main()
    found = b"".join(map(bytes, split_documents(tokens(tmp_path, "train"), 256)
                         + split_documents(tokens(tmp_path, "val"), 256)))
    assert f"text and {END}".encode() in found  # as text, not as the end
    assert len(found) > 2_000_000 or middle != "\u4e00"


# ---- bad input

def broken_gzip(path, text):
    path.write_bytes(text.read_bytes()[:-2000])


def holds(data):
    return lambda path, text: path.write_bytes(data)


BAD_TEXT = [
    ("none.jsonl", lambda path, text: None, ["none.jsonl", "No such file"]),
    ("cut.json.gz", broken_gzip, ["cut.json.gz", "damaged gzip", "after line", "replace"]),
    ("plain.json.gz", holds(b"no gzip"), ["plain.json.gz", "damaged gzip"]),
    ("bad.jsonl", holds(b'{"text": "good"}\n{"text": \n'), ["bad.jsonl line 2", "not JSON"]),
    ("field.jsonl", holds(b'{"body": "x"}\n'), ["field.jsonl line 1", '"text"']),
    ("number.jsonl", holds(b'{"text": 7}\n'), ["number.jsonl line 1", 'string "text"']),
    ("list.jsonl", holds(b"[1]\n"), ["list.jsonl line 1", '"text"']),
    ("deep.jsonl", holds(b"[" * 100_000), ["deep.jsonl line 1"]),
    ("half.jsonl", holds(b'{"text": "\\ud800"}\n'), ["half.jsonl line 1", "surrogate"]),
    ("latin.txt", holds(b"ok\n\xe9\xe9\n"), ["latin.txt", "UTF-8"]),
    ("image.png", holds(b"x"), ["image.png", "expected .json"]),
    ("image.jsonl", holds(b"\x89PNG\r\n"), ["image.jsonl", "UTF-8"]),
    ("a.txt.md", holds(b"text"), ["a.txt.md", "expected .json, .jsonl or .txt"]),
    ("blank.txt", holds(b"\n \n"), ["no documents"])]


@pytest.mark.parametrize("name, make, words", BAD_TEXT)
def test_bad_text_is_one_line_and_leaves_no_shard(tmp_path, text, stream, name, make, words):
    make(tmp_path / name, text)
    done = prepare("files", tmp_path / name, f"--out={tmp_path / 'out'}",
                   f"--tokenizer={stream / 'tokenizer.model'}")
    one_line(done, "prepare.py:", *words)
    assert not list(tmp_path.glob("out/*.bin*"))


def test_bad_text_is_not_blamed_on_the_tokenizer_that_reads_it(tmp_path, text):
    broken_gzip(tmp_path / "cut.json.gz", text)
    done = prepare("files", tmp_path / "cut.json.gz", f"--out={tmp_path / 'out'}")
    one_line(done, "cut.json.gz: damaged gzip")
    assert "tokenizer" not in done.stderr and not digest(tmp_path / "out")


BAD_SETTINGS = [
    ("--tokenizer=train:7", ["train:7", "N must be from 262 to 65536"]),
    ("--tokenizer=train:-500", ["N must be"]), ("--tokenizer=train:70000", ["N must be"]),
    ("--tokenizer=train:20000", ["too high", "value <=", "train:N (N to suit the text)"]),
    ("--tokenizer={empty}", ["--tokenizer={empty}", "SentencePiece .model"]),
    ("--tokenizer={no_eos}", ["no_eos.model", "needs an end-of-sequence piece"]),
    ("--tokenizer=train:x", ["train:x", "'x'", "train:N"]),
    ("--tokenizer=nowhere.model", ["nowhere.model", "No such file"]),
    ("--tokenizer={text}", ["--tokenizer={text}", "SentencePiece .model"]),
    ("--seq_len=1", ["--seq_len", "2 to 65536"]), ("--seq_len=x", ["--seq_len", "int"]),
    ("--shard_chars=0", ["--shard_chars"]), ("--val_fraction=2", ["--val_fraction", "0 to 1"]),
    ("--layout=heap", ["heap"]), ("--shardchars=3", ["--shardchars"]),
    ("--out={text}/data", ["{text}/data: Not a directory"])]


@pytest.mark.parametrize("word, expected", BAD_SETTINGS)
def test_bad_settings_are_one_line(tmp_path, text, word, expected):
    names = {"text": text, "empty": tmp_path / "empty.model", "no_eos": tmp_path / "no_eos.model"}
    names["empty"].touch()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents(50)), model_prefix=tmp_path / "no_eos", vocab_size=60,
        eos_id=-1, minloglevel=2)
    done = prepare("files", text, f"--out={tmp_path / 'out'}", "--tokenizer=train:500",
                   word.format(**names))
    one_line(done, *(part.format(**names) for part in expected))
    assert not digest(tmp_path / "out")


def test_packages_are_those_that_requirements_txt_pins(tmp_path):
    done = prepare("packages", f"--out={tmp_path}", "--max_chars=300000", "--tokenizer=train:500")
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "meta.json").read_text())
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    assert meta["settings"]["packages"] == pinned
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids = tokens(tmp_path, "train")
    text = sp.decode(ids[:min(400, ids.index(1))])
    site = Path(torch.__file__).parents[1]
    roots = [site / name for name in ("torch", "numpy", "matplotlib", "huggingface_hub", "_pytest")]
    files = (path for root in roots for path in root.rglob("*.py"))
    assert any(text in path.read_text(errors="replace") for path in files)


def test_max_chars_is_checked(tmp_path):
    one_line(prepare("python", f"--out={tmp_path}", "--max_chars=0"), "--max_chars")


@pytest.mark.parametrize("word", ["--val_shards=0,8", *(f"--train_shards={numbers}" for numbers in (
    "5-2", "0-3,9-7", "7-", "1024", "x", "1,1", "", "-1"))])
def test_bad_shard_ranges_are_one_line(tmp_path, word):
    done = prepare("c4", f"--out={tmp_path / 'out'}", word)
    one_line(done, word.partition("=")[0])


def test_gpt2_without_network_is_one_line(tmp_path, text):
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"),
           "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = prepare("files", text, f"--out={tmp_path / 'out'}", "--tokenizer=gpt2", env=env)
    one_line(done, "gpt2", "TIKTOKEN_CACHE_DIR")


# ---- downloads, from a real server that speaks as much of the hub's protocol as is needed

class Server(http.server.ThreadingHTTPServer):
    """Serves files by the last part of their path. faults["GET name"] lists what goes wrong at
    the next requests: a status, "breaks off" or "is short". log has ("GET name")."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log = files, {}, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.log.append(f"{self.command} {name}")
        faults = self.server.faults.get(self.server.log[-1], [])
        fault = faults.pop(0) if faults else None
        data = self.server.files.get(name)
        if data is None or isinstance(fault, int):
            return self.send_error(fault or 404)
        body = data[:len(data) // 2] if fault == "is short" else data
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", 40 * "1")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:len(body) // 2] if fault == "breaks off" else body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """C4's first two training files and its first validation file, small."""
    names = ["train.00000-of-01024", "train.00001-of-01024", "validation.00000-of-00008"]
    files = {}
    for seed, name in enumerate(names):
        lines = [json.dumps({"text": text}) + "\n" for text in documents(200, seed)]
        files[f"c4-{name}.json.gz"] = gzip.compress("".join(lines).encode())
    server = Server(files)
    yield server
    server.shutdown()
    server.server_close()


FIRST = "c4-train.00000-of-01024.json.gz"
NOWHERE = "http://127.0.0.1:9"  # a port that nothing listens at


def hub(tmp_path, url, **more):
    """The environment of somebody who has never downloaded anything and uses this mirror."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return {**env, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": url.rstrip("/"), **more}


def c4(stream, env, out, *more):
    return prepare("c4", f"--out={out}", "--train_shards=0-1", "--seq_len=32",
                   f"--tokenizer={stream / 'tokenizer.model'}", *more, env=env)


def test_c4_from_download_to_shards_and_then_from_the_cache(server, tmp_path, stream):
    done = c4(stream, hub(tmp_path, server.url), tmp_path / "a")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert meta["documents"] == {"train": 400, "val": 200} and meta["layout"] == "rows"
    sp = sentencepiece.SentencePieceProcessor(model_file=str(stream / "tokenizer.model"))
    rows = np.array(tokens(tmp_path / "a", "train")).reshape(400, 32).tolist()
    texts = documents(200, 0) + documents(200, 1)
    assert [row[:row.index(1)] for row in rows] == [sp.encode(text)[:31] for text in texts]
    assert all(server.log.count(f"GET {name}") == 1 for name in server.files)
    # Once in the cache, no network is needed.
    for env in (hub(tmp_path, NOWHERE), hub(tmp_path, NOWHERE, HF_HUB_OFFLINE="1")):
        assert c4(stream, env, tmp_path / "b").returncode == 0
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def c4_files(folder, numbers):
    """Files of C4 put by hand: the first for validation and these for training."""
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "c4-validation.00000-of-00008.json.gz", documents(10, seed=-1))
    return [write_jsonl(folder / f"c4-train.{i:05d}-of-01024.json.gz", documents(5 + i, seed=i))
            for i in numbers]


def start_stuck(path, out, count, *words):
    """Start prepare.py with a pipe that nobody writes to in place of a file, and wait until those
    before it are shards, so many."""
    path.unlink()
    os.mkfifo(path)
    process = start(*words)
    while len(list(out.glob("*.bin"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def test_c4_goes_on_and_extends_without_the_finished_files(tmp_path, stream):
    downloads, out = tmp_path / "downloads", tmp_path / "out"
    words = ["c4", "--seq_len=32", f"--tokenizer={stream / 'tokenizer.model'}",
             f"--downloads={downloads}"]
    files = c4_files(downloads, range(60))
    done = prepare(*words, f"--out={tmp_path / 'whole'}", "--train_shards=0-59")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    words.append(f"--out={out}")

    def state():
        return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino)
                for path in out.glob("*.bin")}

    process = start_stuck(files[20], out, 21, *words, "--train_shards=0-38")
    with pytest.raises(UserError, match="cut short"):
        TokenDataset(out, "train")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stderr == (
        "prepare.py: stopped: run the same command again to continue\n")
    first = state()
    assert len(first) == 21 and "train_000020.bin" not in first
    one_line(prepare(*words, "--train_shards=0-37"), "other settings or files", "--out")
    for path in [*files[:20], downloads / "c4-validation.00000-of-00008.json.gz"]:
        path.write_bytes(b"not needed")
    files[20].unlink()
    write_jsonl(files[20], documents(25, seed=20))
    # on, and then more files
    for shards, count in (("0-38", 40), ("0-59", 61)):
        done = prepare(*words, f"--train_shards={shards}")
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert len(state()) == count and state().items() >= first.items()
        assert len(TokenDataset(out, "train")) == sum(5 + i for i in range(count - 1))
    assert digest(out) == digest(tmp_path / "whole")
    assert "nothing to do" in prepare(*words, "--train_shards=0-59").stdout
    for other in (["--train_shards=1-60"], ["--train_shards=0-60", "--val_shards=0-1"],
                  ["--train_shards=0-60", "--seq_len=33"], ["--train_shards=0-58"]):
        one_line(prepare(*words, *other), "other settings or files", "choose another --out")
    assert digest(out) == digest(tmp_path / "whole")


@pytest.mark.parametrize("damage, words", [
    (lambda path: path.write_bytes(path.read_bytes()[:-9]), ["damaged gzip", "replace"]),
    (lambda path: path.write_bytes(gzip.compress(b"\n")), ["no documents", "train_000009.bin"]),
    (lambda path: path.unlink(), ["cannot download", "HF_ENDPOINT", "put the file at"])])
def test_a_file_of_c4_that_fails_is_one_line_and_the_shards_before_it_are_kept(
        server, tmp_path, stream, damage, words):
    out = tmp_path / "out"
    out.mkdir()
    files = c4_files(out / "downloads", range(10))
    damage(files[9])
    done = c4(stream, hub(tmp_path, server.url), out, "--train_shards=0-9")
    one_line(done, *words, *([files[9]] if "no documents" not in words else []))
    assert len(list(out.glob("train_*.bin"))) == 9 and not (out / "train_000009.bin").exists()
    assert not json.loads((out / "meta.json").read_text())["complete"]
    c4_files(out / "downloads", [9])
    assert c4(stream, hub(tmp_path, NOWHERE), out, "--train_shards=0-9").returncode == 0


def test_a_faulty_download_is_taken_up_again(server, tmp_path, stream):
    server.faults = {f"HEAD {FIRST}": [503, 503], f"GET {FIRST}": ["breaks off"]}
    done = c4(stream, hub(tmp_path, server.url), tmp_path / "out")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["documents"]["train"] == 400
    assert server.log.count(f"GET {FIRST}") == 2


@pytest.mark.parametrize("faults, word", [
    ({f"HEAD {FIRST}": [404]}, "404"), ({f"HEAD {FIRST}": [403]}, "403"),
    ({f"GET {FIRST}": [500]}, "500"), ({f"GET {FIRST}": ["is short"]}, "Consistency check")])
def test_a_download_that_fails_is_one_line(server, tmp_path, stream, faults, word):
    server.faults = {request: list(what) for request, what in faults.items()}
    env, out = hub(tmp_path, server.url), tmp_path / "out"
    done = c4(stream, env, out)
    one_line(done, f"en/{FIRST}", word, "HF_ENDPOINT", out / "downloads" / FIRST)
    assert not digest(out)
    assert c4(stream, env, out).returncode == 0  # the same command goes on


@pytest.mark.parametrize("more, word", [
    ({}, "refused"), ({"HF_HUB_OFFLINE": "1"}, "offline"),
    ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "socksio"), ({"ALL_PROXY": "socks://x"}, "socks")])
def test_no_network_is_one_line_at_once_and_files_put_by_hand_help(
        server, tmp_path, stream, more, word):
    env, out, began = hub(tmp_path, NOWHERE, **more), tmp_path / "out", time.monotonic()
    name = "c4-validation.00000-of-00008.json.gz"
    one_line(c4(stream, env, out), name, word, "HF_ENDPOINT", out / "downloads" / name)
    assert time.monotonic() - began < 15  # huggingface_hub by itself retries for 23 seconds
    assert not list(out.glob("*.bin*"))
    for folder in (out / "downloads", tmp_path / "mine"):
        folder.mkdir()
        for name, data in server.files.items():
            (folder / name).write_bytes(data)
    assert c4(stream, env, out).returncode == 0
    assert c4(stream, env, tmp_path / "b", f"--downloads={tmp_path / 'mine'}").returncode == 0
    (out / "downloads" / FIRST).write_bytes(server.files[FIRST][:-9])
    one_line(c4(stream, env, tmp_path / "c", f"--downloads={out / 'downloads'}"),
             out / "downloads" / FIRST, "damaged gzip")


@pytest.mark.parametrize("by_hand", [False, True])
def test_another_file_in_place_of_t5s_tokenizer_is_refused(server, tmp_path, stream, by_hand):
    server.files["spiece.model"] = (stream / "tokenizer.model").read_bytes()
    out = tmp_path / "out"
    if by_hand:
        (out / "downloads").mkdir(parents=True)
        (out / "downloads" / "spiece.model").write_bytes(b"something else")
    done = prepare("c4", f"--out={out}", env=hub(tmp_path, server.url))
    one_line(done, "T5", "sha256", f"at {out / 'downloads' / 'spiece.model'}")
    assert ("GET spiece.model" in server.log) != by_hand
    assert not (out / "meta.json").exists()


def test_c4_has_the_papers_settings(server, tmp_path, stream, module, monkeypatch):
    """With another tokenizer in place of T5's, which is not ours to ship."""
    files = {**server.files, "spiece.model": (stream / "tokenizer.model").read_bytes()}
    (tmp_path / "downloads").mkdir()
    for name, data in files.items():
        (tmp_path / "downloads" / name).write_bytes(data)
    sha256 = hashlib.sha256(files["spiece.model"]).hexdigest()
    monkeypatch.setattr(module, "T5_SHA256", sha256)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "c4", f"--out={tmp_path}",
                                      "--train_shards=1,0"])
    module.main()
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert (meta["layout"], meta["seq_len"], meta["tokenizer_sha256"]) == ("rows", 256, sha256)
    assert meta["settings"] == {"source": "c4", "tokenizer": "t5", "layout": "rows", "seq_len": 256,
                                "train_shards": [0, 1], "val_shards": [0]}
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    first = sp.encode(documents(200, 0)[0]) + [1]
    assert tokens(tmp_path, "train")[:len(first)] == first


MNIST = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k")
         for kind in ("images-idx3", "labels-idx1")]


def test_mnist(tmp_path):
    server = Server({name: gzip.compress(name.encode()) for name in MNIST})
    (tmp_path / MNIST[0]).write_bytes(b"put by hand")
    done = prepare("mnist", f"--out={tmp_path}", f"--url={server.url}")
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    found = {path.name: path.read_bytes() for path in tmp_path.glob("*.gz")}
    assert found == {**server.files, MNIST[0]: b"put by hand"}


def test_a_second_mnist_waits(tmp_path):
    server = Server({name: gzip.compress(name.encode()) for name in MNIST})
    with open(tmp_path / "lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        process = start("mnist", f"--out={tmp_path}", f"--url={server.url}")
        assert "waiting for it" in process.stdout.readline() and not server.log
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    server.shutdown()
    server.server_close()
    assert digest(tmp_path).keys() == set(MNIST)


@pytest.mark.parametrize("fault, word", [
    (404, "404"), ("breaks off", "IncompleteRead"), ("is short", "ended"), ("text", "gzip")])
def test_mnist_that_fails_is_one_line(tmp_path, fault, word):
    server = Server({name: gzip.compress(name.encode()) for name in MNIST})
    if fault == "text":
        server.files[MNIST[2]] = b"<html>"
    server.faults[f"GET {MNIST[2]}"] = [fault]
    out = tmp_path / "mnist"
    done = prepare("mnist", f"--out={out}", f"--url={server.url}")
    one_line(done, f"{server.url}{MNIST[2]}", word, "--url", f"put the file at {out / MNIST[2]}")
    assert digest(out).keys() == set(MNIST[:2])
    server.files[MNIST[2]] = gzip.compress(b"whole")
    full = prepare("mnist", f"--out={out}", f"--url={server.url}", preexec_fn=lambda: (
        resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))))
    one_line(full, "File too large")
    assert "download" not in full.stderr
    assert prepare("mnist", f"--out={out}", f"--url={server.url}").returncode == 0
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("url, word", [(NOWHERE + "/", "refused"), ("nonsense", "unknown url")])
def test_mnist_without_network_is_one_line(tmp_path, url, word):
    one_line(prepare("mnist", f"--out={tmp_path}", f"--url={url}"), MNIST[0], word, "--url")
