import contextlib
import socket

import pytest

from roofline.errors import UsageError
from roofline.server import listening


def test_an_address_is_taken_before_anyone_is_let_in() -> None:
    with contextlib.closing(listening.bind("127.0.0.1", 0)) as sock:
        address = sock.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        assert listening.listen(sock) == f"http://127.0.0.1:{address[1]}"
        socket.create_connection(address).close()


def test_ipv6_has_its_own_spelling() -> None:
    try:
        sock = listening.bind("::1", 0)
    except UsageError:
        pytest.skip("this machine has no IPv6")
    with contextlib.closing(sock):
        assert listening.listen(sock) == f"http://[::1]:{sock.getsockname()[1]}"


def test_a_port_in_use_is_one_line_with_what_to_do() -> None:
    with contextlib.closing(listening.bind("127.0.0.1", 0)) as sock:
        listening.listen(sock)
        port = sock.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
            listening.bind("127.0.0.1", port)


def test_two_that_start_at_once_do_not_both_get_it() -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.closing(listening.bind("127.0.0.1", 0)))
        port = first.getsockname()[1]
        second = stack.enter_context(contextlib.closing(listening.bind("127.0.0.1", port)))
        listening.listen(first)
        with pytest.raises(UsageError, match="is in use"):
            listening.listen(second)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "a b"])
def test_an_address_that_is_not_ours_is_one_line(host: str) -> None:
    with pytest.raises(UsageError, match=f"cannot listen on {host}, port 0: "):
        listening.bind(host, 0)
