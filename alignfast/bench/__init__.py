"""What the benches measured, for people: rows of a run, tables, plots, one page, and two runs compared.

The benches themselves are in `benches/`, run by pytest-benchmark; its JSON is what everything here reads.
"""

from __future__ import annotations
