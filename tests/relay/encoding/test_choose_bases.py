from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

import pytest
from harness.paths import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.encoding.bundle import RUN_AND_BASES_MAX, Span
from relay.encoding.choose_bases import ASKED_MAX, Held, choose_bases, worth_asking
from relay.encoding.codecs import Coding, encode
from relay.package import chunking
from relay.package.chunking import PartDigest
from relay.package.identity import ChunkId, NuGetVersion, PackageId, PackageRef
from relay.package.manifest import Manifest, ManifestBuilder, NupkgDigests
from relay.package.ranges import indexes
from relay.package.zip_reader import Entry, is_root_nuspec, read_part, walk

PACKAGES = SHARED / "packages"
KIB = 1 << 10
MIB = 1 << 20


@cache
def noise(seed: object, size: int) -> bytes:
    return random.Random(str(seed)).randbytes(size)


class Cut:
    """A package that was cut without any store."""

    def __init__(self, files: Mapping[str, bytes], id: str = "Acme.Web", version: str = "1.0.0") -> None:
        parts = dict(files)
        if not any(is_root_nuspec(path) for path in parts):
            parts["a.nuspec"] = f"{id} {version}".encode()
        entries = [Entry(path, len(data), len(data), 0, 0, 0, False) for path, data in parts.items()]
        entries.sort(key=lambda entry: chunking.stream_key(entry.path))
        digests = NupkgDigests(1, hashlib.sha256(repr(parts).encode()).hexdigest(), "A" * 86 + "==")
        builder = ManifestBuilder(PackageRef(PackageId.parse(id), NuGetVersion.parse(version)), digests, {})
        self.data: dict[ChunkId, bytes] = {}
        for found in chunking.cut(entries, lambda e: e.path, lambda e: e.size, lambda e: [parts[e.path]]):
            if isinstance(found, PartDigest):
                builder.saw_part(found)
            else:
                builder.saw_chunk(found)
                self.data[found.id] = found.data
        self.manifest: Manifest = builder.build(entries, [False] * len(entries))

    @property
    def whole(self) -> Held:
        return Held(self.manifest, ((0, len(self.manifest.chunks)),))

    def missing_beside(self, *others: Cut) -> list[int]:
        there = set().union(*(other.data for other in others))
        return [index for index, entry in enumerate(self.manifest.chunks) if ChunkId(entry.id) not in there]

    def join(self, run: Sequence[int]) -> bytes:
        return b"".join(self.data[self.manifest.chunk_id(index)] for index in run)

    def chunk_of(self, path: str) -> int:
        """The place of a part that is one chunk."""
        part = next(index for index, part in enumerate(self.manifest.parts) if part.path == path)
        return self.manifest.chunk_at[self.manifest.part_starts[part]]


def places(spans: Sequence[Span]) -> list[tuple[str, int]]:
    return [(span.manifest_id, index) for span in spans for index in indexes(span.ranges)]


def size_of(spans: Sequence[Span], *held: Cut) -> int:
    known = {one.manifest.id: one.manifest for one in held}
    return sum(known[id].chunks[index].size for id, index in places(spans))


def joined(spans: Sequence[Span], *held: Cut) -> bytes:
    known = {one.manifest.id: one for one in held}
    return b"".join(known[id].join([index]) for id, index in places(spans))


