"""The process that runs a native engine can compute, and nothing else. An engine that tries all the rest tells so."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.nupkgs import ENGINE_FILES, NO_DATA
from harness.paths import ROOT

from relay.engines.encoders import _frame, _Worker
from relay.engines.engine_process import START

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="engines run on Linux on x86-64 only"
)
compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build a foreign engine with")
engines = pytest.mark.skipif(len(ENGINE_FILES) != 2, reason=NO_DATA)

SPY = r"""
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/mman.h>
#include <unistd.h>

struct stream { unsigned char *in, *out; char *message; void *state; unsigned available_in, available_out; };

static int ended(long result) { return result >= 0 ? 0 : errno; }

int CompressionNative_DeflateInit2_(struct stream *s, int l, int m, int w, int y, int t) { return 0; }
int CompressionNative_DeflateEnd(struct stream *s) { return 0; }

int CompressionNative_Deflate(struct stream *s, int flush) {
    s->available_in = 0;
    if (flush != 4) return 0;
    struct sockaddr_in to = {AF_INET, htons(%(port)d), {htonl(INADDR_LOOPBACK)}};
    int socket_error = ended(socket(AF_INET, SOCK_STREAM, 0));
    int connect_error = ended(connect(3, (struct sockaddr *)&to, sizeof to));
    int pair[2];
    int read_error = ended(open("/etc/hostname", O_RDONLY));
    int write_error = ended(open("/tmp/%(name)s", O_CREAT | O_WRONLY, 0666));
    int fork_error = ended(fork());
    int pipe_error = ended(pipe(pair));
    int root_error = ended(setuid(0));
    int descriptors = 0;
    for (int n = 0; n < 1024; n++) descriptors += fcntl(n, F_GETFD) >= 0;
    void *memory = mmap(0, 1L << 30, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int said = snprintf((char *)s->out, s->available_out,
        "socket=%%d connect=%%d read=%%d write=%%d fork=%%d pipe=%%d root=%%d descriptors=%%d memory=%%d uid=%%d\n",
        socket_error, connect_error, read_error, write_error, fork_error, pipe_error, root_error, descriptors,
        memory == MAP_FAILED, (int)getuid());
    s->out += said;
    s->available_out -= said;
    return 1;
}
"""


def spy(folder: Path, port: int) -> bytes:
    (folder / "spy.c").write_text(SPY % {"port": port, "name": folder.name})
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-o", "spy.so", "spy.c"], cwd=folder, check=True)
    return (folder / "spy.so").read_bytes()


async def told(library: bytes) -> dict[str, int]:
    worker = await _Worker.start("dotnet-10", library)
    try:
        said = await worker.exchange(_frame(b"s", START.pack(0, False)) + _frame(b"f", b"content"))
    finally:
        await worker.end()
    return {name: int(value) for name, _, value in (word.partition("=") for word in said.decode().split())}


@compiler
async def test_an_engine_can_open_nothing_reach_nobody_and_start_nothing(tmp_path: Path) -> None:
    import errno
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        said = await told(spy(tmp_path, port))
        socket.create_connection(("127.0.0.1", port)).close()  # it was there to be reached
    assert said["socket"] == said["read"] == said["write"] == said["pipe"] == errno.EMFILE
    assert said["connect"] == errno.EBADF
    assert said["fork"] == errno.EAGAIN
    assert said["descriptors"] == 3, "something was inherited beside the pipes"
    assert said["memory"] == 1, "a gibibyte was given"
    assert not (Path("/tmp") / tmp_path.name).exists()
    if os.geteuid() == 0:
        assert said["uid"] == 65534
        assert said["root"] == errno.EPERM


@compiler
def test_the_spy_can_do_all_that_where_nothing_stops_it(tmp_path: Path) -> None:
    """Else its report proves nothing."""
    import ctypes
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        spy(tmp_path, server.getsockname()[1])
        code = (
            "import ctypes, sys; s = (ctypes.c_uint64 * 6)(); b = ctypes.create_string_buffer(512);"
            "s[1] = ctypes.addressof(b); s[4] = 512 << 32;"
            "ctypes.CDLL(sys.argv[1]).CompressionNative_Deflate(s, 4); sys.stdout.write(b.value.decode())"
        )
        ran = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, str(tmp_path / "spy.so")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert ctypes.sizeof(ctypes.c_void_p) == 8
    first = dict(word.split("=") for word in ran.stdout.splitlines()[0].split())
    assert [first[name] for name in ("socket", "connect", "read", "write", "fork", "pipe", "memory")] == ["0"] * 7
    (Path("/tmp") / tmp_path.name).unlink()


@engines
async def test_the_kernel_says_the_same_of_a_real_engines_process() -> None:
    worker = await _Worker.start("dotnet-10", Path(ENGINE_FILES[0]).read_bytes())
    try:
        proc = Path("/proc") / str(worker.process.pid)
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        limits = {line[:25].strip(): line[26:].split() for line in (proc / "limits").read_text().splitlines()[1:]}
        assert status["NoNewPrivs"].strip() == "1"
        for limit in ("Max open files", "Max file size", "Max core file size", "Max processes"):
            assert limits[limit][:2] == ["0", "0"], limit
        assert limits["Max address space"][0].isdigit()
        if os.geteuid() == 0:
            assert status["Uid"].split() == status["Gid"].split() == ["65534"] * 4
            assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
            assert status["Groups"].split() == []
        if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0:
            assert (proc / "ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    finally:
        await worker.end()


PARENT = """
import asyncio, sys
from pathlib import Path
from relay.engines.encoders import _Worker
async def main():
    worker = await _Worker.start("dotnet-10", Path(sys.argv[1]).read_bytes())
    print(worker.process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@engines
def test_it_dies_with_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, ENGINE_FILES[0]], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        # It does not even run: only its parent's death can end it, not the end of its input.
        os.kill(pid, signal.SIGSTOP)
        parent.kill()
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(pid)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True
