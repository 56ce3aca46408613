"""`roofline ls`: the models that have been fetched, which run without network."""

import datetime

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from roofline import models
from roofline.cli import options, output


def ls(*, json: options.Json = False) -> None:
    """List every model that has been fetched and runs."""
    found = models.cached.cached_models()
    if json:
        output.print_json({"models": [model.report() for model in found]})
        return
    if not found:
        print("nothing has been fetched; `roofline pull MODEL` does")
        return
    table = Table(
        "model", "format", "size", "modified", "revision", box=SIMPLE_HEAD, pad_edge=False
    )
    for model in found:
        modified = datetime.datetime.fromtimestamp(model.modified).strftime("%Y-%m-%d %H:%M")
        size = f"{model.size_bytes / 1e6:,.1f} MB"
        table.add_row(model.reference, model.format, size, modified, model.revision or "")
    Console(highlight=False, soft_wrap=True, markup=False).print(table)
