"""Rows in folds for cross-validation: no opening of a dialogue, and no question, stands on both sides of a fold.

    python folds.py 2 OUT_DIR rows.jsonl more_rows.jsonl

writes OUT_DIR/train_0.jsonl and OUT_DIR/held_out_0.jsonl, and so on: each row is held out once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from alignfast.data import load_rows
from alignfast.data.intervals import numbered


def main() -> None:
    """Read, deal the openings out by a fixed seed, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folds", type=int)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("rows", nargs="+")
    options = parser.parse_args()
    rows = [row for name in options.rows for row in load_rows(name)]
    opening_N = numbered(row["prompt"].split("\n\nAssistant:")[0] for row in rows)
    fold_N = np.random.default_rng(0).permutation(opening_N.max() + 1)[opening_N] % options.folds
    options.out_dir.mkdir(parents=True, exist_ok=True)
    for fold in range(options.folds):
        for name, chosen_N in (("train", fold_N != fold), ("held_out", fold_N == fold)):
            text = "".join(json.dumps(rows[i]) + "\n" for i in np.flatnonzero(chosen_N))
            (options.out_dir / f"{name}_{fold}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
