"""Untrusted grammars, tried in a child process that may be killed: `sandbox.py` runs this.

What is asked for becomes a grammar in llguidance's Lark, and is compiled there over single bytes:
what takes too long, too much memory or too deep a stack does so where it harms nobody. No models,
no tokenizers, and nothing of Roofline that imports much.
"""

import json
import re
import threading
from collections.abc import Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, gbnf_to_lark, regex_to_lark

from roofline.errors import RequestError
from roofline.json_schema import checked_schema

# A line break and as much indentation as anybody writes; small models go on with it for ever.
_WHITESPACE = r"[ \t\n\r]{1,40}"
_STACK_BYTES = 1 << 20  # an eighth of what a thread of the engine's process has

_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
_LEXEME = re.compile(
    r"""(?P<skipped>"(?:\\.|[^"\\\n])*"|(?:\#|//)[^\n]*|/(?:\\.|[^/\\])+/)
    |(?P<json>%json\b\s*)|(?P<token><[^<>\s]+>)|(?P<option>\b(?:temperature|stop)\s*=)""",
    re.VERBOSE | re.DOTALL,
)
# Of the library's messages: what repeats the grammar, and where that is a line of ours.
_NOT_SAID = re.compile(
    r'\n *\d+ \| .*|^at 1\(8\): |failed to compile JSON schema: |invalid regex ".*" \(in \w+\): '
    r"|regex parse error:.*?\nerror: ",
    re.DOTALL,
)


def trial(kind: str, source: str | Sequence[str], whitespace: str | None) -> str:
    """The grammar asked for, in Lark, after it has been compiled once.

    RequestError says what is wrong with it. `whitespace` is a regex for what may be between the
    parts of JSON, empty for nothing.
    """
    # No forced tokens: of several ways to spell what must come, the model chooses.
    grammar = _enforceable(_lark(kind, source), whitespace) + '\n%llguidance {"no_forcing": true}\n'
    failures: list[str] = []
    previous = threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=lambda: failures.append(_failure(grammar)))
    thread.start()
    threading.stack_size(previous)
    thread.join()
    if failures[0]:
        raise RequestError(f"{kind} cannot be enforced: {failures[0]}")
    return grammar


def compiled(grammar: str, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher of a grammar in Lark; its steps are limited in work and it in memory."""
    limits = LLParserLimits(
        max_items_in_row=5_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        verbose_errors=False,
    )
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def failure_of(matcher: LLMatcher) -> str:
    """What went wrong with a matcher, in a line; empty if nothing did."""
    if not matcher.is_error():
        return ""
    message = matcher.get_error().removesuffix("<non-verbose/>").strip()
    if message.startswith("NoExtension"):
        return "no text can match it"
    return " ".join(_NOT_SAID.sub("", message).split())[:300]


def _failure(grammar: str) -> str:
    matcher = compiled(grammar, LLTokenizer("byte"))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return failure_of(matcher) or "; ".join(matcher.get_grammar_warnings())


def _lark(kind: str, source: str | Sequence[str]) -> str:
    """What was asked for, in Lark."""
    if not isinstance(source, str):
        return "start: " + " | ".join(map(_literal, source))
    if kind == "regex":
        return f"start: /{regex_to_lark(source, '')}/"
    if kind in ("json", "json_object"):
        return f"start: %json {source}"
    return _from_gbnf(source) if _GBNF.search(source) else source


def _literal(text: str) -> str:
    """A string of Lark, whose syntax is JSON's without a bare DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _from_gbnf(source: str) -> str:
    try:
        return gbnf_to_lark.gbnf_to_lark(source)
    except Exception as error:  # its parser raises no narrower class
        reason = " ".join(str(error).split())[:300]
        raise RequestError(f"grammar is no GBNF that can be converted: {reason}") from error


def _enforceable(grammar: str, whitespace: str | None) -> str:
    """The grammar with each schema in it checked; refused by name is what would have no effect."""
    done, at = list[str](), 0
    while lexeme := _LEXEME.search(grammar, at):
        done.append(grammar[at : lexeme.end()])
        at = lexeme.end()
        if lexeme["token"]:
            raise RequestError(
                f"grammar names the token {lexeme['token'][:60]}; special tokens are no part of a "
                "text: write what the text is made of"
            )
        if lexeme["option"]:
            raise RequestError(f"grammar sets {lexeme['option']} of a rule, which has no effect")
        if lexeme["json"]:
            schema, at = _schema_at(grammar, at)
            done.append(_with_options(checked_schema(schema), whitespace))
    return "".join(done) + grammar[at:]


def _schema_at(grammar: str, at: int) -> tuple[object, int]:
    try:
        return json.JSONDecoder().raw_decode(grammar, at)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"grammar: %json is followed by no valid JSON: {error}") from None


def _with_options(schema: object, whitespace: str | None) -> str:
    if schema is False:
        raise RequestError("json is the schema false, which allows nothing")
    options: dict[str, object] = {"whitespace_pattern": whitespace or _WHITESPACE}
    if whitespace == "":
        options = {"whitespace_flexible": False}
    # Without \u a key cannot be written so that it escapes what `properties` says of it.
    options["json_allowed_escapes"] = 'nrbtf\\"'
    keywords = schema if isinstance(schema, dict) else {}
    return json.dumps({"x-guidance": options, **keywords}, ensure_ascii=False)
