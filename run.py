"""What surrounds a run: the processes that share it, its folder on disk, and its log."""
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from loader import DataError


class UserError(Exception):
    """One line for the user: what is wrong, where, and the remedy. `status` is the exit status, 2 for bad settings."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


class World:
    """The processes of this run: torchrun's, or this one alone."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = device == "cuda" or device == "auto" and torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            if self.device.index >= torch.cuda.device_count():
                raise UserError(f"process {self.rank} has no GPU, there are {torch.cuda.device_count()} on this node: "
                                "as many for --nproc_per_node, or --device=cpu")
            torch.cuda.set_device(self.device)
        if self.size > 1:
            # torchrun keeps its store over --max_restarts, and in it the addresses of the dead (pytorch issue 167288).
            # On one node all ranks agree on the number of restarts, so that it can tell old keys from new ones.
            more, restarts = {}, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            if restarts != "0" and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                store, rank, size = next(dist.rendezvous("env://"))
                more = {"store": dist.PrefixStore(restarts, store), "rank": rank, "world_size": size}
            dist.init_process_group("nccl" if cuda else "gloo", **more)
            self.host = dist.new_group(backend="gloo")  # for what must not wait for the GPU

    def any(self, flag):
        """Is `flag` true on some rank?"""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.host)
        return bool(flags.item())

    def sum(self, tensor):
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def first(self, function):
        """What function() returns on rank 0, on every rank. If it fails there, the others leave in silence."""
        if self.size == 1:
            return function()
        answer, error = [None, False], None
        if self.rank == 0:
            try:
                answer[0] = function()
            except (UserError, DataError) as e:
                error, answer[1] = e, True
        dist.broadcast_object_list(answer, group=self.host)
        if answer[1]:
            raise error or SystemExit(1)
        return answer[0]


