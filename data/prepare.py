"""Text -> token shards: train_000000.bin, ..., val_000000.bin, ..., tokenizer.model, token_counts.npy, meta.json.

    python data/prepare.py python --out=data/python            # the source of Python's standard library: no network
    python data/prepare.py files a.json.gz b.jsonl c.txt --out=data/mine --tokenizer=train:4096 --layout=stream
    python data/prepare.py c4 --out=data/c4 --train_shards=0-28     # the paper's: T5's tokenizer, rows of 256 tokens
    python data/prepare.py mnist --out=data/mnist                   # no text: the four files of MNIST, for mnist.py

A .bin is llm.c's format: 256 int32 of header (magic, version, number of tokens), then the tokens as uint16. meta.json
says "complete": true last of all; before that, the same command again keeps the finished shards and goes on. Documents
keep their order; tokenizing uses all cores.
"""
import argparse
import gzip
import hashlib
import http.client
import io
import itertools
import json
import os
import ssl
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import sentencepiece
import tiktoken

MAGIC, VERSION, HEADER = 20240520, 1, 256
C4 = "https://huggingface.co/datasets/allenai/c4/resolve/main/en/"
C4_FILES = {"train": 1024, "val": 8}
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
T5 = "https://huggingface.co/google-t5/t5-base/resolve/main/spiece.model"
T5_SHA256 = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
MNIST_FILES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
TRAIN_TEXT = 10_000_000  # characters of training text that train:N looks at


def fail(message):
    sys.exit(f"prepare.py: {message}")


# ---- documents ------------------------------------------------------------------------------------------------------

def read_documents(path):
    """The documents of a local file: JSON lines with a "text" field, or .txt, where a blank line ends a document;
    either may be gzip'd. Yields str."""
    name = path.name.removesuffix(".gz")
    if not name.endswith((".json", ".jsonl", ".txt")):
        fail(f"{path}: expected .json, .jsonl or .txt, or one of them gzip'd")
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="\n") as lines:
            paragraph, size = [], 0
            for number, line in enumerate(lines, 1):
                if not name.endswith(".txt"):
                    if line.strip():
                        yield json_text(path, number, line)
                elif line.strip() and size < 100_000:  # a file without blank lines is no endless document
                    paragraph.append(line)
                    size += len(line)
                else:
                    yield "".join(paragraph)
                    paragraph, size = [line] if line.strip() else [], 0
            yield "".join(paragraph)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        fail(f"{path}: damaged gzip after line {number} ({e}): delete it and get it again")
    except UnicodeDecodeError:
        fail(f"{path}: not UTF-8 text after line {number}: convert it or leave it out")
    except OSError as e:
        fail(f"{path}: {e.strerror or e}")


def json_text(path, number, line):
    try:
        text = json.loads(line)["text"]
        text.encode()  # a lone surrogate is valid JSON and no text
        return text
    except json.JSONDecodeError as e:
        problem = f"not JSON ({e.msg})"
    except KeyError:
        problem = 'no field "text"'
    except UnicodeEncodeError:
        problem = '"text" holds a lone surrogate'
    except (TypeError, AttributeError):
        problem = '"text" is not a string'
    except (ValueError, RecursionError) as e:  # numbers or nesting beyond all measure
        problem = f"not JSON that can be read ({type(e).__name__})"
    fail(f"{path} line {number}: {problem}: mend or remove the line")


def python_files(limit):
    """Python's standard library, up to `limit` characters, without its tests and what differs from build to build: in
    the order of the hashes of the paths, so that the cap takes from all of it alike."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")
             if not skip & set(path.relative_to(root).parts) and path.is_file() and not path.is_symlink()
             and not path.name.startswith("_sysconfig") and not path.parent.name.startswith("config-")}
    if not paths:
        fail(f"no Python source in {root}: use a Python that has it, or `prepare.py files` with other text")
    for name in sorted(paths, key=lambda n: hashlib.sha256(n.encode()).digest()):
        text = paths[name].read_text(encoding="utf-8", errors="replace")
        limit -= len(text)
        if limit < 0:
            return
        yield text


def split_by_hash(documents, fraction):
    """("train" or "val", text): by the text's own hash, so that equal documents fall on the same side."""
    for text in documents:
        h = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        yield ("val" if h < fraction * 2**64 else "train"), text


