import pytest

from roofline.models.fetch_bar import fetch_bar


def shown(capfd: pytest.CaptureFixture[str], *, bars: bool = True) -> str:
    with fetch_bar("Fetching it", bars=bars) as bar:
        bar.advance(bar.add_task("Downloading it", total=10), 10)
    out, err = capfd.readouterr()
    assert out == ""
    return err


def test_off_a_terminal_a_fetch_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert shown(capfd) == "Fetching it\n"


def test_on_a_terminal_a_fetch_is_a_bar_unless_bars_are_off(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    bar = shown(capfd)
    assert "Downloading it" in bar and "━" in bar and "Fetching it" not in bar
    assert shown(capfd, bars=False) == "Fetching it\n"
