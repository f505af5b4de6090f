import ast
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

import train
from baselines import build_optimizer
from conftest import ROOT, TINY, experiment, metrics, one_line, python, settings
from experiments import adam_sgd_gap, length, methods, spikes
from experiments.paper import cost_main
from experiments.sweep import (
    FAILED, LR_GRID, Run, interval_text, mark_diverged, mean_interval, next_above, next_below,
    plot_seeds, spike_steps, start)
from model import Config, LLaMA


def main(*words):
    """The command line in this process: the experiment's name, its options."""
    module = words[0] if words[0] in ("spikes", "length") else "adam_sgd_gap"
    sys.argv = [f"{module}.py", *words]
    if module == "spikes":
        methods.main({"spikes": spikes.spikes})
    elif module == "length":
        methods.main({"length": length.length}, lengths=(length.lengths, None))
    else:
        methods.main(adam_sgd_gap.EXPERIMENTS)


# ---- real runs ----

GAP = {"Adam": {"optimizer": "adamw", "lr": 1e-2, "beta1": 0.8, "beta2": 0.99},
       "SGD with momentum": {"optimizer": "sgd", "lr": 0.5, "momentum": 0.5},
       "clipped SGD": {"optimizer": "clipped_sgd", "lr": 100.0, "token_clip": 1e-2,
                       "update_clip": 1e-3, "momentum": 0.8},
       "clipped SGD, all rows": {"optimizer": "clipped_sgd", "lr": 200.0, "row_clip": 1e-2,
                                 "schedule_update_clip": True}}


def leave_a_gap_page(folder):
    """results/nano/gap.json as `gap` writes it, of runs at the settings in GAP."""
    rows = [{"method": name, "model": "nano", "seed": seed, **found, "status": "done",
             "val_loss": 5.0, "role": role}
            for name, found in GAP.items() for role, seed in (("search", 42), ("seed", 43))]
    (folder / "results" / "nano").mkdir(parents=True)
    (folder / "results" / "nano" / "gap.json").write_text(json.dumps({"rows": rows}))


@pytest.fixture(scope="module")
def demo(stream, tmp_path_factory):
    """The demo's four runs, small, in a folder of their own: (folder, how to repeat, output)."""
    folder = tmp_path_factory.mktemp("demo")
    leave_a_gap_page(folder)

    def again(*more):
        words = ["demo", f"--data={stream}", "--jobs=2", *settings(keep="all"), *more]
        return experiment("adam_sgd_gap", *words, cwd=folder)
    first = again()
    assert first.returncode == 0, first.stderr
    return folder, again, first


def test_demo_shows_what_the_runs_measured(demo):
    folder, _, first = demo
    files = {path.suffix: path for path in (folder / "results" / "nano").glob("demo*")}
    content = json.loads(files[".json"].read_text())
    rows = content["rows"]
    assert [row["method"] for row in rows] == list(GAP)
    finals = {}
    for out in (folder / "runs").iterdir():
        config = json.loads((out / "config.json").read_text())
        finals[config["settings"]["lr"]] = metrics(out)[-1]["val_loss"]
    text = files[".md"].read_text()
    for row in rows:
        assert row["val_loss"] == finals[row["lr"]]
        assert row["seed"] == 43 and GAP[row["method"]].items() <= row.items()
        adam = rows[0]["val_loss"]
        assert row["gap"] == pytest.approx((row["val_loss"] - adam) / adam)
        line = rf"\| {row['method']} \| lr {row['lr']:g}, .* \| {row['val_loss']:.3f} \| "
        assert re.search(line + rf"\{row['gap']:+.1%} ", text), text
    assert text.split("\n\n")[1] in first.stdout
    assert "12 steps of 8 x 32 tokens" in text and "float32; 4 runs, seed 43." in text
    assert "1 thread per run" in text
    assert content["command"].startswith("python -m experiments.adam_sgd_gap demo --data=")
    assert "--steps=12" in content["command"] and content["command"] in text
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    # the name says what is not default; --jobs changes no result
    assert re.fullmatch(r"demo-data-[0-9a-f]{4}-batch_size8-steps12-.*-dtypefloat32-keepall", files[".md"].stem)


