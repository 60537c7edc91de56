"""Clients that send one byte of their request a second, in a separate process.

    with slow_clients("heads", port, count=500, seconds=20) as stopped:
        …
    stopped()  # how often the server closed one of them

``heads``: the client never completes the head of its request. ``bodies``: the client sends a
complete head at once, and the body one byte a second. If the server closes a client's connection,
the client connects again.
"""

import asyncio
import contextlib
import random
import subprocess
import sys
from collections.abc import Callable, Iterator

from benchmarks.serving import ROOT

STEP_S = 1.0
RECONNECT_S = 0.5
HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: 127.0.0.1\r\n"
# For each kind: the bytes that a client sends at once, and those that it sends one at a time.
KINDS = {
    "heads": (b"", HEAD + b"X-Slow: " + b"y" * 8192),
    "bodies": (HEAD + b"Content-Length: 8192\r\n\r\n", b"z" * 8192),
}


@contextlib.contextmanager
def slow_clients(kind: str, port: int, count: int, seconds: float) -> Iterator[Callable[[], int]]:
    """Run ``count`` clients for ``seconds``.

    Yields:
        A function that waits for the end of the clients, and returns how often the server closed
        or refused a connection.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, kind, str(port), str(count), str(seconds)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        yield lambda: int(process.communicate()[0])
    finally:
        process.kill()
        process.wait()


async def send_slowly(kind: str, port: int, count: int, seconds: float) -> int:
    """How often the server closed a client's connection, or refused it."""
    closed = 0

    async def run_client() -> None:
        nonlocal closed
        await asyncio.sleep(random.uniform(0, STEP_S))
        while True:
            with contextlib.suppress(OSError):
                await _one_request(port, *KINDS[kind])
            closed += 1
            await asyncio.sleep(RECONNECT_S)

    clients = [asyncio.create_task(run_client()) for _ in range(count)]
    await asyncio.sleep(seconds)
    for client in clients:
        client.cancel()
    await asyncio.wait(clients)
    return closed


async def _one_request(port: int, at_once: bytes, slowly: bytes) -> None:
    """Send one request slowly; return or raise ``OSError`` when the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    try:
        writer.write(at_once)
        for byte in slowly:
            writer.write(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STEP_S):
                    if not await reader.read(1024):
                        return
    finally:
        writer.close()


if __name__ == "__main__":
    arguments = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    print(asyncio.run(send_slowly(*arguments)))
