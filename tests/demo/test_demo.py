"""`deploy/demo/demo.py` as a user runs it: it tells the truth, and leaves nothing behind, however it ends."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from harness.packages import make_nupkg, noise
from harness.seed import SOAK

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "demo.py"
MIB = 1 << 20
RUN_SECONDS = 300

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin"
needs_programs = pytest.mark.skipif(
    any(shutil.which(program, path=PATH) is None for program in ("dnsmasq", "haproxy")),
    reason="dnsmasq or haproxy is not installed: the demo is NOT run",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the demo makes its own; named in the environment of everything that it starts."""
    made = tmp_path / "tmp"
    made.mkdir()
    return made


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, DEMO, *arguments],
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def processes_of(folder: Path) -> set[int]:
    """Every process that was started with this folder in its environment."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # Gone, or somebody else's.
            continue
        if f"TMPDIR={folder}".encode() in variables:
            found.add(int(entry.name))
    return found


def command_of(id: int) -> str:
    try:
        return Path(f"/proc/{id}/cmdline").read_text()
    except OSError:  # Gone.
        return ""


def assert_nothing_is_left(folder: Path) -> None:
    assert processes_of(folder) == set()
    assert list(folder.iterdir()) == []


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    told = ""
    for line in process.stdout:
        told += line
        if text in line:
            return told
    raise AssertionError(f"the demo ended before it said {text!r}:\n{told}")


# --- the whole


@needs_programs
@pytest.mark.parametrize(
    "shelf", ["as it is", pytest.param("empty", marks=pytest.mark.soak)], ids=["packages-as-found", "packages-packed"]
)
def test_the_demo_keeps_every_promise_and_leaves_nothing(folder: Path, tmp_path: Path, shelf: str):
    if shelf == "empty" and not SOAK:
        pytest.skip("the second form of the demo runs in `make soak`")
    report = tmp_path / "ledger.json"
    chosen = ["--packages", str(tmp_path / "nothing")] if shelf == "empty" else []
    with running(folder, *chosen, "--report", str(report)) as process:
        told, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, told
    assert_nothing_is_left(folder)
    assert "Every promise held" in told
    assert "Released without a failed request" in told
    assert "\x1b[" not in told
    document = json.loads(report.read_text())
    check_numbers(document)
    check_release(document["release"])


def check_numbers(ledger: dict) -> None:
    """The ledger again, by what the issue asks and not by the demo's own judgement."""
    assert ledger["held"] is True
    assert ledger["seconds"] < 180
    first, update, killed, after = ledger["deliveries"]
    for delivery in (first, update, killed, after):
        assert sorted(sent["relay"] for sent in delivery["sent"]) == ["fra", "iad"]
        assert len({pull["machine"] for pull in delivery["pulls"]}) == 6
        counted, told = (sum(sent[what] for sent in delivery["sent"]) for what in ("counted", "told"))
        assert abs(counted - told) <= 0.01 * counted
        assert delivery["each_bytes"] == 6 * delivery["added"]["nupkg_bytes"]
    once = first["added"]["new_bytes"] + first["added"]["manifest_bytes"]
    assert sum(sent["counted"] for sent in first["sent"]) <= 2 * once * 1.1
    assert first["added"]["nupkg_bytes"] > 2 * MIB
    assert sum(sent["counted"] for sent in update["sent"]) < 0.1 * sum(sent["counted"] for sent in first["sent"])
    assert all(pull["disk_bytes"] > 0.8 * pull["tree_bytes"] for pull in update["pulls"])
    assert 0.2 <= killed["kill"]["share"] <= 0.8
    assert all(set(p["relays"]) == {"fra", "iad"} for p in killed["pulls"] if p["site"] == "fra")
    assert all(set(p["relays"]) == {p["site"]} for p in after["pulls"])
    assert ledger["trees_checked"] == 24
    assert ledger["wan_bytes"] < ledger["nupkg_to_each_machine_bytes"]
    assert len(ledger["beside"]) == 2
    for beside, delivery in zip(ledger["beside"], (update, after), strict=True):
        assert beside["package"] == delivery["added"]["package"]
        assert beside["sent_bytes"] == max(sent["counted"] for sent in delivery["sent"])
        ways = {way["name"]: way["bytes"] for way in beside["ways"]}
        assert list(ways) == ["rdiff, as Octodiff", "rsync", "the whole file"]
        assert ways["the whole file"] == beside["nupkg_bytes"] == delivery["added"]["nupkg_bytes"]
        assert all(count is None or beside["sent_bytes"] < count for count in ways.values())
        for program, name in (("rdiff", "rdiff, as Octodiff"), ("rsync", "rsync")):
            assert (ways[name] is None) is (shutil.which(program, path=PATH) is None)
    for delivery in (first, update, killed, after):
        for sent in delivery["sent"]:
            assert sum(each["chunks"] for each in sent["encodings"]) == sent["chunks"]
            assert sum(each["payload_bytes"] for each in sent["encodings"]) <= sent["counted"]


