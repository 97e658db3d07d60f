"""Where the orchestrator keeps what it has, and who calls it."""

from __future__ import annotations

import getpass
import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Paths:
    """Folders and files of one orchestrator, and who works with them.

    Attributes:
        depot: location of the store.
        trust: the folder of the keys.
        person: by whose key releases and decisions are signed; empty: by the order key without a name.
        keys: the folder of that person's key; empty: `people` in `trust`.
    """

    home: str
    depot: str
    trust: str
    journal: str
    person: str = ""
    keys: str = ""

    def deployment(self, ulid: str) -> str:
        """The folder of one deployment."""
        return os.path.join(self.home, "deployments", ulid)


def operator() -> str:
    """Who calls, for the record: user and host. The record guards nothing; keys do."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
