"""Which pages of the cache belong to whom: a count of owners for each, and sequences that start on their prompt's pages.

Pure bookkeeping of numbers; the keys and values themselves are in cache.py.
"""

from __future__ import annotations

from collections.abc import Sequence


class Pages:
    """Pages of `size` tokens, each free or with a number of owners.

    >>> pages = Pages(num_pages=4, size=2)
    >>> prompt = pages.take(2)
    >>> pages.share(prompt)
    >>> pages.give_back(prompt), pages.num_free
    (None, 2)
    >>> pages.give_back(prompt), pages.num_free
    (None, 4)
    """

    def __init__(self, num_pages: int, size: int) -> None:
        self.size = size
        self._free = list(range(num_pages))[::-1]
        self._owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    def needed(self, num_tokens: int) -> int:
        """Pages that so many tokens fill, the last one in part."""
        return -(-num_tokens // self.size)

    def take(self, number: int) -> list[int]:
        """So many free pages, each with one owner.

        Raises:
            RuntimeError: fewer are free; the caller asks `num_free` first.
        """
        if number > len(self._free):
            raise RuntimeError(f"{number} pages were asked for, {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(number)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """One more owner for each."""
        for page in pages:
            self._owners[page] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """One owner less for each; a page without one is free."""
        for page in pages:
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)
