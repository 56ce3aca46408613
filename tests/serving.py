"""A server on a free port, in a thread of the test's own process."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

from roofline.async_llm import AsyncLLM
from roofline.server import listening
from roofline.server.app import create_app

VERSION = "0.0.test"


@contextlib.contextmanager
def serving(llm: AsyncLLM, name: str = "tiny") -> Iterator[str]:
    """Yield the server's URL; what its event loop would only log fails the test."""
    unheard: list[dict[str, Any]] = []
    http = listening.http_server(create_app(llm, name, VERSION))

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, about: unheard.append(about))
        await http.serve([sock])

    with contextlib.closing(listening.bind("127.0.0.1", 0)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 15)  # soon full
        url = listening.listen(sock)
        thread = threading.Thread(target=lambda: asyncio.run(main()))
        thread.start()
        try:
            yield url
        finally:
            http.should_exit = True
            thread.join()
    assert unheard == []
