"""What an order and a report are: the signed words between orchestrator and agents.

Values only: signing, sealing and checking stand in `agent/orders/envelopes.py`; who sends and who acts, elsewhere. Everything
travels as JSON in a DSSE envelope (`relay.trust.envelopes`), so a relay can neither change nor invent any of it.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from relay.protocol.messages import AGENT_NAME, DEPLOYMENT_ID, OPERATION_ID, EncodedBytes

ORDER_TYPE: Final = "application/vnd.waystation.order+json"
REPORT_TYPE: Final = "application/vnd.waystation.report+json"
SEALED_ACTIONS: Final = "sealed-actions"
"""What an agent that opens a `SealedAction` says of itself under `understands`."""
PROJECT_FENCES: Final = "project-fences"
"""The same of one that takes an order's `project`, and keeps a fence for each."""

STALL_LIMITS: Final = "stall-limits"
"""The same, of an agent that knows `RunScript.stall`."""

SKEW_SECONDS: Final = 300.0
"""How far an agent's clock and the orchestrator's may be apart."""
ACCEPT_SECONDS: Final = 3600.0
"""How long an order may wait to be accepted. It governs acceptance, not duration."""

_Hex = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Fingerprint = Annotated[str, Meta(pattern=r"\Asha256:[0-9a-f]{64}\Z")]
_Agent = Annotated[str, Meta(pattern=AGENT_NAME)]
_Operation = Annotated[str, Meta(pattern=OPERATION_ID)]
_Deployment = Annotated[str, Meta(pattern=DEPLOYMENT_ID)]
_Path = Annotated[str, Meta(min_length=1, max_length=4096)]
_Text = Annotated[str, Meta(max_length=4096)]
_Short = Annotated[str, Meta(min_length=1, max_length=200)]
_Seconds = Annotated[float, Meta(ge=0.0, le=7 * 86400.0)]
_Limit = Annotated[float, Meta(gt=0.0, le=7 * 86400.0)]
_Variable = Annotated[
    str,
    Meta(
        pattern=r"\A(?:(?:VAR|TAG)_[A-Z0-9_]{1,200}|MACHINE|ADDRESS|SITE|ROLES|ENVIRONMENT|PROJECT|RELEASE|DEPLOYMENT"
        r"|STEP|ATTEMPT|VERSION|PACKAGE_ID|ROOT)\Z"
    ),
]
"""What an order may put into a script's environment. Nothing else: PATH, LD_PRELOAD or BASH_ENV would let a stolen
order key run what no package key signed."""
_SecretVariable = Annotated[str, Meta(pattern=r"\ASECRET_[A-Z0-9_]{1,200}\Z")]
_Variables = Annotated[dict[_Variable, str], Meta(max_length=512)]
_Many = 64


class _Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A value that was signed: unknown fields are refused, as what they mean was never checked."""


def deployment_of(operation: str) -> str:
    """The deployment that an operation's id names."""
    return operation.partition("/")[0]


# --- what may be ordered


class PackageTree(_Said, frozen=True):
    """A package that belongs under a root: `root` is an absolute folder, the tree stands in
    `root/releases/<label>-<ulid>`; an empty root is the agent's own folder for scripts.
    """

    id: _Short
    version: _Short
    manifest: _Hex
    root: Annotated[str, Meta(max_length=4096)] = ""
    label: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._+-]{0,62}\Z")] = "scripts"


class Survey(_Said, frozen=True, tag="survey"):
    """Say what is there, change nothing: for each tree how much room there is, and what is current."""

    trees: Annotated[tuple[PackageTree, ...], Meta(max_length=_Many)]


class Acquire(_Said, frozen=True, tag="acquire"):
    """Pull every tree from the closest relay and verify it. Safe to repeat."""

    trees: Annotated[tuple[PackageTree, ...], Meta(min_length=1, max_length=_Many)]
    deadline: _Seconds
    stall: _Seconds = 60.0


class RunScript(_Said, frozen=True, tag="script"):
    """Run `path` of the signed package whose manifest is `package`, at most once.

    Attributes:
        variables: into its environment, as they are.
        secrets: sealed to this agent (see `agent.orders.envelopes.seal`), opened into the environment under these names.
        root: the `to:` of the step; the folder it is started in (its own folder where that is empty).
        idempotent: may be run again after an unknown outcome.
        stall: it is ended where it prints nothing for so many seconds. Only for agents that say that
            they know it (`STALL_LIMITS`): others refuse the order.
    """

    package: _Hex
    path: _Path
    variables: _Variables
    secrets: Annotated[dict[_SecretVariable, bytes], Meta(max_length=_Many)] = {}
    root: Annotated[str, Meta(max_length=4096)] = ""
    timeout: _Limit = 600.0
    idempotent: bool = False
    stall: _Limit | None = None


class Switch(_Said, frozen=True, tag="switch"):
    """Let `root/current` name the installed tree of this manifest. Safe to repeat."""

    root: _Path
    manifest: _Hex


