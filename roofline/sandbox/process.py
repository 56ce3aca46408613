"""A child process that can be killed: the parent's half and the child's.

They speak JSON over pipes, never pickle. What work the child does is not known here.
"""

import importlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from roofline import errors

if sys.platform == "linux":
    import resource

_LENGTH = struct.Struct("<Q")  # goes before each message: its bytes
_START_S = 60.0  # a machine may be busy while the child imports
_ORPHAN_S = 1.0  # how much longer than its limit a child lives whose parent cannot kill it

# -I and -S: nothing of the environment, of the working directory or of *.pth files is run.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; from roofline.sandbox.process import serve; serve()"
)
_ENVIRONMENT = ("LD_LIBRARY_PATH", "SYSTEMROOT", "TZ")  # what Python needs; no secrets


class Sandbox:
    """One child process, started when needed and again after it was killed. Safe between threads.

    It ends with `close`, with the object, and with the parent, however that ends.
    """

    def __init__(self, *, memory_bytes: int = 256 << 20) -> None:
        self._memory_bytes = memory_bytes  # beyond what the child has after its imports
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def start(self, *modules: str) -> None:
        """Begin to start the child and to import modules there, without waiting for either.

        Where that cannot be, the next call says so.
        """
        with self._lock, suppress(errors.RooflineError), ExitStack() as unless_started:
            unless_started.callback(self._end)
            child = self._living_child()
            for module in modules:
                child.prepare(module, self._memory_bytes)
            unless_started.pop_all()

    def call(
        self,
        function: str,
        arguments: Mapping[str, Any],
        *,
        limit_s: float = 1.0,
        max_bytes: int = 64 << 20,
    ) -> Any:
        """Run `module:function(**arguments)` in the child; return its result, at most `max_bytes`.

        Raises TimeoutError or MemoryError when a limit was passed or the child died, after which
        the next call has a new child; a RooflineError raised there is raised here. The time to
        start the child and import the module is not counted.
        """
        question = _packed({"function": function, "arguments": arguments, "limit_s": limit_s})
        with self._lock, ExitStack() as unless_answered:
            unless_answered.callback(self._end)
            child = self._living_child()
            child.prepare(function.partition(":")[0], self._memory_bytes)
            child.wait_until_ready()
            answer = child.ask(question, limit_s, max_bytes)
            unless_answered.pop_all()
        if "result" in answer:
            return answer["result"]
        raise _raised(function, *answer["error"])

    def close(self) -> None:
        """End the child; a later call would start another."""
        with self._lock:
            self._end()

    def _living_child(self) -> "_Child":
        """The child, or a new one where it has ended."""
        if self._child is None or self._child.has_ended():
            self._end()
            self._child = _Child()
            self._end_child = weakref.finalize(self, self._child.end)
        return self._child

    def _end(self) -> None:
        if self._child is not None:
            self._end_child()
            self._child = None


class _Child:
    """A process that runs `serve`, from the parent's side."""

    def __init__(self) -> None:
        own = str(Path(__file__).parents[2])  # the path itself may not lead here: import hooks
        paths = [*filter(os.path.isabs, sys.path), own]
        self._prepared: set[str] = set()
        self._awaited = 0  # modules being imported
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, *paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            )
        except OSError as error:
            raise errors.RooflineError(
                f"no process for untrusted input: {sys.executable} cannot be run: {error.strerror}"
            ) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout

    def prepare(self, module: str, memory_bytes: int) -> None:
        """Ask for a module, if that was not done; the answer is awaited in `wait_until_ready`."""
        if module not in self._prepared:
            arguments = {"module": module, "memory_bytes": memory_bytes}
            question = {"function": f"{__name__}:prepare", "arguments": arguments}
            with suppress(BrokenPipeError):  # it has died: seen when its answer is missing
                _send(self._questions, _packed({**question, "limit_s": _START_S}))
            self._prepared.add(module)
            self._awaited += 1

    def wait_until_ready(self) -> None:
        """Wait until all modules asked for are there."""
        if not self._awaited:
            return
        with self._killed_after(_START_S):
            answers = [_receive(self._answers) for _ in range(self._awaited)]
        self._awaited = 0
        for answer in answers:
            if answer is None:
                raise errors.RooflineError(
                    f"the process for untrusted input ({sys.executable}) ended while it started, "
                    f"or was not ready after {_START_S:g} s"
                )
            if "error" in answer:
                raise _raised("import", *answer["error"])

    def ask(self, question: bytes, limit_s: float, max_bytes: int) -> dict[str, Any]:
        """Send a question and return the answer."""
        with self._killed_after(limit_s) as expired, suppress(BrokenPipeError):
            _send(self._questions, question)
            answer = _receive(self._answers, max_bytes)
            if answer is not None and not expired.is_set():
                return answer
        if expired.is_set():
            raise TimeoutError(f"took longer than {limit_s:g} s")
        raise MemoryError("took more memory than there is for it, or crashed")

    def has_ended(self) -> bool:
        """Whether there is no process any more."""
        return self._process.poll() is not None

    def end(self) -> None:
        """Kill it and leave nothing behind."""
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # what it did not read
            self._questions.close()
        self._answers.close()

    @contextmanager
    def _killed_after(self, seconds: float) -> Iterator[threading.Event]:
        """Kill the child when a time has passed, which ends all waiting for it; tell by an event.

        A thread counts the time, for nothing else interrupts the reading of a pipe everywhere.
        """
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield expired
        finally:
            timer.cancel()
            timer.join()