def documents(args):
    """(split, text) for each document that is not blank, always in the same order."""
    if args.source == "c4":
        pairs = ((split, text) for split in ("val", "train") for path in c4_files(args, split)
                 for text in read_documents(path))
    elif args.source == "files":
        pairs = split_by_hash((text for path in args.paths for text in read_documents(path)), args.val_fraction)
    else:
        pairs = split_by_hash(python_files(args.max_chars), args.val_fraction)
    return ((split, text) for split, text in pairs if text.strip())


# ---- downloads ------------------------------------------------------------------------------------------------------

def c4_files(args, split):
    """The wanted files of C4, downloaded where they are not there yet."""
    total = C4_FILES[split]
    for i in args.train_shards if split == "train" else args.val_shards:
        name = f"c4-{'train' if split == 'train' else 'validation'}.{i:05d}-of-{total:05d}.json.gz"
        yield download(args.url + name, args.downloads / name, check_gzip, args.tries)


def check_gzip(path):
    try:
        with gzip.open(path) as f:
            while f.read(1 << 20):
                pass
    except (EOFError, OSError, zlib.error) as e:
        return f"not a valid gzip file ({e})"


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_t5(path):
    if file_sha256(path) != T5_SHA256:
        return "not T5's spiece.model (its sha256 differs)"


def download(url, path, check, tries):
    """url -> path: continues a broken download, checks size and content, and only then gives the file its name.
    Gives up after `tries` in a row without a new byte."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        try:
            size = fetch(url, part, have)
            if size is None or part.stat().st_size == size:
                break
            problem = f"the server promised {size:,} bytes and sent {part.stat().st_size:,}"
        except urllib.error.HTTPError as e:
            problem = f"HTTP {e.code} {e.reason}"
            if e.code == 416 and have:  # nothing after `have`: complete already, or not this file's beginning
                if e.headers.get("Content-Range") == f"bytes */{have}":
                    break
                part.unlink()
            elif e.code < 500 and e.code != 429:
                fail(f"{url}: {problem}: check the name, or fetch the file by hand and put it at {path}")
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as e:
            problem = str(getattr(e, "reason", e)) or type(e).__name__
        except ValueError as e:
            fail(f"{url}: {e}: check the address")
        failures = 0 if part.exists() and part.stat().st_size > have else failures + 1
        if failures >= tries:
            fail(f"{url}: {problem}: tried {tries} times; run this again when the network is back (it goes on where it "
                 f"stopped), or fetch the file by hand and put it at {path}")
        print(f"{path.name}: {problem}; trying again", flush=True)
        time.sleep(min(30, 2**failures / 4))
    problem = check(part)
    if problem:
        part.unlink()
        fail(f"{url}: what came is {problem}; it was deleted: run this again, or fetch the file by hand to {path}")
    os.replace(part, path)
    return path


def fetch(url, part, have):
    """Append what is missing to `part`, from byte `have` on. Returns the size that the whole file should have."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        have = have if response.status == 206 else 0  # a server that knows no ranges sends it all
        length = response.headers.get("Content-Length")
        size = have + int(length) if length else None
        told = time.time()
        with open(part, "ab" if have else "wb") as f:
            while chunk := response.read(1 << 18):
                f.write(chunk)
                if time.time() - told > 2:
                    told = time.time()
                    share = f" of {size / 1e6:,.0f} MB ({f.tell() / size:.0%})" if size else " MB"
                    print(f"{part.stem}: {f.tell() / 1e6:,.0f}{share}", flush=True)
    return size


# ---- tokenizers -----------------------------------------------------------------------------------------------------

