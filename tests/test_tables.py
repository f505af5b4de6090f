import ast
import json
import math
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import tables
from conftest import ROOT, TINY, metrics, one_line, python, settings
from sweep import FAILED, LADDER, Run, above, below, interval, plus_minus, spike_steps

TABLES = ROOT / "tables.py"


@pytest.fixture(scope="module")
def demo(stream, tmp_path_factory):
    """The demo's three runs, small, in a folder of their own: (folder, how to run it again)."""
    folder = tmp_path_factory.mktemp("demo")

    def again(*more):
        return python(TABLES, "demo", f"--data={stream}", "--jobs=2", *settings(), *more, cwd=folder)
    first = again()
    assert first.returncode == 0, first.stderr
    return folder, again, first


def test_demo_shows_what_the_runs_measured(demo, stream):
    folder, _, first = demo
    files = {path.suffix: path for path in (folder / "results" / "nano").iterdir()}
    rows = json.loads(files[".json"].read_text())["rows"]
    assert [r["method"] for r in rows] == ["Adam", "SGD with momentum", "clipped SGD"]
    finals = {json.loads((out / "config.json").read_text())["settings"]["optimizer"]: metrics(out)[-1]["val_loss"]
              for out in (folder / "runs").iterdir()}
    for r in rows:
        assert r["val_loss"] == finals[r["optimizer"]]
        assert r["gap"] == pytest.approx((r["val_loss"] - rows[0]["val_loss"]) / rows[0]["val_loss"])
    text = files[".md"].read_text()
    for r in rows:
        assert re.search(rf"\| {r['method']} \| {r['lr']:g} \| {r['val_loss']:.3f} \| \{r['gap']:+.1%} ", text), text
    assert text.split("\n\n")[1] in first.stdout and "3 runs" in text and "12 steps of 8 x 32 tokens" in text
    assert "--steps=12" in text and files[".png"].read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_repeated_and_killed_ones_go_on(demo):
    folder, again, first = demo
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*")}
    second = again()
    assert second.returncode == 0 and "[1/" not in second.stdout
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*")}
    run = next((folder / "runs").glob("*adamw*"))
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("".join(lines.splitlines(keepends=True)[:-1]))  # as if killed before its last line
    third = again()
    assert "[1/1] Adam" in third.stdout and "from step 12" in third.stdout
    assert (run / "metrics.jsonl").read_text() == lines


def test_told_to_stop_its_runs_save(stream, tmp_path):
    lines = {}
    for time_around in range(2):
        process = subprocess.Popen([sys.executable, TABLES, "demo", f"--data={stream}", "--jobs=2",
                                    *settings(steps=5000, log_every=1)],
                                   cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while (len(paths := list(tmp_path.glob("runs/*/metrics.jsonl"))) < 2
               or any(path.stat().st_size <= lines.get(path, 0) for path in paths)):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in err
        assert len(list(tmp_path.glob("runs/*/ckpt.pt"))) == 2 == len(list(tmp_path.glob("runs/*")))
        assert out.count("from step") == 2 * time_around  # the second time they go on
        lines = {path: path.stat().st_size for path in paths}


def test_bad_words_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["demo", "--steps", "5"], ["demo", "--lr=3"], ["nothing"], ["gap", "--seed=7"], ["demo", "--jobs=0"]):
        monkeypatch.setattr(sys, "argv", ["tables.py", *words])
        with pytest.raises(SystemExit) as leave:
            tables.main()
        assert leave.value.code == 2 and words[-1].split("=")[0] in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_failed_run_is_shown_and_stops_nothing(demo):
    folder, again, _ = demo
    run = next((folder / "runs").glob("*adamw*"))
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines[:-40])  # torn
    (run / "ckpt.pt").write_bytes(b"torn too")
    done = again()
    assert done.returncode == 1 and "Traceback" not in done.stderr and "FAILED: train.py: " in done.stderr
    assert re.search(r"\| Adam .* failed: train.py: runs/.*ckpt.pt is damaged", done.stdout)
    assert re.search(r"\| clipped SGD \| 100 \| \d\.\d+ \| - \|", done.stdout)  # no Adam, no gap to it


