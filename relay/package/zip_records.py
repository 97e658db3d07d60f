"""Records and marks of the zip format, as PKWARE's APPNOTE 6.3.10 lays them out. Numbers are little-endian."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

STORED: Final = 0
DEFLATED: Final = 8
ZSTD: Final = frozenset({93, 20})
"""The number since APPNOTE 6.3.8, and the one of 6.3.7."""
METHODS: Final = frozenset({STORED, DEFLATED}) | ZSTD
"""Those whose parts are read."""
METHOD_NAMES: Final = {
    1: "Shrink",
    2: "Reduce",
    3: "Reduce",
    4: "Reduce",
    5: "Reduce",
    6: "Implode",
    9: "Deflate64",
    10: "PKWARE DCL Implode",
    12: "bzip2",
    14: "LZMA",
    16: "IBM CMPSC",
    18: "IBM TERSE",
    19: "IBM LZ77",
    94: "MP3",
    95: "XZ",
    96: "JPEG",
    97: "WavPack",
    98: "PPMd",
}
"""The others that the format knows (APPNOTE 4.4.5)."""
VERSION_NEEDED: Final = 20

LOCAL: Final = struct.Struct("<4s5H3L2H")
CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
END: Final = struct.Struct("<4s4H2LH")
END64: Final = struct.Struct("<4sQ2H2L4Q")
LOCATOR: Final = struct.Struct("<4sLQL")
LOCAL_MARK, CENTRAL_MARK, END_MARK = b"PK\3\4", b"PK\1\2", b"PK\5\6"
END64_MARK, LOCATOR_MARK, DESCRIPTOR_MARK = b"PK\6\6", b"PK\6\7", b"PK\7\x08"

MAX16: Final = 0xFFFF
MAX32: Final = 0xFFFFFFFF
ZIP64_EXTRA: Final = 0x0001
UNICODE_PATH_EXTRA: Final = 0x7075
EXTRA_MAX: Final = 1024
"""Bytes of one record's extra fields; honest ones have some dozens. Bounds the time of a walk."""

ENCRYPTED_FLAGS: Final = 0x0001 | 0x0040 | 0x2000
DESCRIPTOR_FLAG: Final = 0x0008
UTF8_FLAG: Final = 0x0800
KNOWN_FLAGS: Final = 0x0006 | DESCRIPTOR_FLAG | UTF8_FLAG
"""The deflate level hints, "sizes follow the data", and "the name is UTF-8"."""

UNIX_HOSTS: Final = frozenset({3, 19})
DOS_FOLDER: Final = 0x10
REPARSE_POINT: Final = 0x400


class Directory(NamedTuple):
    """Where the central directory lies, in bytes of the file, and how many records it says it has."""

    offset: int
    size: int
    entries: int
