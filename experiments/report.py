"""RESULTS.md from experiments/results_template.md and the pages in results/.

    python -m experiments.report     # from the root of the repo

A line `{{table results/nano/lr.md}}` of the template becomes the table of that page, followed by
the last line of the page, which names the command, hardware, versions, date and commits. Every
number in the column "ours" of the claims table must be printed in the page that its row links to.
"""
import re
import sys
import textwrap
from pathlib import Path

TEMPLATE = Path("experiments/results_template.md")


def read(path):
    if not Path(path).is_file():
        sys.exit(f"report: {path} is missing: restore it, or change the line in {TEMPLATE}")
    return Path(path).read_text()


def table(path):
    """The table of a page and, wrapped, the line that says how it was made."""
    lines = read(path).strip().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    if not rows or lines[-1] in rows:
        sys.exit(f"report: {path} needs a table and, after it, a line on how it was made")
    lines = textwrap.wrap(lines[-1], 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*rows, "", *lines])


def numbers(text):
    """The numbers in a text as printed, but without "+" and thousands separators."""
    number = r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?%?"
    return {found.replace(",", "") for found in re.findall(number, text)}


def check_claims(text):
    """Stop at a row of the claims table whose page does not print its numbers."""
    claims = re.search(r"^\| claim \|.*\n.*\n((?:\|.*\n)*)", text, re.MULTILINE)
    for row in claims[1].splitlines() if claims else []:
        cells = row.strip("| ").split(" | ")
        link = re.search(r"\]\((.+)\)", cells[-1])
        if len(cells) != 5 or not link:
            sys.exit(f"report: a row of {TEMPLATE} needs five cells, the last one a link: {row}")
        for number in numbers(cells[2]) - numbers(read(link[1])):
            sys.exit(f"report: {number}, claimed in {TEMPLATE}, is not printed in {link[1]}: {row}")


def report():
    """The text of RESULTS.md."""
    text = read(TEMPLATE)
    check_claims(text)
    return re.sub(r"^\{\{table (.+)\}\}$", lambda line: table(line[1]), text, flags=re.MULTILINE)


if __name__ == "__main__":
    Path("RESULTS.md").write_text(report())
