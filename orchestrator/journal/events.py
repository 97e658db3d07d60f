"""What a deployment's journal tells: one frozen struct per kind of entry, a union tagged by `kind`.

Entries are facts, written when they have happened or right before they may happen (`dispatched` before the order leaves,
`bracket_opened` before `before` is started); `orchestrator/journal/views.py` says what they mean together. An entry is never
changed: a field may be added with a default, a kind may be added with a new `orchestrator.journal.journal.FORMAT`.
Seconds, bytes, lower-case hex. `machine` is a name of the plan, `step` the number of a step (0: preparation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from agent.orders.orders import AcquireFacts, Facts, Report, State, SurveyFacts
from relay.errors import StoreError
from relay.protocol.messages import EncodedBytes

Goal = Literal["deploy", "stage", "rollback"]
FinalState = Literal["succeeded", "failed", "cancelled"]
"""How a deployment ends."""
Outcome = Literal["succeeded", "done with exclusions", "failed", "cancelled"]
"""The same for people: `done with exclusions` where all steps are done, but not on every machine."""


class _Fact(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="kind"):
    """One kind of entry."""

    @classmethod
    def kind(cls) -> str:
        """The tag, as it stands in the journal's column `kind`."""
        return str(cls.__struct_config__.tag)


# --- the deployment


class Started(_Fact, frozen=True, tag="started"):
    """The deployment began; always the first entry."""

    operator: str
    host: str
    pid: int
    fence: int
    goal: Goal = "deploy"


class Resumed(_Fact, frozen=True, tag="resumed"):
    """Another process took the deployment up, under a new fence. `reopens`: it had ended, and goes on (`retry`)."""

    operator: str
    host: str
    pid: int
    fence: int
    reopens: bool = False


class Note(_Fact, frozen=True, tag="note"):
    """Something that a person should read."""

    text: str
    machine: str = ""
    step: int = 0


class Notified(_Fact, frozen=True, tag="notified"):
    """A receiver has heard of `event`, or `error` says why not. `target` names it without its secrets."""

    event: str
    target: str
    error: str = ""


class DecisionTaken(_Fact, frozen=True, tag="decision_taken"):
    """What a person decided was taken up: row `decision`, of this kind, with these words."""

    decision: int
    operator: str
    what: str
    data: dict[str, Any] = {}


class Ended(_Fact, frozen=True, tag="ended"):
    """The deployment is over: `succeeded` for a reason is not on every machine, see `outcome_of`."""

    state: FinalState
    reason: str = ""


# --- preparation


class PreAcquireStarted(_Fact, frozen=True, tag="pre_acquire_started"):
    """`undo_due`: from here on its undo is owed, also where its end is not seen."""

    name: str
    undo_due: bool


class PreAcquireEnded(_Fact, frozen=True, tag="pre_acquire_ended"):
    """`undo_due`: whether its undo is owed, now that the end is known."""

    name: str
    ok: bool
    undo_due: bool
    reason: str = ""


class UndoStarted(_Fact, frozen=True, tag="undo_started"):
    """What a step before acquisition opened is about to be closed: `why` the deployment fails, where it is known by then."""

    name: str
    why: str = ""


class UndoEnded(_Fact, frozen=True, tag="undo_ended"):
    """It is closed, or could not be."""

    name: str
    ok: bool
    reason: str = ""


class Surveyed(_Fact, frozen=True, tag="surveyed"):
    """A machine has said what stands on it."""

    machine: str
    facts: SurveyFacts


