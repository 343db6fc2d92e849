"""A learner in a process of its own, killed at a write: a line of JSON on stdin for each run, a line with its end.

Each run is a fork, so that torch is imported once; nothing of it has run a thread before.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from alignfast.online.learning.gate import Decision
from alignfast.online.loop import OnlineLoop, folders
from alignfast.online.store import Store


def kill_at(number: int) -> None:
    """Die at the n-th moment between two things that last: before and after each write to the store or rename."""
    seen = 0

    def moment() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    write, replace = Store.write, os.replace

    def counted_write(self: Store, work: Any) -> Any:
        moment()
        found = write(self, work)
        moment()
        return found

    def counted_replace(*paths: Any) -> None:
        moment()
        replace(*paths)
        moment()

    Store.write = counted_write  # type: ignore[method-assign]
    folders.os.replace = counted_replace  # type: ignore[attr-defined]


def main() -> None:
    import alignfast.online.loop.gate
    import alignfast.trainers.dpo
    import alignfast.trainers.reward

    alignfast.online.loop.gate.gate = lambda figures, limits: Decision(True, ())
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                kill_at(job["moment"])
                with OnlineLoop(**job["options"], say=lambda text: print(text, file=sys.stderr)) as loop:
                    loop.run(once=True)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    main()
