"""A declared retry is counted in one place: nothing below it repeats an act by itself, also by two relays."""

from __future__ import annotations

from pathlib import Path

from harness.farm import Farm


def runs_of(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_what_fails_or_stalls_runs_as_often_as_was_declared_and_no_more(tmp_path: Path) -> None:
    counters = tmp_path / "counters"
    counters.mkdir()
    count = '#!/bin/sh\necho "$ATTEMPT" >> {}/$MACHINE-{}\n{}\n'
    with Farm(tmp_path) as farm:
        farm.add_relay("fra")
        farm.add_relay("iad")
        for name in ("web1", "web2"):
            farm.add_agent(name, relays=[farm.urls["fra"], farm.urls["iad"]]).start()
        farm.add_package("Acme.Web", "1.0.0", {"version.txt": "1.0.0"})
        farm.write_script("fails.sh", count.format(counters, "fails", '[ "$MACHINE" = web2 ] || exit 3'))
        farm.write_script("stalls.sh", count.format(counters, "stalls", "exec sleep 600"))
        farm.write_script("open.sh", f'#!/bin/sh\necho run >> {counters}/open\n[ "$ATTEMPT" = 3 ]\n')
        apply = [
            {"script": "fails.sh", "retry": {"attempts": 3, "delay": "0s"}},
            {"script": "stalls.sh", "stall": "1s", "retry": {"attempts": 2, "delay": "0s"}},
            "switch",
        ]
        step = {
            "name": "web", "roles": ["web"], "deploy": "web", "to": f"{tmp_path}/srv/${{machine.name}}", "apply": apply,
        }  # fmt: skip
        early = {"name": "open", "script": "open.sh", "retry": {"attempts": 3, "delay": "0s"}}
        farm.write_process(packages={"web": "Acme.Web"}, pre_acquire=[early], steps=[step])
        farm.write_environment()
        done = farm.deploy("1.0.0", "--package", "web=1.0.0")
        assert done.code == 1
        assert "it stalled: it printed nothing for 1 s" in done.out
    found = {path.name: runs_of(path) for path in counters.iterdir()}
    assert found == {"open": 3, "web1-fails": 3, "web2-fails": 1, "web2-stalls": 2}
    assert (counters / "web1-fails").read_text().split() == ["1", "2", "3"]