class LineBytes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What crossed one line, such as `origin → fra`: of HTTP in both directions, and its payload by encoding."""

    line: str
    wire_bytes: int
    encodings: tuple[EncodedBytes, ...] = ()


class Replicated(_Fact, frozen=True, tag="replicated"):
    """A package is whole at a relay. `wire_bytes` went over the line, 0 where it was there before.

    `lines` tell every byte, also of what was only asked: where it came over, in the order of their use. `fallbacks` are
    runs that were refused as differences and went plainly. Older entries have neither.
    """

    relay: str
    package: str
    version: str
    package_bytes: int
    wire_bytes: int
    chunks: int = 0
    chunks_sent: int = 0
    seconds: float = 0.0
    lines: tuple[LineBytes, ...] = ()
    fallbacks: int = 0


class RelayBehind(_Fact, frozen=True, tag="relay_behind"):
    """A relay has not got a package, and the deployment goes on without it; `replicated` makes it good. Since format 2."""

    relay: str
    package: str
    version: str
    reason: str


class Acquired(_Fact, frozen=True, tag="acquired"):
    """Every tree of this machine is verified on its disk."""

    machine: str
    facts: AcquireFacts


class Barrier(_Fact, frozen=True, tag="barrier"):
    """Acquisition is through: these machines hold everything; `excluded` (by rule, with reasons) take no part."""

    machines: tuple[str, ...]
    excluded: dict[str, str] = {}


# --- steps and turns


class StepStarted(_Fact, frozen=True, tag="step_started"):
    """A step begins."""

    step: int
    name: str


class StepEnded(_Fact, frozen=True, tag="step_ended"):
    """A step is over, or was skipped."""

    step: int
    ok: bool
    skipped: bool = False
    reason: str = ""
    name: str = ""


class TurnStarted(_Fact, frozen=True, tag="turn_started"):
    """The machine is in flight from here to its `turn_ended`."""

    machine: str
    step: int


class TurnEnded(_Fact, frozen=True, tag="turn_ended"):
    """`outcome` is the turn's word (deployed, kept_old, left_out, …); `failure` counts against `max_failures`;
    `stop_roll`: nothing else may start, whatever `max_failures` allows.
    """

    machine: str
    step: int
    outcome: str
    failure: bool = False
    stop_roll: bool = False
    bracket_open: bool = False
    reason: str = ""


class BracketOpened(_Fact, frozen=True, tag="bracket_opened"):
    """`before` is about to run: from here on the machine may be out of its rotation."""

    machine: str
    rotation: str
    step: int


class BracketClosed(_Fact, frozen=True, tag="bracket_closed"):
    """`after` ended well with this OUTCOME. It closes the bracket whatever deployment had opened it."""

    machine: str
    rotation: str
    outcome: str


class BracketAdopted(_Fact, frozen=True, tag="bracket_adopted"):
    """This deployment answers for a bracket that the deployment `opened_by` (of the release `label`) left open."""

    machine: str
    rotation: str
    opened_by: str
    label: str = ""


class TurnDid(_Fact, frozen=True, tag="turn_did"):
    """What became of one thing that a turn had to do: `do`, `how` and `answer` are words of `orchestrator/rolling/turn.py`.

    It is written with whatever is recorded next: what followed from it is never on the disk without it. Since format 3.
    """

    machine: str
    step: int
    do: str
    how: str
    reason: str = ""
    answer: str = ""


class GatePassed(_Fact, frozen=True, tag="gate_passed"):
    """What stands behind phase `phase` (from 1) of a step may start. Since format 3."""

    step: int
    phase: int
    name: str


# --- people


class AskOpened(_Fact, frozen=True, tag="ask_opened"):
    """People are asked. `ask` names the question for ever (`STEP/NAME`), `at` is when it expires (0: never). Since format 3."""

    ask: str
    step: int
    name: str
    text: str
    at: float = 0.0


class AskAnswered(_Fact, frozen=True, tag="ask_answered"):
    """One person has said yes or no; more may be needed. `decision` is the row. Since format 3."""

    ask: str
    decision: int
    by: str
    verdict: Literal["approve", "reject"]
    why: str = ""


class AskClosed(_Fact, frozen=True, tag="ask_closed"):
    """The question is settled. `late`: its time was over while no process looked. Since format 3."""

    ask: str
    outcome: Literal["approved", "rejected", "expired"]
    reason: str = ""
    late: bool = False


class MachineAsked(_Fact, frozen=True, tag="machine_asked"):
    """A machine's turn waits for a person: what is to be done with it? Since format 3."""

    machine: str
    step: int
    reason: str
    choices: tuple[str, ...]


class MachineDecided(_Fact, frozen=True, tag="machine_decided"):
    """A person has said it. `decision` is the row. Since format 3."""

    machine: str
    step: int
    what: str
    decision: int
    by: str
    why: str = ""


