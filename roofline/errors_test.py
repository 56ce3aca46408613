import re

import pytest

from roofline import errors
from roofline.errors import RooflineError, UsageError, shown

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, RooflineError)]


def test_the_tree_drawn_in_the_docstring_is_the_one_in_code() -> None:
    drawn = re.findall(r"(\w+Error) +exit (\d)", errors.__doc__ or "")
    assert drawn == [(c.__name__, str(c.exit_code)) for c in sorted(CLASSES, key=_drawn_at)]
    indents = {c: _line_of(c).index(c.__name__) for c in CLASSES}
    for error in set(CLASSES) - {RooflineError}:
        parent = next(base for base in error.__mro__[1:] if base in indents)
        assert indents[error] == indents[parent] + 4, error


def _drawn_at(error: type) -> int:
    return (errors.__doc__ or "").index(error.__name__)


def _line_of(error: type) -> str:
    (line,) = [li for li in (errors.__doc__ or "").splitlines() if f"{error.__name__} " in li]
    return line


def test_message_is_the_first_argument_or_the_name() -> None:
    assert UsageError("no such model").message == "no such model"
    assert UsageError().message == "UsageError"


def test_a_request_error_is_a_value_error_for_callers_from_python() -> None:
    with pytest.raises(ValueError, match="bad prompt"):
        raise errors.RequestError("bad prompt")


def test_a_value_of_any_size_is_shown_in_a_few_words() -> None:
    for value in ("x" * 10_000, 10**5000, -(10**4000), b"\0" * 999, list(range(99))):
        assert len(shown(value)) < 100


def test_a_shown_value_is_one_line() -> None:
    class Lines:
        def __repr__(self) -> str:
            return "two\nlines"

    assert shown(Lines()) == "two lines"
    assert shown("a\nb") == r"'a\nb'"
