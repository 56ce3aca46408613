"""`roofline show`: what is known of a model that is here, without reading its weights."""

from typing import Any

from roofline import models
from roofline.cli import options, output


def show(
    model: options.Model, /, *, revision: options.Revision = None, json: options.Json = False
) -> None:
    """Say what a model is: its shape, its size, its tokenizer; fetches nothing."""
    path = models.hub.resolve(model, revision=revision, fetch="nothing")
    facts = {"model": model, **models.facts.model_facts(path)}
    if json:
        output.print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):18} {_shown(value)}")


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
