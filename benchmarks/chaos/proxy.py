"""A TCP proxy that fails on command: it refuses, hangs, slows, cuts or flaps."""

import asyncio
import contextlib
import random
from enum import Enum


class Fault(Enum):
    """What the proxy does to connections and answers."""

    NONE = "forwards everything"
    REFUSED = "resets connections"
    HUNG = "drops requests, so that clients get no answer"
    SLOW = "forwards one byte of each answer per second"
    CUT = "closes after a few bytes of an answer"
    FLAPPING = "resets half of the connections at random"


class FaultProxy:
    """Forwards connections from loopback clients to ``target_port``, with a fault."""

    def __init__(self, target_port: int) -> None:
        self.fault = Fault.NONE
        self.port = 0
        self._target = target_port
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self._server = server
        self.port = server.sockets[0].getsockname()[1]

    def become(self, fault: Fault) -> None:
        """Change the fault, also for connections that are open."""
        self.fault = fault
        if fault in (Fault.REFUSED, Fault.NONE):
            for writer in list(self._writers):
                writer.transport.abort()

    async def stop(self) -> None:
        self._server.close()
        self.become(Fault.REFUSED)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dropped = self.fault is Fault.FLAPPING and random.random() < 0.5
        if self.fault is Fault.REFUSED or dropped:
            writer.transport.abort()
            return
        self._writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(back)
            await asyncio.gather(self._ask(reader, back), self._answer(there, writer))
            self._writers.discard(back)
            back.close()
        self._writers.discard(writer)
        writer.close()

    async def _ask(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            if self.fault is not Fault.HUNG:
                back.write(data)
                await back.drain()
        back.close()

    async def _answer(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await there.read(65_536):
            while self.fault is Fault.HUNG:
                await asyncio.sleep(0.1)
            if self.fault is Fault.CUT:
                writer.write(data[: random.randrange(1, 2 + len(data) // 2)])
                await writer.drain()
                writer.transport.abort()
                return
            while data and self.fault is Fault.SLOW:
                writer.write(data[:1])
                await writer.drain()
                data = data[1:]
                await asyncio.sleep(1)
            writer.write(data)
            await writer.drain()
        writer.close()