def tree(version: int, names: Sequence[str], *, size: int = 100 * KIB, changed: Sequence[str] = ()) -> Cut:
    """A package of libraries, each a chunk of its own; those that changed resemble what they were before."""
    files = {name: noise(name, size) for name in names}
    for name in changed:
        files[name] = files[name][: size // 2] + b"v%d" % version + files[name][size // 2 :]
    return Cut(files, version=f"{version}.0.0")


NAMES = [f"lib/{letter}.dll" for letter in "bcdefghijklm"]


def test_the_whole_old_tree_in_stream_order_is_the_base_where_it_fits():
    old, new = tree(1, NAMES), tree(2, NAMES, changed=["lib/d.dll"])
    run = new.missing_beside(old)
    spans = choose_bases(new.manifest, run, [old.whole], most=64 * MIB, missing=run)
    assert spans == (Span.of(old.manifest.id, range(len(old.manifest.chunks))),)


def test_where_room_is_short_what_the_run_was_before_goes_first():
    old, new = tree(1, NAMES), tree(2, NAMES, changed=["lib/d.dll", "lib/k.dll"])
    run = [new.chunk_of("lib/k.dll")]
    spans = choose_bases(new.manifest, run, [old.whole], most=150 * KIB, missing=new.missing_beside(old))
    assert (old.manifest.id, old.chunk_of("lib/k.dll")) in places(spans)
    assert (old.manifest.id, old.chunk_of("lib/d.dll")) not in places(spans)


def test_then_what_changed_around_it_then_what_did_not():
    old, new = tree(1, NAMES), tree(2, NAMES, changed=["lib/d.dll", "lib/k.dll"])
    run, missing = [new.chunk_of("lib/k.dll")], new.missing_beside(old)
    spans = choose_bases(new.manifest, run, [old.whole], most=250 * KIB, missing=missing)
    tree_places = [index for _, index in places(spans) if index != len(old.manifest.chunks) - 1]
    assert tree_places == [old.chunk_of("lib/d.dll"), old.chunk_of("lib/k.dll")]
    spans = choose_bases(new.manifest, run, [old.whole], most=450 * KIB, missing=missing)
    assert {old.chunk_of(f"lib/{letter}.dll") for letter in "djkl"} <= {index for _, index in places(spans)}


def test_a_part_meets_itself_under_another_number():
    old = Cut({**{name: noise(name, 100 * KIB) for name in NAMES}, "app/10.0.13/x.so": noise("x", 100 * KIB)})
    new = Cut({**{name: noise(name, 100 * KIB) for name in NAMES}, "app/10.0.14/x.so": noise("X", 100 * KIB)})
    run = [new.chunk_of("app/10.0.14/x.so")]
    spans = choose_bases(new.manifest, run, [old.whole], most=110 * KIB)
    assert (old.manifest.id, old.chunk_of("app/10.0.13/x.so")) in places(spans)


def test_a_new_part_meets_its_namesake_of_another_framework():
    old = tree(1, [*NAMES, "lib/net8/z/own.dll"])
    new = tree(2, [*NAMES, "lib/net8/z/own.dll", "lib/uap/own.dll"])
    run = [new.chunk_of("lib/uap/own.dll")]
    spans = choose_bases(new.manifest, run, [old.whole], most=110 * KIB)
    assert (old.manifest.id, old.chunk_of("lib/net8/z/own.dll")) in places(spans)


def test_a_part_of_several_chunks_brings_all_of_them():
    large = noise("large", 9 * MIB)
    old, new = (
        Cut({"a.so": large, "z.so": noise("z", 9 * MIB)}),
        Cut({"a.so": large[::-1], "z.so": noise("z", 9 * MIB)}),
    )
    run = new.missing_beside(old)
    spans = choose_bases(new.manifest, run, [old.whole], most=10 * MIB)
    assert large in joined(spans, old)


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "renamed"),
    [
        (lambda data: data + b"one line more", False),
        (lambda data: data + b"one line more", True),
        (lambda data: data[: -5 * MIB] + b"a word" + data[-5 * MIB :], False),
        (lambda data: data[MIB:-100] + bytes(100), False),
    ],
    ids=["at its end", "under another number", "in its middle", "at both ends"],
)
def test_a_piece_of_a_large_part_is_built_on_the_same_piece_of_what_the_part_was(
    change: Callable[[bytes], bytes], renamed: bool
):
    large = noise("large", 30 * MIB)
    old = Cut({"lib1.so": large})
    new = Cut({"lib2.so" if renamed else "lib1.so": change(large)})
    run = new.missing_beside(old)
    assert new.manifest.size_of(run) < 10 * MIB, "most of it is held"
    base = joined(choose_bases(new.manifest, run, [old.whole], most=16 * MIB), old)
    lost = new.join(run)
    samples = [lost[at : at + 32] for at in range(0, len(lost) - 32, 64 * KIB)]
    assert sum(sample in base for sample in samples) > 0.9 * len(samples)


def test_a_small_part_that_another_package_holds_is_built_on_it():
    texts = {f"doc/{n}.xml": noise(n, 30 * KIB) for n in range(8)}
    library = Cut(texts, id="Acme.Library")
    application = Cut({**{f"app/{n}/doc.xml": data for n, data in enumerate(texts.values())}, "own": b"own"})
    run = application.missing_beside(library)
    assert run, "the same chunks would need no base"
    assert worth_asking(application.manifest, run, [library.manifest]) == [library.manifest.id]
    spans = choose_bases(application.manifest, run, [library.whole], most=MIB)
    base = joined(spans, library)
    payload = b"".join(encode(Coding("hdiff", 19), application.join(run), base))
    assert len(payload) < 1000 < len(b"".join(encode(Coding("zstd", 19), application.join(run)))) / 100


