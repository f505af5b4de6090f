import gzip
import hashlib
import http.server
import importlib.util
import json
import os
import re
import sys
import threading

import numpy as np
import pytest
import sentencepiece
import tiktoken

from conftest import ROOT, documents, one_line, prepare, write_jsonl
from loader import open_shard


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
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def test_stream_is_lossless_in_order_and_split_by_hash(stream):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(stream / "tokenizer.model"))
    meta = json.loads((stream / "meta.json").read_text())
    texts = documents()
    for split, wanted in (("train", [t for t in texts if not is_val(t)]), ("val", [t for t in texts if is_val(t)])):
        got = [sp.decode(ids) for ids in split_documents(tokens(stream, split), meta["eos_id"])]
        assert got == wanted and meta["documents"][split] == len(wanted)
        assert meta["tokens"][split] == len(tokens(stream, split))
    assert meta["vocab_size"] == 500 and meta["tokenizer_sha256"] == hashlib.sha256((stream / "tokenizer.model").read_bytes()).hexdigest()
    assert np.load(stream / "token_counts.npy").tolist() == np.bincount(tokens(stream, "train"), minlength=500).tolist()


def test_rows_are_documents_cut_or_padded(rows, stream):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(stream / "tokenizer.model"))
    meta = json.loads((rows / "meta.json").read_text())
    got = np.array(tokens(rows, "train")).reshape(-1, 32)
    train = [t for t in documents() if not is_val(t)]
    assert len(got) == len(train) == meta["documents"]["train"]
    assert meta["shards"]["train"] >= 3
    for row, text in zip(got.tolist(), train):
        ids = sp.encode(text)[:31] + [meta["eos_id"]]
        assert row == ids + [meta["pad_id"]] * (32 - len(ids))
    assert meta["padding_share"] == pytest.approx((got == meta["pad_id"]).mean())


