"""`roofline serve`: a model behind an OpenAI-compatible HTTP server, until Ctrl-C.

The address is taken before the model is loaded, and answers after.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

import roofline  # the public door: what it names loads on use, torch with it
from roofline import server
from roofline.cli import options
from roofline.config import EngineConfig
from roofline.errors import UsageError, shown


@options.accepts(options.engine_options())
def serve(
    model: options.Model,
    /,
    *,
    host: Annotated[
        str, Parameter(help="the address to listen on; 0.0.0.0 is every")
    ] = "127.0.0.1",
    port: Annotated[int, Parameter(help="0 takes any that is free")] = 8000,
    served_model_name: Annotated[
        str | None, Parameter(help="what clients call the model; default: as given, a path's name")
    ] = None,
    **given: Any,
) -> None:
    """Answer OpenAI's HTTP API: /v1/chat/completions, /v1/completions, /v1/models, /health.

    Ctrl-C lets running answers finish for a few seconds; a second one does not.
    """
    config = EngineConfig.from_options(given, os.environ)
    name = _served_name(model) if served_model_name is None else served_model_name
    if not name.strip():
        raise UsageError(f"served_model_name is {shown(name)}; it must be a name")
    if not 0 <= port < 1 << 16:
        raise UsageError(f"port is {port}; it must be from 0 to 65535")
    debug = bool(os.environ.get("ROOFLINE_DEBUG"))
    logging.basicConfig(format="roofline: %(message)s", level="WARNING")
    logging.getLogger("roofline").setLevel("DEBUG" if debug else "WARNING")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    with contextlib.closing(server.listening.bind(host, port)) as sock:
        started = time.monotonic()
        with contextlib.closing(roofline.AsyncLLM.from_config(model, config)) as llm:
            app = server.app.create_app(llm, name, roofline.__version__)
            url, seconds = server.listening.listen(sock), time.monotonic() - started
            print(
                f"roofline: ready in {seconds:.1f} s: {url}/v1 serves {name}, "
                f"{llm.max_model_len} tokens of context",
                file=sys.stderr,
                flush=True,
            )
            asyncio.run(server.listening.http_server(app).serve([sock]))


def _served_name(model: str) -> str:
    """A model as it was named, but of a path the last part: where it lies is nobody's business."""
    path = Path(model)
    return path.name or model if path.exists() else model
