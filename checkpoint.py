"""What surrounds the loop: the processes of a run (Dist) and its folder on disk (RunDir)."""
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import time
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed

from loader import UserError, access

CODE = ("train.py", "model.py", "optim.py", "baselines.py", "loader.py", "checkpoint.py",
        "metrics.py")
SAVE_SECONDS = 300


class Busy(UserError):
    """Another process has locked the folder."""
    status = 75  # EX_TEMPFAIL of sysexits.h: try again later


def differences(theirs, ours, label):
    """What differs between two dicts, in words: "lr=1.0 (now 2.0)" for the label "now"."""
    return ", ".join(f"{name}={theirs.get(name)} ({label} {ours.get(name)})"
                     for name in sorted({*ours, *theirs}) if theirs.get(name) != ours.get(name))


@functools.cache
def code_hashes():
    """Of each file that a run executes."""
    files = {name: Path(__file__).with_name(name).read_bytes() for name in CODE}
    return {name: hashlib.sha256(content).hexdigest()[:8] for name, content in files.items()}


class Dist:
    """The processes of this run: torchrun's, or this one alone. Raises UserError without a GPU."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if self.device.index >= torch.cuda.device_count():
                raise UserError(f"process {self.rank} has no GPU, there are "
                                f"{torch.cuda.device_count()} on this node: set --nproc_per_node "
                                "to their number, or --device=cpu")
            torch.cuda.set_device(self.device)
        if self.size > 1:
            store = {}
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            if restarts != "0" and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                # After --max_restarts torchrun's store still has the addresses of the dead
                # processes (pytorch issue 167288); on one node a prefix tells new from old.
                old, rank, size = next(torch.distributed.rendezvous("env://"))
                store["store"] = torch.distributed.PrefixStore(restarts, old)
                store |= {"rank": rank, "world_size": size}
            gpu = self.device.type == "cuda"
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", **store)

    def any_rank(self, flag):
        """Whether `flag` is true on some rank."""
        return bool(self.sum(torch.tensor(int(flag))))

    def sum(self, tensor):
        """Sums a tensor over the ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def broadcast(self, value):
        """Rank 0's value, on every rank."""
        values = [value]
        if self.size > 1:
            torch.distributed.broadcast_object_list(values)
        return values[0]

    def rank0_first(self, function, *args):
        """Calls function(*args) on rank 0, then on the others. If it raises UserError on rank 0,
        the others exit in silence, so that an error is reported once."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = function(*args)
            except UserError as e:
                error = e
        if self.any_rank(error is not None):
            raise error or SystemExit(1)
        return result if self.rank == 0 else function(*args)

    def check_same(self, values, remedy):
        """Ends all processes if this dict differs among them; rank 0 says in what: UserError."""
        all_values = [values] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(all_values, values)
        for rank, theirs in enumerate(all_values):
            if differ := differences(theirs, all_values[0], "process 0:"):
                error = UserError(f"process {rank} has {differ}: {remedy}")
                raise error if self.rank == 0 else SystemExit(1)

    def print0(self, text):
        if self.rank == 0:
            print(text, flush=True)


class StopSignal:
    """`number` is None until SIGTERM or Ctrl-C comes, so that the run can save before it ends. A
    second Ctrl-C ends it at once."""

    def __init__(self):
        self.number = None
        signal.signal(signal.SIGTERM, self.handle)
        signal.signal(signal.SIGINT, self.handle)

    def handle(self, number, frame):
        self.number = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def replace(path, write, suffix=".tmp"):
    """Replaces a file by what write(file) writes: a temporary file of that suffix, synced, then
    renamed. Raises UserError."""
    tmp = path.with_name(path.name + suffix)
    try:
        with access("write", path), open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
            os.replace(tmp, path)
    finally:
        with suppress(OSError):
            tmp.unlink()


def rank0(method):
    """Makes a method of RunDir run on rank 0 only. Every rank gets its result, and its UserError
    ends all of them."""
    @functools.wraps(method)
    def wrapper(self, *args):
        def call():
            return method(self, *args) if self.dist.rank == 0 else None
        return self.dist.broadcast(self.dist.rank0_first(call))
    return wrapper


class RunDir:
    """config.json, metrics.jsonl and ckpt.pt of one run. `identity`, a dict of settings, tells it
    from other runs. All ranks call the methods, which raise UserError."""

    def __init__(self, path, identity, dist):
        self.path, self.identity, self.dist = Path(path), identity, dist
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.ckpt = self.path / "ckpt.pt"
        self.lock_file, self.saved = None, time.monotonic()

    @rank0
    def acquire(self, about, before=lambda: None):
        """Creates and locks the folder, or checks that it holds this run. config.json gets the dict
        `about`. Returns the final line of metrics.jsonl if the run is finished, else None. before()
        is called when the folder is free, but not yet there if it is new."""
        try:
            if self.config.exists():
                config = json.loads(self.config.read_text())
                self.check_identity(self.config, config)
                code = code_hashes().items()
                if edited := [k for k, v in code if config.get("code", {}).get(k, v) != v]:
                    self.dist.print0(f"{', '.join(edited)}: edited since {self.path} was begun")
            elif self.path.is_dir() and (
                    {p.name for p in self.path.iterdir()} - {"lock", "config.json.tmp"}):
                raise UserError(f"--out={self.path} holds other files and no run: choose another")
            if final := self.final_line():
                return final
            if self.path.exists():
                self.lock()
                if final := self.final_line():  # by another process, just now
                    return final
            before()
            if not self.lock_file:
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock()
        except ValueError:
            raise UserError(f"{self.config} is broken, or not of a run of train.py: choose another "
                            "--out") from None
        except OSError as e:
            raise UserError(f"--out={self.path}: {e.strerror}: choose another") from None
        if not self.config.exists():
            config = json.dumps({"identity": self.identity, **about}, indent=1).encode()
            replace(self.config, lambda f: f.write(config))

    def check_identity(self, path, content):
        """Refuses a file that another run wrote."""
        theirs = content.get("identity") if isinstance(content, dict) else None
        if not isinstance(theirs, dict):
            raise UserError(f"{path} is not of a run of train.py: choose another --out")
        if differ := differences(theirs, self.identity, "now"):
            raise UserError(f"{path} belongs to a run with {differ}: choose another --out")

    def final_line(self):
        try:
            line = json.loads(self.metrics.read_bytes().splitlines()[-1])
        except (FileNotFoundError, IndexError, ValueError):  # not there yet, empty or torn
            return None
        return line if isinstance(line, dict) and line.get("final") else None

    def lock(self):
        """Locks the folder for as long as this process lives."""
        self.lock_file = open(self.path / "lock", "w")
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise Busy(f"--out={self.path}: another process is at work there: wait for it, or "
                       "choose another") from None
        except OSError:  # a file system without locks
            pass

    @rank0
    def append(self, lines):
        """Adds dicts as lines to metrics.jsonl."""
        with access("write", self.metrics), open(self.metrics, "a") as f:
            f.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)

    @rank0
    def is_save_due(self):
        return time.monotonic() - self.saved > SAVE_SECONDS

    @rank0
    def save(self, step, seconds, last_eval, model, optimizer):
        """Writes ckpt.pt, whole or not at all."""
        state = {"identity": self.identity, "step": step, "seconds": seconds,
                 "last_eval": last_eval, "metrics_bytes": self.sync_metrics(),
                 "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        replace(self.ckpt, lambda f: torch.save(state, f))
        self.saved = time.monotonic()

    def sync_metrics(self):
        """Waits until metrics.jsonl is on the disk. Returns its size in bytes."""
        with access("write", self.metrics), open(self.metrics, "ab") as f:
            os.fsync(f.fileno())
            return f.tell()

    @rank0
    def discard(self, keep, model):
        """Of a finished run's checkpoint, what is not kept: nothing, or all but the weights."""
        self.sync_metrics()  # a run without its last line would need the checkpoint
        if keep == "nothing":
            with access("write", self.ckpt):
                self.ckpt.unlink(missing_ok=True)
        elif keep == "weights":
            state = {"identity": self.identity, "model": model.state_dict()}
            replace(self.ckpt, lambda f: torch.save(state, f))

    def load(self, model, optimizer):
        """Restores ckpt.pt, if there is one, and cuts metrics.jsonl back to it. Returns the steps
        and seconds done so far, and the step and the loss of the last evaluation."""
        state = self.dist.rank0_first(self.restore, model, optimizer)
        self.dist.check_same({str(self.ckpt): state}, "put --out on a disk that they share")
        *progress, metrics_bytes = state
        if self.dist.rank == 0 and self.metrics.exists():
            with access("write", self.metrics):
                os.truncate(self.metrics, metrics_bytes)
        return progress

    def restore(self, model, optimizer):
        if not os.path.lexists(self.ckpt):  # a link to nowhere is an error
            return 0, 0.0, (None, None), 0
        with access("read", self.ckpt, "is damaged or no checkpoint of train.py",
                    "restore it from a copy, or choose another --out to start again"):
            # torch.load does not verify checksums
            if self.dist.rank == 0 and zipfile.ZipFile(self.ckpt).testzip():
                raise ValueError("wrong checksum")
            state = torch.load(self.ckpt, map_location="cpu", weights_only=True, mmap=True)
            self.check_identity(self.ckpt, state)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            metrics_bytes = state["metrics_bytes"]
            progress = state["step"], state["seconds"], state["last_eval"], metrics_bytes
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        if size < metrics_bytes:
            raise UserError(f"{self.metrics} is shorter than when {self.ckpt} was saved: restore "
                            "it, or choose another --out to start again")
        return progress


def hardware(device):
    """The name of a GPU, or of the processor and how many of its threads PyTorch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    threads = torch.get_num_threads()
    plural = "" if threads == 1 else "s"
    return f"{name[1] if name else platform.machine()}, {threads} thread{plural}"


def git_commit():
    """The commit of the code, with "-dirty" if it was edited since, or "unknown"."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True)
    try:
        commit = git("describe", "--always").stdout.decode().strip()
        if commit and git("diff", "--quiet", "HEAD", "--", *CODE, "experiments/*.py").returncode:
            commit += "-dirty"  # new pages do not count
    except OSError:  # no git here
        commit = ""
    return commit or "unknown"


def describe(settings, dist):
    """What config.json says of a run beside its identity: enough to repeat it."""
    return {"settings": asdict(settings), "device": hardware(dist.device), "world_size": dist.size,
            "threads": torch.get_num_threads(), "git_commit": git_commit(), "code": code_hashes(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__}}