def _raised(function: str, name: str, message: str, fields: Mapping[str, str | None]) -> Exception:
    """An error of the child as this process raises it."""
    kind = vars(errors).get(name)
    if isinstance(kind, type) and issubclass(kind, errors.RooflineError):
        return kind(message, **fields)
    return RuntimeError(f"{function} in the sandbox: {name}: {message}")  # a mistake of ours


def serve() -> None:
    """Answer questions until the parent closes the pipe: what the child does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    with os.fdopen(os.dup(0), "rb") as questions, os.fdopen(os.dup(1), "wb") as answers:
        with Path(os.devnull).open("r+b") as nothing:  # a print is no answer
            os.dup2(nothing.fileno(), 0)
            os.dup2(nothing.fileno(), 1)
        while (question := _receive(questions)) is not None:
            _send(answers, _packed(_answer(**question)))


def prepare(module: str, memory_bytes: int) -> None:
    """Import a module in the child, then limit the memory it may take beyond what it has."""
    _limit_memory(None)
    importlib.import_module(module)
    _limit_memory(memory_bytes)


def _answer(function: str, arguments: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """What came of a call: its result, or its error by name and message."""
    module, _, name = function.partition(":")
    try:
        with _killed_by_the_system_after(limit_s + _ORPHAN_S):
            return {"result": vars(sys.modules[module])[name](**arguments)}
    except MemoryError:
        os._exit(1)
    except errors.RooflineError as error:
        return {"error": [type(error).__name__, error.message, _fields(error)]}
    except BaseException as error:  # the border between processes: whatever it is goes over it
        return {"error": [type(error).__name__, " ".join(str(error).split()), {}]}


def _fields(error: errors.RooflineError) -> dict[str, str | None]:
    """What an error says to programs."""
    is_request = isinstance(error, errors.RequestError)
    return {"param": error.param, "code": error.code} if is_request else {}


@contextmanager
def _killed_by_the_system_after(seconds: float) -> Iterator[None]:
    """End this process when the parent was killed itself and cannot."""
    if sys.platform == "win32":
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory(more_bytes: int | None) -> None:
    """Let this process grow by so many bytes, or by any number; on Linux only."""
    if sys.platform != "linux":
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = most
    if more_bytes is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more_bytes
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def _packed(value: object) -> bytes:
    """JSON as bytes; half surrogate pairs pass, for it is not here that they are refused."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _send(file: IO[bytes], message: bytes) -> None:
    file.write(_LENGTH.pack(len(message)) + message)
    file.flush()


def _receive(file: IO[bytes], max_bytes: int | None = None) -> dict[str, Any] | None:
    """The next message, or None where the other side has gone."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    if max_bytes is not None and length > max_bytes:
        raise MemoryError(f"answered with {length} bytes; at most {max_bytes} are taken")
    message = file.read(length)
    if len(message) < length:
        return None
    return json.loads(message.decode("utf-8", "surrogatepass"))
