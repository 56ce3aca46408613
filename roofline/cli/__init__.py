"""The command line: `main` runs a command and turns every error into one line and an exit code.

Exit codes: 0, 1 a failure while running, 2 usage or unsupported, 130 interrupted. Commands live in
modules of their own, imported when called; no torch at import here nor there.
"""

import contextlib
import io
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence

from cyclopts import App, CycloptsError, Parameter

import roofline
from roofline.errors import RooflineError, UsageError

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (default: the program's) name; return its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a terminal that lacks a letter still gets the rest
            stream.reconfigure(errors="backslashreplace")
    try:
        with _output():
            app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _fail(arguments, UsageError(str(error)), UsageError.exit_code)
    except RooflineError as error:
        return _fail(arguments, error, error.exit_code)
    except KeyboardInterrupt:
        return _fail(arguments, KeyboardInterrupt("interrupted"), INTERRUPTED)
    except Exception as error:  # the last resort: no traceback is the only message
        return _fail(arguments, error, 1)
    return 0


app = App(
    name="roofline",
    help="Run a language model, and see how close it came to the memory roofline.",
    version=f"roofline {roofline.__version__}",
    help_format="plaintext",
    result_action="return_none",
    default_parameter=Parameter(negative=()),
)
_bench = App(name="bench", help="Measure speed.")

for _name, _help in {
    "run": "Answer a prompt, and say on stderr how close that came to the roofline.",
    "ppl": "Measure perplexity on a text file.",
    "fit": "Say what a model takes on every rank, what fits and how fast it could be.",
    "quantize": "Write a model as group-wise INT8 safetensors.",
    "doctor": "Look this machine over and say what is wrong.",
}.items():
    app.command(f"roofline.cli.{_name}:{_name}", name=_name, help=_help)
_bench.command(
    "roofline.cli.bench:latency", name="latency", help="Time batches of one size, start to end."
)
app.command(_bench)


@contextlib.contextmanager
def _output() -> Iterator[None]:
    """Flush stdout at the end. A reader that has left, as `head` does, had enough: no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # what the interpreter flushes at exit goes there


def _fail(arguments: Sequence[str], error: BaseException, code: int) -> int:
    """Print one line on stderr, or with --json one object on stdout; return the exit code."""
    if os.environ.get("ROOFLINE_DEBUG"):
        traceback.print_exception(error)
    message = " ".join(str(error).split())
    if "--json" in arguments:
        print(json.dumps({"error": {"type": type(error).__name__, "message": message}}))
    elif code == INTERRUPTED:
        print("roofline: interrupted", file=sys.stderr)
    elif isinstance(error, RooflineError):
        print(f"roofline: error: {message}", file=sys.stderr)
    else:
        hint = "(a bug? ROOFLINE_DEBUG=1 shows where)"
        print(f"roofline: error: {type(error).__name__}: {message} {hint}", file=sys.stderr)
    return code
