"""Started by test_kill.py, and killed: threads that vote, and tell each vote once the store has acknowledged it.

python writer.py URL THREADS          the next number of each thread on standard input, "acknowledged" on standard output
"""

from __future__ import annotations

import json
import os
import sys
import threading

from alignfast.online.feedback import Shown, Vote
from alignfast.online.store import Store


def write_on(store: Store, thread: int, number: int) -> None:
    while True:
        id = f"{thread}-{number}"
        vote = Vote(response_id=id, kind="thumb", value="up", user=f"user {thread}")
        if store.shown(id) is None:
            store.record_shown(Shown(id=id, prompt="2 + 2 =", text=" 4"))
        kept = store.add_vote(vote, key=id)
        assert store.add_vote(vote, key=id).vote == kept.vote  # a client that did not hear the answer
        os.write(1, f"{thread} {number} {kept.vote.id}\n".encode())  # one write, so that no line is torn
        number += 1


if __name__ == "__main__":
    url, threads = sys.argv[1], int(sys.argv[2])
    following = json.loads(sys.stdin.readline())
    opened = Store.open(url)
    for thread in range(threads):
        threading.Thread(target=write_on, args=(opened, thread, following[thread])).start()
