"""Logs of scripts as a test reads them."""

from __future__ import annotations

import re


def printed(log: bytes) -> bytes:
    """What a script printed, of the log that its runner made of it: without time and stream before each line."""
    text = bytearray()
    for line in log.splitlines(keepends=True):
        frame = re.match(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (stdout|stderr) ([FP]) ", line)
        text += line if frame is None else line[frame.end() :].removesuffix(b"\n")
        text += b"\n" if frame is not None and frame[2] == b"F" else b""
    return bytes(text)
