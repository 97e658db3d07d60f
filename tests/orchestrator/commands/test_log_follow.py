"""`release log --follow`: it goes on while nobody runs the deployment, and from where it was killed, without gap or repeat."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import msgspec
import pytest
from harness.process import Process, wait_for
from harness.seed import chance

from agent.runs.runner import framed
from orchestrator.journal.events import Ended
from orchestrator.journal.journal import Journal
from orchestrator.plan.plan import AcquirePlan, Plan

ULID = "01JD0000000000000000000000"
OPERATIONS = ("0~server~open-vpn~1", "1~web1~2-configure~1")


def plan() -> bytes:
    return msgspec.json.encode(
        Plan(
            format=1, project="shop", label="1.4.2", environment="production", packages={}, scripts=None, relays=(),
            feeds={}, machines=(), secrets={}, machine_secrets=(), pre_acquire=(), acquire=AcquirePlan(), steps=(),
        )
    )  # fmt: skip


@pytest.mark.processes
def test_a_follower_that_is_killed_again_and_again_tells_every_line_once(tmp_path: Path) -> None:
    draw = chance("follow")
    logs, told = tmp_path / "deployments" / ULID / "logs", tmp_path / "told.jsonl"
    logs.mkdir(parents=True)
    expected: dict[str, list[str]] = {operation: [] for operation in OPERATIONS}

    def printed(count: int) -> None:
        for _ in range(count):
            operation = draw.choice(OPERATIONS)
            text = f"line {len(expected[operation])} {'ü' * draw.randrange(200)}"
            expected[operation].append(text)
            with (logs / f"{operation}.log").open("ab") as file:
                data = text.encode()
                cut = draw.randrange(len(data))
                file.write(framed(b"stdout", data[:cut], 0.0) + framed(b"stdout", data[cut:] + b"\n", 0.0))

    def found() -> list[tuple[str, str]]:
        whole = told.read_bytes().rpartition(b"\n")[0] if told.exists() else b""
        lines = [json.loads(line) for line in whole.splitlines()]
        return [(line["operation"], line["text"]) for line in lines]

    with Journal.open(str(tmp_path / "journal.db")) as journal:
        journal.begin(ULID, plan(), 1, "ann")
        for _ in range(3):
            follower = Process(tmp_path, "release", "log", "--follow", "--to", told)
            printed(40)
            least = draw.randrange(sum(map(len, expected.values())))
            wait_for(lambda least=least: len(found()) >= least)
            os.kill(follower.pid, signal.SIGKILL)
            follower.result()
            printed(20)
        last = Process(tmp_path, "release", "log", "--follow", "--to", told)
        printed(20)
        journal.set_state(ULID, "succeeded", "", Ended("succeeded"))
        assert last.result().code == 0
    lines = found()
    assert len(lines) == 200
    for operation, texts in expected.items():
        assert [text for of, text in lines if of == operation] == texts