def test_it_goes_on_where_it_stopped_and_then_has_nothing_to_do(text, rows, stream, tmp_path):
    words = ("files", text, f"--out={tmp_path}", f"--tokenizer={stream / 'tokenizer.model'}", "--layout=rows", "--seq_len=32",
             "--shard_chars=20000")
    assert prepare(*words).returncode == 0
    whole = digest(tmp_path)
    # as if killed while it wrote the third shard
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({"complete": False, "settings": meta["settings"]}))
    os.rename(tmp_path / "train_000002.bin", tmp_path / "train_000002.bin.tmp")
    for gone in ("train_000003.bin", "val_000000.bin", "token_counts.npy"):
        (tmp_path / gone).unlink()
    kept = (tmp_path / "train_000001.bin").stat()
    assert prepare(*words).returncode == 0
    after = (tmp_path / "train_000001.bin").stat()
    assert digest(tmp_path) == whole and (kept.st_mtime_ns, kept.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert "nothing to do" in prepare(*words).stdout
    one_line(prepare(*words, "--seq_len=64"), "other settings", "--out")
    assert digest(tmp_path) == whole


def test_text_files_and_plain_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\n\nOne paragraph\nof two lines.\n\n\nAnother.\n" + "".join(f"\n{d}\n" for d in documents(60)).replace("…\n\n", ""))
    write_jsonl(tmp_path / "b.jsonl", documents(60, seed=1))
    done = prepare("files", tmp_path / "a.txt", tmp_path / "b.jsonl", f"--out={tmp_path / 'out'}", "--tokenizer=train:400",
                   "--val_fraction=0.2")
    assert done.returncode == 0, done.stderr
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    texts = [sp.decode(ids) for split in ("train", "val") for ids in split_documents(tokens(tmp_path / "out", split), 1)]
    assert "One paragraph\nof two lines.\n" in texts and "Another.\n" in texts and documents(60, seed=1)[3] in texts


def test_the_embedded_corpus_is_the_same_twice(tmp_path):
    for name in "ab":
        done = prepare("python", f"--out={tmp_path / name}", "--max_chars=400000", "--tokenizer=train:600", "--val_fraction=0.3")
        assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def broken_gzip(path, text):
    path.write_bytes(text.read_bytes()[:-2000])


@pytest.mark.parametrize("name, make, words", [
    ("none.jsonl", lambda p, t: None, ["no file", "none.jsonl"]),
    ("cut.json.gz", broken_gzip, ["cut.json.gz", "damaged gzip"]),
    ("plain.json.gz", lambda p, t: p.write_text("no gzip"), ["plain.json.gz", "damaged gzip"]),
    ("bad.jsonl", lambda p, t: p.write_text('{"text": "good"}\n{"text": \n'), ["bad.jsonl", "line 2", "not JSON"]),
    ("field.jsonl", lambda p, t: p.write_text('{"body": "x"}\n'), ["field.jsonl", "line 1", "text"]),
    ("number.jsonl", lambda p, t: p.write_text('{"text": 7}\n'), ["number.jsonl", "line 1", "not a string"]),
    ("list.jsonl", lambda p, t: p.write_text('[1]\n'), ["list.jsonl", "line 1"]),
    ("half.jsonl", lambda p, t: p.write_text('{"text": "\\ud800"}\n'), ["half.jsonl", "surrogate"]),
    ("latin.txt", lambda p, t: p.write_bytes(b"ok\n\xe9\xe9\n"), ["latin.txt", "UTF-8"]),
    ("image.png", lambda p, t: p.write_bytes(b"x"), ["image.png", "expected .json"]),
    ("blank.txt", lambda p, t: p.write_text("\n \n"), ["no documents"])])
def test_bad_text_is_one_line_and_leaves_no_shard(tmp_path, text, stream, name, make, words):
    make(tmp_path / name, text)
    done = prepare("files", tmp_path / name, f"--out={tmp_path / 'out'}", f"--tokenizer={stream / 'tokenizer.model'}")
    one_line(done, "prepare.py:", *words)
    assert not list(tmp_path.glob("out/*.bin*"))


@pytest.mark.parametrize("words, expected", [
    (["--tokenizer=train:7"], ["train:7", "choose another N"]), (["--tokenizer=train:x"], ["whole number"]),
    (["--tokenizer=nowhere.model"], ["nowhere.model", "No such file"]), (["--tokenizer={text}"], ["not a SentencePiece model"]),
    (["--seq_len=1"], ["--seq_len"]), (["--layout=heap"], ["heap"]), (["--shardchars=3"], ["--shardchars"])])
def test_bad_settings_are_one_line(tmp_path, text, words, expected):
    one_line(prepare("files", text, f"--out={tmp_path / 'out'}", *(w.format(text=text) for w in words)), *expected)


def test_gpt2_without_network_is_one_line(tmp_path, text):
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    one_line(prepare("files", text, f"--out={tmp_path / 'out'}", "--tokenizer=gpt2", env=env), "gpt2", "TIKTOKEN_CACHE_DIR")


@pytest.mark.parametrize("layout", ["stream", "rows"])
def test_gpt2_gets_a_piece_for_padding_where_it_needs_one(tmp_path, text, layout, monkeypatch):
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    encoding = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})  # GPT-2's form, without its 50,000 merges
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "files", str(text), f"--out={tmp_path}", "--tokenizer=gpt2",
                                      f"--layout={layout}", "--seq_len=64"])
    module.main()
    meta = json.loads((tmp_path / "meta.json").read_text())
    train = [t.encode() for t in documents() if not is_val(t)]
    if layout == "rows":
        assert (meta["vocab_size"], meta["pad_id"], meta["eos_id"], meta["tokenizer"]) == (258, 257, 256, "gpt2")
        assert np.array(tokens(tmp_path, "train")).reshape(-1, 64).tolist() == \
            [[*t[:63], 256] + [257] * (63 - len(t[:63])) for t in train]
    else:
        assert meta["vocab_size"] == 257
        assert [bytes(ids) for ids in split_documents(tokens(tmp_path, "train"), 256)] == train


# ---- downloads: a real server that misbehaves -----------------------------------------------------------------------

