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
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

import roofline
from roofline.errors import RooflineError, UsageError

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (default: the program's) name; return its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter the terminal lacks ends no answer
            stream.reconfigure(errors="backslashreplace")
    try:
        app(arguments, exit_on_error=False, print_error=False)
        if sys.stdout is not None:  # closed by the caller: nobody reads
            sys.stdout.flush()
    except CycloptsError as error:
        return _fail(arguments, UsageError(str(error)), UsageError.exit_code)
    except RooflineError as error:
        return _fail(arguments, error, error.exit_code)
    except KeyboardInterrupt:
        return _fail(arguments, KeyboardInterrupt("interrupted"), INTERRUPTED)
    except BrokenPipeError:  # the reader has left, as `head` does: it had enough
        return 0
    except Exception as error:  # the last resort: a traceback is never the only message
        return _fail(arguments, error, 1)
    finally:
        _settle_stdout()
    return 0


app = App(
    name="roofline",
    help="Run a language model, and see how close it came to the memory roofline.",
    version=f"roofline {roofline.__version__}",
    help_format="plaintext",
    result_action="return_none",
    suppress_keyboard_interrupt=False,  # `main` says so in one line
    default_parameter=Parameter(negative=()),
)
_bench = App(name="bench", help="Measure speed.")

for _name, _help in {
    "run": "Answer a prompt, and say on stderr how close that came to the roofline.",
    "chat": "Talk with a model at a terminal, or one message a line through a pipe.",
    "serve": "Serve a model over HTTP, as OpenAI's API.",
    "ppl": "Measure perplexity on a text file.",
    "fit": "Say what a model takes on every rank, what fits and how fast it could be.",
    "quantize": "Write a model as group-wise INT8 safetensors.",
    "pull": "Fetch a model, or what is new of it.",
    "ls": "List the models that have been fetched.",
    "show": "Say what a model is, without reading its weights.",
    "rm": "Remove a model that was fetched.",
    "doctor": "Look this machine over and say what is wrong.",
}.items():
    app.command(f"roofline.cli.{_name}:{_name}", name=_name, help=_help)
for _name, _help in {
    "latency": "Time batches of one size, start to end.",
    "throughput": "Time many prompts given at once, random or from a file.",
}.items():
    _bench.command(f"roofline.cli.bench:{_name}", name=_name, help=_help)
app.command(_bench)


def _fail(arguments: Sequence[str], error: BaseException, code: int) -> int:
    """Print one line on stderr, or with --json one object on stdout; return the exit code."""
    if os.environ.get("ROOFLINE_DEBUG"):
        traceback.print_exception(error)
    kind, message = type(error).__name__, " ".join(str(error).split())
    if "--json" in arguments:
        with contextlib.suppress(OSError):  # stdout may be what failed
            print(json.dumps({"error": {"type": kind, "message": message}}), flush=True)
            return code
    if code == INTERRUPTED:
        line = "interrupted"
    elif isinstance(error, RooflineError):
        line = f"error: {message}"
    else:
        line = f"error: {kind}: {message} (ROOFLINE_DEBUG=1 shows where)"
    print(f"roofline: {line}", file=sys.stderr)
    return code


def _settle_stdout() -> None:
    """Flush; what cannot be written must not fail again when the interpreter flushes at exit."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
