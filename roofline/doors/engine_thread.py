"""A thread that steps an engine while it has work, and sleeps while it has none.

Nothing here knows of event loops or of text.
"""

import atexit
import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue

from roofline.engine import Engine
from roofline.request import Request, TokenOutput


class EngineThread:
    """Does what it is asked between two steps, in order; its methods may be called from anywhere.

    `hear` gets what each step brought and `fail` what ended a step, and every request with it; both
    are called in the thread.
    """

    def __init__(
        self,
        engine: Engine,
        hear: Callable[[list[TokenOutput]], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._engine, self._hear, self._fail = engine, hear, fail
        self._asked: SimpleQueue[Callable[[], object]] = SimpleQueue()  # destructors may put
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="roofline-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside torch must not outlive the interpreter

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests that the engine has checked."""
        self._asked.put(partial(self._add, requests))

    def abort(self, request_id: str) -> None:
        """End a request before the next step, if it is alive."""
        self._asked.put(partial(self._engine.abort, request_id))

    def close(self) -> None:
        """Stop after the step that runs; closing again does nothing."""
        atexit.unregister(self.close)
        self._asked.put(self._stop)
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping:
            try:
                if self._engine.has_unfinished and self._asked.empty():
                    self._hear(self._engine.step())
                else:
                    self._asked.get()()
            except BaseException as error:  # whatever it was, the next request runs
                self._fail(error)

    def _add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._engine.add(request)

    def _stop(self) -> None:
        self._stopping = True
