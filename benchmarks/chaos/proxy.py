"""A TCP proxy that can be told to fail: refuse, hang, trickle, cut, or break off and on."""

import asyncio
import contextlib
import random
from enum import Enum


class Fault(Enum):
    """What the proxy does to those who connect, and to what the server says to them."""

    NONE = "as if it were not there"
    REFUSED = "connections are reset"
    HUNG = "what is asked is swallowed, and no answer comes"
    SLOW = "a byte a second of each answer"
    CUT = "answers are cut after a few bytes"
    FLAPPING = "each connection works, or is reset, by chance"


class FaultProxy:
    """Between loopback clients and a server on ``target_port``."""

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
        """Change the fault; those who are connected feel it, too."""
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