def check_release(release: dict) -> None:
    """What the visitors saw, by what the issue asks."""
    assert release["failed"] == 0
    assert set(release["versions"]) == {"1.0.0", "2.0.0"}
    assert sum(release["versions"].values()) == release["requests"] >= 800
    assert (release["survived"]["state"], release["survived"]["deployments"]) == ("succeeded", 1)
    assert release["survived"]["said"] == ["anna: approve"]
    assert list(release["survived"]["switches"].values()) == [1] * 6
    assert release["survived"]["after_the_loss"] > 2
    assert all(promise["held"] for promise in release["promises"])


# --- however it ends


@needs_programs
@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "agent pull"), (signal.SIGTERM, "There is no real package")],
    ids=["ctrl-c-in-a-pull", "sigterm-while-packing"],
)
def test_a_demo_that_is_stopped_leaves_nothing(folder: Path, tmp_path: Path, number: signal.Signals, moment: str):
    with running(folder, "--packages", str(tmp_path / "nothing")) as process:
        read_until(process, moment)
        assert len(processes_of(folder)) >= 4, "the demo, two relays and a name server are running"
        assert len(list(folder.iterdir())) == 1
        process.send_signal(number)
        told, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 128 + number
    assert "Stopped in step" in told
    assert "Traceback" not in told
    assert_nothing_is_left(folder)


@needs_programs
def test_a_demo_that_is_stopped_in_the_middle_of_a_roll_leaves_no_application_behind(folder: Path, tmp_path: Path):
    files = {f"lib/part{n}.dll": noise(n, 300_000) for n in range(8)}
    for id, versions in {
        "Shop.Web": ("1.0.0", "1.0.1"),
        "Microsoft.AspNetCore.App.Runtime.linux-x64": ("10.0.13", "10.0.14"),
    }.items():
        for version in versions:
            make_nupkg(tmp_path, files | {"lib/changed.dll": noise(version, 300_000)}, id=id, version=version)
    with running(folder, "--packages", str(tmp_path)) as process:
        read_until(process, "Version 2.0.0 follows under load")
        read_until(process, ": out of web")
        assert any("webshop" in command_of(id) for id in processes_of(folder)), "the shop runs"
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 128 + signal.SIGINT
    assert "Stopped in step 13" in told
    assert_nothing_is_left(folder)


@needs_programs
def test_a_demo_that_fails_says_where_shows_the_logs_and_leaves_nothing(folder: Path, tmp_path: Path):
    for version in ("1.0.0", "1.0.1"):
        (tmp_path / f"Shop.Web.{version}.nupkg").write_bytes(b"not a package")
    with running(folder, "--packages", str(tmp_path)) as process:
        told, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 1
    assert "The demo failed in step 2" in told
    assert "error (refused)" in told or "not a zip" in told
    assert "relay ready at" in told
    assert "Traceback" not in told
    assert_nothing_is_left(folder)


