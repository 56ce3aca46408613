"""`roofline quantize`: a model written as group-wise INT8, the bits that loading it would give."""

import importlib
import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from roofline import models
from roofline.cli import options, output
from roofline.config import EngineConfig
from roofline.models.checkpoints.tensors import tensor_shapes

_OPTIONS = (  # that change what is written
    "revision",
    "load_format",
    "tokenizer",
    "chat_template",
    "generation_config",
    "rotary_order",
    "group_size",
    "seed",
)


@options.accepts(options.engine_options(only=_OPTIONS))
def quantize(
    model: options.Model,
    out: Annotated[str, Parameter(help="the folder to make; there must be nothing of that name")],
    /,
    *,
    json: options.Json = False,
    **given: Any,
) -> None:
    """Write a model as group-wise INT8 safetensors; the folder appears when it is whole."""
    config = EngineConfig.from_options(given, os.environ)
    opened = models.opening.open_model(model, config)
    try:
        total = len(tensor_shapes(opened.checkpoint.config))
        with output.progress() as bar:
            task = bar.add_task("Quantising", total=total)

            def advance(name: str) -> None:
                bar.update(task, advance=1, description=f"Quantising {name}")

            # Not at the top: it imports torch, which --help does without.
            writer = importlib.import_module("roofline.models.checkpoints.quantized")
            writer.write_quantized(opened, Path(out), config.weights, advance)
    finally:
        opened.checkpoint.close()
    size = sum(path.stat().st_size for path in Path(out).iterdir())
    if json:
        output.print_json({"model": model, "out": out, "bytes": size})
    else:
        print(f"{out}: {size / 1e6:,.1f} MB")
