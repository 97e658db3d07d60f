from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec
import pytest

from relay.errors import UnknownLeaseError
from relay.package.identity import manifest_id
from relay.protocol.messages import LEASE_SECONDS
from relay.server.leases import Leases
from relay.stores.memory import MemoryDocuments

ONE, TWO, THREE = (manifest_id(name) for name in (b"one", b"two", b"three"))


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class CountingDocuments(MemoryDocuments):
    writes = 0

    async def write(self, name, data):
        self.writes += 1
        await super().write(name, data)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def documents():
    return CountingDocuments()


@pytest.fixture
def leases(documents, clock):
    return Leases(documents, clock)


async def reopened(documents, clock):
    again = Leases(documents, clock)
    await again.load()
    return again


async def test_a_lease_holds_what_was_offered_and_says_that_it_is_on_its_way(leases):
    lease = await leases.use(await leases.open("offer", [ONE]))
    assert lease.manifests == lease.offered == {ONE}
    assert leases.offered() == {ONE}


async def test_what_is_named_later_is_held_but_not_on_its_way(leases):
    lease = await leases.open("offer", [ONE])
    grown = await leases.use(lease, [TWO, THREE])
    assert grown.manifests == {ONE, TWO, THREE}
    assert leases.offered() == {ONE}


async def test_a_lease_ends_an_hour_after_its_last_use(leases, clock):
    lease = await leases.open("offer", [ONE])
    clock.now += LEASE_SECONDS - 1
    await leases.use(lease)
    clock.now += LEASE_SECONDS - 1
    await leases.use(lease)
    clock.now += LEASE_SECONDS
    with pytest.raises(UnknownLeaseError):
        await leases.use(lease)
    assert leases.offered() == set()


@pytest.mark.parametrize("id", ["", "0" * 32, "../../etc/passwd", "x" * 1000])
async def test_a_lease_that_was_never_given_is_unknown(leases, id):
    await leases.open("offer", [ONE])
    with pytest.raises(UnknownLeaseError):
        await leases.use(id)


async def test_names_cannot_be_guessed_from_one_another(leases):
    ids = {await leases.open("offer", [ONE]) for _ in range(50)}
    assert len(ids) == 50
    assert all(len(id) == 32 for id in ids)


async def test_a_lease_outlives_the_process_that_gave_it(leases, documents, clock):
    lease = await leases.open("offer", [ONE])
    await leases.use(lease, [TWO])
    again = await reopened(documents, clock)
    assert again.offered() == {ONE}
    assert (await again.use(lease)).manifests == {ONE, TWO}


async def test_an_ended_lease_is_not_taken_up_and_its_file_goes(leases, documents, clock):
    await leases.open("offer", [ONE])
    clock.now += LEASE_SECONDS
    again = await reopened(documents, clock)
    assert len(again) == 0
    assert await documents.list("state/leases") == []


async def test_ended_leases_go_when_a_new_one_is_opened(leases, documents, clock):
    for _ in range(5):
        await leases.open("offer", [ONE])
    clock.now += LEASE_SECONDS
    lease = await leases.open("offer", [TWO])
    assert len(leases) == 1
    assert await documents.list("state/leases") == [f"state/leases/{lease}"]


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"kind":1}', b"[]", b"\0" * 100])
async def test_a_damaged_lease_file_is_dropped_and_the_others_live(leases, documents, clock, damage):
    lease = await leases.open("offer", [ONE])
    await documents.write(f"state/leases/{'0' * 32}", damage)
    again = await reopened(documents, clock)
    assert (await again.use(lease)).manifests == {ONE}
    assert await documents.list("state/leases") == [f"state/leases/{lease}"]


async def test_renewals_are_written_once_in_a_while_and_growth_at_once(leases, documents, clock):
    lease = await leases.open("offer", [ONE])
    for _ in range(100):
        clock.now += 1
        await leases.use(lease)
    assert documents.writes == 1
    await leases.use(lease, [TWO])
    assert documents.writes == 2
    clock.now += LEASE_SECONDS / 2
    await leases.use(lease)
    assert documents.writes == 3


async def test_what_was_written_is_never_far_behind_the_last_use(leases, documents, clock):
    """A relay that is killed loses at most a sixth of a lease's time."""
    lease = await leases.open("offer", [ONE])
    for _ in range(300):
        clock.now += 30
        await leases.use(lease)
        record = msgspec.json.decode(await documents.read(f"state/leases/{lease}"))
        assert record["expires"] >= clock.now + LEASE_SECONDS * 5 / 6 - 30


async def test_uses_at_the_same_time_lose_nothing_that_was_named(leases):
    lease = await leases.open("offer", [ONE])
    await asyncio.gather(*(leases.use(lease, [id]) for id in (TWO, THREE, ONE)))
    assert (await leases.use(lease)).manifests == {ONE, TWO, THREE}
