"""pytest-benchmark's JSON as Markdown tables: `python benches/tables.py results.json > results.md`; see alignfast.bench."""

from __future__ import annotations

import json
import sys

from alignfast.bench.tables import markdown

if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(markdown(json.load(file)), end="")
