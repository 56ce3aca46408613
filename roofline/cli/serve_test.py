import contextlib
from pathlib import Path
from typing import Any

import pytest

from roofline.cli.serve import _served_name, serve
from roofline.errors import RequestError, UsageError
from roofline.server import listening


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": -1}, "port is -1; it must be from 0 to 65535"),
        ({"port": 65536}, "port is 65536"),
        ({"served_model_name": " "}, "served_model_name is ' '"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_modle_len": 5}, "did you mean 'max_model_len'"),
        ({"host": "no-such-host.invalid", "port": 0}, "cannot listen on no-such-host.invalid"),
    ],
)
def test_options_are_refused_before_anything_is_opened(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        serve("nothing is opened", **options)


def test_a_port_in_use_is_told_before_the_model_is_loaded() -> None:
    with contextlib.closing(listening.bind("127.0.0.1", 0)) as sock:
        listening.listen(sock)
        with pytest.raises(UsageError, match="is in use"):
            serve("nothing is opened", port=sock.getsockname()[1])


def test_a_shape_without_a_tokenizer_is_not_served() -> None:
    with pytest.raises(RequestError, match="no tokenizer"):
        serve("llama-110m", port=0, load_format="dummy", max_num_seqs=1, max_model_len=64)


def test_a_model_is_called_as_it_was_named_but_not_by_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    assert _served_name(str(tmp_path / "m.gguf")) == "m.gguf"
    assert _served_name(f"{tmp_path}/") == tmp_path.name
    assert _served_name("smollm2-135m") == "smollm2-135m"
    assert _served_name("org/repo:Q8_0") == "org/repo:Q8_0"
