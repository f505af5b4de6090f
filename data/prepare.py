"""Text to token shards: train_000000.bin, ..., val_000000.bin, ..., tokenizer.model, meta.json.

    python data/prepare.py python --out=data/python   # Python's standard library, no network
    python data/prepare.py packages --out=data/packages  # that of what requirements.txt pins
    python data/prepare.py files a.json.gz b.txt --out=data/mine --tokenizer=train:4096
    python data/prepare.py c4 --out=data/c4 --train_shards=0-28    # as in Glentis et al. 2026
    python data/prepare.py mnist --out=data/mnist     # no text: MNIST's four files

A .bin is in llm.c's format: 256 int32 of header (magic, version, number of tokens), then uint16
tokens. meta.json says "complete": true last of all; until then, run the same command again to keep
the finished shards and continue. A second process waits for the first. Downloads are
huggingface_hub's, with its cache, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE; a file in OUT/downloads is
used instead. Each C4 file becomes one shard and can be deleted afterwards. More --train_shards than
before extend the directory; no run can start on it until that is complete.
"""
import argparse
import fcntl
import gzip
import hashlib
import importlib.metadata
import io
import json
import os
import re
import sys
import zlib
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from urllib.request import urlopen

import huggingface_hub as hub
import numpy as np
import sentencepiece
import tiktoken

T5_SHA256 = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
LONG = 100_000  # characters; a longer document of a file is several
REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"


def fail(message):
    sys.exit(f"prepare.py: {message}")


def write(path, data):
    """Write all of the data, or leave the file as it was."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def lock(folder):
    """Make the folder and lock it until this process ends. Waits if another has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file = os.open(folder / "lock", os.O_CREAT | os.O_WRONLY)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another prepare.py is at work in {folder}: waiting for it", flush=True)
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks, or for reading only
        pass