def test_neighbours_of_a_value_on_the_ladder_and_off_it():
    assert below((1, 3, 10), 3) == [1] and above((1, 3, 10), 3) == [10]
    assert below((1, 3, 10), 5) == [3] and above((1, 3, 10), 10) == [] == below((1, 3), 1)
    assert below(LADDER, 100.0) + above(LADDER, 100.0) == [31.6, 316.0]


def test_statistics_are_those_computed_by_hand():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3 ** 0.5))  # deviation 1, t(2) = 4.303
    assert interval([4.0, 4.5]) == pytest.approx((4.25, 12.706 * 0.25)) and interval([7.0]) == (7.0, None)
    assert plus_minus([0.01, 0.02, 0.03], "+.1%") == "+2.0% ± 2.5%" and plus_minus([1.0, None], ".3f") == "-"
    norms = [1.0] * 100 + [5.0, 5.1, 1.0, 20.0]
    assert spike_steps(norms) == [101, 103] and spike_steps(norms[:100]) == []


def valley(s, lr):
    """Above the best: Adam's is off the start on every axis, the global norm's along the diagonal, clipped SGD's at
    the edge of two grids."""
    if s["optimizer"] == "adamw":
        return abs(lr + 3) / 9 + abs(s["beta1"] - 0.8) + abs(s["beta2"] - 0.99)
    if s["optimizer"] == "sgd":
        clip = math.log10(s.get("grad_clip", 1))
        return 3 * abs(lr + clip - 0.5) + abs(clip) / 3
    update, token = (-4 if s[k] == "none" else math.log10(s[k]) for k in ("update_clip", "token_clip"))
    return abs(lr - 3) / 9 + abs(update + 3.8) / 3 + (token + 5) / 9 - s["momentum"]


LOSSES = {  # of what runs that were never run would have ended with: settings -> loss, or the step where it diverged, or None
    "all is well": lambda s: 4 + valley(s, math.log10(s["lr"])),
    "SGD diverges": lambda s: 5 if s["optimizer"] == "adamw" else s["batch_size"] // 8 if s["lr"] > 1e-3 else 6.0,
    "all diverge": lambda s: 3,
    "one seed diverges": lambda s: 2 if s["seed"] == 43 else 5.0 + s["lr"] / 1e6,
    "some fail": lambda s: None if s["optimizer"] != "sgd" and s["lr"] in (3.16e-3, 100.0) else 5.0,
}


def end(out, words, outcome):
    """Write what a run of train.py with these settings would have left: 110 steps, some of them with diagnostics.
    False, and nothing, if it failed."""
    s = {k: ast.literal_eval(v) if v[0].isdigit() else v for k, v in (w[2:].split("=", 1) for w in words)}
    loss = LOSSES[outcome](s)
    if loss is None:
        return False
    lines = [{"step": i, "lr": s["lr"], "tokens": i * s["batch_size"] * 32, "tok_per_s": 1000, "train_loss": 5.0,
              "grad_norm": None if i == 105 and outcome == "SGD diverges" else 1.0 + 9 * (i == 104),
              "clipped_tensors": 0.5, "clipped_rows": 0.1,
              **({"effective_lr": 0.1, "weight_to_gradient": 30.0, "imbalance": None} if i % 10 == 0 else {})}
             for i in range(1, 111)]
    done = isinstance(loss, float)
    groups = [{"step": step, "val_loss": 5.0, "val_tokens": 9, "group_losses": [5.0 - step / 100] * 9 + [None]}
              for step in (0, 110)]
    lines = groups[:1] + lines + groups[1:] * done
    lines.append({"final": True, "status": "done" if done else "diverged", "step": 110 if done else int(loss),
                  "val_loss": loss if done else None, "seconds": 3.0})
    out.mkdir(parents=True)
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "config.json").write_text(json.dumps(
        {"device": "none", "versions": {"torch": "0"}, "started": "2026-01-01 00:00:00", "git_commit": "0"}))
    return True


