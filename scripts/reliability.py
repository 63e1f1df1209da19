"""Write the table of docs/reliability.md from the counts of `make faults`.

python scripts/reliability.py
"""

import json
from pathlib import Path

from helpers.fault_plan import LINES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
BEGIN, END = "<!-- table -->\n", "<!-- end -->"


def table() -> str:
    """One row for each line of the plan. A line that was not tried has 0 trials."""
    counts = json.loads(RESULTS.read_text())
    rows = ["| | fault | trials | passed | what happens |", "| --- | --- | --- | --- | --- |"]
    for number, line in LINES.items():
        tests = [test for test in counts.values() if test["line"] == number]
        made, passed = (sum(test[key] for test in tests) for key in ("trials", "passed"))
        rows.append(f"| {number} | {line.fault} | {made:,} | {passed:,} | {line.expected} |")
    return "\n".join(rows) + "\n"


def page(text: str) -> str:
    """The page with the table of today's counts."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + table() + rest[rest.index(END) :]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