class Tokenizer:
    """A SentencePiece model in memory, or tiktoken's gpt2. encode() takes a list of documents and keeps its order."""

    def __init__(self, name, model=None):
        threads = os.cpu_count()
        if model is None:
            try:
                encoding = tiktoken.get_encoding(name)
            except Exception as e:  # whatever its HTTP library raises
                fail(f"tiktoken could not get the encoding {name} ({type(e).__name__}): connect once, or set "
                     f"TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=train:N or a .model file")
            self.vocab_size, self.eos_id, self.pad_id = encoding.n_vocab, encoding.eot_token, -1
            ranks = encoding._mergeable_ranks
            self.sha256 = hashlib.sha256(b"".join(sorted(ranks, key=ranks.get))).hexdigest()
            self.name = name
            self.encode = lambda texts: encoding.encode_ordinary_batch(texts, num_threads=threads)
        else:
            try:
                sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            except RuntimeError:
                fail(f"{name} is not a SentencePiece model: give a .model file")
            self.vocab_size, self.eos_id, self.pad_id = sp.vocab_size(), sp.eos_id(), sp.pad_id()
            self.sha256 = hashlib.sha256(model).hexdigest()
            self.name = "tokenizer.model"
            self.encode = lambda texts: sp.encode(texts, num_threads=threads)
        if self.eos_id < 0:
            fail(f"{name} has no end-of-sequence piece, which ends each document: choose another tokenizer")


def tokenizer_model(args):
    """The bytes of the SentencePiece model asked for."""
    if args.tokenizer == "t5":
        path = download(args.t5_url, args.downloads / "spiece.model", check_t5, args.tries)
        if problem := check_t5(path):  # it may have been put there by hand
            fail(f"{path} is {problem}: delete it")
    elif args.tokenizer.startswith("train:"):
        return train_tokenizer(args)
    else:
        path = Path(args.tokenizer)
    try:
        return path.read_bytes()
    except OSError as e:
        fail(f"--tokenizer={args.tokenizer}: {e.strerror}: give t5, gpt2, train:N or a SentencePiece .model file")


def train_tokenizer(args):
    """A BPE of N pieces on the beginning of the training text. Lossless: white space is kept, a newline is a piece, and
    what the pieces cannot spell is spelt in bytes."""
    try:
        pieces = int(args.tokenizer.removeprefix("train:"))
    except ValueError:
        fail(f"--tokenizer={args.tokenizer}: N must be a whole number, for instance train:4096")
    print(f"training a tokenizer of {pieces:,} pieces", flush=True)

    def lines():
        left = TRAIN_TEXT
        for split, text in documents(args):
            if split == "train":
                yield from text.split("\n")
                left -= len(text)
                if left < 0:
                    return
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, model_type="bpe", vocab_size=pieces, minloglevel=2,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, user_defined_symbols=["\n"], byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, max_sentence_length=1 << 30)
    except RuntimeError as e:
        fail(f"--tokenizer={args.tokenizer}: SentencePiece refused ({' '.join(str(e).split())}): "
             f"choose another N, or give it more text")
    return model.getvalue()


# ---- shards ---------------------------------------------------------------------------------------------------------

def write(path, data):
    """All of `data`, or what was there before: never half of it."""
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


class ShardWriter:
    """The shards of one split, each of about shard_chars characters; one that is there is skipped, not made again."""

    def __init__(self, args, split, tokenizer):
        self.args, self.split, self.tokenizer = args, split, tokenizer
        self.docs, self.shards, self.room, self.texts, self.file = 0, 0, 0, [], None

    def add(self, text):
        if self.room <= 0:
            self.close()
            self.path = self.args.out / f"{self.split}_{self.shards:06d}.bin"
            self.room, self.kept = self.args.shard_chars, self.path.exists()
            self.shards += 1
        self.docs += 1
        self.room -= max(len(text), self.args.seq_len)
        if not self.kept:
            self.texts.append(text)
        if len(self.texts) == 2048:
            self.flush()

    def flush(self):
        """Tokenize the waiting documents into the open shard."""
        if self.file is None:
            self.file = open(self.path.with_name(self.path.name + ".tmp"), "wb")
            self.file.write(bytes(4 * HEADER))
        t, T = self.tokenizer, self.args.seq_len
        encoded = t.encode(self.texts)
        if self.args.layout == "rows":
            rows = np.full((len(encoded), T), self.args.pad_id, dtype=np.uint16)
            for row, ids in zip(rows, encoded):
                ids = ids[:T - 1] + [t.eos_id]
                row[:len(ids)] = ids
            self.file.write(rows.tobytes())
        else:
            flat = itertools.chain.from_iterable((*ids, t.eos_id) for ids in encoded)
            self.file.write(np.fromiter(flat, dtype=np.uint16).tobytes())
        self.texts = []

    def abandon(self):
        if self.file is not None:
            self.file.close()
            os.unlink(self.file.name)

    def close(self):
        """Finish the open shard: the header, then its name."""
        if self.texts:
            self.flush()
        if self.file is None:
            return
        header = np.zeros(HEADER, dtype="<i4")
        header[:3] = MAGIC, VERSION, (self.file.tell() - 4 * HEADER) // 2
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.file.name, self.path)
        self.file = None


