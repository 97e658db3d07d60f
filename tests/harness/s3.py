"""A real S3 server of our own, moto's, on a free port: each test has a bucket of its own there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

KEY, SECRET = "waystation-test", "s3cr3t-of-the-bucket"


@dataclass
class S3Server:
    """`url` is its endpoint; `client` is boto3's, for what a test does behind the store's back."""

    url: str
    credentials: Path

    def __post_init__(self) -> None:
        self.credentials.write_text(f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
        self.credentials.chmod(0o600)
        self.client: Any = boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id=KEY, aws_secret_access_key=SECRET
        )

    def make_bucket(self) -> str:
        # moto keeps buckets per process, whichever of its servers made them.
        name = f"bucket-{uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name

    def location(self, bucket: str, prefix: str = "", *, through: str = "", **more: str) -> str:
        """A store there; `through`: another endpoint, as of a proxy."""
        options = {"endpoint": through or self.url, "credentials": str(self.credentials), "path_style": "true", **more}
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"s3://{bucket}{'/' if prefix else ''}{prefix}?{query}"

    def change(self, bucket: str, key: str, change: Any) -> None:
        """Write other bytes over an object."""
        stored = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        self.client.put_object(Bucket=bucket, Key=key, Body=change(stored))

    def empty(self, bucket: str, *, keep: str) -> None:
        """Remove all objects but one."""
        doomed = [{"Key": key} for key in self.keys(bucket) if key != keep]
        if doomed:
            self.client.delete_objects(Bucket=bucket, Delete={"Objects": doomed})

    def keys(self, bucket: str) -> list[str]:
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=bucket).get("Contents", ())]


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}", folder / "credentials")
    finally:
        server.stop()
