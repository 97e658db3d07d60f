"""Waystation in a minute or two. The road: two sites, two relays, six machines, real packages, a relay that dies in
mid-pull, and the ledger of every byte. Then the release: the same machines behind a real HAProxy get a web application
and its next version, machine by machine, under load and without a failed request.

Everything runs on loopback in a temporary folder, with the real command, a real name server and proxies that count
every byte between them; nothing is left behind. The exit code is 0 only if everything that was promised held.
Usage: deploy/demo/demo.py [--packages DIR] [--report FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ledger as books
import packages
import webfarm
from ledger import Added, Beside, Delivery, Kill, Ledger, Pull, Sent, Way
from narration import Narrator, names
from packages import Nupkg
from programs import DemoError, in_thread, until
from town import DOMAIN, SITES, Machine, Town, missing, show

from benchmarks.lines.network import CountingProxy, Line
from relay.support.console import size
from relay.support.together import together

SHELF = Path(__file__).parents[3] / "shared" / "data" / "packages"
"""Where real packages lie beside a checkout, if they do."""
KILLED = "fra"
KILL_AT = 0.45
"""Of what the machines of that site want, on the line to its relay."""
MIDDLE_SECONDS = 2.5
"""How long that line takes for all of it: on loopback there would be no middle to kill in."""
CALL_SECONDS = 20
LOG_LINES = 12


@dataclass(frozen=True, slots=True)
class Played:
    """Both halves, and whether every promise of theirs held."""

    book: Ledger
    rolled: webfarm.Rolled
    held: bool


async def play(town: Town, shelf: Path, tell: Narrator) -> Played:
    """The road and its ledger, then the release."""
    book = await play_road(town, shelf, tell)
    road_held = close_the_books(book, tell)
    rolled = await webfarm.play(town, tell)
    release_held = webfarm.close(rolled, town.machines, tell)
    return Played(book, rolled, road_held and release_held)


async def play_road(town: Town, shelf: Path, tell: Narrator) -> Ledger:
    """The story of the bytes, one step after another."""
    book = Ledger()

    tell.begin("Two sites, a relay in each, and DNS records that lead to the closest")
    await open_relays(town, tell)

    tell.begin("The origin makes its keys and takes a package in")
    tell.say(await show(town, tell, town.at_origin("trust", "init")))
    web, next_web = await choose("web", town, shelf, tell)
    added = await take_in(web, town, tell)

    tell.begin("It goes to both sites at once, each byte of it one time")
    sent = await replicate(web, town, tell)

    tell.begin("Six machines find their relay by DNS, pull and verify")
    await set_up_machines(town, tell)
    book.deliveries.append(await deliver(web, added, sent, town, tell))
    await verify(town, tell)

    tell.begin("The next version: only what changed moves")
    added = await take_in(next_web, town, tell)
    sent = await replicate(next_web, town, tell)
    book.deliveries.append(await deliver(next_web, added, sent, town, tell, one_file_changed=True))

    tell.begin(f"Another package, and relay {KILLED} is killed in mid-pull")
    runtime, next_runtime = await choose("runtime", town, shelf, tell)
    added = await take_in(runtime, town, tell)
    sent = await replicate(runtime, town, tell)
    book.deliveries.append(await deliver_and_kill(runtime, added, sent, town, tell))

    tell.begin(f"Relay {KILLED} comes back, and so do its machines")
    await open_relay(KILLED, town, tell)
    added = await take_in(next_runtime, town, tell)
    sent = await replicate(next_runtime, town, tell)
    book.deliveries.append(await deliver(next_runtime, added, sent, town, tell, returned=KILLED))

    tell.begin("Every tree on every machine is compared with what was packed")
    await verify(town, tell)
    await compare([web, next_web, runtime, next_runtime], book, town, tell)

    tell.begin("The new versions once more, as others would send them")
    await send_by_others([(web, next_web), (runtime, next_runtime)], book, tell)
    return book


# --- the set-up


async def open_relays(town: Town, tell: Narrator) -> None:
    for scopes, name in ((("write", "order"), "the origin"), (("agent",), "the machines")):
        # The relays share what says who may do what; site, store and port are given to each by option.
        command = town.at_relay("token", *scopes, "--config", "relays/relay.yaml", "--name", name)
        tell.command(f"{command} > tokens/{scopes[0]}")
        token = town.folder / "tokens" / scopes[0]
        token.touch(mode=0o600)
        token.write_text(await town.processes.run(command))
    await together([open_relay(relay, town, tell) for relay in SITES])
    tell.command(str(await town.start_dns()))
    tell.say("\n".join(line for line in town.zone().splitlines() if line.startswith("srv-host")))
    tell.say("Each port there is a line that counts; those between sites carry 100 Mbit/s.")


async def open_relay(relay: str, town: Town, tell: Narrator) -> None:
    tell.command(f"{town.serve(relay)} &")
    await town.start_relay(relay)
    town.plug_in(relay)


async def set_up_machines(town: Town, tell: Narrator) -> None:
    commands = [town.init(machine) for machine in town.machines]
    tell.command(str(commands[0]), others(town.machines))
    documents = await together([town.json(command) for command in commands])
    town.fingerprints = {document["name"]: document["fingerprint"] for document in documents}
    tell.say(f"fingerprint {documents[0]['fingerprint']}")


# --- a package and its road


async def choose(name: str, town: Town, shelf: Path, tell: Narrator) -> tuple[Nupkg, Nupkg]:
    """Two versions: real ones if they are at hand, else packed here and now."""
    found = packages.find(name, shelf)
    if found:
        return found
    tell.say("There is no real package at hand; files of this Python make one.")
    made = await in_thread(packages.gather, name, town.folder)
    for nupkg in made:
        words = ("package", "pack", str(nupkg.folder), "--id", nupkg.id, "--version", nupkg.version)
        tell.say(await show(town, tell, town.at_origin(*words, "--output", nupkg.path.name)))
    return made


async def take_in(nupkg: Nupkg, town: Town, tell: Narrator) -> Added:
    chunks, manifests = town.kept_bytes("chunks"), town.kept_bytes("manifests")
    command = town.at_origin("package", "add", str(nupkg.path), "--json")
    tell.command(str(command).replace(str(nupkg.path), nupkg.path.name))
    [entry] = (await town.json(command))["packages"]
    added = Added(
        package=nupkg.label,
        nupkg_bytes=nupkg.size,
        new_chunks=entry["chunks_stored"],
        new_bytes=town.kept_bytes("chunks") - chunks,
        manifest_bytes=town.kept_bytes("manifests") - manifests,
    )
    tell.say(
        f"{size(added.nupkg_bytes)} in {entry['chunks']} chunks; {added.new_chunks} of them are new, "
        f"{size(added.new_bytes)} at zstd level 3. Signed."
    )
    return added


async def replicate(nupkg: Nupkg, town: Town, tell: Narrator) -> tuple[Sent, ...]:
    tell.command(str(town.replicate(nupkg)))
    sent = await town.send(nupkg)
    for one in sent:
        tell.say(
            f"relay {one.relay}: {one.chunks} chunks, {size(one.counted)} over the WAN (its own count: {size(one.told)})"
        )
    return sent


async def deliver(
    nupkg: Nupkg,
    added: Added,
    sent: tuple[Sent, ...],
    town: Town,
    tell: Narrator,
    *,
    one_file_changed: bool = False,
    returned: str | None = None,
) -> Delivery:
    """Pull onto every machine, and read the counters."""
    before = town.received()
    tell.command(str(town.pull(town.machines[0], nupkg)), others(town.machines))
    pulls = await town.pull_everywhere(nupkg)
    tell.say(told(pulls))
    local, across = carried(before, town)
    return Delivery(added, sent, pulls, local, across, one_file_changed=one_file_changed, returned=returned)


async def deliver_and_kill(nupkg: Nupkg, added: Added, sent: tuple[Sent, ...], town: Town, tell: Narrator) -> Delivery:
    """The same, with one relay killed where its machines are in the middle."""
    before = town.received()
    own = [machine for machine in town.machines if machine.site == KILLED]
    wanted = len(own) * added.new_bytes
    rate = wanted / MIDDLE_SECONDS
    line = town.lines[KILLED, KILLED]
    line.shape(down=Line(rate=rate))
    tell.say(f"The line to relay {KILLED} is held at {size(rate)}/s and opens when all its machines have called:")
    tell.say("so there is a middle to kill in.")
    tell.command(str(town.pull(town.machines[0], nupkg)), others(town.machines))
    disturbing = asyncio.create_task(disturb(wanted, len(own), town, tell))
    try:
        pulls = await town.pull_everywhere(nupkg)
        share = await disturbing
    finally:
        disturbing.cancel()
        line.shape(down=Line())
    tell.say(told(pulls))
    local, across = carried(before, town)
    # The machines of the other site were not disturbed: what they needed is what is needed.
    needed = local[other(KILLED)] * len(own) // (len(town.machines) - len(own))
    twice = local[KILLED] + across[other(KILLED)] - needed
    return Delivery(added, sent, pulls, local, across, kill=Kill(KILLED, share, twice))


async def disturb(wanted: int, machines: int, town: Town, tell: Narrator) -> float:
    await start_level(town.lines[KILLED, KILLED], machines)
    return await kill_at(KILL_AT, wanted, town, tell)


async def start_level(line: CountingProxy, machines: int) -> None:
    """Hold the line until every machine has called, so that none is done before another begins."""
    before = line.connections

    async def all_called() -> bool:
        return line.connections >= before + machines

    line.pause()
    try:
        await until(all_called, CALL_SECONDS, "a machine did not call its relay")
    finally:
        line.resume()


async def kill_at(share: float, wanted: int, town: Town, tell: Narrator) -> float:
    """SIGKILL the relay, and pull its plug, once `share` of `wanted` bytes has come from it; returns the real share."""
    line = town.lines[KILLED, KILLED]
    start = line.counts.down
    try:
        await asyncio.wait_for(line.wait_for(start + int(share * wanted), direction="down"), 30)
    except TimeoutError as error:
        raise DemoError(f"the machines of {KILLED} never came to the middle of their pull") from error
    id = await town.processes.kill(f"relay-{KILLED}")
    # What the kernel still held of it would arrive; a machine that dies takes that along.
    await town.pull_plug(KILLED)
    share = (line.counts.down - start) / wanted
    tell.command(
        f"kill -KILL {id}", f"relay {KILLED}, when {100 * share:.0f} % had come from it; its lines are cut too"
    )
    return share


def other(site: str) -> str:
    return next(name for name in SITES if name != site)


def carried(before: dict[tuple[str, str], int], town: Town) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes since `before`, by relay: to machines of its own site, and to those of others."""
    since = {ends: count - before[ends] for ends, count in town.received().items()}
    local = {relay: count for (site, relay), count in since.items() if site == relay}
    across = {relay: sum(c for (s, r), c in since.items() if r == relay != s) for relay in SITES}
    return local, across


