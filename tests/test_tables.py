import json
import re

import pytest

from conftest import ROOT, TINY, metrics, python, settings
from tables import Run

TABLES = ROOT / "tables.py"


@pytest.fixture(scope="module")
def demo(stream, tmp_path_factory):
    """The demo's three runs, small, in a folder of their own: (folder, how to run it again)."""
    folder = tmp_path_factory.mktemp("demo")

    def again(*more):
        return python(TABLES, "demo", f"--data={stream}", *settings(), *more, cwd=folder)
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


def test_bad_words_are_refused(tmp_path):
    for words in (["demo", "--steps", "5"], ["demo", "--lr=3"], ["nothing"]):
        done = python(TABLES, *words, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())


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


def test_a_diverged_run_is_a_result(stream, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("SGD", {**TINY, "data": str(stream), "optimizer": "sgd", "lr": 1e4})
    run.start()
    row = run.row(adam=run)
    assert run.verdict.startswith("diverged at step") and row["status"] == "diverged" and row["val_loss"] is row["gap"] is None