# --- what it judges by


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(DEMO.parent))
    return importlib.import_module


def test_a_demo_that_lacks_a_program_names_it_and_starts_nothing(module, monkeypatch, capsys):
    town, demo = module("town"), module("demo")
    monkeypatch.setattr(town, "program", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    assert demo.main() == 2
    assert "dnsmasq (Debian: apt-get install dnsmasq-base)" in capsys.readouterr().err


def good_ledger(books):
    """What the demo sees when all is well: 10 MiB once to each of two relays, to three machines at each."""
    added = books.Added("Demo 1.0.0", 10 * MIB, 100, 10 * MIB, 1000)
    sent = tuple(books.Sent(relay, 100, 9 * MIB, 9 * MIB) for relay in ("fra", "iad"))
    pulls = tuple(
        books.Pull(f"{site}-{n}", site, 30 * MIB, 20 * MIB, {site: books.Taken(99, 10 * MIB, 4 * MIB)})
        for site in ("fra", "iad")
        for n in (1, 2, 3)
    )
    plain = books.Delivery(added, sent, pulls, {"fra": 12 * MIB, "iad": 12 * MIB}, {"fra": 0, "iad": 0})
    both = {relay: books.Taken(50, 5 * MIB, 2 * MIB) for relay in ("fra", "iad")}
    went_on = tuple(replace(pull, relays=both) if pull.site == "fra" else pull for pull in pulls)
    killed = replace(plain, pulls=went_on, kill=books.Kill("fra", 0.45, MIB))
    ways = (books.Way("rdiff", None), books.Way("rsync", 8 * MIB), books.Way("the whole file", 10 * MIB))
    beside = books.Beside("Demo 1.0.1", 10 * MIB, MIB, ways)
    return books.Ledger([plain, killed, replace(plain, returned="fra")], trees_checked=18, beside=[beside])


def test_good_numbers_keep_every_promise(module):
    books = module("ledger")
    assert [promise for promise in books.promises(good_ledger(books)) if not promise.held] == []


def sent_twice(delivery):
    return replace(delivery, sent=tuple(replace(s, counted=2 * s.counted, told=2 * s.told) for s in delivery.sent))


def told_less(delivery):
    return replace(delivery, sent=tuple(replace(s, told=int(0.98 * s.told)) for s in delivery.sent))


def pulled_all(delivery):
    return replace(
        delivery,
        pulls=tuple(
            replace(p, relays={r: replace(t, chunks=101) for r, t in p.relays.items()}) for p in delivery.pulls
        ),
    )


def pulled_elsewhere(delivery):
    return replace(delivery, pulls=tuple(replace(p, relays={"iad": p.relays[p.site]}) for p in delivery.pulls))


def killed_at(share: float):
    return lambda delivery: replace(delivery, kill=replace(delivery.kill, share=share))


def crossed_twice(delivery):
    return replace(delivery, kill=replace(delivery.kill, twice_bytes=40 * MIB))


def changed_much(delivery):
    return replace(delivery, one_file_changed=True)


@pytest.mark.parametrize(
    ("number", "harm", "broken"),
    [
        (0, sent_twice, "crosses once per site"),
        (0, told_less, "own count"),
        (0, pulled_all, "only what they lack"),
        (0, changed_much, "moves little"),
        (1, killed_at(0.1), "between 20 and 80 %"),
        (1, killed_at(0.9), "between 20 and 80 %"),
        (1, pulled_elsewhere, "go on at the other relay"),
        (1, crossed_twice, "crosses twice"),
        (2, pulled_elsewhere, "returns to relay fra"),
    ],
)
def test_each_bad_number_breaks_the_promise_that_it_belongs_to(module, number, harm, broken):
    books = module("ledger")
    ledger = good_ledger(books)
    ledger.deliveries[number] = harm(ledger.deliveries[number])
    assert [broken in promise.text for promise in books.promises(ledger) if not promise.held] == [True]


@pytest.mark.parametrize("count", [8 * MIB, 9 * MIB])
def test_another_way_that_sends_as_little_breaks_the_last_promise(module, count):
    books = module("ledger")
    ledger = good_ledger(books)
    ledger.beside[0] = replace(ledger.beside[0], sent_bytes=count)
    broken = [promise for promise in books.promises(ledger) if not promise.held]
    assert [promise.text for promise in broken] == ["Demo 1.0.1: a site is sent less than by each other way"]
    assert "rsync 8.0 MiB" in broken[0].seen


def test_the_last_table_says_what_is_not_here(module):
    books = module("ledger")
    lines = books.beside(good_ledger(books)).splitlines()
    assert lines[-1].endswith("100.00 %")
    (rdiff,) = [line for line in lines if "rdiff" in line]
    assert rdiff.endswith("not installed here")
    assert any("waystation" in line and "1,048,576" in line and line.endswith("10.00 %") for line in lines)


def test_each_line_tells_its_encodings(module):
    books = module("ledger")
    ledger = good_ledger(books)
    once = books.Encoded("hdiff", 3, 9 * MIB, MIB)
    plain = books.Encoded("zstd", 1, MIB, 2 * MIB)
    first = ledger.deliveries[0]
    sent = (replace(first.sent[0], encodings=(once, plain)), replace(first.sent[1], encodings=(once,)))
    pulls = tuple(replace(pull, encodings=(plain,)) for pull in first.pulls)
    ledger.deliveries[:] = [replace(first, sent=sent, pulls=pulls)]
    rows = [line.split("  ") for line in books.by_encoding(ledger).splitlines()[2:]]
    told = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert told == [
        ["Demo 1.0.0", "hdiff", "1.0 MiB", "1.0 MiB", "-"],
        ["zstd", "2.0 MiB", "-", "12.0 MiB"],
    ]


@pytest.mark.parametrize("harm", [{"trees_checked": 17}, {"trees_wrong": ["fra-1, Demo 1.0.0: a.dll"]}])
def test_a_tree_that_is_wrong_or_was_not_compared_breaks_the_first_promise(module, harm):
    books = module("ledger")
    ledger = replace(good_ledger(books), **harm)
    assert [promise.held for promise in books.promises(ledger)].index(False) == 0


def test_a_tree_differs_when_a_file_is_missing_altered_or_too_many(module, tmp_path):
    import zipfile

    packages = module("packages")
    nupkg, tree = tmp_path / "a.nupkg", tmp_path / "tree"
    with zipfile.ZipFile(nupkg, "w") as archive:
        for name in ("a.nuspec", "[Content_Types].xml", "_rels/.rels", "lib/one.dll", "lib/two%20.dll", "same.txt"):
            archive.writestr(name, name)
    (tree / "lib").mkdir(parents=True)
    (tree / "same.txt").write_text("same.txt")
    (tree / "lib" / "one.dll").write_text("altered")
    (tree / "extra.txt").write_text("")
    assert packages.differences(tree, packages.digests_of(nupkg)) == ["extra.txt", "lib/one.dll", "lib/two .dll"]


# --- what the release is judged by


def good_roll(module):
    """What visitors and HAProxy see when all is well: six machines leave and return, first one, then two at a time."""
    farm, log, load = module("webfarm"), module("haproxy_log"), module("load")
    names = [f"web{n}" for n in range(6)]
    changes = []

    def told(second: int, name: str, admin: str) -> None:
        at = datetime(2026, 1, 1, 0, 0, second, tzinfo=UTC)
        changes.append(log.Change(at, name, admin, True, "as HAProxy says it"))

    told(1, names[0], "drain")
    told(2, names[0], "ready")
    for n, (left, right) in enumerate(((names[1], names[2]), (names[3], names[4])), start=1):
        for second, name, admin in ((0, left, "drain"), (1, right, "drain"), (2, left, "ready"), (3, right, "ready")):
            told(10 * n + second, name, admin)
    told(40, names[5], "drain")
    told(41, names[5], "ready")
    summary = load.Summary(
        tuple(load.Visit(n / 50, farm.FIRST if n < 60 else farm.SECOND, "", n % 2 == 0) for n in range(100))
    )
    standing = {name: log.Standing() for name in names}
    survived = farm.Survived("succeeded", 1, "web0", ("anna: approve",), dict.fromkeys(names, 1), 5)
    turns = dict.fromkeys(names, "deployed")
    return farm.Rolled(summary, log.Log(standing, tuple(changes), ()), 100, 9.0, turns, survived)


def machines_of(rolled):
    return [SimpleNamespace(name=name) for name in rolled.turns]


def test_a_good_roll_keeps_every_promise(module):
    rolled = good_roll(module)
    assert [p.text for p in module("webfarm").promises(rolled, machines_of(rolled)) if not p.held] == []


def with_visits(rolled, change):
    return replace(rolled, load=replace(rolled.load, visits=tuple(map(change, rolled.load.visits))))


def one_failed(rolled):
    last = rolled.load.visits[-1]
    return with_visits(rolled, lambda visit: replace(visit, failure="reset") if visit is last else visit)


def one_was_cut_silently(rolled):
    return replace(rolled, logged=99)


def only_the_new_one_was_seen(rolled):
    return with_visits(rolled, lambda visit: replace(visit, version="2.0.0"))


def no_client_kept_a_connection(rolled):
    return with_visits(rolled, lambda visit: replace(visit, kept=False))


def one_never_left(rolled):
    changes = tuple(change for change in rolled.log.changes if change.server != "web5")
    return replace(rolled, log=replace(rolled.log, changes=changes))


def one_was_kept_old(rolled):
    return replace(rolled, turns=rolled.turns | {"web3": "kept_old"})


def two_began(rolled):
    """The second machine leaves while the first is still out."""
    first, second, *others = rolled.log.changes
    early = replace(others[0], at=first.at)
    return replace(rolled, log=replace(rolled.log, changes=(first, early, second, *others[1:])))


def survived(**otherwise):
    return lambda rolled: replace(rolled, survived=replace(rolled.survived, **otherwise))


@pytest.mark.parametrize(
    ("harm", "broken"),
    [
        (survived(deployments=2), "the same deployment went on"),
        (survived(state="interrupted"), "the same deployment went on"),
        (survived(killed_in=""), "the same deployment went on"),
        (survived(switches={f"web{n}": 1 + (n == 3) for n in range(6)}), "switched once"),
        (survived(said=()), "was asked, and answered once"),
        (survived(said=("anna: approve", "anna: approve")), "was asked, and answered once"),
        (survived(after_the_loss=2), "no machine with it"),
        (one_failed, "no request failed"),
        (one_was_cut_silently, "HAProxy counted as many"),
        (only_the_new_one_was_seen, "both versions were seen"),
        (no_client_kept_a_connection, "half of them over kept connections"),
        (one_never_left, "every machine left its rotation"),
        (one_was_kept_old, "every machine left its rotation"),
        (two_began, "first one machine alone"),
    ],
)
def test_each_fault_of_a_roll_breaks_its_promise(module, harm, broken):
    rolled = harm(good_roll(module))
    assert [broken in p.text for p in module("webfarm").promises(rolled, machines_of(rolled)) if not p.held] == [True]


def test_three_machines_out_at_once_break_window_and_minimum(module):
    rolled = good_roll(module)
    changes = [change for change in rolled.log.changes if change.admin == "drain"][:3]
    rolled = replace(rolled, log=replace(rolled.log, changes=tuple(changes) + rolled.log.changes))
    texts = [p.text for p in module("webfarm").promises(rolled, machines_of(rolled)) if not p.held]
    assert any("never more than 2" in text for text in texts)
    assert any("never fewer than 4" in text for text in texts)