def test_a_table_computes_what_the_commands_compute_that_it_prints(
        demo, tmp_path, monkeypatch):
    folder, again, _ = demo
    runs = (folder / "runs").rename(folder / "before")
    commands = again("--dry").stdout.splitlines()
    runs.rename(folder / "runs")
    assert len(commands) == 4
    monkeypatch.chdir(folder)
    for command in commands:
        (_, script, *words), name = shlex.split(command)[:-1], command.rpartition("--out=")[2]
        assert Path(script).resolve() == ROOT / "train.py"
        assert train.main([*words, f"--out={tmp_path / name}"]) == 0
        assert metrics(tmp_path / name) == metrics(folder / name)


def test_finished_runs_are_not_repeated_and_killed_ones_continue(demo):
    folder, again, _ = demo
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    second = again()
    assert second.returncode == 0 and "[1]" not in second.stdout
    assert "4 of 4 runs were there, from commit" in second.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    # as if one were killed before its last line
    path = next((folder / "runs").glob("*adamw*")) / "metrics.jsonl"
    lines = path.read_text()
    path.write_text("".join(lines.splitlines(keepends=True)[:-1]))
    third = again()
    assert "[1] Adam" in third.stdout and "[2]" not in third.stdout
    assert "from step 12" in third.stdout and "3 of 4 runs were there" in third.stdout
    assert path.read_text() == lines


def test_a_failed_run_is_shown_and_stops_nothing(demo):
    folder, again, _ = demo
    run = next((folder / "runs").glob("*adamw*"))
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines[:-40])  # torn
    (run / "ckpt.pt").write_bytes(b"torn too")
    done = again()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "FAILED: train.py: " in done.stderr
    assert re.search(r"\| Adam .* failed: train.py: runs/.*ckpt.pt is damaged", done.stdout)
    assert re.search(r"\| clipped SGD \| lr 100, .* \| \d\.\d+ \| - \|", done.stdout)  # no gap
    assert "**1 of 4 runs failed** (Adam)" in done.stdout