def count_tokens(paths, vocab_size):
    """How often each token occurs, int64 [vocab_size]; piece by piece, as bincount makes its input int64."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for path in paths:
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER)
        for i in range(0, len(tokens), 1 << 22):
            counts += np.bincount(tokens[i:i + (1 << 22)], minlength=vocab_size)
    return counts


def begin(args, settings):
    """The tokenizer for a new data directory or for one that the same command left half done; None if it is complete.
    Fails if the directory belongs to something else."""
    meta, kept, shards = args.out / "meta.json", args.out / "tokenizer.model", any(args.out.glob("*.bin"))
    old = None
    if meta.exists():
        try:
            old = json.loads(meta.read_text())
            complete, same = old["complete"], old["settings"] == settings
        except (ValueError, KeyError, TypeError):
            fail(f"{meta} is broken, or not of prepare.py: choose another --out")
        if not same and (shards or complete):
            fail(f"{args.out} was prepared with other settings or files ({meta}): choose another --out, or delete it")
        if complete:
            return None
    elif shards:
        fail(f"{args.out} holds shards but no meta.json: choose another --out, or delete it")
    if args.tokenizer == "gpt2":
        tokenizer = Tokenizer("gpt2")
    elif old and same:
        tokenizer = Tokenizer(args.tokenizer, kept.read_bytes())
    else:
        model = tokenizer_model(args)
        tokenizer = Tokenizer(args.tokenizer, model)
        if kept.exists() and not old and kept.read_bytes() != model:
            fail(f"{kept} is there already, and another one: choose another --out")
        args.out.mkdir(parents=True, exist_ok=True)
        write(kept, model)
    args.out.mkdir(parents=True, exist_ok=True)
    write(meta, json.dumps({"complete": False, "settings": settings}, indent=1).encode())
    return tokenizer


def prepare(args):
    apart = ("out", "downloads", "url", "t5_url", "paths", "tries")  # where things lie, not what they are
    settings = {k: v for k, v in vars(args).items() if k not in apart}
    if args.source == "files":
        for path in args.paths:
            if not path.is_file():
                fail(f"no file {path}: give .json.gz, .jsonl or .txt files")
        settings["files"] = [[path.name, file_sha256(path)] for path in args.paths]
    if args.source == "python":
        settings["python"] = sys.version.split()[0]
    t = begin(args, settings)
    if t is None:
        print(f"{args.out} is ready: nothing to do")
        return
    vocab_size, args.pad_id = t.vocab_size, t.pad_id
    if args.layout == "rows" and t.pad_id < 0:  # no piece for padding: one more id
        args.pad_id, vocab_size = vocab_size, vocab_size + 1
    if vocab_size > 65536:
        fail(f"--tokenizer={args.tokenizer} has {vocab_size:,} pieces; uint16 shards hold 65,536 at most")
    writers = {split: ShardWriter(args, split, t) for split in ("train", "val")}
    told = time.time()
    try:
        for split, text in documents(args):
            writers[split].add(text)
            if time.time() - told > 5:
                told = time.time()
                print("tokenizing: " + ", ".join(f"{w.docs:,} {split}" for split, w in writers.items()) + " documents",
                      flush=True)
        for split, writer in writers.items():
            if not writer.docs:
                fail(f"no documents for {split}: give it more text, or another --val_fraction")
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()

    # All figures are read back from the shards, whichever run made them.
    shards = {split: sorted(args.out.glob(f"{split}_*.bin")) for split in writers}
    counts = {split: count_tokens(paths, vocab_size) for split, paths in shards.items()}
    tokens = {split: int(c.sum()) for split, c in counts.items()}
    padding = int(counts["train"][args.pad_id]) if args.layout == "rows" else 0
    meta = {"complete": True, "vocab_size": vocab_size, "layout": args.layout, "seq_len": args.seq_len,
            "pad_id": args.pad_id, "eos_id": t.eos_id, "tokenizer": t.name, "tokenizer_sha256": t.sha256,
            "shards": {split: len(paths) for split, paths in shards.items()},
            "documents": {split: w.docs for split, w in writers.items()}, "tokens": tokens,
            "padding_share": padding / tokens["train"], "settings": settings}
    counts["train"][args.pad_id] -= padding
    buffer = io.BytesIO()
    np.save(buffer, counts["train"])
    write(args.out / "token_counts.npy", buffer.getvalue())  # of the training set, for the frequency groups
    write(args.out / "meta.json", json.dumps(meta, indent=1).encode())
    print(f"{args.out}: {tokens['train']:,} training tokens, {meta['padding_share']:.0%} of them padding; "
          f"{tokens['val']:,} for validation; vocabulary {vocab_size:,}")


# ---- command line ---------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        print(f"prepare.py: {message}; see data/prepare.py --help", file=sys.stderr)
        sys.exit(2)


def ranges(limit):
    """"0-2,7" -> [0, 1, 2, 7], each below `limit`."""
    def parse(text):
        numbers = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
        if not numbers or max(numbers) >= limit or len(set(numbers)) < len(numbers):
            raise argparse.ArgumentTypeError(f"{text}: expected different numbers from 0 to {limit - 1}, like 0-9,12")
        return numbers
    parse.__name__ = "list of shards"
    return parse


def number(kind, low, high):
    """A whole or real number in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {high:g}]")
        return value
    parse.__name__ = kind.__name__
    return parse


