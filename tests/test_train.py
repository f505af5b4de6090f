import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

import checkpoint
import train
from baselines import build_optimizer
from checkpoint import Dist, RunDir
from conftest import ROOT, TINY, launch, metrics, one_line, python, result, run, same_end, settings, wait_for
from loader import BatchSampler, TokenDataset, UserError, eval_batches
from metrics import Diagnostics, frequency_groups
from model import Config, LLaMA


def here(**changes):
    """A run in this very process."""
    train.train(train.parse(settings(**changes)))


def main(*words):
    """The exit status of the command line, run in this very process."""
    try:
        return train.main(words)
    except SystemExit as e:
        return e.code


@pytest.fixture(scope="session")
def whole(stream, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run(*settings(data=stream, out=out))
    assert done.returncode == 0, done.stderr
    return out


def close(a, b, rel=1e-4):
    """The same lines, the numbers to rounding."""
    a, b = metrics(a), metrics(b)
    assert [list(x) for x in a] == [list(x) for x in b]
    for x, y in zip(a, b):
        for k in ("train_loss", "val_loss"):
            if k in x:
                assert x[k] == pytest.approx(y[k], rel=rel)


# ---- what a run leaves ----------------------------------------------------------------------------------------------

def test_metrics_config_and_schedule(whole, stream):
    lines = metrics(whole)
    steps = [x for x in lines if "train_loss" in x]
    assert [x["step"] for x in steps] == list(range(1, 13)) and [x["tokens"] for x in steps] == [8 * 32 * k for k in range(1, 13)]
    evals = [x for x in lines if "val_tokens" in x]
    group = frequency_groups(torch.from_numpy(np.load(stream / "token_counts.npy")))
    first = next(eval_batches(TokenDataset(stream, "val"), 500, 16))[1]  # 16 sequences of 32: the whole evaluation set
    share = torch.bincount(group[first.flatten()], minlength=10) / first.numel()
    for x in evals:
        assert len(x["group_losses"]) == 10
        assert sum(p * (loss or 0) for p, loss in zip(share.tolist(), x["group_losses"])) == pytest.approx(x["val_loss"])
    assert [x["step"] for x in evals] == [0, 6, 12] and all(500 <= x["val_tokens"] < 532 for x in evals)
    assert evals[0]["val_loss"] == pytest.approx(math.log(500), abs=0.2) and evals[-1]["val_loss"] < evals[0]["val_loss"] - 0.3
    assert lines[-1] == {"final": True, "status": "done", "step": 12, "val_loss": evals[-1]["val_loss"]}
    # warm-up over 10% of 12 steps is one step, at the peak; then a cosine that ends at 10% of it
    lrs = [x["lr"] for x in steps]
    assert lrs[0] == 100 and lrs[-1] == pytest.approx(10) and lrs == sorted(lrs, reverse=True)
    assert lrs[6] == pytest.approx(10 + 90 * 0.5 * (1 + math.cos(math.pi * 6 / 11)))
    assert all(0 <= x["clipped_tensors"] <= 1 and 0 <= x["clipped_rows"] <= 1 and x["grad_norm"] > 0 for x in steps)
    config = json.loads((whole / "config.json").read_text())
    assert config["settings"]["lr"] == 100 and config["versions"]["torch"] == torch.__version__ and config["world_size"] == 1


@pytest.mark.parametrize("scheduled", [True, False])
def test_multipliers_scale_the_updates_and_the_update_clip_may_follow_the_schedule(scheduled, stream, tmp_path):
    """At a learning rate so large that every tensor is clipped, the RMS of its update is its update clip."""
    here(data=stream, model="micro", out=tmp_path, lr=1e9, row_clip=1e-5, update_clip=1e-4, diag_every=1, warmup=0.5,
         embedding_mult=4, lm_head_mult=2, matrix_mult=0.5, norm_mult=3, schedule_update_clip=scheduled)
    config = Config.named("micro", 500)
    table, norms = 500 * 64, 9 * 64
    squares = (16 + 4) * table + 0.25 * (config.parameters - 2 * table - norms) + 9 * norms
    for line in (line for line in metrics(tmp_path) if "train_loss" in line):
        factor = line["lr"] / 1e9 if scheduled else 1
        assert line["effective_lr"] * line["grad_norm"] == pytest.approx(factor * 1e-4 * squares ** 0.5, rel=1e-3)
        assert line["clipped_tensors"] == 1


@pytest.mark.parametrize("keep", ["weights", "nothing"])
def test_of_a_finished_run_the_weights_stay_or_nothing(keep, whole, stream, tmp_path):
    here(data=stream, out=tmp_path, keep=keep, save_every="none")
    assert metrics(tmp_path) == metrics(whole)
    if keep == "nothing":
        assert not (tmp_path / "ckpt.pt").exists()
    else:
        small, full = (torch.load(out / "ckpt.pt", weights_only=True) for out in (tmp_path, whole))
        assert set(small) == {"identity", "model"} and all(torch.equal(w, full["model"][name]) for name, w in small["model"].items())


def test_without_save_every_a_run_saves_by_the_clock(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", 0.0)
    saved = []
    monkeypatch.setattr(checkpoint.RunDir, "save", lambda self, step, *args: saved.append(step))
    here(data=stream, out=tmp_path, save_every="none")
    assert saved == [3, 6, 9, 12]  # at the logged steps


def test_the_loss_in_the_log_is_the_mean_over_the_whole_batch(stream, tmp_path):
    torch.manual_seed(42)
    model = LLaMA(Config.named("nano", 500))
    x, y, _ = BatchSampler(TokenDataset(stream, "train"), 8, 42)(0)
    mean = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
    here(data=stream, out=tmp_path / "run", steps=1, warmup=0, micro_batch=2)
    first = next(x for x in metrics(tmp_path / "run") if "train_loss" in x)
    assert first["train_loss"] == pytest.approx(mean, rel=1e-5)


def test_a_finished_run_is_left_alone(whole, stream, capsys):
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    here(data=stream, out=whole)
    assert "is finished: done" in capsys.readouterr().out
    assert before == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_an_output_that_is_full_is_said_in_a_line(stream, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "train.py", *settings(data=stream, out=tmp_path / "run")],
                              stdout=full, stderr=subprocess.PIPE, text=True)
    one_line(done, "No space left on device", "start again")


def test_edited_code_is_said(whole, stream, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    config = json.loads((whole / "config.json").read_text())
    config["code"]["optim.py"] = "another"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    here(data=stream, out=tmp_path / "run")
    assert f"optim.py: edited since {tmp_path / 'run'} was begun" in capsys.readouterr().out
    here(data=stream, out=whole)
    assert "edited" not in capsys.readouterr().out


def test_neither_micro_batch_nor_world_size_changes_the_losses(whole, stream, rows, tmp_path):
    """Rows are the harder case: the number of targets differs from rank to rank and from one micro-batch to the next."""
    here(data=stream, out=tmp_path / "stream", micro_batch=2)
    close(tmp_path / "stream", whole)
    words = dict(data=rows, steps=60, log_every=1)
    here(out=tmp_path / "one", **words)
    here(out=tmp_path / "micro", micro_batch=1, **words)
    close(tmp_path / "micro", tmp_path / "one")
    out = tmp_path / "moved"  # begun by one process, ended by two
    process = launch(*settings(out=out, **words))
    wait_for(out, 3, process)
    process.terminate()
    result(process)
    assert metrics(out)[-1]["step"] < 60
    done = run(*settings(out=out, micro_batch=2, **words), processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout and "; from step" in done.stdout
    close(out, tmp_path / "one")


def test_wandb_gets_every_line_if_it_is_there(stream, tmp_path, capsys, monkeypatch):
    (tmp_path / "wandb.py").write_text("""class Run(list):
    def log(self, line, step):
        self.append((step, line))
    def finish(self):
        pass
runs = []
def init(**words):
    runs.append((words, Run()))
    return runs[-1][1]
""")
    refuse(capsys, "--wandb", "pip install", data=stream, out=tmp_path / "run", wandb="p")
    monkeypatch.syspath_prepend(tmp_path)
    here(data=stream, out=tmp_path / "run", wandb="p")
    words, lines = sys.modules["wandb"].runs[0]
    assert words["project"] == "p" and words["config"]["batch_size"] == 8
    assert [{k: v for k, v in x.items() if k != "tok_per_s"} for _, x in lines] == metrics(tmp_path / "run")[:-1]
    assert all(step == x["step"] for step, x in lines)


def test_a_wandb_that_does_not_start_claims_no_folder(stream, tmp_path, capsys, monkeypatch):
    (tmp_path / "wandb.py").write_text("""def init(**words):
    raise ConnectionError("no API key configured:\\n  run wandb login")
""")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    words = dict(data=stream, out=tmp_path / "run", wandb="p")
    refuse(capsys, "--wandb=p", "no API key configured: run", "`wandb login`", "WANDB_MODE=offline", **words)
    assert not (tmp_path / "run").exists()
    here(**{**words, "wandb": "none"})
    here(**words)  # a finished run needs none
    monkeypatch.delitem(sys.modules, "wandb")


def test_ranks_that_disagree_do_not_train(stream, rows, tmp_path):
    """As two nodes with different scripts, data and code; and as one whose settings cannot be read."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    with open(tmp_path / "optim.py", "a") as f:
        f.write("# another version\n")
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(f"""import os, sys
own, other = sys.argv[1].split(","), os.environ["RANK"] == "1"
sys.path.insert(0, "{tmp_path}" if other else "{ROOT}")
import train
sys.exit(train.main(sys.argv[2:] + own * other))
""")
    for own, expected in ((f"--optimizer=sgd,--log_every=4,--data={rows}", ["process 1 has", "data_sha256=", "log_every=4 (process 0: 3)", "optim.py=",
                                                                           "optimizer=sgd (process 0: clipped_sgd)"]), ("--lr=fast", ["invalid number"])):
        done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", wrapper, own, *settings(data=stream, out=tmp_path / "run", lr=1))
        said = [line for line in done.stderr.splitlines() if "train.py: " in line]
        assert done.returncode and len(said) == 1 and all(word in said[0] for word in expected), done.stderr
        assert done.stderr.count("Traceback") == 1 and not (tmp_path / "run").exists()  # torchrun's own


def test_two_nodes_meet_and_all_ranks_end_alike(whole, stream, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def nodes(**changes):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=1",
                   "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", str(ROOT / "train.py"), *settings(data=stream, **changes)]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "12"]
        for done in [result(node) for node in both]:
            assert done.returncode == 0, done.stderr
    nodes(out=tmp_path / "two")
    close(tmp_path / "two", whole)
    nodes(out=tmp_path / "diverged", optimizer="sgd", lr=1e5)
    assert metrics(tmp_path / "diverged")[-1]["status"] == "diverged"


@pytest.mark.parametrize("optimizer, more", [("sgd", {"lr": 1}), ("adamw", {"lr": 1e-3}), ("adamw", {"lr": 1e-3, "grad_clip": 0.1})])
def test_the_baselines_learn(optimizer, more, stream, tmp_path):
    here(data=stream, out=tmp_path, optimizer=optimizer, **more)
    losses = [x["train_loss"] for x in metrics(tmp_path) if "train_loss" in x]
    assert losses[-1] < losses[0] - 0.1 and not any("clipped_rows" in x for x in metrics(tmp_path))


# the solution of the README's third exercise
SIGNUM = """class Signum(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                p.sub_(group["lr"] * m.lerp_(p.grad, 1 - group["momentum"]).sign())


"""
BRANCH = """    if name == "signum":
        return Signum(groups, lr, momentum)
"""
ENTRY = '"signum": ("momentum",), '


def test_the_readmes_exercise_adds_an_optimizer(stream, tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name, old, new in (("baselines.py", "def build_optimizer(", f"{SIGNUM}def build_optimizer("),
                           ("baselines.py", "    raise ValueError(f\"no optimizer", f"{BRANCH}    raise ValueError(f\"no optimizer"),
                           ("train.py", "OPTIMIZER_SETTINGS = {", f"OPTIMIZER_SETTINGS = {{{ENTRY}")):
        text = (tmp_path / name).read_text()
        assert text.count(old) == 1
        (tmp_path / name).write_text(text.replace(old, new))
    done = python(tmp_path / "train.py", *settings(data=stream, out=tmp_path / "run", optimizer="signum", lr=1e-2, momentum=0.5))
    assert done.returncode == 0, done.stderr
    first, *_, last = [x["val_loss"] for x in metrics(tmp_path / "run") if "val_tokens" in x]
    assert last < first - 0.5


def test_grad_clip_bounds_what_the_optimizer_sees(stream, tmp_path):
    here(data=stream, out=tmp_path, optimizer="sgd", lr=10, momentum=0, grad_clip=1e-3, steps=1, warmup=0, min_lr=1)
    torch.manual_seed(42)
    start = LLaMA(Config.named("nano", 500)).state_dict()
    end = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    moved = sum(((end[k] - start[k]) ** 2).sum() for k in start).sqrt().item()
    assert moved == pytest.approx(10 * 1e-3, rel=1e-3)
    assert metrics(tmp_path)[1]["grad_norm"] > 0.1  # the log has the norm before the clip


def test_a_diverged_run_is_a_result(stream, tmp_path, capsys):
    words = dict(data=stream, out=tmp_path, optimizer="sgd", lr=1e4)
    here(**words)
    lines = metrics(tmp_path)
    assert lines[-1]["status"] == "diverged" and lines[-1]["val_loss"] is None
    steps = [x["step"] for x in lines if "train_loss" in x]
    assert steps == list(range(1, lines[-1]["step"] + 1)) and lines[-1]["step"] < 12
    here(**words)
    assert "is finished: diverged" in capsys.readouterr().out and metrics(tmp_path) == lines


def test_weights_that_are_not_finite_at_the_end_are_no_result(stream, tmp_path):
    here(data=stream, out=tmp_path, optimizer="sgd", lr=1e30, steps=1, warmup=0)
    assert metrics(tmp_path)[-1] == {"final": True, "status": "diverged", "step": 1, "val_loss": None}


def test_bf16_is_close(stream, tmp_path, whole):
    here(data=stream, out=tmp_path, dtype="bfloat16")
    close(tmp_path, whole, rel=0.02)


def test_compiled_is_the_same(stream, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(train.SIZES, "nano", (32, 48, 1, 2))  # four layers take a minute to compile
    for compile in ("false", "true"):
        here(data=stream, out=tmp_path / compile, compile=compile, steps=3)
    assert "float32, compiled" in capsys.readouterr().out
    close(tmp_path / "true", tmp_path / "false")


def test_without_a_compiler_it_says_so_once_and_runs(stream, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")}
    env |= {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *settings(data=stream, out=tmp_path / "run", compile="true", steps=2)],
                          capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("C++ compiler") == 1 and "eager" in done.stdout and not done.stderr


def test_it_says_why_it_does_not_compile(stream, tmp_path):
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "a cache")}
    done = run(*settings(data=stream, out=tmp_path / "run", compile="true", steps=1, eval_every="none"), env=env)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "running eagerly" in line]
    assert len(said) == 1 and "without spaces" in said[0] and "g++" in said[0] and str(tmp_path / "a") in said[0]


def test_a_torch_that_does_not_describe_the_cpu_takes_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # as in an older one
    assert train.default_dtype(torch.device("cpu")) == "float32"


# ---- stopping and going on ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer, kills", [("clipped_sgd", (0, 31)), ("adamw", ("random",))])
def test_killed_runs_end_as_if_never_killed(optimizer, kills, stream, tmp_path):
    """Killed in its first evaluation, in the middle, or anywhere; 0 is the line that the first evaluation writes."""
    words = dict(data=stream, optimizer=optimizer, lr=1e-2, steps=60, eval_every=17, save_every=13, log_every=1)
    assert main(*settings(out=tmp_path / "never", **words)) == 0
    out = tmp_path / "killed"
    for step in kills:
        process = launch(*settings(out=out, **words))
        step = random.randrange(40) if step == "random" else step
        print("killed after step", step)
        wait_for(out, step, process)
        process.kill()
        assert result(process).returncode == -signal.SIGKILL
    assert main(*settings(out=out, **words)) == 0
    assert same_end(out, tmp_path / "never")


def test_signals_save_and_stop(stream, tmp_path, call):
    words = settings(data=stream, out=tmp_path, steps=60, save_every=1000, eval_every=1000, log_every=1)
    start = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = launch(*words)
        wait_for(tmp_path, start + 3, process)
        process.send_signal(signal.SIGSTOP)  # so that it is at work for as long as a second one takes to start
        one_line(call(lambda: train.main(words)), tmp_path, "another process is at work there")
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        stopped = result(process)
        assert stopped.returncode == 128 + number and "the same command goes on" in stopped.stdout and not stopped.stderr
        assert f"from step {start}" in stopped.stdout or not start
        start = torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"]
        assert start == metrics(tmp_path)[-1]["step"] < 60
    assert [x["step"] for x in metrics(tmp_path) if "train_loss" in x] == list(range(1, start + 1))


def test_a_signal_waits_neither_for_the_step_nor_for_the_evaluation(stream, tmp_path):
    """The step is dropped, the evaluation done anew: the run ends as if nothing had been."""
    words = dict(data=stream, batch_size=32, micro_batch=1, eval_every=2, eval_tokens=10**6, steps=3, log_every=1, save_every=1000)
    assert main(*settings(out=tmp_path / "never", **words)) == 0
    out = tmp_path / "stopped"
    for step in (1, 2):  # in step 2, and in the evaluation after it
        process = launch(*settings(out=out, **words))
        wait_for(out, step, process)
        process.terminate()
        assert f"stopped by a signal after step {step}," in result(process).stdout and process.returncode == 128 + signal.SIGTERM
        assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == step == metrics(out)[-1]["step"] and "train_loss" in metrics(out)[-1]
    assert main(*settings(out=out, **words)) == 0
    assert same_end(out, tmp_path / "never")


def test_torchrun_told_to_stop_saves(stream, tmp_path):
    words = settings(data=stream, out=tmp_path, batch_size=32, micro_batch=1, steps=500, save_every=1000, log_every=1)
    process = launch(*words, processes=2)
    wait_for(tmp_path, 1, process)
    process.terminate()
    stopped = result(process)
    assert stopped.returncode != 0 and "stopped by a signal after step 1," in stopped.stdout and "the same command goes on" in stopped.stdout
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == metrics(tmp_path)[-1]["step"] == 1


def test_a_slurm_job_saves_and_queues_itself_again(stream, tmp_path):
    """With stand-ins for Slurm's commands; the job, torchrun and the run are real."""
    bin = tmp_path / "repo" / ".venv" / "bin"
    bin.mkdir(parents=True)
    for name, body in {"srun": f'echo $$ > {tmp_path}/pid; echo "$1" > {tmp_path}/cpus; shift; exec "$@"', "scancel": f'kill -"${{1#*=}}" $(cat {tmp_path}/pid)',
                       "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
                       "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/said'}.items():
        (bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin / name).chmod(0o755)
    for path in (*ROOT.glob("*.py"), ROOT / "dev"):
        (tmp_path / "repo" / path.name).symlink_to(path)
    env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7",
           "SLURM_JOB_NODELIST": "here", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "64"}
    out = tmp_path / "run"

    def job(steps):
        return subprocess.Popen(["bash", "dev/slurm.sh", *settings(data=stream, out=out, steps=steps, log_every=1)],
                                cwd=tmp_path / "repo", env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = job(5000)
    wait_for(out, 3, first)
    first.send_signal(signal.SIGUSR1)
    said = result(first).stdout
    assert "the same command goes on" in said and (tmp_path / "said").read_text() == "requeue 7\n"
    assert (tmp_path / "cpus").read_text() == "--cpus-per-task=64\n"  # srun does not take sbatch's
    at = metrics(out)[-1]["step"]
    second = job(5000)
    wait_for(out, at + 1, second)
    second.send_signal(signal.SIGUSR1)
    assert f"from step {at}" in result(second).stdout
    bad = job(0)
    assert result(bad).returncode != 0 and (tmp_path / "said").read_text() == "requeue 7\n" * 2


def test_a_run_stopped_just_after_an_evaluation_does_not_repeat_it(whole, stream, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    *lines, final = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join(lines))
    state = torch.load(out / "ckpt.pt", weights_only=True)
    assert state["last_eval"][0] == 6  # a checkpoint comes before the evaluation of its step
    for last_eval, kept in (((12, json.loads(final)["val_loss"]), lines), (state["last_eval"], lines[:-1])):
        size = len(b"".join(kept))
        torch.save({**state, "last_eval": last_eval, "metrics_bytes": size}, out / "ckpt.pt")
        (out / "metrics.jsonl").write_bytes(b"".join(kept))
        here(data=stream, out=out)
        assert metrics(out) == metrics(whole)


def test_a_full_disk_keeps_the_old_checkpoint(stream, tmp_path):
    here(data=stream, out=tmp_path)
    (tmp_path / "metrics.jsonl").unlink()  # as if stopped at step 8
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    torch.save({**state, "step": 8, "metrics_bytes": 0}, tmp_path / "ckpt.pt")
    old = (tmp_path / "ckpt.pt").read_bytes()

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    one_line(run(*settings(data=stream, out=tmp_path), preexec_fn=small_files), "ckpt.pt", "make room")
    assert (tmp_path / "ckpt.pt").read_bytes() == old and not list(tmp_path.glob("*.tmp"))


def test_metrics_that_cannot_be_synced_are_said_in_a_line(whole, tmp_path):
    run_dir, model, optimizer = unfinished(whole, tmp_path / "run")
    run_dir.metrics.unlink()
    run_dir.metrics.symlink_to("/dev/null")  # takes lines, but cannot sync them
    run_dir.append([{"step": 1}])
    with pytest.raises(UserError, match="could not write .*metrics.jsonl .*make room"):
        run_dir.save(1, 1.0, None, model, optimizer)


# ---- refusals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, expected", [
    (["--learning_rate=1"], ["--learning_rate", "--help"]), (["7"], ["7"]), (["--lr"], ["--lr", "expected one argument"]),
    (["--lr=fast"], ["--lr", "invalid number", "fast"]), (["--steps=1e3"], ["--steps", "invalid whole number"]), (["--compile=yes"], ["--compile", "true or false"]),
    (["--lr=0"], ["--lr", "above 0"]), (["--lr=-1"], ["--lr", "above 0"]), (["--lr=nan"], ["--lr"]), (["--lr=1", "--steps=0"], ["--steps"]),
    (["--warmup=1.5"], ["--warmup", "fraction"]), (["--warmup=50"], ["--warmup", "fraction"]), (["--momentum=1"], ["--momentum"]),
    (["--model=7b"], ["7b", "130m"]), (["--optimizer=lion"], ["lion", "adamw"]), (["--out="], ["--out"]), (["--dtype=fp8"], ["fp8"]),
    (["--embedding=big"], ["--embedding=big", "detach, norm, scale"]),
    (["--optimizer=adamw", "--lr=1", "--token_clip=1"], ["--token_clip", "adamw"]), (["--seed=-1"], ["--seed"]),
    (["--optimizer=sgd"], ["--lr is missing"]), (["--seed=36893488147419103232"], ["--seed"]),
    (["--batch_size=8", "--micro_batch=3"], ["--micro_batch=3", "8"]), (["--batch_size=100000"], ["100000"]),
    (["--device=cuda"], ["--device", "cpu"])])
def test_bad_settings(words, expected, stream, tmp_path, capsys):
    status = main(*settings(data=stream, out=tmp_path / "run"), *words)
    err = capsys.readouterr().err.strip()
    assert status in (1, 2) and len(err.splitlines()) == 1 and all(word in err for word in expected), err
    assert not (tmp_path / "run").exists()


def refuse(capsys, *expected, **changes):
    status = main(*settings(**changes))
    err = capsys.readouterr().err.strip()
    assert status and len(err.splitlines()) == 1 and all(str(word) in err for word in expected), err


def test_bad_data(stream, tmp_path, capsys):
    refuse(capsys, "none", "data/prepare.py", data=tmp_path / "none", out=tmp_path / "run")
    data = shutil.copytree(stream, tmp_path / "data")
    shard = data / "train_000000.bin"
    good = shard.read_bytes()
    for bad, word in ((good[:-1], "truncated"), (b"", "header"), (b"\0" * len(good), "magic"), (good[:1024] + b"\xff" * (len(good) - 1024), "vocab_size")):
        shard.write_bytes(bad)
        refuse(capsys, shard, word, data=data, out=tmp_path / word)
    shard.write_bytes(good)
    for bad in (b"", b"12", good):
        (data / "token_counts.npy").write_bytes(bad)
        refuse(capsys, "token_counts.npy", "500", data=data, out=tmp_path / "run")
    (data / "meta.json").write_text("{")
    refuse(capsys, "meta.json", "broken", data=data, out=tmp_path / "run")
    (data / "meta.json").unlink()
    refuse(capsys, "meta.json", "missing", data=data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_runs_folder_is_refused_and_not_touched(whole, stream, rows, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    refuse(capsys, whole, "lr=100.0 (now 30.0)", data=stream, out=whole, lr=30)
    refuse(capsys, whole, "seed=42 (now 1)", data=stream, out=whole, seed=1)
    refuse(capsys, whole, "data_sha256", data=rows, out=whole)
    assert before == {p.name: p.read_bytes() for p in whole.iterdir()}
    (tmp_path / "thesis.txt").write_text("x")
    refuse(capsys, tmp_path, "other files", data=stream, out=tmp_path)
    for out in (tmp_path / "thesis.txt", tmp_path / "thesis.txt" / "run"):
        refuse(capsys, out, "choose another", data=stream, out=out)
    for config in ("{", "[1]", '{"architectures": ["LlamaForCausalLM"]}'):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text(config)
        refuse(capsys, "config.json", "choose another --out", data=stream, out=tmp_path / "model")


def test_a_bad_checkpoint_is_refused(whole, stream, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:3]))
    refuse(capsys, "metrics.jsonl is shorter", data=stream, out=out)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]))  # as if not finished
    good = (out / "ckpt.pt").read_bytes()
    half = len(good) // 2
    for bad in (good[:half], b"", b"not a checkpoint", good[:half] + bytes([good[half] ^ 1]) + good[half + 1:]):
        (out / "ckpt.pt").write_bytes(bad)
        refuse(capsys, "ckpt.pt", "damaged", data=stream, out=out)
        assert (out / "ckpt.pt").read_bytes() == bad
    torch.save({"weights": torch.zeros(3)}, out / "ckpt.pt")
    refuse(capsys, "ckpt.pt", "not of a run of train.py", data=stream, out=out)
    state = torch.load(whole / "ckpt.pt", weights_only=True)
    torch.save({**state, "identity": {**state["identity"], "lr": 5.0}}, out / "ckpt.pt")
    refuse(capsys, "ckpt.pt", "lr=5.0", data=stream, out=out)


