"""The thread that owns an engine: requests and cancels enter by a queue, deltas leave through the requests' sinks."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from upwell.engine.engine import Engine
from upwell.engine.sequence import Request
from upwell.errors import RankError, ShuttingDownError

GRACE_SECONDS = 10.0  # that the thread has to notice by itself that a rank is gone

logger = logging.getLogger(__name__)


class EngineThread:
    """Starts at construction. submit() and cancel() may be called from any thread; sinks are called on this one.

    So are `couriers`, whenever something long begins: a step's computation, or waiting for requests.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._door = threading.Lock()
        self.lost: RankError | None = None
        self.couriers: list[Callable[[], None]] = []
        engine.before_computing = self._send_out
        self._thread = threading.Thread(target=self._loop, name="upwell-engine", daemon=True)
        self._thread.start()
        engine.runner.model.on_failure(self.lose)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self.lost is None

    def lose(self, error: RankError) -> None:
        """Another rank is gone: what runs ends with this error, and nothing more is taken. From any thread."""
        self.lost = error
        self._commands.put(lambda: self._give_up(error))
        late = threading.Timer(GRACE_SECONDS, self._give_up_for_it, (error,))
        late.daemon = True
        late.start()

    def submit(self, request: Request) -> None:
        """Hand in a request made by `engine.request`. Raises QueueFullError, and ShuttingDownError after stop()."""
        with self._door:  # what passes it before stop() does is served
            if self.lost is not None:
                raise self.lost
            if self._stopping or not self.is_alive:
                raise ShuttingDownError("the engine takes no new requests")
            self.engine.admit(request)
            self._commands.put(lambda: self.engine.start(request))

    def cancel(self, request: Request) -> None:
        """End what still runs of a request before the next step; its blocks are free then."""
        self._commands.put(lambda: self.engine.cancel(request))

    def stop(self, timeout: float = 30.0) -> None:
        """Take no more requests and finish those taken. What isn't done after `timeout` seconds ends with an error."""
        with self._door:
            self._stopping = True
        self._commands.put(lambda: None)  # wakes the loop
        self._thread.join(timeout if self.lost is None else min(timeout, GRACE_SECONDS))
        if self._thread.is_alive() and self.lost is None:
            error = ShuttingDownError("the engine was stopped before this was done")
            self._commands.put(lambda: self.engine.fail_all(error))
            self._thread.join()
        self.engine.close()

    def _give_up(self, error: RankError) -> None:
        raise error

    def _give_up_for_it(self, error: RankError) -> None:
        """On a device an exchange may wait for ever. Whoever waits for an answer shall not."""
        if self._thread.is_alive():
            self.engine.fail_all(error)
            self._send_out()

    def _loop(self) -> None:
        try:
            while self._turn():
                pass
        except RankError as error:
            self._stopping, self.lost = True, error
            self.engine.fail_all(error)
        except Exception as error:
            # A bug in the scheduler, not a failed forward (those end their own requests). No one must wait forever.
            logger.exception("the engine's thread ends")
            self._stopping = True
            self.engine.fail_all(error)
        finally:
            self._send_out()

    def _send_out(self) -> None:
        for courier in self.couriers:
            courier()

    def _turn(self) -> bool:
        """Take the commands that are there, run a step; False when there is nothing left to do and no more comes."""
        # Idle: wait for a command. Busy: take those that are there and go on.
        if not self.engine.has_work and not (self._stopping and self._commands.empty()):
            self._send_out()
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()
        if self.engine.has_work:
            self.engine.step()
            return True
        return not (self._stopping and self._commands.empty())