class ControlService(_Said, frozen=True, tag="service"):
    """Start, stop, restart or reload a service by the machine's own service manager, at most once."""

    name: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9@_][A-Za-z0-9@_.:-]{0,199}\Z")]
    action: Literal["start", "stop", "restart", "reload"]
    timeout: _Limit = 120.0
    idempotent: bool = False


class HttpCheck(_Said, frozen=True, tag="http"):
    """GET `url`; the status is `status`, and the body, stripped, is `expect` (where given) or contains `contains`."""

    url: Annotated[str, Meta(max_length=2048)]
    expect: str | None = None
    contains: str | None = None
    status: int = 200


class TcpCheck(_Said, frozen=True, tag="tcp"):
    """Something listens there."""

    host: _Short
    port: Annotated[int, Meta(ge=1, le=65535)]


class CommandCheck(_Said, frozen=True, tag="command"):
    """A command ends with 0; it may be started many times.

    On a machine, `argv[0]` is the path of a script in the signed package whose manifest is `package`, and without a
    package nothing is started: orders run only what a package key signed. On the server there is no package, and
    `argv[0]` is looked up in PATH.
    """

    argv: Annotated[tuple[str, ...], Meta(min_length=1, max_length=_Many)]
    package: Annotated[str, Meta(pattern=r"\A(?:[0-9a-f]{64})?\Z")] = ""


class ServiceCheck(_Said, frozen=True, tag="service"):
    """The machine's service manager says that it is active."""

    name: _Short


Check = HttpCheck | TcpCheck | CommandCheck | ServiceCheck


class TimedCheck(_Said, frozen=True):
    """`check` must hold for `lasting` seconds without a break, and that before `deadline` seconds have passed.

    One try takes at most `timeout` seconds.
    """

    check: Check
    lasting: _Seconds = 0.0
    deadline: _Seconds = 60.0
    timeout: _Seconds = 10.0


class Verify(_Said, frozen=True, tag="verify"):
    """Check the health of what runs. Safe to repeat. `variables` are for its commands."""

    checks: Annotated[tuple[TimedCheck, ...], Meta(min_length=1, max_length=_Many)]
    root: Annotated[str, Meta(max_length=4096)] = ""
    variables: _Variables = {}


class Settle(_Said, frozen=True, tag="settle"):
    """The tree that is current under `root` is good: remember it with what made it so, and prune old trees.

    `fingerprint` is of all that the step does on this machine: the same again is "already current".
    """

    root: _Path
    manifest: _Hex
    fingerprint: _Hex
    keep: Annotated[int, Meta(ge=0, le=1000)] = 3


class Stop(_Said, frozen=True, tag="stop"):
    """End a running operation: TERM to its processes, 10 s, KILL."""

    operation: _Operation


class Acknowledge(_Said, frozen=True, tag="acknowledge"):
    """The orchestrator has these results on its disk: the agent need not keep them. `ends` closes the deployment."""

    operations: Annotated[tuple[_Operation, ...], Meta(max_length=1024)]
    ends: bool = False


OpenAction = Survey | Acquire | RunScript | Switch | ControlService | Verify | Settle | Stop | Acknowledge


class SealedAction(_Said, frozen=True, tag="sealed"):
    """An action that only its agent can read: scripts and their variables, checks, folders, digests of packages.

    Attributes:
        kind: the type of the action in it, for lists.
        box: see `agent.orders.envelopes.seal_action`.
    """

    kind: Annotated[str, Meta(pattern=r"\A[a-z]{1,20}\Z")]
    box: Annotated[bytes, Meta(min_length=1)]


Action = OpenAction | SealedAction


def action_name(action: Action) -> str:
    """Its type, as the documents name it; of a sealed one, that of what is sealed."""
    return action.kind if isinstance(action, SealedAction) else str(type(action).__struct_config__.tag)


UNLIMITED_SECONDS: Final = 900.0
"""For what has no limit of its own: it reads or removes files of one machine."""


def longest_of(action: Action) -> float:
    """Seconds that it may take by its own limits, once it has begun."""
    match action:
        case Acquire(deadline=limit) | RunScript(timeout=limit) | ControlService(timeout=limit):
            return limit
        case Verify(checks=checks):
            return max(check.deadline for check in checks)
        case _:
            return UNLIMITED_SECONDS


class Order(_Said, frozen=True):
    """One instruction to one agent.

    Attributes:
        operation: its name for ever: deployment ULID/step/machine/action/attempt.
        fence: the rising number of the deployment; with `journal` it shuts an old orchestrator out.
        project: the fence is that of this project in the environment. Empty, as older orchestrators leave it: of all
            projects there.
        agent, key: the addressee: its name, and the fingerprint over both of its keys.
        not_before, not_after: when it may be accepted, seconds since 1970.
        relays: URLs where packages are, closest site first; the signed fall-back list.
    """

    format: Literal[1]
    operation: _Operation
    deployment: _Deployment
    environment: _Short
    fence: Annotated[int, Meta(ge=1, lt=1 << 53)]
    journal: Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    agent: _Agent
    key: _Fingerprint
    not_before: float
    not_after: float
    relays: Annotated[tuple[str, ...], Meta(max_length=_Many)]
    action: Action
    project: Annotated[str, Meta(max_length=200)] = ""


