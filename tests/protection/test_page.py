"""What the page tells in words is what the shipped table says."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
NUMBER = re.compile(r"(?<![\d.])\d*\.\d(?!\d)")


def test_every_number_of_the_summary_stands_in_the_table():
    page = (DOCS / "protection.md").read_text(encoding="utf-8")
    section = page.split("## What it is worth")[1].split("### Other ways to realign")[0]
    summary = "\n".join(section.split("\n- **Without any data**")[1:])
    table = (DOCS / "_static" / "protection" / "table.txt").read_text(encoding="utf-8")
    known = {float(number) for number in NUMBER.findall(table)}
    told = [float(number) for number in NUMBER.findall(summary)]
    assert len(told) > 25
    assert [number for number in told if number not in known] == []
