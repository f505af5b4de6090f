"""What surrounds a run: the processes that share it, its folder on disk, and its log."""
import contextlib
import json
import math
import os
import platform
import re
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


class UserError(Exception):
    """One line for the user: what is wrong, where, and the remedy. `status` is the exit status."""

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
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
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
        """function() of rank 0, its result or its UserError on every rank."""
        if self.size == 1:
            return function()
        answer = [None, None]
        if self.rank == 0:
            try:
                answer[0] = function()
            except UserError as e:
                answer[1] = str(e)
        dist.broadcast_object_list(answer, group=self.host)
        if answer[1]:
            raise UserError(answer[1])
        return answer[0]


class Folder:
    """config.json, metrics.jsonl and ckpt.pt of one run. Only rank 0 writes."""

    def __init__(self, path, identity):
        self.path, self.identity = Path(path), identity  # identity: the settings that make a run what it is
        self.config, self.metrics, self.ckpt = (self.path / n for n in ("config.json", "metrics.jsonl", "ckpt.pt"))

    def claim(self, about):
        """Make the folder, or see that it is this run's. Returns the final line of a finished run, else None."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out={self.path} is a file: choose another")
        if self.config.exists():
            try:
                theirs = json.loads(self.config.read_text())["identity"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.config} is broken: delete {self.path}, or choose another --out") from None
            self.compare(theirs, self.path)
            if self.metrics.exists():
                last = self.metrics.read_bytes().splitlines()[-1:]
                with contextlib.suppress(ValueError, KeyError):
                    line = json.loads(last[0]) if last else {}
                    return line if line.get("final") else None
        elif self.path.exists() and any(p.suffix != ".tmp" for p in self.path.iterdir()):
            raise UserError(f"--out={self.path} holds other files and no run: choose another")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write(self.config, lambda f: f.write(json.dumps({"identity": self.identity, **about}, indent=1).encode()))

    def compare(self, theirs, where):
        keys = {*self.identity, *theirs}
        other = [f"{k}={theirs.get(k)} (now {self.identity.get(k)})" for k in sorted(keys)
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
        except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
            tmp.unlink(missing_ok=True)
            kept = "; the one before it is kept" if path.exists() else ""
            raise UserError(f"could not write {path} ({getattr(e, 'strerror', None) or str(e).splitlines()[0]}){kept}: "
                            f"make room and start again") from None

    def append(self, lines):
        text = "".join(json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v
                                   for k, v in line.items()}) + "\n" for line in lines)
        try:
            with open(self.metrics, "a") as f:
                f.write(text)
        except OSError as e:
            raise UserError(f"could not write {self.metrics} ({e.strerror}): make room and start again") from None

    def save(self, step, seconds, loss, model, optimizer):
        with open(self.metrics, "ab") as f:
            os.fsync(f.fileno())
            size = f.tell()
        state = {"identity": self.identity, "step": step, "seconds": seconds, "metrics_bytes": size,
                 "val_loss": loss, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        self.write(self.ckpt, lambda f: torch.save(state, f))

    def load(self, model, optimizer):
        """Restore the checkpoint, if there is one. Returns step, seconds, bytes of metrics.jsonl, validation loss."""
        if not self.ckpt.exists():
            return 0, 0.0, 0, None
        try:
            state = torch.load(self.ckpt, map_location="cpu", weights_only=True)
            self.compare(state["identity"], self.ckpt)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return state["step"], state["seconds"], state["metrics_bytes"], state["val_loss"]
        except UserError:
            raise
        except Exception as e:  # a torn or foreign file fails in many ways, all with this remedy
            raise UserError(f"{self.ckpt} is damaged or no checkpoint of train.py ({type(e).__name__}): restore it from a "
                            f"copy, or delete it to start from step 0") from None


class Log:
    """A line of metrics.jsonl for every step. The values stay on the device until flush(): only there is it waited for."""

    def __init__(self, s, world, folder, sequences):
        self.s, self.world, self.folder, self.pending = s, world, folder, []
        self.tokens_per_step = s.batch_size * sequences.seq_len  # padding included, as the paper counts
        self.limit = 2 * math.log(sequences.vocab_size)  # ours: a run has diverged at twice the loss of a uniform guess

    def add(self, lr, values):
        self.pending.append((lr, values))

    def flush(self, step, mark):
        """Write the lines up to `step`, begun at time `mark`. Returns the seconds they took, and the step that diverged."""
        names = list(self.pending[0][1])
        table = torch.stack([torch.stack(list(values.values())) for _, values in self.pending])  # [steps, names]
        table[:, 0] = self.world.sum(table[:, 0].clone())  # train_loss: each rank has its part of the sum
        rows = table.tolist()
        seconds = time.time() - mark
        speed = len(rows) * self.tokens_per_step / seconds
        lines, diverged = [], None
        for number, ((lr, _), row) in enumerate(zip(self.pending, rows), step - len(rows) + 1):
            lines.append({"step": number, "lr": lr, "tokens": number * self.tokens_per_step, "tok_per_s": round(speed),
                          **dict(zip(names, row))})
            if not all(map(math.isfinite, row)) or row[0] > self.limit:
                diverged = number
                break
        self.pending = []
        last = lines[-1]
        clips = [f"{last['clipped_' + what]:.0%} of {what}" for what in ("tensors", "rows") if "clipped_" + what in last]
        text = (f"{self.head(last['step'])}  loss {last['train_loss']:.4f}  lr {last['lr']:<8.3g}  gradient "
                f"{last['grad_norm']:<8.2g}  {speed:,.0f} tok/s  {'clipped ' + ', '.join(clips) + '  ' if clips else ''}"
                f"{clock((self.s.steps - step) * self.tokens_per_step / speed)} left")
        self.write(lines, text if step % self.s.log_every == 0 or diverged else None)
        return seconds, diverged

    def evaluation(self, step, loss, tokens):
        self.write([{"step": step, "val_loss": loss, "val_tokens": tokens}], f"{self.head(step)}  validation loss {loss:.4f}")

    def final(self, status, step, loss, seconds):
        self.write([{"final": True, "status": status, "step": step, "val_loss": loss, "seconds": round(seconds, 1)}],
                   f"{status} at step {step} after {clock(seconds)}" + (f", validation loss {loss:.4f}" if loss else ""))

    def head(self, step):
        return f"step {step:>{len(str(self.s.steps))}}/{self.s.steps}"

    def write(self, lines, text):
        if self.world.rank == 0:
            self.folder.append(lines)
            if text:
                print(text, flush=True)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}".removeprefix("0:")


def describe(settings, world):
    """What config.json says of this run beside its identity: enough to repeat it."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True,
                                text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    cpu = f"{cpu[1] if cpu else platform.machine()}, {torch.get_num_threads()} threads"
    return {"settings": asdict(settings),
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else cpu, "world_size": world.size,
            "git_commit": commit or "unknown", "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
