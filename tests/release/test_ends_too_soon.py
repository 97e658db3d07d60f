"""A deployment that would outlive its token does not begin."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
import yaml
from harness.farm import Farm

from relay.server.http.tokens import make_token

pytestmark = pytest.mark.processes


def test_a_deployment_that_outlives_its_token_does_not_begin(tmp_path: Path) -> None:
    text, record = make_token(["write", "order"], datetime.now(UTC) - timedelta(days=89), name="releases")
    config, token = tmp_path / "relay.yaml", tmp_path / "token"
    config.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", "tokens": [msgspec.to_builtins(record)]}))
    token.write_text(text)
    token.chmod(0o600)
    with Farm(tmp_path / "farm") as farm:
        farm.add_relay("fra", "--config", config)
        farm.add_agent("web1")
        farm.add_package("Acme.Web", "1.0.0", {"version.txt": "1.0.0"})
        farm.write_process(
            packages={"web": "Acme.Web"},
            deadline="48h",
            steps=[{"name": "farm", "roles": ["web"], "deploy": "web", "to": str(tmp_path / "srv")}],
        )
        farm.write_environment(relays={"fra": {"url": farm.urls["fra"], "site": "fra", "token": {"file": str(token)}}})
        done = farm.deploy("1.0.0", "--package", "web=1.0.0")
        assert done.code == 1, done.out
        assert f"relay fra: its token {record.id} at " in done.err
        assert "before that ends what it needs" in done.err
        assert "nothing was deployed yet" in farm.call("release", "status").err
