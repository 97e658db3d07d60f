"""What an agent remembers of its relays when its process ends: their health, and the last good answers of DNS."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from agent.acts import RelayIll, RelaysForgotten, RelayWell
from agent.disk import disk_errors
from agent.relays.dns import LastAnswer, words_of
from agent.relays.health import UNKNOWN, Health
from relay.audit.event import tell
from relay.folders import make_folder
from relay.support.durable import write_durably

STATE_BYTES_MAX = 1 << 20


@dataclass(frozen=True)
class State:
    """What outlives the process. `current` is the URL of the source in use, `healths` are by URL."""

    format: Literal[1] = 1
    current: str | None = None
    healths: dict[str, Health] = field(default_factory=dict)
    last_answers: tuple[LastAnswer, ...] = ()


def load_state(path: Path) -> State:
    """The kept state, or an empty one: it can all be learned again, so no file may keep an agent from starting.

    Blocks for one small file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(STATE_BYTES_MAX + 1)
        if len(data) > STATE_BYTES_MAX:
            return _start_fresh(path, f"larger than {STATE_BYTES_MAX} bytes")
        return msgspec.json.decode(data, type=State)
    except FileNotFoundError:
        return State()
    except (OSError, ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        return _start_fresh(path, words_of(error))


def _start_fresh(path: Path, reason: str) -> State:
    tell(RelaysForgotten(str(path), reason))
    return State()


def save_state(path: Path, state: State) -> None:
    """Replace the file as a whole: a reader, and the next start after a power cut, finds the old or the new one.

    Blocks for an fsync; call it in a thread.

    Raises:
        StoreError: it could not be written; the old file is untouched.
    """
    data = msgspec.json.format(msgspec.json.encode(state), indent=1)
    with disk_errors("cannot keep what is known of the relays"):
        make_folder(os.fspath(path.parent), mode=0o700)
        write_durably(os.fspath(path), data)


def log_changes(before: Mapping[str, Health], after: Mapping[str, Health]) -> None:
    """Log the sources whose state changed, and only those."""
    for url, health in after.items():
        was_ok = before.get(url, UNKNOWN).ok
        if was_ok and not health.ok:
            tell(RelayIll(url, health.fails, health.reason))
        elif health.ok and not was_ok:
            tell(RelayWell(url))