class Folder:
    """config.json, metrics.jsonl and ckpt.pt of one run. Rank 0 writes, and all ranks learn whether it could."""

    def __init__(self, path, identity, world):
        self.path, self.identity, self.world = Path(path), identity, world  # identity: what makes a run what it is
        self.config, self.metrics, self.ckpt = (self.path / n for n in ("config.json", "metrics.jsonl", "ckpt.pt"))

    def claim(self, about):
        """Make the folder, or see that it is this run's. Returns the final line if the run is finished, else None."""
        return self.world.first(lambda: self._claim(about))

    def _claim(self, about):
        try:
            if self.config.exists():
                self.compare(self.config, json.loads(self.config.read_text()))
                if final := self.last_line() if self.metrics.exists() else None:
                    return final
            elif self.path.is_dir() and any(p.suffix != ".tmp" and p.name != "lock" for p in self.path.iterdir()):
                raise UserError(f"--out={self.path} holds other files and no run: choose another")
            self.path.mkdir(parents=True, exist_ok=True)
            self.take()
        except ValueError:
            raise UserError(f"{self.config} is broken, or not of a run of train.py: choose another --out") from None
        except OSError as e:
            raise UserError(f"--out={self.path}: {e.strerror}: choose another") from None
        if not self.config.exists():
            text = json.dumps({"identity": self.identity, **about}, indent=1)
            self.write(self.config, lambda f: f.write(text.encode()))

    def take(self):
        """Lock the folder for as long as this process lives, where the file system can."""
        self.lock = open(self.path / "lock", "w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"--out={self.path}: another process is at work there: wait for it, or choose another")

    def last_line(self):
        """The final line of metrics.jsonl, or None if it is not there yet."""
        try:
            line = json.loads(self.metrics.read_bytes().splitlines()[-1])
        except (ValueError, IndexError):  # torn, or empty
            return None
        return line if line.get("final") else None

    def compare(self, where, holder):
        """Refuse what another run wrote: `holder` has its identity."""
        theirs = holder.get("identity") if isinstance(holder, dict) else None
        if not isinstance(theirs, dict):
            raise UserError(f"{where} is not of a run of train.py: choose another --out")
        other = [f"{k}={theirs.get(k)} (now {self.identity.get(k)})" for k in sorted({*self.identity, *theirs})
                 if theirs.get(k) != self.identity.get(k)]
        if other:
            raise UserError(f"{where} belongs to a run with {', '.join(other)}: choose another --out, or delete it")

    def write(self, path, fill):
        """All of a file or the old one: a temporary file, synced, then renamed."""
        tmp = path.with_name(path.name + ".tmp")
        try:
            with open(tmp, "wb") as f:
                fill(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, path)
        except (OSError, RuntimeError) as e:  # torch.save turns a failed write into a RuntimeError
            tmp.unlink(missing_ok=True)
            kept = ", the one before it is kept" if path.exists() else ""
            reason = getattr(e, "strerror", None) or "is the disk full?"
            raise UserError(f"could not write {path} ({reason}){kept}: make room and start again") from None

    def append(self, lines):
        """Add lines to metrics.jsonl; what is not finite becomes null."""
        text = "".join(json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v
                                   for k, v in line.items()}) + "\n" for line in lines)

        def write():
            try:
                with open(self.metrics, "a") as f:
                    f.write(text)
            except OSError as e:
                raise UserError(f"could not write {self.metrics} ({e.strerror}): make room and start again") from None
        self.world.first(write)

    def save(self, step, seconds, loss, model, optimizer):
        def write():
            with open(self.metrics, "ab") as f:
                os.fsync(f.fileno())
                size = f.tell()
            state = {"identity": self.identity, "step": step, "seconds": seconds, "metrics_bytes": size,
                     "val_loss": loss, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            self.write(self.ckpt, lambda f: torch.save(state, f))
        self.world.first(write)

    def load(self, model, optimizer):
        """Restore the checkpoint, if there is one, and cut metrics.jsonl back to it. Returns the steps and seconds done
        so far and the last validation loss."""
        def restore():
            if not self.ckpt.exists():
                return 0, 0.0, 0, None
            try:
                if self.world.rank == 0 and zipfile.ZipFile(self.ckpt).testzip():  # torch.load checks no sums
                    raise ValueError
                state = torch.load(self.ckpt, map_location="cpu", weights_only=True, mmap=True)
                self.compare(self.ckpt, state)
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                return tuple(state[k] for k in ("step", "seconds", "metrics_bytes", "val_loss"))
            except UserError:
                raise
            except Exception as e:  # a torn or foreign file fails in many ways, all with this remedy
                raise UserError(f"{self.ckpt} is damaged or no checkpoint of train.py ({type(e).__name__}): restore it "
                                f"from a copy, or delete it to start from step 0") from None
        found = self.world.first(restore)  # a bad file is said once
        step, seconds, size, loss = restore() if self.world.rank else found
        if self.world.any(step != found[0]):
            raise UserError(f"the processes see different {self.ckpt}: put --out on a disk that they share")

        def cut():
            have = self.metrics.stat().st_size if self.metrics.exists() else 0
            if have < size:
                raise UserError(f"{self.metrics} is shorter than when {self.ckpt} was saved: restore it, or delete "
                                f"{self.path} to start again")
            if have:
                os.truncate(self.metrics, size)
        self.world.first(cut)
        return step, seconds, loss


class Log:
    """A line of metrics.jsonl for every step. Values stay on the device until flush(): only there is it waited for."""

    def __init__(self, s, folder, sequences):
        self.s, self.folder, self.world, self.pending = s, folder, folder.world, []
        self.tokens_per_step = s.batch_size * sequences.seq_len  # padding included, as the paper counts
        # ours: diverged is twice the loss of a uniform guess; weighted, one batch's mean may be anything
        self.limit = math.inf if s.loss_weighting else 2 * math.log(sequences.vocab_size)
        self.wandb = None

    def start_wandb(self):
        """Once the folder is this process's."""
        if self.s.wandb and self.world.rank == 0:
            import wandb
            out = Path(self.s.out).resolve()
            self.wandb = wandb.init(project=self.s.wandb, name=self.s.out, config=asdict(self.s), resume="allow",
                                    id=hashlib.sha256(f"{out} {self.folder.identity}".encode()).hexdigest()[:16])

    def add(self, lr, values, looks={}):
        """Of one step: its lr, `values` that every step has, `looks` that only some have; 0-d tensors."""
        self.pending.append((lr, values, looks))

    def flush(self, step, began):
        """Write the lines up to `step`, which began at perf_counter() `began`. Returns their seconds, and the step at
        which the run diverged or None."""
        names = list(self.pending[0][1])
        table = torch.stack([torch.stack(list(values.values())) for _, values, _ in self.pending])  # [steps, names]
        table[:, 0] = self.world.sum(table[:, 0].clone())  # train_loss: each rank has its part of the sum
        rows = table.tolist()
        seconds = time.perf_counter() - began
        speed = len(rows) * self.tokens_per_step / seconds
        lines, diverged = [], None
        for number, ((lr, _, looks), row) in enumerate(zip(self.pending, rows), step - len(rows) + 1):
            lines.append({"step": number, "lr": lr, "tokens": number * self.tokens_per_step, "tok_per_s": round(speed),
                          **dict(zip(names, row)), **{name: value.item() for name, value in looks.items()}})
            if not all(map(math.isfinite, row)) or row[0] > self.limit:
                diverged = number
                break
        self.pending = []
        self.keep(lines)
        if step % self.s.log_every == 0 or diverged:
            self.show(lines[-1], speed)
        return seconds, diverged

    def show(self, line, speed):
        clips = [f"{line[k]:.0%} of {k[8:]}" for k in ("clipped_tensors", "clipped_rows") if k in line]
        left = (self.s.steps - line["step"]) * self.tokens_per_step / speed
        self.say(f"{self.head(line['step'])}  loss {line['train_loss']:.4f}  lr {line['lr']:<8.3g}  "
                 f"gradient {line['grad_norm']:<8.2g}  {speed:,.0f} tok/s  "
                 f"{'clipped ' + ', '.join(clips) + '  ' if clips else ''}{clock(left)} left")

    def keep(self, lines):
        self.folder.append(lines)
        for line in () if self.wandb is None else lines:
            self.wandb.log(line, step=line["step"])

    def evaluation(self, step, loss, tokens, groups):
        more = {"group_losses": [x if math.isfinite(x) else None for x in groups]} if groups else {}
        self.keep([{"step": step, "val_loss": loss, "val_tokens": tokens, **more}])
        self.say(f"{self.head(step)}  validation loss {loss:.4f}")

    def final(self, status, step, loss, seconds):
        self.folder.append([{"final": True, "status": status, "step": step, "val_loss": loss,
                             "seconds": round(seconds, 1)}])
        if self.wandb is not None:
            self.wandb.finish()
        self.say(f"{status} at step {step} after {clock(seconds)}" + (f", validation loss {loss:.4f}" if loss else ""))

    def head(self, step):
        return f"step {step:>{len(str(self.s.steps))}}/{self.s.steps}"

    def say(self, text):
        if self.world.rank == 0:
            print(text, flush=True)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}".removeprefix("0:")


def hardware(device="cpu"):
    """The name of a GPU, or the processor's and how many threads PyTorch uses of it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return f"{cpu[1] if cpu else platform.machine()}, {(n := torch.get_num_threads())} thread{'s' * (n > 1)}"


def describe(settings, world):
    """What config.json says of this run beside its identity: enough to repeat it."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, text=True,
                                capture_output=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return {"settings": asdict(settings),
            "device": hardware(world.device), "world_size": world.size,
            "git_commit": commit or "unknown", "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