@pytest.mark.parametrize("outcome", LOSSES)
def test_every_page_stands_whatever_the_runs_came_to(outcome, stream, tmp_path, monkeypatch, capsys):
    """From the files that runs leave, with no run: each search goes on from what it finds, until a page is there."""
    monkeypatch.chdir(tmp_path)
    names = "demo", "gap", "lr", "ablation", "batch", "dynamics", "thresholds", "frequency", "spikes"
    for name in names if outcome != "one seed diverges" else ("gap",):
        words = ["tables.py", name, f"--data={stream}", "--steps=110"]
        for _ in range(60):
            monkeypatch.setattr(sys, "argv", [*words, "--dry"])
            tables.main()
            missing = {w.rsplit("--out=", 1)[1].strip("'"): w for w in capsys.readouterr().out.splitlines()}
            for out, command in missing.items():
                if not end(tmp_path / out, [w for w in shlex.split(command)[2:] if not w.startswith("--out")], outcome):
                    monkeypatch.setitem(FAILED, Path(out), "train.py: it failed")
            if not missing:
                break
        assert not missing, f"{name} does not end"
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as leave:
            tables.main()
        if (name, outcome) == ("ablation", "all diverge"):
            assert "the largest stable learning rate of SGD with momentum is not known" in leave.value.code
            continue
        assert "FAILED" not in capsys.readouterr().err and (outcome == "some fail" or not leave.value.code)
        stem = next((tmp_path / "results" / "nano").glob(f"{name}-*.json")).with_suffix("")
        rows = json.loads(stem.with_suffix(".json").read_text(), parse_constant=pytest.fail)["rows"]
        text = stem.with_suffix(".md").read_text()
        assert rows and not re.search(r"\b(nan|inf|None)\b", text), text
        assert ("diverged" in text) == any(row["status"] == "diverged" for row in rows) or name in ("gap", "thresholds"), text
        if name == "gap" and outcome == "one seed diverges":
            assert text.count("1 of 3: diverged at step 2") == 5
        if name == "gap" and outcome == "all is well":
            for best in ("Adam | lr 0.001, beta1 0.8, beta2 0.99", "SGD | lr 3.16", "SGD with momentum | lr 3.16, momentum "
                         "0.9", "SGD, global norm clipped | lr 3.16, grad_clip 1, momentum 0.9", "clipped SGD | lr 1000, "
                         "update_clip 0.000158, token_clip 3.16e-06, momentum 0.98 (the grid's edge: token_clip, momentum)"):
                assert f"| {best} |" in text, text


def test_a_dry_run_prints_the_commands_and_does_nothing(tmp_path):
    done = python(TABLES, "gap", "--scale=1b", "--data=data/c4", "--nproc=8", "--dry", cwd=tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr
    lines = done.stdout.splitlines()
    assert all("-m torch.distributed.run --standalone --nproc_per_node=8" in line for line in lines)
    paper = "--optimizer=clipped_sgd --lr=300.0 --token_clip=0.001 --update_clip=0.0002"
    assert any(paper in line and "--batch_size=4096 --steps=19125" in line for line in lines)


def test_cost_and_a_scale_that_does_not_fit(tmp_path):
    done = python(TABLES, "cost", "--scale=1b", "--data=data/c4", "--gpus=16", "--mfu=0.5", cwd=tmp_path)
    assert done.returncode == 0 and "| parameters | 1,339,082,752 |" in done.stdout
    flops = 20_054_016_000 * (6 * (1_339_082_752 - 49 * 2048 - 32_000 * 2048) + 6 * 24 * 256 * 2048)
    assert f"| {flops / (16 * 989e12 * 0.5) / 3600:.2f} |" in done.stdout
    refused = python(TABLES, "gap", "--scale=1b", "--data=data/c4", "--micro_batch=4096", cwd=tmp_path)
    one_line(refused, "1b", "GiB", "--micro_batch")
    assert not list(tmp_path.iterdir())


def test_a_diverged_run_is_a_result(stream, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("SGD", {**TINY, "data": str(stream), "optimizer": "sgd", "lr": 1e4})
    run.start(SimpleNamespace(nproc=1, jobs=1))
    row = run.row(adam=run)
    assert run.verdict.startswith("diverged at step") and row["status"] == "diverged" and row["val_loss"] is row["gap"] is None