def read_documents(path):
    """Yield the "text" of each line of JSON, or the paragraphs of a .txt; gzipped or not."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in (".json", ".jsonl", ".txt"):
        fail(f"{path}: expected .json, .jsonl or .txt, or one of them gzipped")
    opener = gzip.open if path.suffix == ".gz" else open
    number, paragraph = 0, ""
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as lines:  # drops a BOM
            for number, line in enumerate(lines, 1):
                if kind == ".txt" and line.strip() and len(paragraph) + len(line) < LONG:
                    paragraph += line
                elif kind == ".txt":  # the paragraph ends
                    yield paragraph
                    paragraph = "" if line.isspace() else line
                elif not line.isspace():
                    text = json.loads(line)["text"]
                    text.encode()  # fails for a lone surrogate, which JSON allows
                    yield text
        yield paragraph
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as e:
        fail(f"{path}: damaged gzip or not UTF-8 after line {number} ({e}): replace or convert it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        fail(f'{path} line {number}: not JSON with a string "text" ({e}): correct the file')


def library_files():
    """{name: path} of Python's standard library, without its tests and what differs between
    builds."""
    root = Path(os.__file__).parent
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    paths = {path.relative_to(root): path for path in root.rglob("*.py")}
    return {name.as_posix(): path for name, path in paths.items()
            if path.is_file() and not path.is_symlink() and not skip & set(name.parts)
            and not path.name.startswith("_sysconfig")
            and not path.parent.name.startswith("config-")}


def packages():
    """The names of the packages that requirements.txt pins, in order."""
    return re.findall(r"^([\w-]+)==", REQUIREMENTS.read_text(), re.MULTILINE)


def package_files():
    """{name: path} of these packages, without what a build writes: torch for CUDA has the same."""
    skip = {"version.py", "_version.py", "__config__.py"}
    return {str(file): file.locate() for package in packages()
            for file in importlib.metadata.files(package) or ()
            if file.suffix == ".py" and file.name not in skip and file.locate().is_file()}


def source_code(files, limit):
    """Yield the text of {name: path}, up to `limit` characters, in the order of the names' hashes:
    a sample of all of it."""
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = files[name].read_text(encoding="utf-8", errors="replace")
        limit -= len(text)
        if limit < 0:
            return
        yield text


def cut(text):
    """A document, or a long one as several of equal length."""
    n = len(text) // LONG + 1
    return [text[len(text) * i // n:len(text) * (i + 1) // n] for i in range(n)]


def documents(args, split, numbers=None):
    """Yield the documents of a split that are not blank, in a fixed order; of C4 also those of the
    files with these numbers alone."""
    if args.source == "c4":
        name = "train.{:05d}-of-01024" if split == "train" else "validation.{:05d}-of-00008"
        for i in numbers or getattr(args, f"{split}_shards"):
            path = hub_file(args, "dataset", "allenai/c4", f"en/c4-{name.format(i)}.json.gz")
            yield from filter(str.strip, read_documents(path))
        return
    if args.source == "files":
        texts = chain.from_iterable(cut(t) for path in args.paths for t in read_documents(path))
    else:
        files = library_files() if args.source == "python" else package_files()
        texts = source_code(files, args.max_chars)
    for text in filter(str.strip, texts):
        # Split by the text's own hash, so that equal documents are on the same side.
        h = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        if (h < args.val_fraction * 2**64 or text == args.val_text) == (split == "val"):
            yield text


def hub_file(args, repo_type, repo, filename):
    """The path of a file of the Hugging Face hub: put by hand, or in its cache, or downloaded."""
    by_hand = args.downloads / Path(filename).name
    if by_hand.exists():
        return by_hand
    cached = hub.try_to_load_from_cache(repo, filename, repo_type=repo_type)
    if isinstance(cached, str):
        return Path(cached)
    print(f"downloading {filename} of {repo}", flush=True)
    hub.logging.set_verbosity_error()  # no warning for each retry
    try:
        # Without a network this fails at once, where hf_hub_download would try for long.
        hub.get_session().head(hub.constants.ENDPOINT, timeout=10)
        return Path(hub.hf_hub_download(repo, filename, repo_type=repo_type))
    except Exception as e:  # a download fails in many ways
        reason = str(e.__cause__ or e).strip() or type(e).__name__
        fail(f"cannot download {filename} of {repo} ({reason.splitlines()[0]}): connect and run "
             f"this again, set HF_ENDPOINT to a mirror, or put the file at {by_hand}")


def mnist(args):
    """Download MNIST's four files, each of them whole or not at all; one that exists is kept."""
    lock(args.out)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        path = args.out / f"{name}-ubyte.gz"
        if path.exists():
            continue
        try:
            data = urlopen(args.url + path.name, timeout=60).read()
            gzip.decompress(data)
        except Exception as e:  # as above
            fail(f"cannot download {args.url}{path.name} ({e}): connect and run this again, "
                 f"choose a mirror with --url, or put the file at {path}")
        write(path, data)


def tokenizer_model(args):
    """The bytes of the SentencePiece model that --tokenizer asks for; None for gpt2."""
    if args.tokenizer == "gpt2":
        return None
    if args.tokenizer == "t5":
        path = hub_file(args, "model", "google-t5/t5-base", "spiece.model")
        if hashlib.sha256(path.read_bytes()).hexdigest() != T5_SHA256:
            fail(f"{path} is not T5's spiece.model (its sha256 differs): put the right one at "
                 f"{args.downloads / path.name}")
        return path.read_bytes()
    if not args.tokenizer.startswith("train:"):
        return Path(args.tokenizer).read_bytes()

    # A BPE of N pieces, trained on the beginning of the training text. White space is kept, a
    # newline is a piece, and what the pieces cannot spell is spelled in bytes: it is lossless, but
    # for U+2581, which is SentencePiece's own sign for a space and comes back as a space.
    pieces = int(args.tokenizer.removeprefix("train:"))
    if not 262 <= pieces <= 65536:
        raise ValueError("N must be from 262 to 65536")
    print(f"training a tokenizer of {pieces:,} pieces", flush=True)
    text = ""
    for document in documents(args, "train"):
        text += document + "\n"
        if len(text) > 10_000_000:
            break
    # At most half of the pieces are characters, of which Chinese has many: a rarer one ends a line.
    rare = Counter(text).most_common()[(pieces - 260) // 2:]
    lines = text.translate({ord(c): "\n" for c, _ in rare}).split("\n")
    # A space is a piece even where it is rare.
    more = {"required_chars": "\u2581"} if text.count(" ") < len(text) / 1000 else {}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=pieces,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, user_defined_symbols=["\n"], byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, minloglevel=2,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        max_sentence_length=1 << 30, **more)
    return model.getvalue()