# --- what is answered


class TreeFacts(_Said, frozen=True):
    """What stands under a root.

    Attributes:
        free_bytes: room on its file system.
        installed: the asked tree is here, and whole: every byte of it was read.
        file_system: equal for roots that share their room.
        current_manifest, current_version, current_path: what `current` names; empty where nothing that we installed.
        settled: the fingerprint that the current tree was settled with; empty where it never was, and where it is the
            asked one but not whole any more.
    """

    root: str
    manifest: _Hex
    free_bytes: int
    installed: bool
    file_system: str = ""
    current_manifest: str = ""
    current_package: str = ""
    current_version: str = ""
    current_path: str = ""
    settled: str = ""


class SurveyFacts(_Said, frozen=True, tag="survey"):
    trees: tuple[TreeFacts, ...]


class TreePulled(_Said, frozen=True):
    """How a tree came: bytes by where they came from.

    Attributes:
        from_relays: payload bytes by relay.
        encodings: the same by encoding.
        fallbacks: differences that failed and were asked for again plainly.
    """

    package: str
    version: str
    path: str
    already: bool
    tree_bytes: int
    from_disk_bytes: int = 0
    resumed_bytes: int = 0
    from_relays: dict[str, int] = {}
    encodings: tuple[EncodedBytes, ...] = ()
    fallbacks: int = 0
    wire_bytes: int = 0
    seconds: float = 0.0


class AcquireFacts(_Said, frozen=True, tag="acquire"):
    trees: tuple[TreePulled, ...]


class SwitchFacts(_Said, frozen=True, tag="switch"):
    """`before` and `after` are paths of trees, empty where none."""

    before: str
    after: str


class VerifyFacts(_Said, frozen=True, tag="verify"):
    """What each check said last."""

    checks: tuple[str, ...]


Facts = SurveyFacts | AcquireFacts | SwitchFacts | VerifyFacts

State = Literal["running", "done", "failed", "stopped", "refused", "unknown"]
"""`failed`: it ran and did not succeed (a script's exit status, its time limit, a check). `refused`: it never ran.
`unknown`: it began, and its end was not seen."""

FINAL: Final[frozenset[str]] = frozenset({"done", "failed", "stopped", "refused", "unknown"})


class Report(_Said, frozen=True):
    """What became of an order, signed by the agent.

    Attributes:
        key: fingerprint of the agent.
        order: SHA-256 of the order's envelope, hex: which bytes this answers.
        number: rises with the operation's reports, with gaps; that of a refused letter stands apart.
        exit_status: of a script; negative: the signal that ended it.
        log_bytes, log_sha256: of the whole output as it was sent, in the final report.
        done, whole: progress in bytes, while it runs.
    """

    format: Literal[1]
    operation: _Operation
    deployment: _Deployment
    agent: _Agent
    key: _Fingerprint
    order: _Hex
    number: Annotated[int, Meta(ge=1, lt=1 << 53)]
    state: State
    reason: _Text = ""
    exit_status: int | None = None
    started: float = 0.0
    ended: float = 0.0
    log_bytes: int = 0
    log_sha256: str = ""
    done: int = 0
    whole: int = 0
    facts: Facts | None = None


class FenceSeen(_Said, frozen=True):
    """The highest fence that an agent accepted of a project in an environment. `open`: that deployment did not end yet."""

    fence: int
    journal: str
    deployment: str
    open: bool


class Presence(msgspec.Struct, frozen=True, omit_defaults=True):
    """An agent that is there, signed by itself. Fields that a newer agent adds are passed over: it orders nothing.

    Attributes:
        signing, sealing: its public keys, hex; their fingerprint is what the environment names.
        time: its clock, seconds since 1970.
        fences: the highest of each environment, of whichever project.
        project_fences: those of each project, by environment and project; an empty name is that of all.
        refused: the newest refusals of letters that could not be answered by a report, for `status`; at most 8.
        understands: forms of orders beyond the first ones.
        start: a word that each start of the agent draws anew; two at one time are two agents with the same keys.
        started: its clock at that start.
        host: what its machine calls itself.
    """

    format: Literal[1]
    name: _Agent
    signing: _Hex
    sealing: _Hex
    version: str
    system: str
    site: str
    time: float
    fences: dict[str, FenceSeen] = {}
    refused: tuple[str, ...] = ()
    understands: tuple[str, ...] = ()
    start: Annotated[str, Meta(max_length=64)] = ""
    started: float = 0.0
    host: Annotated[str, Meta(max_length=255)] = ""
    project_fences: dict[str, dict[str, FenceSeen]] = {}
