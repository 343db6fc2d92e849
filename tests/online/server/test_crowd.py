"""Many chats at once across a swap and a SIGTERM: none is cut, and the server's memory hardly grows with their number."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from online.server.crowd import Crowd
from online.server.process import Server, save_model

from alignfast.online.server.versions import weights_hash
from alignfast.online.store import Store

WORDS = ["--max_queue", "600", "--request_seconds", "900", "--max_tokens", "100", "--cache_tokens", "16384"]


def peak_mib(server: Server) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)  # a process that has ended has none
    return int(found[1]) / 1024 if found else 0.0


def through_a_swap_and_a_sigterm(folder: Path, chats: int, tokens: int) -> float:
    """The server's peak of memory in MiB; every chat must have been answered whole."""
    first, second = (save_model(folder / name, seed, endless=True) for name, seed in (("p1", 3), ("p2", 8)))
    db = f"sqlite:///{folder}/feedback.db"
    ask = {"model": "p1", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": tokens}
    with Store.open(db) as store:
        key, _ = store.keys.make("ann")
        server = Server(first, db, folder / "log", WORDS)
        try:
            crowd = asyncio.run(talk(store, server, key, second, [ask] * chats))
            assert all(stream.whole for stream in crowd.streams), Counter(
                (stream.status, stream.events[-1:]) for stream in crowd.streams if not stream.whole
            )
            assert Counter(stream.told["version"] for stream in crowd.streams) == {
                "p1": chats // 2, "p2": chats - chats // 2,
            }  # fmt: skip
            kept = store.shown_among([stream.told["answers"][0]["response_id"] for stream in crowd.streams])
            assert {len(one.completion_ids) for one in kept.values()} == {tokens}
            assert len(kept) == chats
            return crowd.mib
        finally:
            server.kill()


class Measured(Crowd):
    mib = 0.0


async def talk(store: Store, server: Server, key: str, second: Path, asks: list[dict[str, Any]]) -> Measured:
    crowd = Measured(server.url, key)
    await crowd.begin(asks[: len(asks) // 2])
    store.versions.add("p2", "policy", str(second), weights_hash(second))
    store.versions.promote("p2")
    end = time.monotonic() + 60
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
        while True:
            models = (await http.get(f"{server.url}/v1/models")).json()
            if models["data"][0]["alignfast"]["name"] == "p2":
                break
            assert time.monotonic() < end, "the server did not follow"
            await asyncio.sleep(0.05)
    await crowd.begin(asks[len(asks) // 2 :])
    server.process.send_signal(signal.SIGTERM)
    ending = asyncio.ensure_future(crowd.end())
    while not ending.done():
        crowd.mib = max(crowd.mib, peak_mib(server))
        await asyncio.sleep(0.05)
    await ending
    assert await asyncio.to_thread(server.process.wait, 60) == 0
    return crowd


def test_no_chat_is_cut_by_a_swap_or_a_sigterm(tmp_path: Path) -> None:
    through_a_swap_and_a_sigterm(tmp_path, chats=40, tokens=30)


@pytest.mark.slow
def test_five_hundred_chats_take_hardly_more_memory_than_fifty(tmp_path: Path) -> None:
    found = {}
    for chats in (50, 500):
        (tmp_path / str(chats)).mkdir()
        found[chats] = through_a_swap_and_a_sigterm(tmp_path / str(chats), chats, tokens=64)
    print(f"peak of memory with 50 chats {found[50]:.0f} MiB, with 500 {found[500]:.0f} MiB")
    assert found[500] < 1.5 * found[50]