class Tokenizer:
    """A SentencePiece model, given as bytes, or tiktoken's encoding of that name."""

    def __init__(self, name, model=None):
        if model is not None:
            sp = sentencepiece.SentencePieceProcessor()
            sp.LoadFromSerializedProto(model)
            self.encode = sp.encode
            self.vocab_size, self.eos_id, self.pad_id = sp.vocab_size(), sp.eos_id(), sp.pad_id()
            self.name, self.sha256 = "tokenizer.model", hashlib.sha256(model).hexdigest()
        else:
            bpe = tiktoken.get_encoding(name)
            self.encode = bpe.encode_ordinary_batch
            self.vocab_size, self.eos_id, self.pad_id = bpe.n_vocab, bpe.eot_token, -1
            self.name, self.sha256 = name, None


def in_shards(texts, args):
    """Yield lists of texts, one per shard, of about shard_chars characters each."""
    shard, room = [], args.shard_chars
    for text in texts:
        shard.append(text)
        room -= max(len(text), args.seq_len)
        if room <= 0:
            yield shard
            shard, room = [], args.shard_chars
    if shard:
        yield shard


def write_shard(path, texts, t, args):
    """Tokenize texts with tokenizer t and write them as a .bin, unless that is there."""
    if path.exists():
        return
    texts, data, count, odd = iter(texts), bytearray(1024), 0, False
    while some := list(islice(texts, 2048)):
        count += len(some)
        odd |= t.name == "tokenizer.model" and any("\u2581" in text for text in some)
        encoded = t.encode(some)
        if args.layout == "rows":  # a row per document, cut or padded, eos included
            tokens = np.full((len(encoded), args.seq_len), t.pad_id, dtype="<u2")
            for row, ids in zip(tokens, encoded):
                ids = ids[:args.seq_len - 1] + [t.eos_id]
                row[:len(ids)] = ids
        else:  # end to end, an eos after each
            flat = chain.from_iterable((*ids, t.eos_id) for ids in encoded)
            tokens = np.fromiter(flat, dtype="<u2")
        data += tokens.tobytes()
        if len(data) >= 2**32:  # the header counts the tokens in an int32
            fail(f"{path} would have 2^31 tokens or more: lower --seq_len, or --layout=stream")
    if not count:
        fail(f"no documents for {path}: replace the file that it is made of")
    data[:12] = np.array([20240520, 1, len(data) // 2 - 512], dtype="<i4").tobytes()
    write(path, data)
    print(f"{path.name}: {count:,} documents", flush=True)
    if odd:
        print(f"{path.name}: U+2581 in the text becomes a space, for which SentencePiece uses it")


def prepare(args):
    """Make the data directory args.out, or finish it."""
    # The settings say what the data is made of, not where that lies.
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "downloads", "paths")}
    if args.source == "python":
        settings["python"] = sys.version.split()[0]
    if args.source == "packages":  # without what names a build, as in 2.13.0+cpu
        settings["packages"] = {name: importlib.metadata.version(name).split("+")[0]
                                for name in packages()}
    if args.source == "files":
        digests = [hashlib.file_digest(open(path, "rb"), "sha256") for path in args.paths]
        settings["files"] = [[p.name, d.hexdigest()] for p, d in zip(args.paths, digests)]
    if args.tokenizer not in ("t5", "gpt2") and Path(args.tokenizer).is_file():
        settings["tokenizer"] = hashlib.sha256(Path(args.tokenizer).read_bytes()).hexdigest()

    lock(args.out)
    # A directory with the same settings is finished, one with other data is left alone.
    meta_path, model_path = args.out / "meta.json", args.out / "tokenizer.model"
    try:
        old = json.loads(meta_path.read_text())
        before = dict(old["settings"])
    except (OSError, ValueError, TypeError, KeyError):
        old, before = {}, {}  # none, or not ours
    differ = {k for k in {*settings, *before} if settings.get(k) != before.get(k)}
    extends = differ == {"train_shards"} and set(before["train_shards"]) < set(args.train_shards)
    ours = before and (not differ or extends)
    if old.get("complete") and differ <= {"python", "packages"}:
        notes = {"python": f"the library of Python {before.get('python')}, this is "
                           f"{settings.get('python')}",
                 "packages": "other versions of the packages than are installed here"}
        print(f"{args.out} is ready" + ("".join(f"; its text is {notes[k]}" for k in differ)
                                        or ": nothing to do"))
        return
    begun = any(args.out.glob("*.bin"))
    foreign = not old and (meta_path.exists() or model_path.exists())
    if not ours and (begun or foreign or old.get("complete")):
        fail(f"{args.out} holds data of other settings or files: choose another --out")

    args.val_text = None
    if not (begun and args.source == "c4"):  # whose first files may be gone
        if not any(documents(args, "val")):  # there are few: the longest is for validation
            args.val_text = max(documents(args, "train"), key=len, default=None)
        if not any(documents(args, "train")):
            fail("no documents for training: give it more text, or another --val_fraction")
    try:
        model = model_path.read_bytes() if ours and model_path.exists() else tokenizer_model(args)
        t = Tokenizer(args.tokenizer, model)
    except (OSError, ValueError, RuntimeError) as e:
        fail(f"--tokenizer={args.tokenizer}: {' '.join(str(e).split())}: give t5, gpt2 (from a "
             "network or TIKTOKEN_CACHE_DIR), a SentencePiece .model, train:N (N to suit the text)")
    if args.layout == "rows" and t.pad_id < 0:  # no piece for padding: one more id
        t.pad_id, t.vocab_size = t.vocab_size, t.vocab_size + 1
    if t.eos_id < 0 or t.vocab_size > 65536:
        fail(f"--tokenizer={args.tokenizer}: needs an end-of-sequence piece, at most 65,536 pieces")
    if not ours:  # a tokenizer of other settings, whose data was never begun
        model_path.unlink(missing_ok=True)
    write(meta_path, json.dumps({"complete": False, "settings": settings}, indent=1).encode())
    if model is not None:
        write(model_path, model)

    for split in ("val", "train"):
        shards = enumerate(in_shards(documents(args, split), args))
        if args.source == "c4":  # a file each, read only if its shard is not there
            numbers = getattr(args, f"{split}_shards")
            shards = ((number, documents(args, split, [number])) for number in numbers)
        for number, texts in shards:
            write_shard(args.out / f"{split}_{number:06d}.bin", texts, t, args)
    meta = {"complete": True, "vocab_size": t.vocab_size, "layout": args.layout,
            "seq_len": args.seq_len, "pad_id": t.pad_id, "eos_id": t.eos_id,
            "tokenizer": t.name, "tokenizer_sha256": t.sha256,
            "shards": {"train": 0, "val": 0}, "documents": {"train": 0, "val": 0},
            "tokens": {"train": 0, "val": 0}, "padding_share": 0.0, "settings": settings}
    for split in ("val", "train"):
        counts = np.zeros(t.vocab_size, dtype=np.int64)  # how often each token occurs
        for path in args.out.glob(f"{split}_*.bin"):
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024)
            for i in range(0, len(tokens), 1 << 22):  # in pieces, which bincount copies to int64
                counts += np.bincount(tokens[i:i + (1 << 22)], minlength=t.vocab_size)
            meta["shards"][split] += 1
            meta["tokens"][split] += len(tokens)
        meta["documents"][split] = (meta["tokens"][split] // args.seq_len if args.layout == "rows"
                                    else int(counts[t.eos_id]))
    # The last counts are those of the training set. Padding does not count.
    padding = int(counts[t.pad_id]) if args.layout == "rows" else 0
    meta["padding_share"] = padding / meta["tokens"]["train"]
    counts[t.pad_id] -= padding
    np.save(npy := io.BytesIO(), counts)
    write(args.out / "token_counts.npy", npy.getvalue())
    write(meta_path, json.dumps(meta, indent=1).encode())
    print(f"{args.out}: {meta['tokens']['train']:,} training tokens, {meta['padding_share']:.0%} "
          f"padding; {meta['tokens']['val']:,} for validation; vocabulary {t.vocab_size:,}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"prepare.py: {message}; see data/prepare.py --help\n")


def shard_list(text):
    """The numbers that text such as 0-2,7 lists."""
    numbers = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        those = range(int(first), int(last if dash else first) + 1)
        if not those:
            raise ValueError
        numbers += those
    if max(numbers) > 1023 or len(set(numbers)) < len(numbers):
        raise ValueError
    return sorted(numbers)


def main():
    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = top.add_subparsers(dest="source", required=True)
    for source in ("python", "packages", "files", "c4", "mnist"):
        p = sources.add_parser(source, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add = p.add_argument
        add("--out", type=Path, required=True, help="the directory to make")
        if source == "mnist":
            add("--url", default=MNIST_URL, help="where the files are downloaded from")
            continue
        add("--tokenizer", default="train:4096", help="t5, gpt2, train:N or a .model file")
        add("--layout", choices=["rows", "stream"], default="stream", help="of the documents")
        add("--seq_len", type=int, default=128, help="tokens per sequence")
        add("--downloads", type=Path, help="folder of manual downloads [OUT/downloads]")
        if source == "c4":
            add("--train_shards", type=shard_list, default="0-28", help="of 0-1023, like 0-9,12")
            add("--val_shards", type=shard_list, default="0", help="of 0-7")
            p.set_defaults(tokenizer="t5", layout="rows", seq_len=256)
        else:
            add("--shard_chars", type=int, default=400_000_000, help="characters per .bin")
            add("--val_fraction", type=float, default=0.05, help="of the documents")
        if source == "files":
            add("paths", type=Path, nargs="+", metavar="FILE", help=".json, .jsonl, .txt; or .gz")
        if source in ("python", "packages"):
            limit = 10_000_000 if source == "python" else 100_000_000
            add("--max_chars", type=int, default=limit, help="characters at most")
    args = top.parse_args()
    limits = {"seq_len": (2, 65536), "shard_chars": (1, 400_000_000), "val_fraction": (0, 1),
              "max_chars": (1, 10**12)}
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name, low) <= high:
            top.error(f"--{name} must be from {low} to {high}")
    if max(getattr(args, "val_shards", [0])) > 7:
        top.error("--val_shards: C4 has 0 to 7")
    try:
        if args.source == "mnist":
            return mnist(args)
        args.downloads = args.downloads or args.out / "downloads"
        prepare(args)
    except KeyboardInterrupt:
        fail("stopped: run the same command again to continue")
    except importlib.metadata.PackageNotFoundError as e:
        fail(f"the package {e.name} is not installed: pip install -r requirements.txt")
    except OSError as e:  # a missing file, a full disk, a folder that cannot be written
        fail(f"{e.filename or args.out}: {e.strerror or e}: mend it and run the command again")


if __name__ == "__main__":
    main()
