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
        fields = ("reference", "revision", "format", "size_bytes", "modified")
        listed = [{name: getattr(model, name) for name in fields} for model in found]
        listed = [row | {"path": str(model.path)} for row, model in zip(listed, found, strict=True)]
        output.print_json({"models": listed})
        return
    table = Table(
        "model", "format", "size", "modified", "revision", box=SIMPLE_HEAD, pad_edge=False
    )
    for model in found:
        modified = datetime.datetime.fromtimestamp(model.modified).strftime("%Y-%m-%d %H:%M")
        size = f"{model.size_bytes / 1e6:,.1f} MB"
        table.add_row(model.reference, model.format, size, modified, model.revision or "")
    Console(highlight=False, soft_wrap=True, markup=False).print(table)
