"""`roofline pull`: fetch a model, so that it runs without network from then on."""

from typing import Annotated

from cyclopts import Parameter

from roofline import models
from roofline.cli import options, output


def pull(
    model: Annotated[
        str, Parameter(help="org/repo[:QUANT] on Hugging Face, or a built-in name (smollm2-135m)")
    ],
    /,
    *,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Fetch a model, or what is new of it, and print its path."""
    path = models.hub.pull(model, revision=revision)
    if json:
        output.print_json({"model": model, "path": str(path)})
    else:
        print(path)
