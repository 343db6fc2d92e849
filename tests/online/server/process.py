"""`alignfast serve` as a process, to be asked, signalled and killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from online.server.serving import make_chat_tokenizer, make_model


def save_model(folder: Path, seed: int = 3, endless: bool = False) -> Path:
    """A tiny model with its tokenizer; an endless one writes until it is told to stop."""
    model = make_model(seed, positions=100_000 if endless else 64)
    if endless:
        model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(folder)
    make_chat_tokenizer(endless).save_pretrained(folder)
    return folder


class Server:
    """A server that listens, or did.

    Args:
        model: folder of its first version.
        db: URL of its database.
        log: file that it writes to.
        words: more options.
    """

    def __init__(self, model: Path, db: str, log: Path, words: Sequence[str] = ()) -> None:
        command = [
            sys.executable,
            "-u",
            "-m",
            "alignfast",
            "serve",
            "--model",
            str(model),
            "--db",
            db,
            "--port",
            "0",
        ]
        self._log: IO[Any] = log.open("ab")
        began = log.stat().st_size
        self.process = subprocess.Popen(
            [*command, "--use_cpu", *words], stdout=self._log, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        end = time.monotonic() + 120
        while True:
            self.said = log.read_bytes()[began:].decode(errors="replace")
            found = re.search(r"running on (http://\S+)", self.said)
            if found:
                break
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.02)
        self.url = found[1]

    def kill(self) -> None:
        """With -9."""
        self.process.kill()
        self.process.wait()
        self._log.close()