async def verify(town: Town, tell: Narrator) -> None:
    """By the product's own command, which ends with 1 where a byte differs."""
    commands = [town.on(machine, "agent", "verify") for machine in town.machines]
    tell.say(await show(town, tell, *commands, also=others(town.machines)))
    tell.say(f"Exit code 0 on all {len(commands)}.")


async def compare(nupkgs: Sequence[Nupkg], book: Ledger, town: Town, tell: Narrator) -> None:
    """Without the product: files against what Python's zipfile reads in the nupkg."""
    for nupkg in nupkgs:
        wanted = await in_thread(packages.digests_of, nupkg.path)
        for machine in town.machines:
            [tree] = (town.folder / machine.root(nupkg) / "releases").glob(f"{nupkg.version}-*")
            wrong = await in_thread(packages.differences, tree, wanted)
            book.trees_checked += 1
            book.trees_wrong += [f"{machine.name}, {nupkg}: {path}" for path in wrong]
    tell.say(
        f"Without Waystation, by SHA-256 of what zipfile reads in the nupkgs: {book.trees_checked} trees compared."
    )


async def send_by_others(pairs: Sequence[tuple[Nupkg, Nupkg]], book: Ledger, tell: Narrator) -> None:
    """Each new version by each other way, to a site that has the one before; what they send is counted as ours is."""
    deliveries = {delivery.added.package: delivery for delivery in book.deliveries}
    for old, new in pairs:
        ways = await in_thread(packages.other_ways, old, new)
        sent = max(sent.counted for sent in deliveries[new.label].sent)
        book.beside.append(Beside(new.label, new.size, sent, tuple(Way(*way) for way in ways.items())))
        tell.say(f"{new} over {old.version}: {packages.told_change(new)}")