class Server(http.server.ThreadingHTTPServer):
    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log = files, {}, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name, faults = self.path.lstrip("/"), self.server.faults.get(self.path.lstrip("/"), [])
        fault = faults.pop(0) if faults else None
        begin = int(m[1]) if (m := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        self.server.log.append((name, begin))
        data = self.server.files.get(name)
        if data is None or isinstance(fault, int):
            return self.send_error(fault or 404)
        if fault == "no ranges":
            begin = 0
        if begin >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            return self.end_headers()
        body = data[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body) + {"says more": 999, "says less": -999}.get(fault, 0)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if fault == "breaks off" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def c4():
    """C4's first two training files and its first validation file, small."""
    files = {f"c4-{split}.{i:05d}-of-{n:05d}.json.gz": gzip.compress("".join(
        json.dumps({"text": t}) + "\n" for t in documents(200, seed)).encode())
        for seed, (split, i, n) in enumerate([("train", 0, 1024), ("train", 1, 1024), ("validation", 0, 8)])}
    server = Server(files)
    yield server
    server.shutdown()
    server.server_close()


FIRST = "c4-train.00000-of-01024.json.gz"


def fetch(c4, out, stream, *more):
    return prepare("c4", f"--out={out}", f"--url={c4.url}", "--train_shards=0-1", "--seq_len=32",
                   f"--tokenizer={stream / 'tokenizer.model'}", *more)


def test_c4_from_download_to_shards(c4, tmp_path, stream):
    done = fetch(c4, tmp_path, stream)
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["documents"] == {"train": 400, "val": 200} and meta["layout"] == "rows"
    sp = sentencepiece.SentencePieceProcessor(model_file=str(stream / "tokenizer.model"))
    rows = np.array(tokens(tmp_path, "train")).reshape(400, 32).tolist()
    assert [r[:r.index(1)] for r in rows] == [sp.encode(t)[:31] for t in documents(200, 0) + documents(200, 1)]
    assert sorted(n for n, _ in c4.log) == sorted(c4.files)


@pytest.mark.parametrize("faults", [["breaks off"], [503, 503, "breaks off", 500], ["says more"], ["breaks off", "no ranges"]])
def test_a_faulty_download_is_taken_up_again(c4, tmp_path, stream, faults):
    c4.faults[FIRST] = list(faults)
    done = fetch(c4, tmp_path, stream)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "downloads" / FIRST).read_bytes() == c4.files[FIRST]
    if faults == ["breaks off"]:
        assert [begin for n, begin in c4.log if n == FIRST] == [0, len(c4.files[FIRST]) // 2]
    assert not list(tmp_path.glob("downloads/*.part"))


def test_a_download_killed_before_its_name_is_not_repeated(c4, tmp_path, stream):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / (FIRST + ".part")).write_bytes(c4.files[FIRST])
    assert fetch(c4, tmp_path, stream).returncode == 0


@pytest.mark.parametrize("faults, words", [([404], ["404", "by hand"]), (["says less"], ["not a valid gzip file", "deleted"])])
def test_a_hopeless_download_is_one_line(c4, tmp_path, stream, faults, words):
    c4.faults[FIRST] = list(faults)
    one_line(fetch(c4, tmp_path, stream), FIRST, *words)
    assert not list(tmp_path.glob("*.bin*")) or not list(tmp_path.glob("train_*"))
    assert fetch(c4, tmp_path, stream).returncode == 0  # and nothing stands in the way of trying again


def test_no_network_says_what_to_do(tmp_path, stream):
    done = prepare("c4", f"--out={tmp_path}", "--url=http://127.0.0.1:9/", "--tries=2", f"--tokenizer={stream / 'tokenizer.model'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "c4-validation.00000-of-00008.json.gz" in last and "fetch the file by hand and put it at" in last


def test_another_file_in_place_of_t5s_tokenizer_is_refused(c4, tmp_path):
    c4.files["spiece.model"] = b"something else"
    one_line(prepare("c4", f"--out={tmp_path}", f"--url={c4.url}", f"--t5_url={c4.url}spiece.model"), "T5", "sha256")


@pytest.mark.parametrize("shards", ["5-2", "1024", "x", "1,1", ""])
def test_bad_shard_ranges_are_one_line(tmp_path, shards):
    one_line(prepare("c4", f"--out={tmp_path / 'out'}", f"--train_shards={shards}"), "--train_shards")
