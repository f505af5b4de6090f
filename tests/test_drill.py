from conftest import ROOT, python


def test_damaged_files_are_refused_or_read():
    done = python(ROOT / "tests" / "drill.py", "fuzz", "--files=90")
    assert done.returncode == 0 and "| ckpt.pt | 10 |" in done.stdout, done.stdout + done.stderr
