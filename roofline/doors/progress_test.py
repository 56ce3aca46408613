import re

import pytest

from roofline.doors.outputs import CompletionOutput, RequestMetrics, RequestOutput
from roofline.doors.progress import loading_bar, prompts_bar, tell

OUTPUT = RequestOutput(
    "0",
    None,
    [1] * 30,
    [CompletionOutput(i, token_ids=[2] * 10) for i in range(2)],
    RequestMetrics(0),
)


def test_a_bar_that_was_asked_for_ends_with_what_was_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with prompts_bar(3, show=True) as advance:
        advance(OUTPUT)
        advance(OUTPUT)
    shown = capsys.readouterr()
    assert shown.out == "" and "2/3" in shown.err
    rates = re.search(
        r"input: ([\d.]+) tok/s, output: ([\d.]+) tok/s", shown.err.replace("\n", " ")
    )
    assert rates is not None
    assert float(rates[1]) / float(rates[2]) == pytest.approx(60 / 40, rel=0.01)


def test_nothing_is_shown_unasked_or_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with prompts_bar(1, show=False) as advance:
        advance(OUTPUT)
    with loading_bar("Loading", 1, "a note") as advance_loading:
        advance_loading("a.weight")
    tell("a line")
    assert capsys.readouterr() == ("", "")