def others(machines: Sequence[Machine]) -> str:
    return f"the same at once on {names([machine.name for machine in machines[1:]])}"


def told(pulls: Sequence[Pull]) -> str:
    """One line for each machine: where its bytes came from."""
    lines = []
    for pull in pulls:
        parts = [f"{size(pull.disk_bytes)} from its own disk"] if pull.disk_bytes else []
        parts += [f"{size(taken.tree_bytes)} from relay {relay}" for relay, taken in pull.relays.items()]
        lines.append(f"{pull.machine}: {names(parts)}")
    return "\n".join(lines)


# --- the end


def close_the_books(book: Ledger, tell: Narrator) -> bool:
    """Print the ledger and the promises; whether all of them held."""
    tell.begin("The ledger")
    for table in (books.by_package, books.by_relay, books.by_machine, books.by_encoding, books.beside):
        tell.say(f"{table(book)}\n\n")
    held = tell.judge(books.promises(book))
    saved = 100 * (1 - book.wan_bytes / book.each_bytes)
    tell.verdict(
        held=held,
        text=f"\n{'Every promise held' if held else 'A PROMISE WAS BROKEN'}: {size(book.wan_bytes)} crossed the WAN in "
        f"place of {size(book.each_bytes)}, {saved:.0f} % less, in {tell.seconds:.0f} s.",
    )
    return held