def test_edited_code_is_run_again_and_edited_comments_are_not(stream, tmp_path):
    """A run's folder, by which finished runs are found, is named after the code."""
    for path in [*ROOT.glob("*.py"), ROOT / "experiments"]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    leave_a_gap_page(tmp_path)
    optim, folders = tmp_path / "optim.py", []
    for old, new in (("", ""), ("# ", "#  "), ('"""SGD with', '"""SGD, with'),
                     ("alpha=-lr", "alpha=-2 * lr")):
        text = optim.read_text()
        assert old in text
        optim.write_text(text.replace(old, new) if old else text)
        done = python("-m", "experiments.adam_sgd_gap", "demo", f"--data={stream}", "--dry",
                      *settings(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        folders.append({line.rpartition("--out=")[2] for line in done.stdout.splitlines()})
    first, comment, docstring, code = folders
    assert first == comment == docstring and not first & code and len(first) == len(code) == 4
    # edited while a table is at work: the runs after it would be of other code than the first
    table = subprocess.Popen(
        [sys.executable, "-m", "experiments.adam_sgd_gap", "demo", f"--data={stream}", "--jobs=1",
         *settings(steps=100)], cwd=tmp_path, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE)
    while not list(tmp_path.glob("runs/*/metrics.jsonl")):
        assert table.poll() is None
        time.sleep(0.1)
    optim.write_text(text)
    _, err = table.communicate(timeout=60)
    assert table.returncode == 1 and len(list(tmp_path.glob("runs/*"))) == 1
    assert err == ("demo: the code was edited since this began: start again, finished runs are "
                   "kept\n")


def test_two_tables_at_once_finish_both(stream, tmp_path):
    leave_a_gap_page(tmp_path)
    words = ["-m", "experiments.adam_sgd_gap", "demo", f"--data={stream}", *settings(steps=60)]
    tables = [subprocess.Popen([sys.executable, *words], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in range(2)]
    outputs = [table.communicate(timeout=120)[0] for table in tables]
    assert [table.returncode for table in tables] == [0, 0], outputs
    pages = [re.findall(r"^\| (.*?) \| lr .*? \| (.*?) \|", out, re.MULTILINE) for out in outputs]
    assert pages[0] == pages[1] and len(pages[0]) == 4
    assert any("another process is at work" in out for out in outputs)


def test_settings_that_train_refuses_stop_everything(stream, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    for name, *words, expected in (
            ("lr", f"--data={stream}", *settings(steps=-1), "--steps=-1: it must be above 0"),
            ("gap", "--momentum=0.5", "--momentum=0.5: it does nothing for adamw"),
            # what the search of clipped SGD on all rows would try after hours
            ("gap", f"--data={stream}", "--min_lr=0", "--schedule_update_clip=True: it needs"),
            ("cost", "--model=7b", "--model=7b: choose from micro"),
            ("cost", "--micro_batch=abc", "--micro_batch: invalid whole number value: 'abc'")):
        done = call(lambda: cost_main(words) if name == "cost" else main(name, *words))
        one_line(done, expected)
        assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())


def gpus_of_children(parent):
    """CUDA_VISIBLE_DEVICES of the processes that this one has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if stat.read_text().rpartition(")")[2].split()[1] == str(parent):
                environ = stat.with_name("environ").read_bytes().split(b"\0")
                found += [line[21:] for line in environ if line.startswith(b"CUDA_VISIBLE_DEVICES=")]
        except OSError:  # it has ended
            pass
    return sorted(found)


def test_told_to_stop_its_runs_save_and_each_had_a_gpu_of_its_own(stream, tmp_path):
    leave_a_gap_page(tmp_path)
    words = ["demo", f"--data={stream}", "--jobs=2", *settings(steps=5000, log_every=1)]
    sizes = {}
    for attempt in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.adam_sgd_gap", *words], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "4,6"})
        # until both runs have written more than before
        while (len(paths := list(tmp_path.glob("runs/*/metrics.jsonl"))) < 2
               or any(path.stat().st_size <= sizes.get(path, 0) for path in paths)):
            assert process.poll() is None
            time.sleep(0.1)
        assert gpus_of_children(process.pid) == [b"4", b"6"]
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in err
        assert len(list(tmp_path.glob("runs/*"))) == 2  # the third one was not started
        assert len(list(tmp_path.glob("runs/*/ckpt.pt"))) == 2
        assert len(re.findall("from step [1-9]", out)) == 2 * attempt  # then they continue
        sizes = {path: path.stat().st_size for path in paths}


def test_a_diverged_run_is_a_result(stream, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = Run("SGD", {**TINY, "model": "micro", "data": str(stream), "optimizer": "sgd", "lr": 1e4,
                      "seed": 42})
    start(run, nproc=1)
    row = run.row(adam=run)
    assert run.outcome.startswith("diverged at step") and row["status"] == "diverged"
    assert row["val_loss"] is None and row["gap"] is None


def test_a_long_run_is_read_in_little_memory(stream, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("Adam", {"model": "1b", "data": str(stream), "optimizer": "adamw", "lr": 1e-3,
                       "seed": 42})
    run.out.mkdir(parents=True)
    with open(run.out / "metrics.jsonl", "w") as file:
        for step in range(1, 30_001):
            print(json.dumps({"step": step, "train_loss": 5.0, "grad_norm": 1.0}), file=file)
        print(json.dumps({"final": True, "status": "done", "step": step, "val_loss": 5.0}), file=file)
    tracemalloc.start()
    assert run.read() and run.average("grad_norm") == 1.0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 30_000  # bytes; as dicts it would be four times as much


# ---- search and statistics ----

def test_neighbours_of_a_value_on_the_grid_and_off_it():
    assert next_below((1, 3, 10), 3) == 1 and next_above((1, 3, 10), 3) == 10
    assert next_below((1, 3, 10), 5) == 3 and next_above((1, 3, 10), 5) == 10
    assert next_above((1, 3, 10), 10) is None and next_below((1, 3), 1) is None
    assert next_below(LR_GRID, 100.0) == 31.6 and next_above(LR_GRID, 100.0) == 316.0
    for spec in methods.METHODS.values():  # also 0.99 to 0.999
        for grid in (LR_GRID, methods.FACTORS, *spec["axes"].values()):
            for low, high in zip(grid, grid[1:]):
                assert next_above(grid, low) == high and next_below(grid, high) == low
    assert methods.halved((1e-3, 3.16e-3, 1e-2)) == [1e-3, 1.78e-3, 3.16e-3, 5.62e-3, 1e-2]
    assert len(LR_GRID) == 23 and LR_GRID[0] == 1e-6 and LR_GRID[-1] == 1e5


def test_statistics_are_those_computed_by_hand():
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3 ** 0.5))  # t(2), s = 1
    assert mean_interval([4.0, 4.5]) == pytest.approx((4.25, 12.706 * 0.25))
    assert mean_interval([7.0]) == (7.0, None)
    assert interval_text([0.01, 0.02, 0.03], "+.1%") == "+2.0% ± 2.5%"
    assert interval_text([7.0], ".1f") == "7.0"
    assert interval_text([1.0, None], ".3f") == "-" == interval_text([1.0, math.inf], ".3f")
    norms = [1.0] * 100 + [5.0, 5.1, 1.0, 20.0]
    assert spike_steps(norms) == [101, 103] and spike_steps(norms[:100]) == []


# ---- every page, from stubbed runs ----

def valley(s, lr):
    """Loss above the best. Adam's best lr is between two of the grid, the global norm's along a
    diagonal, clipped SGD's at the edge of two grids, with all rows along a diagonal, too. SCALE's
    best momentum is another with multipliers."""
    if s["optimizer"] == "adamw":
        return abs(lr + 3.25) / 9 + abs(s["beta1"] - 0.8) + abs(s["beta2"] - 0.99)
    if s["optimizer"] == "sgd":
        clip = s.get("grad_clip", "none")
        clip = 0 if clip == "none" else math.log10(clip)
        return 3 * abs(lr + clip - 0.5) + abs(clip) / 3
    if s["optimizer"] == "scale":
        fast = s.get("embedding_mult", 1)
        return (abs(lr + 2.5) / 3 + abs(s["momentum"] - (0.95 if fast > 1 else 0.9))
                + abs(math.log2(fast / 32)) / 9)
    clips = [-4 if s[name] == "none" else math.log10(s[name])
             for name in ("update_clip", "token_clip")]
    best_clip, bonus = -3.8, 0
    if s.get("schedule_update_clip") == "False":
        best_clip = -3.3
    elif s.get("schedule_update_clip") == "True":
        best_clip, bonus = -2.8, 0.1
    return (abs(lr - 3) / 9 + abs(clips[0] - best_clip) / 3 - bonus + (clips[1] + 5) / 9
            - s["momentum"])


def diverges_unless_adam(s):
    if s["optimizer"] == "adamw":
        return 5
    return s["batch_size"] // 8 if s["lr"] > 1e-3 else 6.0


def one_seed_diverges(s):
    """SGD at its best learning rate; below it, another momentum is better."""
    if s["optimizer"] == "sgd" and s["seed"] == 43 and s["lr"] > 1:
        return 2
    return 4 + valley(s, math.log10(s["lr"])) + (s["lr"] <= 1) * abs(s.get("momentum", 0) - 0.8)


def one_seed_is_lucky(s):
    """The search's, with Adam above its best learning rate."""
    lucky = s["optimizer"] == "adamw" and s["lr"] > 1e-3 and s["seed"] == 42
    return 4 + valley(s, math.log10(s["lr"])) - lucky


# settings -> the final loss, a float; or the step where it diverged, an int; or None, it failed
OUTCOMES = {
    "all is well": lambda s: 4 + valley(s, math.log10(s["lr"])),
    "SGD diverges": diverges_unless_adam,
    "all diverge": lambda s: 3,
    "one seed diverges": one_seed_diverges,
    "one seed is lucky": one_seed_is_lucky,
    "some fail": lambda s: None if s["optimizer"] != "sgd" and s["lr"] in (3.16e-3, 100) else 5.0,
}
BEST = (
    "Adam | lr 0.000562, beta1 0.8, beta2 0.99, grad_clip 0.3", "SGD | lr 3.16",
    "SGD with momentum | lr 3.16, momentum 0.5",
    "SGD, global norm clipped | lr 3.16, grad_clip 1, momentum 0.9",
    "clipped SGD | lr 1000, update_clip 0.000158, token_clip 3.16e-06, momentum 0.98 "
    "(the grid's edge: token_clip, momentum)",
    "clipped SGD, all rows | lr 1000, update_clip 0.00158, row_clip 3.16e-06, momentum 0.98, "
    "schedule_update_clip True, token_clip 3.16e-06 (the grid's edge: row_clip, momentum)",
    "one | SCALE | lr 0.00316, momentum 0.9", "separate | SCALE | lr 0.00316, momentum 0.95, "
    "embedding_mult 32, lm_head_mult 4, matrix_mult 1")


def leave_a_run(command, outcome):
    """Write the files that this command of train.py would leave: up to 110 steps, some with
    diagnostics. Returns its folder, and whether it finished."""
    words = [word[2:].split("=", 1) for word in shlex.split(command) if word.startswith("--")]
    s = {name: ast.literal_eval(v) if v[0].isdigit() else v for name, v in words}
    out, result = Path(s.pop("out")), OUTCOMES[outcome](s)
    if result is None:
        return out, False
    lines, steps = [], min(s["steps"], 110)
    for step in range(1, steps + 1):
        line = {"step": step, "lr": s["lr"], "tokens": step * s["batch_size"] * 32,
                "tok_per_s": 1000, "train_loss": 5.0, "grad_norm": 1.0 + 9 * (step == 104),
                "clipped_tensors": 0.5, "clipped_rows": 0.1}
        if step == 105 and outcome == "SGD diverges":
            line["grad_norm"] = None
        if step % 10 == 0:
            line |= {"effective_lr": 0.1, "weight_to_gradient": 30.0, "imbalance": None}
        lines.append(line)
    done = isinstance(result, float)
    evals = [{"step": step, "val_loss": 5.0, "val_tokens": 9,
              "group_losses": [5.0 - step / 100] * 9 + [None]} for step in (0, steps)]
    lines = [evals[0], *lines, *(evals[1:] if done else [])]
    lines.append({"final": True, "status": "done" if done else "diverged",
                  "step": steps if done else int(result), "val_loss": result if done else None,
                  "seconds": 3.0})
    out.mkdir(parents=True)
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "config.json").write_text(json.dumps(
        {"device": "none", "world_size": 1, "versions": {"torch": "0"}, "git_commit": "0",
         "started": "2026-01-01 00:00:00", "identity": {"dtype": "float32"}}))
    return out, True


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_page_stands_whatever_the_runs_came_to(
        outcome, stream, tmp_path, monkeypatch, capsys):
    """Each search goes on from the files of the runs that --dry names, until a page is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    others = [name for name in adam_sgd_gap.EXPERIMENTS if name != "gap"]
    others += ["spikes", "length --scale=micro", "length"]  # nano's starts from micro's
    few = {"one seed diverges": ["gap"], "one seed is lucky": ["length --scale=micro"]}
    for target in few.get(outcome, ["gap", *others]):
        name, *words = target.split()
        steps = 110 if name in ("dynamics", "spikes") else 30
        words = [name, *words, f"--data={stream}", *[f"--steps={steps}"] * (name != "length"),
                 *["--seeds=2"] * (name == "demo")]
        for _ in range(60):
            main(*words, "--dry")
            commands = {line.rpartition("=")[2]: line  # one run may be there in two ways
                        for line in capsys.readouterr().out.splitlines()}
            for command in commands.values():
                out, finished = leave_a_run(command, outcome)
                if not finished:
                    monkeypatch.setitem(FAILED, out, "train.py: it failed")
            if not commands:
                break
        assert not commands, f"{name} does not end"

        with pytest.raises(SystemExit) as leave:
            main(*words)
        if (name, outcome) == ("ablation", "all diverge"):
            reason = "the maximum stable learning rate of SGD with momentum is not known"
            assert reason in leave.value.code
            continue
        assert "FAILED" not in capsys.readouterr().err
        assert outcome == "some fail" or not leave.value.code
        scale = "micro" if "--scale=micro" in words else "nano"
        page = next((tmp_path / "results" / scale).glob(f"{name}*.json"))
        if scale == "micro":
            shutil.copy(page, page.with_name("length.json"))  # without the name of the data
        if name == "gap":
            shutil.copy(page, page.with_name("gap.json"))  # the demo reads it
        rows = json.loads(page.read_text(), parse_constant=pytest.fail)["rows"]
        text = page.with_suffix(".md").read_text()
        assert rows and not re.search(r"\b(nan|inf|None)\b", text), text
        assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        if name not in ("gap", "one_lr", "thresholds", "length"):  # tables of the best runs
            assert ("diverged" in text) == any(row["status"] == "diverged" for row in rows), text
        assert "runs failed**" in text or all(row["status"] != "failed" for row in rows)
        if name == "gap" and outcome == "one seed diverges":
            assert "| SGD with momentum | lr 1, momentum 0.8 |" in text
            assert "diverged at" not in text and any(row["status"] == "diverged" for row in rows)
        if name == "length" and outcome == "all is well":
            at = [(row["tokens_per_parameter"], row["method"]) for row in rows
                  if row["role"] == "seed"]
            longest, seeds = (20, 3 + 3 + 1 + 1) if scale == "micro" else (7, 3 + 3 + 1)
            assert at[:3] == [(0.4, "Adam")] * 3 and at[-1] == (longest, "SCALE")
            per_step, count = 32 * 32, Config.named(scale, 500).parameters
            assert len(at) == 5 * seeds and {
                row["steps"] for row in rows if row["tokens_per_parameter"] == longest} == {
                round(longest * count / per_step)}
        if outcome == "one seed is lucky":
            best = {(row["tokens_per_parameter"], row["lr"]) for row in rows
                    if row["method"] == "Adam" and row["role"] == "seed"}
            # at 7 and 20 the search's seed is the only one
            assert best == {(0.4, 1e-3), (2, 1e-3), (7, 3.16e-3), (20, 3.16e-3)}
        if name == "gap" and outcome == "all is well":
            assert "**The longest runs read their text" in text  # 30 x 32 sequences
            for best in BEST:
                assert f"{best} |" in text, text
            losses = {row["method"]: row["val_loss"] for row in rows if row["role"] == "seed"}
            adam, sgd = losses["Adam"], losses["SGD"]
            gaps = f"{sgd / adam - 1:+.1%} ± 0.0% | {sgd - adam:+.3f} ± 0.000"
            assert f"| {sgd:.3f} ± 0.000 | {math.exp(sgd):.1f} ± 0.0 | {gaps} |" in text
        if name == "demo" and outcome == "all is well":
            assert [row["seed"] for row in rows] == [43, 44] * 4 and "| +0.0% ± 0.0% |" in text
        if name == "spikes" and outcome == "all is well":
            assert {row["variant"] for row in rows} == {*spikes.VARIANTS, "Fast Embed"}
            assert all(row["spikes"] == [104] for row in rows)


def test_longer_training_at_nano_starts_where_the_settings_at_micro_point(
        stream, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    rows = [{"role": "seed", "tokens_per_parameter": n, "method": name, "lr": 1.0,
             **dict.fromkeys(methods.METHODS[name]["axes"], 0.5)}
            for name in length.NAMES for n in (0.4, 7.0)]
    clipped = [row for row in rows if row["method"] == "clipped SGD"]
    clipped[0] |= {"lr": 1000.0, "update_clip": 1.58e-3, "token_clip": 1e-4, "momentum": 0.5}
    clipped[1] |= {"lr": 316.0, "update_clip": 5e-4, "token_clip": 3.16e-5, "momentum": 0.95}
    length.MICRO.parent.mkdir(parents=True)
    length.MICRO.write_text(json.dumps({"rows": rows}))
    main("length", "--dry", f"--data={stream}", "--lengths=0.4,7")
    commands = [line for line in capsys.readouterr().out.splitlines() if "token_clip=0.0" in line]
    start = "--lr=316.0 --token_clip=0.001 --update_clip=0.0005 --momentum=0.8"  # nano's best
    assert any(start in command for command in commands)
    # nano's lr and clips by micro's factor, the momentum that micro changed to; and its neighbours
    for update_clip in ("5e-05", "0.000158", "0.0005"):
        moved = f"--lr=100.0 --token_clip=0.000316 --update_clip={update_clip} --momentum=0.95"
        assert any(moved in command for command in commands)
    with pytest.raises(SystemExit) as leave:
        main("length", "--dry", f"--data={stream}", "--lengths=3")
    assert leave.value.code == "length: --lengths: results/micro/length.json has 0.4, 7, not 3"


def test_seeds_are_a_mean_and_a_band_and_divergences_are_above_the_losses():
    from matplotlib.figure import Figure
    axes = Figure().subplots()
    style = {"color": "black"}
    plot_seeds(axes, [1, 2], [[4.0, 3.0], [6.0, 2.0]], style, "Adam")
    [line], [band] = axes.lines, axes.collections
    assert list(line.get_ydata()) == [5.0, 2.5] and line.get_label() == "Adam"
    corners = band.get_paths()[0].vertices[:, 1]
    assert (corners.min(), corners.max()) == (2.0, 6.0)
    mark_diverged(axes, [], style)
    assert not axes.child_axes
    mark_diverged(axes, [1.5], style)
    [strip] = axes.child_axes
    assert strip.get_ylabel() == "diverged" and list(strip.lines[0].get_xdata()) == [1.5]
    assert strip.get_position().y0 > axes.get_position().y1 and len(axes.lines) == 1


# ---- the command line ----

def test_bad_words_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    for words in (["demo", "--steps", "5"], ["demo", "--lr=3"], ["nothing"], ["gap", "--seed=7"],
                  ["demo", "--jobs=0"], ["demo", "--out=x"], ["demo", "steps=5"],
                  ["demo", "--jobs=x"], ["lr", "--batch=1"], ["lr", "--steps={[]:1}"],
                  # these would do nothing
                  ["lr", "--seeds=3"]):
        with pytest.raises(SystemExit) as leave:
            main(*words)
        stderr = capsys.readouterr().err
        assert leave.value.code == 2 and words[-1].split("=")[0] in stderr
        assert len(stderr.splitlines()) == 1
        assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as leave:
        main("demo", "--scale=60m", "--data=x", "--dry")
    assert "results/60m/gap-x.json is missing" in leave.value.code
    with pytest.raises(SystemExit) as leave:  # spikes compares these itself
        main("spikes", "--init=small")
    assert leave.value.code == "spikes: it sets init itself: drop --init"
    with pytest.raises(SystemExit) as leave:
        main("gap", "--matrix_mult=2", "--dry")
    assert leave.value.code == "gap: the search is over this: drop --matrix_mult"
    with pytest.raises(SystemExit) as leave:
        main("lr", "--nproc=3")
    assert "lr: a batch of 32 sequences does not divide among 3 processes" in leave.value.code
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as leave:
        main("length", "--steps=5", "--dry")
    assert leave.value.code == "length: --lengths sets the steps: drop --steps"
    with pytest.raises(SystemExit) as leave:
        main("length", "--dry")
    assert "results/micro/length.json is missing" in leave.value.code


def test_a_dry_run_prints_the_commands_and_does_nothing(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    for name, shape in (("gap", "--batch_size=4096 --steps=19125"),
                        ("spikes", "--batch_size=1024 --steps=38250")):
        words = name, "--scale=1b", "--data=data/c4", "--nproc=8", "--dry"
        done = call(lambda: main(*words))
        assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr
        lines = done.stdout.splitlines()
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node=8"
        assert lines and all(torchrun in line and shape in line for line in lines)
        paper = "--optimizer=clipped_sgd --lr=300.0 --token_clip=0.001 --update_clip=0.0002"
        assert any(paper in line for line in lines)
        assert any("--init=small" in line for line in lines) == (name == "spikes")
    # from a start between two values of the grid
    done = call(lambda: main("lr", "--scale=350m", "--data=data/c4", "--dry"))
    clipped = [line for line in done.stdout.splitlines() if "--token_clip=0.001" in line]
    assert [re.search(r"--lr=(\S+)", line)[1] for line in clipped] == [
        "100.0", "200.0", "316.0", "1000.0", "3160.0"]


def test_cost(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)

    def cost(*words):
        return call(lambda: cost_main(words))
    one_line(cost(f"--data={tmp_path}"), "meta.json is missing")
    (tmp_path / "results" / "nano").mkdir(parents=True)
    (tmp_path / "results" / "nano" / "gap.md").write_text("Caption. 118 runs, seed 42, 43.\n")
    out = cost("--scale=1b", "--target=gap", "--gpus=16", "--mfu=0.5").stdout
    assert "| parameters | 1,339,082,752 |" in out
    matmul = 1_339_082_752 - 49 * 2048 - 32_000 * 2048
    flops = 20_054_016_000 * (6 * matmul + 6 * 24 * 256 * 2048)
    hours = flops / (16 * 989e12 * 0.5) / 3600
    assert f"| {hours:.2f} |" in out
    # 32 sequences of 256 tokens: the logits and their gradient in bf16
    assert f"logits {32 * 256 * 32_000 * 4 / 2**30:.2f}" in out
    assert f"| GiB of a checkpoint, Adam | {12 * 1_339_082_752 / 2**30:.2f}, twice" in out
    assert "| C4 files for one epoch, in rows | 220, 66 GB |" in out  # 4,096 x 19,125 documents
    assert "| runs of gap, as in results/nano/gap.md | 118 |" in out
    assert f"| hours of gap | {118 * hours:,.1f} |" in out
    assert "| GiB kept of finished runs | 0.0 |" in out
    # runs of half the tokens, and runs unlike one another, whose page may be that of another scale
    (tmp_path / "results" / "micro").mkdir()
    for target, hours, scale in (("spikes", f"{59 * hours:,.1f}", "nano"),
                                 ("thresholds", "-", "nano"), ("length", "-", "micro")):
        page = tmp_path / "results" / scale / f"{target}.md"
        page.write_text("Caption. 118 runs, seed 42.\n")
        out = cost("--scale=1b", f"--target={target}", "--gpus=16", "--mfu=0.5").stdout
        assert f"| hours of {target} | {hours} |" in out and "GiB kept of finished runs" in out
        assert f"as in results/{scale}/{target}.md | 118 |" in out
    # one_lr's page here is of other data
    shutil.copy("results/nano/gap.md", "results/nano/one_lr-news.md")
    out = cost("--scale=1b", "--target=one_lr").stdout
    assert "| runs of one_lr, as in results/nano/one_lr-news.md | 118 |" in out
    # without a micro-batch all of a GPU's sequences are there at once
    out = cost("--scale=60m", "--gpus=16", "--micro_batch=none", "--seeds=5").stdout
    assert f"logits {2048 / 16 * 256 * 32_000 * 4 / 2**30:.2f}" in out
    assert "| runs of paper, stated settings, 5 seeds | 20 |" in out
    for scale, files in (("130m", 29), ("350m", 87)):
        out = cost(f"--scale={scale}").stdout
        assert f"in rows | {files}," in out and "| runs of paper, stated settings, one seed | 4" in out


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_optimizer_state_is_as_large_as_the_tables_say(name):
    spec, model = methods.METHODS[name], LLaMA(Config.named("micro", 2000))
    settings = {"model": "micro", **spec["start"]}
    options = {k: v for k, v in spec["start"].items() if k not in ("optimizer", "grad_clip")}
    optimizer = build_optimizer(settings["optimizer"], model, **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = [x for state in optimizer.state.values() for x in state.values()
               if isinstance(x, torch.Tensor) and x.dim()]
    size = sum(x.numel() * x.element_size() for x in tensors)
    expected = methods.state_bytes(settings, 2000) * model.config.parameters
    assert size == pytest.approx(expected, rel=0.01)


def test_a_search_beyond_nano_has_to_be_asked_for(tmp_path):
    refused = experiment("adam_sgd_gap", "gap", "--scale=1b", "--data=data/c4", cwd=tmp_path)
    one_line(refused, "gap: at 1b", "make cost TARGET=gap SCALE=1b", "TUNE=1", "make paper")
    assert not list(tmp_path.iterdir())


def test_the_papers_runs_need_no_search(stream, tmp_path):
    words = [f"--data={stream}", "--model=micro", "--jobs=2", *settings()]
    done = experiment("paper", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "one run of nano" in done.stdout and len(list(tmp_path.glob("runs/*"))) == 4
    [page] = tmp_path.glob("results/nano/paper-*.md")
    assert re.search(r"\| Adam \| lr 0.00316, beta1 0.8, .* \| \d", page.read_text())
    assert re.search(r"\| clipped SGD \| lr 316, .* \| \d\.\d+ \| [+-]", page.read_text())
    kept = [torch.load(path, weights_only=True) for path in tmp_path.glob("runs/*/ckpt.pt")]
    assert len(kept) == 4 and all(set(state) == {"identity", "model"} for state in kept)
    dry = experiment("paper", "--scale=1b", "--nproc=8", "--data=data/c4", "--dry", cwd=tmp_path)
    assert "hours of paper | 54.3" in dry.stderr and len(dry.stdout.splitlines()) == 4
    paper = "--optimizer=clipped_sgd --lr=300.0 --token_clip=0.001 --update_clip=0.0002"
    assert paper in dry.stdout and "--nproc_per_node=8" in dry.stdout
    # 32 sequences at a time would not divide the 20 of a process
    dry = experiment("paper", "--scale=1b", "--nproc=2", "--batch_size=40", "--dry", cwd=tmp_path)
    assert dry.stdout.count("--micro_batch=4 ") == 4
