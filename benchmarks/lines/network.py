"""A line with known properties: an asyncio TCP proxy that counts, slows, delays, stops and cuts.

What toxiproxy calls toxics (https://github.com/Shopify/toxiproxy#toxics: bandwidth, latency, down, reset_peer,
limit_data), between any client and any server on this machine, without root. It shapes payload, not packets: there is
no loss and no slow start here; for those use network namespaces.

Sockets are read and written without asyncio's streams, and with small kernel buffers: what the counter says has
passed is at most one piece and three such buffers away from what the receiver has read, where there is no latency.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeVar

from relay.support.rate_limit import Pacer

PIECE = 64 << 10
"""Bytes that are read and passed on at once, at most; also the size asked for each kernel buffer."""

Direction = Literal["up", "down"]
"""`up` flows from the client to the server, `down` from the server to the client."""

_T = TypeVar("_T")

BURST_SECONDS = 0.02
"""Seconds of unused line that may be made up for later, so that a late timer costs no throughput."""
_SMALLEST_PIECE = 1 << 10
_PIECES_A_SECOND = 50  # A shaped line is cut finely, so that several connections share it fairly.
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time to linger: close() sends RST.


@dataclass(frozen=True, slots=True)
class Line:
    """One direction of a line.

    Attributes:
        rate: bytes a second for all connections together; None is unlimited.
        latency: seconds from here to there.
        window: bytes that may be on their way at once in one connection where there is latency. At least rate times
            latency, or it is the window that limits.
    """

    rate: float | None = None
    latency: float = 0.0
    window: int = 4 << 20

    def __post_init__(self) -> None:
        if (self.rate is not None and self.rate <= 0) or self.latency < 0 or self.window < 1:
            raise ValueError(f"not a line: {self}")

    @property
    def piece(self) -> int:
        """Bytes to read at once."""
        if self.rate is None:
            return PIECE
        return max(_SMALLEST_PIECE, min(PIECE, int(self.rate / _PIECES_A_SECOND)))


@dataclass(slots=True)
class Counts:
    """Bytes of payload as received from each sender."""

    up: int = 0
    down: int = 0

    @property
    def total(self) -> int:
        return self.up + self.down

    def add(self, direction: Direction, size: int) -> None:
        setattr(self, direction, getattr(self, direction) + size)

    def of(self, direction: Direction | None) -> int:
        """One direction, or both together."""
        return {"up": self.up, "down": self.down}.get(direction or "", self.total)


class CountingProxy:
    """A TCP proxy on 127.0.0.1 in front of `host`:`port`. An asynchronous context manager; it belongs to one loop.

    A new connection costs one round trip of latency before its first byte passes, as TCP's own handshake does.

    Attributes:
        counts: bytes of all connections since the start.
        connections: how many were accepted since the start.
    """

    def __init__(self, host: str, port: int, *, up: Line | None = None, down: Line | None = None) -> None:
        self._target = (host, port)
        self._lines: dict[Direction, Line] = {"up": up or Line(), "down": down or Line()}
        self._pacers = {way: _pacer(line) for way, line in self._lines.items()}
        self.counts = Counts()
        self.connections = 0
        self._waiters: dict[asyncio.Future[None], tuple[int, Direction | None]] = {}
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._placeholder: socket.socket | None = None
        self._listener: asyncio.Task[None] | None = None
        self._carriers: set[asyncio.Task[bool]] = set()

    async def __aenter__(self) -> Self:
        # It keeps the port while the proxy is cut: bound but not listening, it makes the kernel refuse.
        self._placeholder = _bound_socket(0)
        self.restore()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()
        for reached in self._waiters:
            reached.cancel()
        if self._placeholder is not None:
            self._placeholder.close()
            self._placeholder = None

    @property
    def port(self) -> int:
        """Where to connect to, on 127.0.0.1."""
        if self._placeholder is None:
            raise RuntimeError("the proxy is not running")
        return int(self._placeholder.getsockname()[1])

    # --- what can be done to the line

    def shape(self, *, up: Line | None = None, down: Line | None = None) -> None:
        """Change a direction from its next piece on. The window of a living connection stays as it was."""
        changed: dict[Direction, Line | None] = {"up": up, "down": down}
        for way, line in changed.items():
            if line is not None:
                self._lines[way] = line
                self._pacers[way] = _pacer(line)

    def pause(self) -> None:
        """Pass nothing on until `resume`. Connections stay open; new ones are accepted and wait."""
        self._flowing.clear()

    def resume(self) -> None:
        """Pass everything on again, nothing is lost."""
        self._flowing.set()

    async def cut(self) -> None:
        """Reset all connections and refuse new ones until `restore`. What was on its way is lost."""
        ended: set[asyncio.Task[Any]] = set(self._carriers)
        if self._listener is not None:
            ended.add(self._listener)
            self._listener = None
        for task in ended:
            task.cancel()
        if ended:
            await asyncio.wait(ended)

    def restore(self) -> None:
        """Accept connections again, on the same port."""
        if self._listener is None:
            listening = _bound_socket(self.port)
            listening.listen(1024)
            self._listener = asyncio.get_running_loop().create_task(self._accept(listening))

    async def wait_for(self, total: int, *, direction: Direction | None = None) -> None:
        """Return once `total` bytes were received since the start, in `direction` or in both together."""
        reached = asyncio.get_running_loop().create_future()
        self._waiters[reached] = (total, direction)
        self._tell_waiters()
        await reached

    # --- inside

    def _tell_waiters(self) -> None:
        for reached, (total, direction) in list(self._waiters.items()):
            if self.counts.of(direction) >= total:
                del self._waiters[reached]
                if not reached.done():
                    reached.set_result(None)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listening:
            while True:
                try:
                    client, _ = await loop.sock_accept(listening)
                except OSError:  # Out of descriptors, or the client is gone already: neither ends the proxy.
                    await asyncio.sleep(0.01)
                    continue
                client.setblocking(False)
                self._begin(client, _small_socket())

    def _begin(self, client: socket.socket, server: socket.socket) -> None:
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._carry(client, server))
        self._carriers.add(task)

        def end(task: asyncio.Task[bool]) -> None:
            # Here and not in the task, as one that is cancelled before its first step runs no line of its own.
            self._carriers.discard(task)
            is_closed = not task.cancelled() and task.result()
            for each in (client, server):
                if not is_closed:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                each.close()

        task.add_done_callback(end)

    async def _carry(self, client: socket.socket, server: socket.socket) -> bool:
        """Whether both sides closed it; else one of them reset it, or no server is behind the proxy."""
        try:
            await asyncio.sleep(self._lines["up"].latency + self._lines["down"].latency)
            await asyncio.get_running_loop().sock_connect(server, self._target)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump("up", client, server))
                pumps.create_task(self._pump("down", server, client))
            is_closed = True
        except* OSError:
            is_closed = False
        return is_closed

    async def _pump(self, way: Direction, source: socket.socket, sink: socket.socket) -> None:
        """One direction of one connection, until the source ends it.

        `room` bounds what was received and not yet passed on: one piece, or the window where there is latency.
        """
        loop = asyncio.get_running_loop()
        line = self._lines[way]
        room = asyncio.Semaphore(max(1, line.window // line.piece) if line.latency else 1)
        underway: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._deliver(underway, sink, room))
            while True:
                await room.acquire()
                await self._flowing.wait()
                piece = await loop.sock_recv(source, self._lines[way].piece)
                self.counts.add(way, len(piece))
                self._tell_waiters()
                pacer = self._pacers[way]
                await asyncio.sleep(pacer.take(len(piece)) if pacer else 0.0)
                underway.put_nowait((loop.time() + self._lines[way].latency, piece))
                if not piece:
                    return

    async def _deliver(
        self, underway: asyncio.Queue[tuple[float, bytes]], sink: socket.socket, room: asyncio.Semaphore
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, piece = await underway.get()
            await asyncio.sleep(due - loop.time())
            await self._flowing.wait()
            if not piece:
                sink.shutdown(socket.SHUT_WR)
                return
            await loop.sock_sendall(sink, piece)
            room.release()


class ThreadedProxy:
    """A `CountingProxy` on a thread and loop of its own, for callers that drive processes and block.

    Its methods are those of the proxy, and return when what they do has happened.
    """

    def __init__(self, host: str, port: int, *, up: Line | None = None, down: Line | None = None) -> None:
        self._arguments = (host, port, up, down)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="counting-proxy", daemon=True)
        self._proxy: CountingProxy

    def __enter__(self) -> Self:
        host, port, up, down = self._arguments
        self._thread.start()
        self._proxy = CountingProxy(host, port, up=up, down=down)
        self._call(self._proxy.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._proxy.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def port(self) -> int:
        """Where to connect to, on 127.0.0.1."""
        return self._proxy.port

    @property
    def counts(self) -> Counts:
        """Bytes so far, a copy."""
        return replace(self._proxy.counts)

    @property
    def connections(self) -> int:
        """How many were accepted since the start."""
        return self._proxy.connections

    def shape(self, *, up: Line | None = None, down: Line | None = None) -> None:
        self._run(lambda: self._proxy.shape(up=up, down=down))

    def pause(self) -> None:
        self._run(self._proxy.pause)

    def resume(self) -> None:
        self._run(self._proxy.resume)

    def cut(self) -> None:
        self._call(self._proxy.cut())

    def restore(self) -> None:
        self._run(self._proxy.restore)

    def wait_for(self, total: int, *, direction: Direction | None = None, timeout: float = 60.0) -> None:
        """Raises:
        TimeoutError: not so many bytes within `timeout` seconds.
        """
        self._call(asyncio.wait_for(self._proxy.wait_for(total, direction=direction), timeout))

    def _run(self, call: Callable[[], _T]) -> _T:
        """Call a plain function in the loop's thread."""

        async def run() -> _T:
            return call()

        return self._call(run())

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def _pacer(line: Line) -> Pacer | None:
    return None if line.rate is None else Pacer(line.rate, burst=BURST_SECONDS)


def _small_socket() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setblocking(False)
    # Before the handshake, where the window is agreed; accepted sockets inherit them.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PIECE)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _bound_socket(port: int) -> socket.socket:
    made = _small_socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(("127.0.0.1", port))
    return made