def test_other_packages_come_first_and_only_with_what_they_share():
    shared = noise("shared", 20 * KIB)
    library = Cut({**{f"l{n}.dll": noise(n, 80 * KIB) for n in range(5)}, "s.xml": shared}, id="Acme.Library")
    old = tree(1, NAMES)
    new = Cut({**{name: noise(name, 100 * KIB) for name in NAMES}, "deps/s.xml": shared}, version="2.0.0")
    run = new.missing_beside(old)
    spans = choose_bases(new.manifest, run, [old.whole, library.whole], most=64 * MIB)
    assert [span.manifest_id for span in spans] == [library.manifest.id, old.manifest.id]
    (index,) = indexes(spans[0].ranges)
    assert shared in library.join([index])


def test_a_second_package_that_holds_the_same_adds_nothing():
    shared = noise("shared", 20 * KIB)
    one, two = (Cut({"s.xml": shared, f"{id}.txt": noise(id, 900)}, id=id) for id in ("Acme.One", "Acme.Two"))
    new = Cut({"deps/s.xml": shared, "x.txt": noise("x", 2000)})
    run = new.missing_beside(one, two)
    spans = choose_bases(new.manifest, run, [one.whole, two.whole], most=64 * MIB)
    assert [span.manifest_id for span in spans] == [one.manifest.id]


def test_a_chunk_that_two_manifests_name_is_taken_once():
    old, older = tree(1, NAMES), tree(0, NAMES, changed=["lib/d.dll"])
    new = tree(2, NAMES, changed=["lib/d.dll"])
    run = new.missing_beside(old)
    spans = choose_bases(new.manifest, run, [old.whole, older.whole], most=64 * MIB)
    known = {one.manifest.id: one.manifest for one in (old, older)}
    ids = [known[id].chunk_id(index) for id, index in places(spans)]
    assert len(ids) == len(set(ids))


def test_nothing_held_is_no_base():
    new = tree(2, NAMES)
    run = range(len(new.manifest.chunks))
    assert choose_bases(new.manifest, run, [], most=MIB) == ()
    assert choose_bases(new.manifest, run, [Held(tree(1, NAMES).manifest, ())], most=MIB) == ()
    assert choose_bases(new.manifest, run, [tree(1, NAMES).whole], most=0) == ()


def digests(package: Cut, chunks: Iterable[int]) -> set[str]:
    """Of the parts that lie in these chunks."""
    manifest, wanted = package.manifest, set(chunks)
    extents = [{extent.part for extent in manifest.extents[index]} for index in wanted]
    return {manifest.part_sha256(part) for part in set().union(*extents)} if extents else set()


def test_equal_parts_are_taken_beyond_what_the_neighbourhood_may_cost():
    parts = {f"{letter}.xml": noise(letter, 40 * KIB) for letter in "abcdefghijklmnopqrst"}
    library = Cut(parts, id="Acme.Library")
    new = Cut({**parts, "z-own.xml": noise("own", 40 * KIB)}, id="Acme.App")
    run = new.missing_beside(library)
    assert run
    spans = choose_bases(new.manifest, run, [library.whole], most=1)
    bases = digests(library, [index for _, index in places(spans)])
    assert digests(new, run) & digests(library, range(len(library.manifest.chunks))) <= bases


@pytest.mark.long
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_bases_are_held_named_once_and_within_bounds(data: st.DataObject):
    letters = st.lists(st.sampled_from(NAMES), unique=True)
    old = tree(1, data.draw(letters), size=70 * KIB, changed=())
    new = tree(
        2,
        names := data.draw(letters),
        size=70 * KIB,
        changed=data.draw(st.sets(st.sampled_from(names or ["-"]))) if names else (),
    )
    library = Cut({name: noise(name, 2 * KIB) for name in data.draw(letters)}, id="Acme.Library")
    held = [
        Held(
            one.manifest,
            tuple((index, index + 1) for index in range(len(one.manifest.chunks)) if data.draw(st.booleans())),
        )
        for one in (old, library)
    ]
    count = len(new.manifest.chunks)
    run = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    most = data.draw(st.integers(0, MIB))
    spans = choose_bases(new.manifest, run, held, most=most, missing=run)
    found = places(spans)
    assert set(found) <= {(one.manifest.id, index) for one in held for index in indexes(one.ranges)}
    manifests = {one.manifest.id: one.manifest for one in (old, library)}
    ids = [manifests[id].chunk_id(index) for id, index in found]
    assert len(set(ids)) == len(ids)
    equal = digests(new, run)
    beside = [
        place for place in found if not equal & digests(old if place[0] == old.manifest.id else library, [place[1]])
    ]
    assert sum(manifests[id].chunks[index].size for id, index in beside) <= most
    assert size_of(spans, old, library) <= RUN_AND_BASES_MAX - sum(new.manifest.chunks[index].size for index in run)
    assert spans == choose_bases(new.manifest, run, held, most=most, missing=run), "not the same for the same"


