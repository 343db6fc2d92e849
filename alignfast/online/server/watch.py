"""What the server does by itself, once a second: it follows what the store says.

    serving version changed   -> its weights are loaded beside the ones that serve, then requests go to it
    canary came, went         -> an engine more, an engine less; a canary that is promoted is there already
    a first key was made      -> from then on a key is asked for
    an hour went by           -> what is older than the store may keep is deleted

So a promotion from another machine reaches it, and a version that can't be loaded leaves the one that serves. Nothing
here opens a server that was closed: that the last key was revoked locks everybody out until another one is made.
"""

from __future__ import annotations

import logging
import threading
import time

from alignfast.online.server.service import Service
from alignfast.online.store import Version as Stored

log = logging.getLogger("alignfast.server")

_SECONDS = 1.0  # between two looks
_AGAIN_SECONDS = 60.0  # until a version that could not be loaded is tried again
_EXPIRE_SECONDS = 3600.0


class Watch:
    """The thread that looks.

    Args:
        service: that follows the store.
        retention_days: how long answers are kept; None: for ever.

    Attributes:
        faults: why a version that the store names is not in place, by its name.
    """

    def __init__(self, service: Service, retention_days: float | None = None) -> None:
        self.service, self.retention_days = service, retention_days
        self.faults: dict[str, str] = {}
        self._failed_at: dict[str, float] = {}
        self._expired_at = -_EXPIRE_SECONDS
        self._looking = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alignfast-watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the look that is under way."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self, *, again: bool = False) -> None:
        """One look. Blocks while versions are loaded.

        Args:
            again: try also what failed less than a minute ago.
        """
        with self._looking:
            if again:
                self._failed_at.clear()
            versions = self.service.store.versions
            self._serve(versions.serving())
            self._duel(versions.canary())
            if self.service.keyless and self.service.store.keys.any():
                log.warning("a key was made: from now on whoever asks needs one")
                self.service.keyless = False

    def _run(self) -> None:
        while not self._over.wait(_SECONDS):
            try:
                self.look()
                self._expire()
            except Exception:  # the database may be gone for a while; the model serves on
                log.exception("the store could not be read")

    def _serve(self, wanted: Stored | None) -> None:
        runner = self.service.runner
        if wanted is None or (runner.current is not None and runner.current.version.name == wanted.name):
            return
        if runner.canary is not None and runner.canary.version.name == wanted.name:
            runner.end_canary(promote=True)
        elif not self._load(wanted, canary=False):
            return
        log.info("version %s serves, weights %s", wanted.name, wanted.hash[:12])

    def _duel(self, wanted: Stored | None) -> None:
        canary = self.service.runner.canary
        if canary is not None and (wanted is None or wanted.name != canary.version.name):
            self.service.runner.end_canary()
            canary = None
        if wanted is None or wanted.share is None:
            return
        self.service.canary_share = wanted.share
        if canary is None and self._load(wanted, canary=True):
            log.info("version %s duels, before %g of the users", wanted.name, wanted.share)

    def _load(self, version: Stored, canary: bool) -> bool:
        """Whether it is in place."""
        if time.monotonic() < self._failed_at.get(version.name, -_AGAIN_SECONDS) + _AGAIN_SECONDS:
            return False
        try:
            self.service.load(version, canary=canary)
        except Exception as error:
            log.exception("version %s can't be served; the one before it goes on", version.name)
            self.faults[version.name] = f"{type(error).__name__}: {error}"
            self._failed_at[version.name] = time.monotonic()
            return False
        self.faults.pop(version.name, None)
        return True

    def _expire(self) -> None:
        if self.retention_days is None or time.monotonic() < self._expired_at + _EXPIRE_SECONDS:
            return
        self._expired_at = time.monotonic()
        gone = self.service.store.expire(self.retention_days)
        if gone.responses:
            log.info(
                "%d answers and %d votes were older than %g days",
                gone.responses,
                gone.votes,
                self.retention_days,
            )
