import re

import pytest
from conftest import ROOT, experiment, one_line

from experiments.report import report

PAGE = """What was run.

| method | loss |
| --- | --- |
| Adam | 4.483 ± 0.052 |

`make gap`; CPU
"""
TEMPLATE = """# Results

| claim | paper | ours | verdict | link |
| --- | --- | --- | --- | --- |
| Adam learns | yes | {ours} | yes | [gap](results/gap.md) |

{{{{table {page}}}}}

End.
"""


@pytest.fixture
def write(tmp_path):
    """Runs report in a folder with one page and a template; returns the process and RESULTS.md."""
    def run(ours="4.483 ± 0.052", page="results/gap.md", content=PAGE):
        template = TEMPLATE.format(ours=ours, page=page)
        for folder, name, text in (("results", "gap.md", content),
                                   ("experiments", "results_template.md", template)):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / name).write_text(text)
        return experiment("report", cwd=tmp_path), tmp_path / "RESULTS.md"
    return run


def test_a_table_comes_with_the_line_on_how_it_was_made(write):
    done, results = write()
    assert done.returncode == 0, done.stderr
    table = PAGE.partition("\n\n")[2].strip()
    assert results.read_text().endswith(f"(results/gap.md) |\n\n{table}\n\nEnd.\n")


@pytest.mark.parametrize("ours, number", [("4.48", "4.48"), ("4.483 and 5%", "5%"),
                                          ("-4.483", "-4.483"), ("1,000", "1000")])
def test_a_claim_whose_number_is_not_in_its_page_is_refused(write, ours, number):
    done, results = write(ours=ours)
    one_line(done, f"{number}, claimed", "results/gap.md", "Adam learns")
    assert not results.exists()


@pytest.mark.parametrize("ours", ["4,483", "+4.483"])
def test_signs_and_separators_do_not_matter(write, ours):
    page = PAGE.replace("4.483", "4483") if "," in ours else PAGE
    done, _ = write(ours=ours, content=page)
    assert done.returncode == 0, done.stderr


def test_a_missing_page_is_refused(write):
    done, results = write(page="results/lr.md")
    one_line(done, "results/lr.md", "missing")
    assert not results.exists()


def test_a_page_without_a_table_is_refused(write):
    one_line(write(content="4.483 ± 0.052\n")[0], "results/gap.md", "needs a table")


def test_a_row_without_a_link_is_refused(write):
    one_line(write(ours="4.483 | 0.052")[0], "five cells")


def test_results_are_what_report_writes_now(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (ROOT / "RESULTS.md").read_text() == report(), "run `make report`"


def test_results_are_short():
    lines = (ROOT / "RESULTS.md").read_text().splitlines()
    assert len(lines) <= 170
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md", "dev/LOG.md"])
def test_local_links_and_pictures_exist(name):
    page = ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [page.parent / link for link in links if "://" not in link]
    assert [path for path in local if not path.exists()] == []