def main():
    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = top.add_subparsers(dest="source", required=True, metavar="python|files|c4|mnist")
    for source, tokenizer, layout, seq_len in (("python", "train:4096", "stream", 128),
                                               ("files", "train:4096", "stream", 128), ("c4", "t5", "rows", 256)):
        p = sources.add_parser(source, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("--out", type=Path, required=True, help="data directory to make")
        p.add_argument("--tokenizer", default=tokenizer, help="t5, gpt2, train:N or a SentencePiece .model file")
        p.add_argument("--layout", choices=("rows", "stream"), default=layout, help="a document a row, or end to end")
        p.add_argument("--seq_len", type=number(int, 2, 65536), default=seq_len, help="tokens of a sequence")
        p.add_argument("--shard_chars", type=number(int, 1, 4e8), default=400_000_000, help="text of a .bin file")
        p.add_argument("--downloads", type=Path, help="folder for downloaded files (default: OUT/downloads)")
        p.add_argument("--tries", type=number(int, 1, 1e9), default=8, help="of a download, without a new byte")
        p.add_argument("--t5_url", default=T5, help="where t5's spiece.model is")
        if source == "c4":
            p.add_argument("--train_shards", type=ranges(C4_FILES["train"]), default="0-28", help="of 0-1023")
            p.add_argument("--val_shards", type=ranges(C4_FILES["val"]), default="0", help="of 0-7")
            p.add_argument("--url", default=C4, help="where the files are: a mirror")
        else:
            p.add_argument("--val_fraction", type=number(float, 0, 1), default=0.05, help="of the documents")
        if source == "files":
            p.add_argument("paths", type=Path, nargs="+", metavar="FILE", help=".json, .jsonl or .txt, or gzip'd")
        if source == "python":
            p.add_argument("--max_chars", type=number(int, 1, 1e12), default=10_000_000, help="cap on the text")
    p = sources.add_parser("mnist", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder for the files")
    p.add_argument("--url", default=MNIST, help="where the files are: a mirror")
    p.add_argument("--tries", type=number(int, 1, 1e9), default=8, help="of a download, without a new byte")
    args = top.parse_args()
    try:
        if args.source == "mnist":
            for name in MNIST_FILES:
                download(args.url + name, args.out / name, check_gzip, args.tries)
            return
        args.downloads = args.downloads or args.out / "downloads"
        prepare(args)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on where it was")
    except OSError as e:  # a full disk, a folder that may not be written
        fail(f"{e.filename or args.out}: {e.strerror or e}; the same command goes on where it was")


if __name__ == "__main__":
    main()
