"""Command-line options made from dataclasses: a field is described once, where it is checked.

A command takes `**options` and receives those that were given, as values of their types. Nothing
is checked here and no default is filled in: the dataclass does both, for every door alike. Flags go
before ROOFLINE_* variables, those before the file of `--config`, and that before the built-in.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter, Token

from roofline.cli.config_file import read_config_file
from roofline.config import EngineConfig, environment_options, parse_option
from roofline.errors import UsageError, shown
from roofline.request import SamplingParams

Model = Annotated[
    str,
    Parameter(
        help="a .gguf or .bin file, a safetensors folder, a built-in name (smollm2-135m), "
        "or org/repo[:QUANT] on Hugging Face"
    ),
]
Revision = Annotated[
    str | None, Parameter(help="branch, tag or commit of a Hugging Face repository; default: main")
]
Json = Annotated[bool, Parameter(name="--json", help="print one JSON object")]

_Command = TypeVar("_Command", bound=Callable[..., Any])

TRUNCATION = {"top_k", "top_p", "min_p"}  # do nothing at temperature 0
_SAMPLING_HELP = {  # of the fields that a command line offers
    "temperature": "0 takes the likeliest token every time; 1 samples as the model was trained",
    "top_k": "sample among this many likeliest tokens; 0 is all",
    "top_p": "sample among the likeliest tokens that hold this much probability",
    "min_p": "sample among tokens at least this likely, relative to the likeliest",
    "repetition_penalty": "above 1: tokens of prompt and answer become less likely",
    "presence_penalty": "above 0: tokens of the answer become less likely",
    "frequency_penalty": "above 0: tokens of the answer become less likely, each time more",
    "bad_words": "a text never to write; may be repeated",
    "stop": "a text that ends the answer; may be repeated",
    "stop_token_ids": "a token id that ends the answer; may be repeated",
    "ignore_eos": "go on after the model's own end",
    "min_tokens": "no end before this many tokens",
    "max_tokens": "end after this many tokens; default: the rest of the context",
}


def accepts(*options: Sequence[inspect.Parameter]) -> Callable[[_Command], _Command]:
    """Spell out `**options` of a command: its names, types, defaults and help.

    Those that only the file of `--config` gives arrive as if they were on the command line.
    """
    spelled = {parameter.name: parameter for group in options for parameter in group}

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def with_file(*own: Any, config: str | None = None, **given: Any) -> Any:
            if config is not None:
                given = _from_file(config, spelled, given) | given
            return command(*own, **given)

        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = [*own, _CONFIG, *spelled.values()]
        cast("Any", with_file).__signature__ = signature.replace(parameters=parameters)
        return cast("_Command", with_file)

    return decorate


def engine_options(
    defaults: Mapping[str, object] | None = None,
    *,
    only: Collection[str] | None = None,
    without: Collection[str] = (),
) -> list[inspect.Parameter]:
    """The fields of EngineConfig; `defaults` are the command's own, here for the help only."""
    hints = get_type_hints(EngineConfig)
    return [
        _option(
            field.name,
            hints[field.name],
            _ENGINE,
            f"{field.metadata['help']} [env: ROOFLINE_{field.name.upper()}]",
            (defaults or {}).get(field.name, field.default),
        )
        for field in dataclasses.fields(EngineConfig)
        if (only is None or field.name in only) and field.name not in without
    ]


def sampling_options(defaults: Mapping[str, object]) -> list[inspect.Parameter]:
    """The fields of SamplingParams that fit a command line."""
    hints = get_type_hints(SamplingParams)
    fields = {field.name: field for field in dataclasses.fields(SamplingParams)}
    return [
        _option(name, hints[name], _SAMPLING, text, defaults.get(name, fields[name].default))
        for name, text in _SAMPLING_HELP.items()
    ]


def take_sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Remove the sampling options from those given, and return them."""
    return {name: given.pop(name) for name in _SAMPLING_HELP if name in given}


def settable() -> list[str]:
    """Names of the sampling options that a chat can change."""
    return [*_SAMPLING_HELP, "seed"]


def parse_sampling(name: str, text: str) -> Any:
    """What the text of a settable sampling option means; a list is JSON, or its only item."""
    if name not in settable():
        near = difflib.get_close_matches(name, settable(), 1)
        advice = f"did you mean {near[0]}?" if near else f"options: {', '.join(settable())}"
        raise UsageError(f"unknown sampling option {shown(name)}; {advice}")
    hint = get_type_hints(SamplingParams)[name]
    if text == "none" and type(None) in get_args(hint):
        return None
    item = _item_hint(hint)
    if item is None:
        return parse_option(hint, text)
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, (str, list)):
            return value if isinstance(value, list) else [value]
    return [parse_option(item, text)]


def _from_file(name: str, spelled: Collection[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a file that the command has and that nothing before the file gives.

    As with variables, one file serves several commands: each takes what it has.
    """
    found = read_config_file(name, _SAMPLING_HELP)
    above = {*given, *environment_options(os.environ)}
    if given.get("temperature") == 0:  # asks for what the file's truncation would do nothing to
        above |= TRUNCATION
    return {option: found[option] for option in found if option in spelled and option not in above}


_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        Parameter(
            help="a .toml or .json file of options; flags and variables go before it",
            metavar="FILE",
        ),
    ],
)
_SAMPLING = Group("Sampling", sort_key=1)
_ENGINE = Group("Engine", help="Each is read from the environment too.", sort_key=2)


def _option(name: str, hint: Any, group: Group, text: str, default: object) -> inspect.Parameter:
    """A keyword that is absent unless given; the help shows what holds then.

    Its declared type says how many words it takes and nothing more: cyclopts has values checked
    against it wherever pydantic happens to be imported, and ours are checked by the dataclass.
    """
    kind, item, read = (bool | None, hint, None) if hint is bool else (Any, hint, _read_one(hint))
    items = _item_hint(hint)
    if items is not None:
        item = items
        kind, read = list[Any] | None, _read_all(item)
    parameter = Parameter(
        group=group,
        help=text,
        converter=read,
        metavar=_metavar(item) if read else None,
        show_default=False if default is None else lambda _: str(default).lower(),
        negative=f"--no-{name.replace('_', '-')}" if default is True else (),
    )
    annotation = Annotated[kind, parameter]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _item_hint(hint: Any) -> Any:
    """The type of a list's items; None for what is no list."""
    lists = [member for member in get_args(hint) if get_origin(member) is Sequence]
    return get_args(lists[0])[0] if lists else None


def _read_one(hint: Any) -> Callable[[Any, Sequence[Token]], Any]:
    return lambda _, tokens: parse_option(hint, tokens[0].value)


def _read_all(item: Any) -> Callable[[Any, Sequence[Token]], list[Any]]:
    return lambda _, tokens: [parse_option(item, token.value) for token in tokens]


def _metavar(hint: Any) -> str:
    """What a value looks like: `auto|INT`."""
    members = get_args(hint) if get_origin(hint) is not Literal else (hint,)
    words: list[str] = []
    for member in members or (hint,):
        if get_origin(member) is Literal:
            words += get_args(member)
        elif member is not type(None):
            words.append("TEXT" if member is str else member.__name__.upper())
    return "|".join(words)
