"""How many sums are solved before and after, and by how much they differ: python figures.py TASKS BEFORE AFTER...

Files of `alignfast generate` on TASKS, with as many completions of each prompt in every one. A file AFTER is compared with
BEFORE prompt by prompt: completions of one prompt are a cluster.
"""

import json
import sys
from pathlib import Path

from alignfast.data.intervals import paired_difference, proportion
from alignfast.rewards import load_reward


def read(name):
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def solved(tasks, name):
    """Whether each completion of a file is right, and its prompt."""
    answers = {row["prompt"]: row["answer"] for row in tasks}
    rows = read(name)
    prompts, completions = ([row[column] for row in rows] for column in ("prompt", "completion"))
    return load_reward("numeric")(prompts, completions, answer=[answers[p] for p in prompts]), prompts


def main(tasks, before, *after):
    hit_N, prompts = solved(read(tasks), before)
    print(f"{before}: {proportion(hit_N, prompts)}")
    for name in after:
        then_N, same = solved(read(tasks), name)
        assert same == prompts, f"{name} and {before} answer other prompts"
        print(f"{name}: {proportion(then_N, prompts)}, more by {paired_difference(then_N, hit_N, prompts)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
