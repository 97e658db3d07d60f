"""A release is frozen with all that it needs, signed, and refused once anything of it was altered."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec
import pytest
from harness.origins import Keys, trust_keys

from orchestrator.plan.plan import FrozenFile, PlannedPackage
from orchestrator.releases.release import (
    RELEASE_TYPE,
    SNAPSHOT_BYTES,
    SNAPSHOT_FILES,
    FileChangedError,
    FrozenRelease,
    Release,
    open_release,
    read_beside,
    unpack_release,
)
from orchestrator.releases.release import freeze_release as freeze
from orchestrator.trust.keyring import load_signer
from relay.errors import RefusedError, SignatureError
from relay.trust.envelopes import sign_document

PROCESS = "format: 1\nproject: webshop\n"
PACKAGES = {"web": PlannedPackage("Acme.Web", "1.4.2", "a" * 64, 10, 20)}
SCRIPTS = PlannedPackage("Waystation.Scripts.webshop", "1.0.0-h0123456789abcdef", "b" * 64)


def sha256_of(release: Release) -> dict[str, str]:
    """Of each file, by its path."""
    return {file.path: file.sha256 for file in release.files}


def frozen(folder: Path, path: str) -> FrozenFile:
    return FrozenFile(str(folder), path, hashlib.sha256((folder / path).read_bytes()).hexdigest())


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "ops").mkdir(parents=True)
    (folder / "release.yaml").write_text(PROCESS)
    (folder / "ops/up.sh").write_text("#!/bin/sh\n. ./common.sh\n")
    (folder / "ops/common.sh").write_text("true\n")
    (folder / "ops/helper").write_bytes(b"\x7fELF")
    (folder / "ops/helper").chmod(0o755)
    (folder / "migrate.sh").write_text("#!/bin/sh\necho migrating\n")
    return folder


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return trust_keys(tmp_path / "trust")


def freeze_release(project: Path, keys: Keys, *paths: str, label: str = "1.4.2", **more) -> FrozenRelease:
    return freeze(
        PROCESS,
        str(project / "release.yaml"),
        project="webshop",
        label=label,
        packages=PACKAGES,
        scripts=SCRIPTS,
        server_files=[frozen(project, path) for path in paths],
        signer=load_signer(keys.folder, "order"),
        **more,
    )


# --- snapshots


def test_a_script_is_frozen_with_the_plain_files_beside_it_and_nothing_deeper(project: Path) -> None:
    (project / "ops/.env").write_text("TOKEN=abcd")
    (project / "ops/deeper").mkdir()
    (project / "ops/deeper/file").write_text("x")
    (project / "ops/link").symlink_to(project / "release.yaml")
    os.mkfifo(project / "ops/fifo")
    found = {each.name: each for each in read_beside(frozen(project, "ops/up.sh"))}
    assert set(found) == {"up.sh", "common.sh", "helper"}
    assert found["helper"].executable
    assert not found["up.sh"].executable
    assert found["common.sh"].data == b"true\n"


def test_a_secret_beside_a_script_is_not_frozen(project: Path) -> None:
    (project / "ops/lb.token").write_text("verysecret")
    assert "lb.token" in {each.name for each in read_beside(frozen(project, "ops/up.sh"))}
    left = read_beside(frozen(project, "ops/up.sh"), [str(project / "ops/../ops/lb.token")])
    assert {each.name for each in left} == {"up.sh", "common.sh", "helper"}


def test_a_changed_or_missing_script_is_refused_with_its_name_and_the_next_step(project: Path) -> None:
    planned = frozen(project, "ops/up.sh")
    (project / "ops/up.sh").write_text("#!/bin/sh\nrm -rf /\n")
    with pytest.raises(FileChangedError, match=r"ops/up\.sh has the SHA-256 .* planned was .*Plan and deploy again"):
        read_beside(planned)
    (project / "ops/up.sh").unlink()
    with pytest.raises(FileChangedError, match=r"ops/up\.sh is not what it was: there is no script"):
        read_beside(planned)
    (project / "ops/up.sh").symlink_to("/etc/hostname")
    with pytest.raises(FileChangedError, match="leads out of"):
        read_beside(planned)
    with pytest.raises(FileChangedError, match="there is no script"):
        read_beside(FrozenFile(str(project), "gone/x.sh", "0" * 64))


def test_a_script_that_is_a_link_inside_the_project_is_frozen_as_a_file(project: Path) -> None:
    (project / "ops/also.sh").symlink_to("up.sh")
    found = {each.name: each.data for each in read_beside(frozen(project, "ops/also.sh"))}
    assert found["also.sh"] == found["up.sh"]


def test_a_folder_with_too_much_beside_the_script_is_refused(project: Path) -> None:
    planned = frozen(project, "ops/up.sh")
    for i in range(SNAPSHOT_FILES - 3):
        (project / f"ops/file{i}").write_text("x")
    assert len(read_beside(planned)) == SNAPSHOT_FILES
    (project / "ops/one more").write_text("x")
    with pytest.raises(RefusedError, match=r"65 files, more than 64.*folder of its own"):
        read_beside(planned)
    (project / "ops/one more").unlink()
    there = sum(len(each.data) for each in read_beside(planned))
    (project / "ops/file0").write_bytes(bytes(SNAPSHOT_BYTES - there + 1))
    assert sum(len(each.data) for each in read_beside(planned)) == SNAPSHOT_BYTES
    (project / "ops/file0").write_bytes(bytes(SNAPSHOT_BYTES - there + 2))
    with pytest.raises(RefusedError, match="more than 4 MiB"):
        read_beside(planned)


# --- releases


def test_a_release_comes_back_as_it_was_frozen(project: Path, keys: Keys) -> None:
    release = freeze_release(project, keys, "ops/up.sh")
    opened = open_release(release.document, release.envelope, keys.pins.order)
    assert (opened.project, opened.label, opened.process) == ("webshop", "1.4.2", PROCESS)
    assert opened.packages == PACKAGES
    assert opened.scripts == SCRIPTS
    assert list(sha256_of(opened)) == ["ops/common.sh", "ops/helper", "ops/up.sh"]
    assert release.files[sha256_of(opened)["ops/common.sh"]] == b"true\n"
    assert set(release.files) == set(sha256_of(opened).values())


def test_scripts_for_machines_are_frozen_without_what_stands_beside_them(project: Path, keys: Keys) -> None:
    (project / "deploy").mkdir()
    (project / "deploy/configure.sh").write_text("#!/bin/sh\n")
    (project / "deploy/notes.txt").write_text("not for anybody")
    machine_files = [frozen(project, "deploy/configure.sh"), frozen(project, "ops/up.sh")]
    release = freeze_release(project, keys, "ops/up.sh", machine_files=machine_files)
    opened = open_release(release.document, release.envelope, keys.pins.order)
    assert list(sha256_of(opened)) == ["deploy/configure.sh", "ops/common.sh", "ops/helper", "ops/up.sh"]
    (project / "deploy/configure.sh").write_text("#!/bin/sh\necho other\n")
    with pytest.raises(FileChangedError, match="configure"):
        freeze_release(project, keys, machine_files=machine_files)


def test_the_same_project_gives_the_same_document(project: Path, keys: Keys) -> None:
    first = freeze_release(project, keys, "ops/up.sh", "migrate.sh")
    os.utime(project / "migrate.sh", (1, 1))
    assert freeze_release(project, keys, "migrate.sh", "ops/up.sh") == first
    (project / "ops/common.sh").write_text("false\n")
    assert freeze_release(project, keys, "ops/up.sh", "migrate.sh").document != first.document


def test_an_altered_release_is_refused(project: Path, keys: Keys) -> None:
    release = freeze_release(project, keys, "ops/up.sh")
    altered = release.document.replace(b'"1.4.2"', b'"1.4.3"', 1)
    assert altered != release.document
    for document in (altered, release.document + b" ", b"", b"{}"):
        with pytest.raises(SignatureError):
            open_release(document, release.envelope, keys.pins.order)
    for at in range(0, len(release.envelope), 7):
        broken = bytearray(release.envelope)
        broken[at] ^= 1
        with pytest.raises(SignatureError):
            open_release(release.document, bytes(broken), keys.pins.order)


def test_the_statement_of_one_release_does_not_vouch_for_another(project: Path, keys: Keys) -> None:
    one, other = (freeze_release(project, keys, "ops/up.sh", label=label) for label in ("1.4.2", "1.4.3"))
    with pytest.raises(SignatureError, match="not the one that was signed"):
        open_release(one.document, other.envelope, keys.pins.order)


def test_only_an_order_key_makes_releases(project: Path, keys: Keys, tmp_path: Path) -> None:
    release = freeze_release(project, keys, "ops/up.sh")
    stranger = trust_keys(tmp_path / "other")
    for pins in (keys.pins.package, stranger.pins.order, ()):
        with pytest.raises(SignatureError, match="not signed by a trusted key"):
            open_release(release.document, release.envelope, pins)
    order = sign_document(b"{}", "application/vnd.waystation.order+json", load_signer(keys.folder, "order"))
    with pytest.raises(SignatureError):
        open_release(release.document, order, keys.pins.order)


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", "a//b", "", "a\\..\\evil"])
def test_a_signed_release_still_names_no_file_outside_of_its_folder(project: Path, keys: Keys, path: str) -> None:
    release = freeze_release(project, keys, "ops/up.sh")
    said = msgspec.json.decode(release.document)
    said["files"][0]["path"] = path
    document = msgspec.json.encode(said)
    digest = hashlib.sha256(document).hexdigest()
    statement = {"format": 1, "project": "webshop", "label": "1.4.2", "document": digest}
    envelope = sign_document(msgspec.json.encode(statement), RELEASE_TYPE, load_signer(keys.folder, "order"))
    with pytest.raises(SignatureError, match="outside of its own folder"):
        open_release(document, envelope, keys.pins.order)


def test_a_script_outside_of_the_processs_folder_is_no_part_of_a_release(project: Path, keys: Keys) -> None:
    (project.parent / "outside").mkdir()
    (project.parent / "outside/x.sh").write_text("#!/bin/sh\n")
    with pytest.raises(RefusedError, match="lies outside of"):
        freeze_release(project, keys, "../outside/x.sh")


def test_a_process_larger_than_an_envelope_is_frozen(project: Path, keys: Keys) -> None:
    text = PROCESS + "# long\n" * 100_000
    release = freeze(
        text,
        str(project / "release.yaml"),
        project="webshop",
        label="1",
        packages={},
        scripts=None,
        server_files=[],
        signer=load_signer(keys.folder, "order"),
    )
    assert open_release(release.document, release.envelope, keys.pins.order).process == text


def test_an_unpacked_release_has_every_file_as_it_was(project: Path, keys: Keys, tmp_path: Path) -> None:
    frozen_release = freeze_release(project, keys, "ops/up.sh", "migrate.sh")
    release = open_release(frozen_release.document, frozen_release.envelope, keys.pins.order)
    target = tmp_path / "unpacked"
    process = unpack_release(release, frozen_release.files, str(target))
    assert Path(process).read_text() == PROCESS
    assert (target / "ops/up.sh").read_bytes() == (project / "ops/up.sh").read_bytes()
    assert os.access(target / "ops/helper", os.X_OK)
    assert frozen(target, "ops/up.sh").sha256 == sha256_of(release)["ops/up.sh"]
    with pytest.raises(RefusedError):
        unpack_release(release, frozen_release.files, str(target))


def test_a_lost_or_altered_file_of_a_release_is_refused_before_anything_is_written(
    project: Path, keys: Keys, tmp_path: Path
) -> None:
    frozen_release = freeze_release(project, keys, "ops/up.sh")
    release = open_release(frozen_release.document, frozen_release.envelope, keys.pins.order)
    digest = sha256_of(release)["ops/common.sh"]
    for files in ({**frozen_release.files, digest: b"evil"}, {}):
        with pytest.raises(SignatureError, match="lost or altered"):
            unpack_release(release, files, str(tmp_path / "unpacked"))
        assert not (tmp_path / "unpacked").exists()