def test_only_packages_that_add_something_are_worth_asking_the_largest_share_first():
    parts = {f"{n}.xml": noise(n, 10 * KIB) for n in range(6)}
    items = list(parts.items())
    small, large, same = (
        Cut(dict(items[:2]), id="Acme.S"),
        Cut(dict(items[1:]), id="Acme.L"),
        Cut(dict(items[3:]), id="Acme.M"),
    )
    alien = Cut({"alien.txt": noise("alien", 10 * KIB)}, id="Acme.Alien")
    new = Cut({f"app/{name}": data for name, data in parts.items()} | {"app/own.txt": noise("own", 900)})
    others = [one.manifest for one in (small, alien, same, large)]
    everything = range(len(new.manifest.chunks))
    assert worth_asking(new.manifest, everything, others) == [large.manifest.id, small.manifest.id]
    assert worth_asking(new.manifest, [], others) == []
    assert worth_asking(new.manifest, everything, [new.manifest]) == [], "nobody is asked for the package itself"


def test_a_few_equal_bytes_are_worth_no_question():
    tiny, enough = noise("tiny", 4 * KIB - 1), noise("enough", 4 * KIB)
    new = Cut({"a/tiny": tiny, "a/enough": enough, "own": noise("own", 500)})
    everything = range(len(new.manifest.chunks))
    assert worth_asking(new.manifest, everything, [Cut({"tiny": tiny}, id="A.B").manifest]) == []
    other = Cut({"enough": enough}, id="A.C").manifest
    assert worth_asking(new.manifest, everything, [other]) == [other.id]


def test_a_question_names_at_most_48_packages():
    parts = {f"{n}.xml": noise(n, 5 * KIB) for n in range(ASKED_MAX + 5)}
    others = [Cut({name: data}, id=f"Acme.L{n}").manifest for n, (name, data) in enumerate(parts.items())]
    new = Cut({f"app/{name}": data for name, data in parts.items()})
    asked = worth_asking(new.manifest, range(len(new.manifest.chunks)), others)
    assert len(asked) == len(set(asked)) == ASKED_MAX == 48


@pytest.mark.parametrize("shape", ["one name in many folders", "names that differ in numbers only"])
def test_ten_thousands_of_like_named_parts_are_no_trouble(shape: str):
    """Each run looks at each old part a few times, not at each old part for each of its own: that would be 10^8 steps."""
    many = 10_000
    paths = [f"d{n:x}/i.html" if shape.startswith("one") else f"js/{n}.js" for n in range(many)]
    old, new = (
        Cut(
            {path: hashlib.sha256(f"{version} {path}".encode()).digest() * 4 for path in names},
            version=f"{version}.0.0",
        )
        for version, names in ((1, paths[: many // 2]), (2, paths[many // 2 :]))
    )
    starts = old.manifest.__dict__["part_starts"] = _Counting(old.manifest.part_starts)
    run = range(len(new.manifest.chunks))
    assert choose_bases(new.manifest, run, [old.whole], most=64 * MIB)
    assert 0 < starts.looked_at < 100 * many


class _Counting(list[int]):
    """Counts how often one of its items is asked for."""

    looked_at = 0

    def __getitem__(self, at):
        self.looked_at += 1
        return super().__getitem__(at)


@pytest.mark.long
@pytest.mark.skipif(not PACKAGES.is_dir(), reason="no real packages in ../shared/data/packages")
@pytest.mark.parametrize(
    ("before", "after", "bound"),
    [
        ("serilog.4.3.0", "serilog.4.4.0", 174_766),
        ("dapper.2.1.66", "dapper.2.1.86", 273_850),
        ("microsoft.entityframeworkcore.10.0.14", "microsoft.entityframeworkcore.10.0.15", 80_412),
    ],
)
def test_on_its_bases_a_real_version_takes_what_bsdiff_takes_over_the_whole_tree(before: str, after: str, bound: int):
    """`bound`: control, differences and literals of bsdiff over the sorted tree, through zstd -19."""
    old, new = Cut(_inflate(before), "Acme.A", "1.0.0"), Cut(_inflate(after), "Acme.A", "2.0.0")
    run = new.missing_beside(old)
    spans = choose_bases(new.manifest, run, [old.whole], most=24 * MIB, missing=run)
    payload = encode(Coding.parse("hdiff:19"), new.join(run), joined(spans, old))
    assert sum(map(len, payload)) <= bound * 1.15 + KIB


def _inflate(name: str) -> dict[str, bytes]:
    with (PACKAGES / f"{name}.nupkg").open("rb") as file:
        return {entry.path: b"".join(read_part(file, entry)) for entry in walk(file)}