class Paused(_Fact, frozen=True, tag="paused"):
    """Nothing new starts until a person says so. Since format 3."""

    reason: str
    by: str = ""


class Unpaused(_Fact, frozen=True, tag="unpaused"):
    """It goes on. Since format 3."""

    by: str
    why: str = ""


class Left(_Fact, frozen=True, tag="left"):
    """A machine is left out of this deployment, on purpose or by rule; `by` is a person, empty for a rule. Since format 3."""

    machine: str
    reason: str
    by: str = ""


# --- operations


class Dispatched(_Fact, frozen=True, tag="dispatched"):
    """A signed order is about to leave; `order` is the SHA-256 of its envelope."""

    operation: str
    machine: str
    order: str


class Reported(_Fact, frozen=True, tag="reported"):
    """The final report of an operation, its signature checked."""

    operation: str
    machine: str
    state: State
    reason: str = ""
    exit_status: int | None = None
    started: float = 0.0
    ended: float = 0.0
    log_bytes: int = 0
    log_sha256: str = ""
    facts: Facts | None = None

    @classmethod
    def of(cls, machine: str, report: Report) -> Reported:
        """What the journal keeps of a report."""
        return cls(
            operation=report.operation,
            machine=machine,
            state=report.state,
            reason=report.reason,
            exit_status=report.exit_status,
            started=report.started,
            ended=report.ended,
            log_bytes=report.log_bytes,
            log_sha256=report.log_sha256,
            facts=report.facts,
        )


class ServerRunDispatched(_Fact, frozen=True, tag="server_run_dispatched"):
    """Something is about to run on the server; `machine` is the one that it serves, empty where none."""

    operation: str
    name: str
    machine: str = ""


class ServerRunEnded(_Fact, frozen=True, tag="server_run_ended"):
    """What ran on the server has ended."""

    operation: str
    state: State
    machine: str = ""
    reason: str = ""
    exit_status: int | None = None
    started: float = 0.0
    ended: float = 0.0
    log_bytes: int = 0


class Refused(_Fact, frozen=True, tag="refused"):
    """An agent refused an order, or a letter; `operation` where it could say which."""

    machine: str
    reason: str
    operation: str = ""


Event = (
    Started
    | Resumed
    | Note
    | Notified
    | DecisionTaken
    | Ended
    | PreAcquireStarted
    | PreAcquireEnded
    | UndoStarted
    | UndoEnded
    | Surveyed
    | Replicated
    | RelayBehind
    | Acquired
    | Barrier
    | StepStarted
    | StepEnded
    | TurnStarted
    | TurnEnded
    | BracketOpened
    | BracketClosed
    | BracketAdopted
    | TurnDid
    | GatePassed
    | AskOpened
    | AskAnswered
    | AskClosed
    | MachineAsked
    | MachineDecided
    | Paused
    | Unpaused
    | Left
    | Dispatched
    | Reported
    | ServerRunDispatched
    | ServerRunEnded
    | Refused
)

BRACKET_KINDS = tuple(kind.kind() for kind in (BracketOpened, BracketClosed, BracketAdopted))


WrittenState = Literal["running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class DeploymentRecord:
    """A deployment as the journal lists it.

    `deployment` is its ULID. Times are seconds since 1970; `ended` is None while it is running.
    """

    deployment: str
    project: str
    label: str
    environment: str
    goal: Goal
    fence: int
    state: WrittenState
    reason: str
    operator: str
    host: str
    pid: int
    started: float
    ended: float | None


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """An event in its place. `number` counts the entries of the whole journal, `at` is seconds since 1970."""

    number: int
    deployment: str
    at: float
    event: Event


def outcome_of(state: FinalState, reason: str) -> Outcome:
    """The word for an end as it is written down."""
    return "done with exclusions" if state == "succeeded" and reason else state


_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def decode(data: bytes | str) -> Event:
    """Read an entry's JSON.

    Raises:
        StoreError: it is no event that this version knows.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise StoreError(f"an entry of the journal cannot be read: {error}") from error
