import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are of a CPU: bit for bit, two processes, fp32
os.environ["OMP_NUM_THREADS"] = "1"  # they are small and run side by side, and threads that wait for a core take it

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TINY = {"batch_size": 8, "steps": 12, "eval_every": 6, "eval_tokens": 500, "log_every": 3, "save_every": 4, "compile": "false", "dtype": "float32"}


def documents(n=400, seed=0):
    """Text with a heavy-tailed vocabulary, and what tokenizers stumble over: indentation, tabs, runs of spaces, emoji."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8))) for _ in range(300)]
    weights = [1 / (k + 1) for k in range(300)]
    odd = ["\n    ", "\t", "  ", "naïve", "🙂", "<unk>", "</s>", "…\n\n"]
    return [" ".join(rng.choices(words, weights, k=rng.randint(5, 60))) + rng.choice(odd) + rng.choice(words) for _ in range(n)]


def write_jsonl(path, texts):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n" for text in texts)
    return path


def python(*words, **options):
    """Run a script of the repo; returns the finished process with its stdout and stderr as text."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120, **options)


def prepare(*words, **options):
    return python(ROOT / "data" / "prepare.py", *words, **options)


def experiment(name, *words, **options):
    """Run `python -m experiments.NAME` in any folder."""
    options.setdefault("env", {**os.environ, "PYTHONPATH": str(ROOT)})
    return python("-m", f"experiments.{name}", *words, **options)


def settings(**changes):
    return [f"--{k}={v}" for k, v in {**TINY, **changes}.items()]


def metrics(out):
    """The lines of a run's metrics.jsonl, without what the clock says."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tok_per_s", "seconds")} for line in lines]


def launch(*words, processes=1, restarts=0, **options):
    """Start train.py, under torchrun if it is to have several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", f"--max_restarts={restarts}"]
    return subprocess.Popen([sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "train.py"), *words],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def result(process):
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(*words, **options):
    return result(launch(*words, **options))


def wait_for(out, step, process):
    """Until the run has written the line of a step, or is over."""
    path, began = out / "metrics.jsonl", time.monotonic()
    while process.poll() is None and not (path.exists() and f'"step": {step},' in path.read_text()):
        if time.monotonic() - began > 60:
            raise TimeoutError(f"{out}: no step {step}")
        time.sleep(0.01)


def same_end(a, b):
    """Whether two runs left the same lines and, bit for bit, the same weights and optimizer."""
    x, y = (torch.load(out / "ckpt.pt", weights_only=True) for out in (a, b))
    (ps, names), (qs, others) = (torch.utils._pytree.tree_flatten([z["step"], z["model"], z["optimizer"]]) for z in (x, y))
    return metrics(a) == metrics(b) and names == others and all(
        torch.equal(p, q) if torch.is_tensor(p) else p == q for p, q in zip(ps, qs, strict=True))


def one_line(process, *words):
    """A refusal: one line on stderr with these words, a non-zero status, no traceback."""
    assert process.returncode != 0
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1, process.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]


@pytest.fixture
def call(capsys, monkeypatch):
    """Calls a script's main() as python() would run the script, without another process, which would import torch anew."""
    def call(main, *words):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        capsys.readouterr()
        try:
            status = main() or 0
        except SystemExit as e:
            status = e.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
        return subprocess.CompletedProcess(words, status, *capsys.readouterr())
    return call


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small .json.gz in C4's format."""
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.json.gz", documents())


@pytest.fixture(scope="session")
def stream(tmp_path_factory, text):
    """A data directory: stream layout, sequences of 32, vocabulary 500."""
    out = tmp_path_factory.mktemp("stream") / "data"
    done = prepare("files", text, f"--out={out}", "--tokenizer=train:500", "--seq_len=32")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def rows(tmp_path_factory, text, stream):
    """The same text and tokenizer as rows of 32, in shards of 20,000 characters."""
    out = tmp_path_factory.mktemp("rows") / "data"
    done = prepare("files", text, f"--out={out}", f"--tokenizer={stream / 'tokenizer.model'}", "--layout=rows",
                   "--seq_len=32", "--shard_chars=20000")
    assert done.returncode == 0, done.stderr
    return out