def unfinished(whole, out):
    """A copy of the run `whole` as its next process sees it, with a new model and optimizer."""
    shutil.copytree(whole, out)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]))
    model = LLaMA(Config.named("nano", 500))
    return RunDir(out, json.loads((out / "config.json").read_text())["identity"], Dist("cpu")), model, build_optimizer("clipped_sgd", model, 100.0)


def test_a_run_that_another_process_finishes_meanwhile_is_left_alone(whole, tmp_path):
    run_dir, _, _ = unfinished(whole, tmp_path / "run")

    class Late(RunDir):
        def lock(self):  # the other process's last line, before it lets go of the folder
            shutil.copy(whole / "metrics.jsonl", self.metrics)
            super().lock()
    final = Late(run_dir.path, run_dir.identity, run_dir.dist).acquire({})
    assert final["status"] == "done" and run_dir.metrics.read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_good_checkpoint_that_cannot_be_read_is_not_called_damaged(whole, stream, tmp_path, capsys):
    run_dir, model, optimizer = unfinished(whole, tmp_path / "run")
    size = int(re.search(r"VmSize:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
    limit, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**21, hard))  # the checkpoint has 7.5 MB
    try:
        with pytest.raises(UserError, match="could not read .*ckpt.pt .memory is full.: .*make room"):
            run_dir.load(model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    assert run_dir.load(model, optimizer)[0] == 12
    lines = run_dir.metrics.read_bytes()
    run_dir.ckpt.rename(tmp_path / "elsewhere.pt")
    for target, reason in (("nowhere", "No such file"), ("/proc/self/mem", "Invalid argument"), (tmp_path, "Is a directory")):
        run_dir.ckpt.symlink_to(target)
        refuse(capsys, "could not read", "ckpt.pt", reason, "check path and permissions", data=stream, out=tmp_path / "run")
        run_dir.ckpt.unlink()
    run_dir.ckpt.symlink_to(tmp_path / "elsewhere.pt")
    assert run_dir.load(model, optimizer)[0] == 12 and run_dir.metrics.read_bytes() == lines


def test_a_world_that_does_not_divide_the_batch(stream, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    words = dict(data=stream, out=tmp_path / "run")
    refuse(capsys, "--batch_size=9: it does not divide among 2 processes", batch_size=9, **words)
    refuse(capsys, "--micro_batch=8: it does not divide the 4 sequences", batch_size=8, micro_batch=8, **words)


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as e:
        train.parse(["--help"])
    out = capsys.readouterr().out
    assert not e.value.code and all(f"--{name} " in out and f"[{getattr(train.Settings, name)}]" in out for name in train.Settings.__dataclass_fields__)
    assert all(k in train.Settings.__dataclass_fields__ for k in TINY)


def test_frequency_groups_hold_equal_shares():
    counts = torch.cat([torch.full((2**i,), 2 ** (5 - i)) for i in range(5)])  # five groups of 32 samples
    mixed = torch.randperm(len(counts), generator=torch.Generator().manual_seed(0))
    expected = torch.cat([torch.full((2**i,), i) for i in range(5)])
    assert frequency_groups(counts[mixed], 5).tolist() == expected[mixed].tolist()
    assert frequency_groups(torch.tensor([0, 90, 0, 10]), 10).tolist() == [9, 4, 9, 9]  # one class over several groups


def test_the_diagnostics_are_what_they_say(stream, tmp_path):
    """Plain SGD's effective learning rate is its learning rate; the others against the definitions, on one batch."""
    out = tmp_path / "run"
    here(data=stream, out=out, optimizer="sgd", momentum=0, lr=0.1, diag_every=3)
    lines = [line for line in metrics(out) if "effective_lr" in line]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    for line in lines:
        assert line["effective_lr"] == pytest.approx(line["lr"], rel=1e-4)
    model = LLaMA(Config(hidden=32, ffn=48, layers=1, heads=2, vocab_size=97))
    tokens = torch.randint(97, (4, 16))
    model(tokens, tokens).backward()
    found = Diagnostics(model).before_step()
    ratios = [(p.norm() / p.grad.norm()).item() for p in model.parameters()]
    rows = model.lm_head.weight.grad.norm(dim=1)
    assert found["weight_to_gradient"].item() == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert found["imbalance"].item() == pytest.approx((rows.max() / rows.mean()).item(), rel=1e-4)