def confess(error: BaseException, town: Town, tell: Narrator) -> None:
    """Say where it failed, and what the relays said last."""
    tell.verdict(held=False, text=f"\nThe demo failed in {tell.step}.")
    tell.say(str(error) if isinstance(error, DemoError) else "".join(traceback.format_exception(error)))
    for relay in SITES:
        log = town.processes.log(f"relay-{relay}")
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
        tell.say("\n".join([f"The last lines of relay {relay}:", *(f"  {line}" for line in lines or ["none"])]))


async def perform(shelf: Path, report: Path | None, tell: Narrator) -> int:
    """Play it in a folder of its own, and leave nothing behind, however it ends. Returns the exit code.

    SIGINT, SIGTERM or SIGHUP end the story, once; what is then tidied up cannot be hurried.
    """
    stopped: list[signal.Signals] = []
    story: asyncio.Task[Played] | None = None

    def stop(number: signal.Signals) -> None:
        if not stopped and not (story and story.done()):
            stopped.append(number)
            if story:
                story.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    with tempfile.TemporaryDirectory(prefix="waystation-demo-") as name:
        folder = Path(name).resolve()
        tell.folder = str(folder)
        async with Town(folder) as town:
            story = asyncio.create_task(play(town, shelf, tell))
            if stopped:
                story.cancel()
            await asyncio.wait({story})
            error = None if story.cancelled() else story.exception()
            if error is not None:
                confess(error, town, tell)
    if stopped:
        tell.say(f"\nStopped in {tell.step}. What ran is ended, and the folder is gone.")
        return 128 + stopped[0]
    if error is not None:
        return 1
    played = story.result()
    if report is not None:
        document = books.report(played.book, books.promises(played.book), tell.seconds)
        document["release"] = webfarm.report(played.rolled, webfarm.promises(played.rolled, town.machines))
        report.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if played.held else 1


def main() -> int:
    """Exit code: 0 every promise held, 1 one did not or the demo failed, 2 something is missing, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--packages", type=Path, default=SHELF, metavar="DIR", help="real packages, if there are any")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write the ledger there, as JSON")
    arguments = parser.parse_args()
    lacking = missing()
    if lacking:
        print("The demo needs what is not here:", *(f"  {what}" for what in lacking), sep="\n", file=sys.stderr)
        return 2
    print(f"Waystation's road on loopback: {names(SITES)} are sites of {DOMAIN}, the rest is real.")
    return asyncio.run(perform(arguments.packages.resolve(), arguments.report, Narrator()))


if __name__ == "__main__":
    sys.exit(main())
