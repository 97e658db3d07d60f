from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import hashlib
import io
import json
import os
import resource
import socket
import ssl
import tracemalloc
import zipfile
from dataclasses import replace

import pytest
import trustme
from aiohttp import web
from aiohttp.abc import AbstractResolver
from harness.feed import at_first, body, cut, drop, redirect, running_feed
from harness.process import eventually
from harness.proxy import forward_proxy, plain_answer, without_proxies
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.depot import nuget_client as feed_module
from orchestrator.depot.feed_policy import FeedCredentials, FeedGate, FeedPolicy, FeedPolicyError, scope_of
from orchestrator.depot.nuget_client import (
    FeedDocumentError,
    FeedIntegrityError,
    FeedTooSlowError,
    download,
    parse_sha512,
)
from relay.errors import NotFoundError, RefusedError, StoreError, UnreachableError, UntrustedError, UsageError
from relay.network.proxies import ProxyError
from relay.package.identity import NuGetVersion, PackageId
from relay.support.persistence import Persistence

ID = PackageId.parse("Shop.Web")
VERSION = NuGetVersion.parse("1.0.1-RC.1")
NUPKG_PATH = "/flat/shop.web/1.0.1-rc.1/shop.web.1.0.1-rc.1.nupkg"


def small_nupkg() -> bytes:
    """The same bytes in every process, whenever it starts."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("Shop.Web.nuspec"), "<package/>")
        archive.writestr(zipfile.ZipInfo("lib/x.dll"), bytes(range(256)) * 1000)
    return buffer.getvalue()


NUPKG = small_nupkg()
SHA512 = base64.b64encode(hashlib.sha512(NUPKG).digest()).decode()
AT_ONCE = Persistence(first_pause=0.0, longest_pause=0.0, longest_asked=0.0, failures=3)
"""Borne as ever, without the pauses."""
OTHER_SHA512 = base64.b64encode(bytes(64)).decode()


@contextlib.asynccontextmanager
async def running(ssl_context=None):
    async with running_feed(ssl_context) as server:
        server.serve(NUPKG_PATH, body(NUPKG))
        yield server


@pytest.fixture
async def server():
    async with running() as made:
        yield made


@pytest.fixture
def destination(tmp_path):
    return str(tmp_path / "x.nupkg")


async def fetch(server, destination, **options):
    feed_url = options.pop("feed_url", None) or server.index
    options["policy"] = replace(options.get("policy", FeedPolicy()), persistence=AT_ONCE)
    return await download(feed_url, ID, VERSION, destination, **options)


def contents(path):
    with open(path, "rb") as file:
        return file.read()


class FixedResolver(AbstractResolver):
    """Names lead to where the test says; `asked` proves that it was asked."""

    def __init__(self, **addresses):
        self.addresses = {name.replace("_", "."): list(answers) for name, answers in addresses.items()}
        self.asked = []

    async def resolve(self, host, port=0, family=socket.AF_INET):
        self.asked.append(host)
        answers = self.addresses[host]
        address = answers.pop(0) if len(answers) > 1 else answers[0]
        return [{"hostname": host, "host": address, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}]

    async def close(self):
        return


# --- what arrives


async def test_a_package_arrives_whole(server, destination):
    got = await fetch(server, destination)
    assert contents(destination) == NUPKG
    assert got.source_url == server.base + NUPKG_PATH
    assert got.verified_by == "transport"


async def test_the_feeds_own_hash_is_found_in_the_registration(server, destination):
    server.serve_registration(packageHash=SHA512, packageHashAlgorithm="SHA512")
    assert (await fetch(server, destination)).verified_by == "feed"
    assert "/reg/old.json" not in server.paths


async def test_the_feeds_own_hash_is_found_in_the_catalog(server, destination):
    server.serve_registration(**{"@id": f"{server.base}/catalog/1.json"})
    server.serve("/catalog/1.json", {"packageHash": SHA512, "packageHashAlgorithm": "SHA512"})
    assert (await fetch(server, destination)).verified_by == "feed"


@pytest.mark.parametrize("where", ["registration", "catalog"])
async def test_a_package_with_another_hash_than_the_feed_states_is_refused_and_removed(server, destination, where):
    stated = {"packageHash": OTHER_SHA512, "packageHashAlgorithm": "SHA512"}
    if where == "registration":
        server.serve_registration(**stated)
    else:
        server.serve_registration(**{"@id": f"{server.base}/catalog/1.json"})
        server.serve("/catalog/1.json", stated)
    with pytest.raises(FeedIntegrityError, match="another SHA-512 than the feed states"):
        await fetch(server, destination)
    assert NUPKG_PATH in server.paths
    assert not os.path.exists(destination)


@pytest.mark.parametrize(
    "given", [SHA512, hashlib.sha512(NUPKG).hexdigest(), hashlib.sha512(NUPKG).hexdigest().upper()]
)
async def test_a_given_hash_is_checked_in_place_of_the_feeds(server, destination, given):
    server.serve_registration(packageHash=OTHER_SHA512, packageHashAlgorithm="SHA512")
    assert (await fetch(server, destination, sha512=given)).verified_by == "given"
    assert not any(path.startswith("/reg") for path in server.paths)


async def test_a_package_with_another_hash_than_given_is_refused_and_removed(server, destination):
    with pytest.raises(FeedIntegrityError, match="another SHA-512 than given"):
        await fetch(server, destination, sha512=OTHER_SHA512)
    assert not os.path.exists(destination)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"packageHash": SHA512},
        {"packageHash": OTHER_SHA512, "packageHashAlgorithm": "MD5"},
        {"@id": "urn:not-a-url"},
        {"version": "9.9.9", "packageHash": OTHER_SHA512, "packageHashAlgorithm": "SHA512"},
    ],
)
async def test_a_feed_that_states_no_sha512_is_recorded_as_such(server, destination, entry):
    server.serve_registration(**entry)
    assert (await fetch(server, destination)).verified_by == "transport"
    assert "/reg/page.json" in server.paths


async def test_a_registration_that_is_absent_or_gzipped_is_understood(server, destination):
    server.serve_index(registration=f"{server.base}/reg/")
    assert (await fetch(server, destination)).verified_by == "transport"
    entry = {"version": "1.0.1-rc.1", "packageHash": SHA512, "packageHashAlgorithm": "sha512"}
    document = b"\xef\xbb\xbf" + json.dumps({"items": [{"items": [{"catalogEntry": entry}]}]}).encode()
    server.serve("/reg/shop.web/index.json", body(gzip.compress(document), Content_Encoding="gzip"))
    assert (await fetch(server, destination + "2")).verified_by == "feed"


async def test_credentials_go_to_the_feed(server, destination):
    await fetch(server, destination, credentials=FeedCredentials("ci", "s3cret"))
    for _, headers in server.asked:
        assert headers["Authorization"] == "Basic " + base64.b64encode(b"ci:s3cret").decode()
    assert "s3cret" not in repr(FeedCredentials("ci", "s3cret"))


# --- what is not there


async def test_a_missing_package_is_named(server, destination):
    del server.answers[NUPKG_PATH]
    with pytest.raises(NotFoundError, match=r"has no Shop\.Web 1\.0\.1-RC\.1"):
        await fetch(server, destination)
    assert not os.path.exists(destination)


async def test_a_missing_feed_is_named(server, destination):
    with pytest.raises(NotFoundError, match=r"no NuGet V3 feed at .*/other"):
        await fetch(server, destination, feed_url=f"{server.base}/other")


@pytest.mark.parametrize("status", [401, 403])
async def test_a_closed_feed_asks_for_credentials(server, destination, status):
    server.serve("/v3/index.json", body(b"", status=status))
    with pytest.raises(RefusedError, match="credentials"):
        await fetch(server, destination)


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_a_feed_in_trouble_may_be_asked_later(server, destination, status):
    server.serve(NUPKG_PATH, body(b"", status=status, Retry_After="7"))
    with pytest.raises(UnreachableError, match="later") as caught:
        await fetch(server, destination)
    assert caught.value.retry_after == 7
    assert not os.path.exists(destination)


async def test_a_feed_that_nobody_serves_is_unreachable(destination):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(UnreachableError, match="cannot reach"):
        await fetch(None, destination, feed_url=f"http://127.0.0.1:{port}/index.json")


async def test_a_feed_that_cannot_prove_who_it_is_gets_nothing(destination):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with running(context) as server:
        with pytest.raises(UntrustedError, match="certificate"):
            await fetch(server, destination, feed_url=server.index.replace("http:", "https:"))
        assert not server.asked


async def test_a_file_that_exists_is_not_touched(server, destination):
    with open(destination, "wb") as file:
        file.write(b"precious")
    with pytest.raises(RefusedError, match="cannot make the file"):
        await fetch(server, destination)
    assert contents(destination) == b"precious"


async def test_a_full_disk_is_said_and_leaves_no_file(server, destination):
    server.serve(NUPKG_PATH, body(NUPKG))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StoreError, match="cannot write") as caught:
            await fetch(server, destination)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.full
    assert not os.path.exists(destination)


# --- a feed that leads elsewhere (row 25)


@pytest.mark.parametrize(
    "evil",
    [
        "file:///etc/passwd",
        "http://169.254.169.254/latest/",
        "http://[::1]:{port}/flat/",
        "http://localhost:{port}/flat/",
        "http://2130706433:{port}/flat/",
        "http://127.1:{port}/flat/",
        "http://127.0.0.2:{port}/flat/",
        "http://127.0.0.1:1/flat/",
        "http://user:pass@127.0.0.1:{port}/flat/",
        "https://cdn.example/flat/",
        "//127.0.0.1:{port}/flat/",
        "/flat/",
        "flat",
        "ftp://127.0.0.1:{port}/flat/",
        "",
    ],
)
@pytest.mark.parametrize("resource_name", ["flat", "registration"])
async def test_a_service_index_that_leads_elsewhere_is_refused_before_anything_is_sent(
    server, destination, evil, resource_name
):
    server.serve_index(**{resource_name: evil.format(port=server.port)})
    with pytest.raises(FeedPolicyError):
        await fetch(server, destination)
    assert server.paths == ["/v3/index.json"]
    assert not os.path.exists(destination)


async def test_a_registration_page_or_catalog_that_leads_elsewhere_is_refused(server, destination):
    async with running() as other:
        server.serve_registration(**{"@id": f"{other.base}/catalog/1.json"})
        with pytest.raises(FeedPolicyError, match=f"--allow-host 127.0.0.1:{other.port}"):
            await fetch(server, destination)
        assert "/reg/page.json" in server.paths
        server.serve("/reg/shop.web/index.json", {"items": [{"@id": f"{other.base}/page.json"}]})
        with pytest.raises(FeedPolicyError, match=f"--allow-host 127.0.0.1:{other.port}"):
            await fetch(server, destination)
        assert not other.asked


async def test_a_listed_host_serves_but_sees_no_credentials(server, destination):
    async with running() as other:
        server.serve_index(flat=f"{other.base}/flat/")
        policy = FeedPolicy(allow_hosts=(f"127.0.0.1:{other.port}",))
        got = await fetch(server, destination, policy=policy, credentials=FeedCredentials("ci", "s3cret"))
        assert got.source_url == other.base + NUPKG_PATH
        assert "Authorization" in server.asked[0][1]
        assert [path for path, headers in other.asked if "Authorization" not in headers] == [NUPKG_PATH]


async def test_a_name_that_resolves_to_loopback_is_refused_before_anything_is_sent(server, destination):
    resolver = FixedResolver(feed_test=["127.0.0.1"])
    policy = FeedPolicy(allow_http=True, allow_private=True)
    with pytest.raises(FeedPolicyError, match=r"feed\.test resolves to 127\.0\.0\.1, a loopback address"):
        await fetch(
            server,
            destination,
            feed_url=f"http://feed.test:{server.port}/v3/index.json",
            policy=policy,
            resolver=resolver,
        )
    assert resolver.asked == ["feed.test"]
    assert not server.asked


async def test_a_name_that_flips_to_a_near_address_is_refused(server, destination):
    server.serve_index(flat=f"http://cdn.test:{server.port}/flat/")
    resolver = FixedResolver(cdn_test=["127.0.0.1", "169.254.169.254"])
    policy = FeedPolicy(allow_http=True, allow_hosts=(f"cdn.test:{server.port}",))
    await fetch(server, destination, policy=policy, resolver=resolver)
    with pytest.raises(FeedPolicyError, match=r"cdn\.test resolves to 169\.254\.169\.254, a link-local address"):
        await fetch(server, destination + "2", policy=policy, resolver=resolver)
    assert resolver.asked == ["cdn.test"] * 2


async def test_a_private_address_needs_the_operators_word(destination):
    resolver = FixedResolver(feed_test=["10.9.8.7"])
    with pytest.raises(FeedPolicyError, match=r"a private address.*--allow-private"):
        await fetch(None, destination, feed_url="https://feed.test/index.json", resolver=resolver)
    assert resolver.asked == ["feed.test"]


# --- redirects (row 26)


async def test_a_redirect_within_the_feed_is_followed_with_credentials(server, destination):
    server.serve(NUPKG_PATH, redirect("/blob?signature=abc", 307))
    server.serve("/blob", body(NUPKG))
    got = await fetch(server, destination, credentials=FeedCredentials("ci", "s3cret"))
    assert server.paths[-1] == "/blob"
    assert "Authorization" in server.asked[-1][1]
    assert got.source_url == server.base + NUPKG_PATH


@pytest.mark.parametrize("listed", [False, True])
async def test_a_redirect_to_another_origin_carries_no_credentials_and_needs_its_host_listed(
    server, destination, listed
):
    async with running() as other:
        server.serve(NUPKG_PATH, redirect(f"{other.base}/blob"))
        other.serve("/blob", body(NUPKG))
        credentials = FeedCredentials("ci", "s3cret")
        if listed:
            policy = FeedPolicy(allow_hosts=(f"127.0.0.1:{other.port}",))
            await fetch(server, destination, policy=policy, credentials=credentials)
            assert ["Authorization" in headers for _, headers in other.asked] == [False]
        else:
            with pytest.raises(FeedPolicyError, match="another host"):
                await fetch(server, destination, credentials=credentials)
            assert not other.asked
        assert "Authorization" in server.asked[-1][1]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "http://169.254.169.254/", "http://[", "ftp:x"])
async def test_a_redirect_to_an_impossible_place_is_refused(server, destination, location):
    server.serve(NUPKG_PATH, redirect(location))
    with pytest.raises((FeedPolicyError, FeedDocumentError)):
        await fetch(server, destination)
    assert not os.path.exists(destination)


async def test_redirects_without_end_are_stopped(server, destination):
    server.serve("/v3/index.json", redirect("/v3/index.json"))
    with pytest.raises(FeedPolicyError, match="more than 3 times"):
        await fetch(server, destination)
    assert len(server.asked) == 4


# --- documents (row 27)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"version":3,"resources":[]}',
        b'{"version":"3.0.0.0","resources":[]}',
        b'{"version":"3.0.0"}',
        b'{"version":"2.0.0","resources":[]}',
        b'{"version":"3.0.0","resources":[]}',
        b'{"version":"3.0.0","resources":[{"@id":7,"@type":"PackageBaseAddress/3.0.0"}]}',
        b'{"version":"3.0.0","resources":[{"@id":"http://127.0.0.1/","@type":"packagebaseaddress/3.0.0"}]}',
        b'{"version":"3.0.0","resources":' + b"[" * 100_000,
    ],
)
async def test_a_service_index_of_another_shape_is_refused(server, destination, document):
    server.serve("/v3/index.json", body(document, Content_Type="application/json"))
    with pytest.raises(FeedDocumentError):
        await fetch(server, destination)


async def test_a_login_page_in_place_of_the_index_is_told(server, destination):
    server.serve("/v3/index.json", body(b"<html>Log in</html>", Content_Type="text/html"))
    with pytest.raises(FeedDocumentError, match="login"):
        await fetch(server, destination)


async def test_a_document_that_is_too_large_is_refused_as_it_arrives(server, destination):
    sent = []

    async def endless(request):
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * 65536)
            sent.append(65536)

    server.serve("/v3/index.json", endless)
    with pytest.raises(FeedDocumentError, match="larger than 1000000"):
        await fetch(server, destination, policy=FeedPolicy(json_max=1_000_000))
    assert sent


@pytest.mark.parametrize(
    ("coding", "data"),
    [
        ("gzip", gzip.compress(bytes(10_000_000), mtime=0)),
        ("gzip", gzip.compress(b"{}", mtime=0)[:-1]),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"x"),
        ("gzip", b"not gzip"),
        ("br", b"{}"),
    ],
)
async def test_a_compression_bomb_or_a_broken_stream_is_refused(server, destination, coding, data):
    server.serve("/v3/index.json", body(data, Content_Encoding=coding))
    with pytest.raises(FeedDocumentError):
        await fetch(server, destination, policy=FeedPolicy(json_max=1_000_000))


def test_a_compression_bomb_takes_no_more_memory_than_its_cap():
    bomb = gzip.compress(bytes(50_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="inflates to more"):
            feed_module._inflate(bomb, "gzip", 100_000)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("depth", [15, 16])
async def test_a_document_is_nested_no_deeper_than_agreed(server, destination, depth):
    nested = json.loads("[" * depth + "]" * depth)
    server.serve("/v3/index.json", dict(server.answers["/v3/index.json"], ignored=nested))
    if depth == 15:
        await fetch(server, destination)
    else:
        with pytest.raises(FeedDocumentError, match="deeper than 16"):
            await fetch(server, destination)


async def test_a_hash_that_is_none_is_refused(server, destination):
    server.serve_registration(packageHash="AAAA", packageHashAlgorithm="SHA512")
    with pytest.raises(FeedDocumentError, match="as a SHA-512"):
        await fetch(server, destination)


async def test_pages_that_all_claim_the_version_are_not_all_fetched(server, destination):
    server.serve_index(registration=f"{server.base}/reg/")
    server.serve("/reg/shop.web/index.json", {"items": [{"@id": f"{server.base}/page.json"}] * 100})
    server.serve("/page.json", {"items": []})
    assert (await fetch(server, destination)).verified_by == "transport"
    assert server.paths.count("/page.json") == 4


# --- bodies (row 29)


async def test_a_web_page_in_place_of_the_package_is_refused(server, destination):
    server.serve(NUPKG_PATH, body(b"<html>Log in</html>", Content_Type="text/html"))
    with pytest.raises(FeedIntegrityError, match=r"no zip.*login"):
        await fetch(server, destination)
    assert not os.path.exists(destination)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_always_cut_short_is_given_up_and_removed(server, destination, chunked):
    server.serve(NUPKG_PATH, cut(NUPKG, 1000, chunked=chunked))
    with pytest.raises(UnreachableError, match="cut short"):
        await fetch(server, destination)
    assert server.paths.count(NUPKG_PATH) == 4
    assert not os.path.exists(destination)


@pytest.mark.parametrize("announced", [True, False])
async def test_a_package_that_is_too_large_is_refused_and_removed(server, destination, announced):
    async def stream(request):
        response = web.StreamResponse()
        if announced:
            response.content_length = len(NUPKG)
        await response.prepare(request)
        await response.write(NUPKG)
        return response

    server.serve(NUPKG_PATH, stream)
    with pytest.raises(UntrustedError, match="too many" if announced else "larger than"):
        await fetch(server, destination, policy=FeedPolicy(nupkg_max=len(NUPKG) - 1))
    assert not os.path.exists(destination)


TROUBLES = {
    "503": body(b"busy", status=503, Retry_After="1"),
    "502": body(b"<html>bad gateway</html>", status=502),
    "500": body(b"", status=500),
    "429": body(b"", status=429, Retry_After="Wed, 21 Oct 2099 07:28:00 GMT"),
    "drop": drop,
    "cut": cut(NUPKG, 100),
    "redirect to a dead address": redirect("http://127.0.0.1:1/gone"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_a_feed_that_is_in_trouble_once_at_each_step_still_gives_its_package(server, destination, trouble):
    server.serve_registration(packageHash=SHA512, packageHashAlgorithm="SHA512")
    for path in ("/v3/index.json", "/reg/shop.web/index.json", "/reg/page.json", NUPKG_PATH):
        server.serve(path, at_first(TROUBLES[trouble], then=server.answers[path]))
    policy = FeedPolicy(allow_hosts=("127.0.0.1:1",))
    got = await fetch(server, destination, policy=policy)
    assert (got.verified_by, contents(destination)) == ("feed", NUPKG)


def unannounced(data):
    """A body that ends with its connection, as HTTP/1.0 has it: a cut looks like an end."""

    async def answer(request):
        head = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n"
        request.transport.write(head + data)
        request.transport.close()
        return web.Response()

    return answer


async def test_a_body_without_an_announced_end_that_is_wrong_is_asked_for_again(server, destination):
    server.serve_registration(packageHash=SHA512, packageHashAlgorithm="SHA512")
    index = json.dumps(server.answers["/v3/index.json"]).encode()
    server.serve("/v3/index.json", at_first(unannounced(index[:40]), then=unannounced(index)))
    server.serve(NUPKG_PATH, at_first(unannounced(NUPKG[:1000]), then=unannounced(NUPKG)))
    assert (await fetch(server, destination)).verified_by == "feed"
    assert contents(destination) == NUPKG
    server.serve(NUPKG_PATH, unannounced(NUPKG[:1000]))
    with pytest.raises(UnreachableError, match="may be cut short"):
        await fetch(server, destination + "2")
    assert not os.path.exists(destination + "2")


@pytest.mark.parametrize("status", [500, 503])
async def test_a_registration_that_is_out_of_order_is_done_without(server, destination, status):
    server.serve_registration(packageHash=SHA512, packageHashAlgorithm="SHA512")
    server.serve("/reg/page.json", body(b"", status=status, Retry_After="86400"))
    assert (await fetch(server, destination)).verified_by == "transport"
    assert server.paths.count("/reg/page.json") == 2, "what is optional is asked for once again"


async def test_a_feed_that_asks_for_time_gets_it(server, destination):
    server.serve(NUPKG_PATH, at_first(body(b"", status=503, Retry_After="0.2"), then=body(NUPKG)))
    began = asyncio.get_running_loop().time()
    await download(server.index, ID, VERSION, destination, policy=FeedPolicy(persistence=Persistence(0.0, failures=1)))
    assert asyncio.get_running_loop().time() - began >= 0.2


@pytest.mark.parametrize("status", [204, 206, 400, 405, 410, 401])
async def test_an_answer_that_time_does_not_mend_is_not_asked_for_again(server, destination, status):
    server.serve(NUPKG_PATH, body(b"", status=status))
    with pytest.raises((UntrustedError, RefusedError)):
        await fetch(server, destination)
    assert server.paths.count(NUPKG_PATH) == 1


async def test_a_package_in_a_content_coding_is_refused(server, destination):
    server.serve(NUPKG_PATH, body(gzip.compress(NUPKG), Content_Encoding="gzip"))
    with pytest.raises(FeedDocumentError, match="content coding"):
        await fetch(server, destination)
    assert not os.path.exists(destination)


async def drip(request):
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"P")
        await asyncio.sleep(0.01)


async def test_a_feed_that_drips_is_given_up(server, destination):
    server.serve(NUPKG_PATH, drip)
    with pytest.raises(FeedTooSlowError, match="less than"):
        await fetch(server, destination, policy=FeedPolicy(window_seconds=0.2))
    assert server.paths[-1] == NUPKG_PATH
    assert not os.path.exists(destination)


async def test_a_feed_that_keeps_the_minimum_rate_still_has_to_end(server, destination):
    server.serve(NUPKG_PATH, drip)
    with pytest.raises(FeedTooSlowError, match="in all"):
        await fetch(server, destination, policy=FeedPolicy(window_bytes=1, total_seconds=0.3))
    assert server.paths[-1] == NUPKG_PATH
    assert not os.path.exists(destination)


async def test_a_feed_that_accepts_and_says_nothing_is_given_up(server, destination):
    async def silent(request):
        await asyncio.sleep(60)

    server.serve(NUPKG_PATH, silent)
    with pytest.raises(UnreachableError, match="in time"):
        await fetch(server, destination, policy=FeedPolicy(connect_seconds=0.1, answer_seconds=0.1))


async def test_a_download_that_is_given_up_by_the_caller_leaves_no_file(server, destination):
    server.serve(NUPKG_PATH, drip)
    task = asyncio.ensure_future(fetch(server, destination))
    await eventually(lambda: server.paths[-1:] == [NUPKG_PATH])
    assert os.path.exists(destination)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not os.path.exists(destination)


# --- proxies


@pytest.fixture
def proxied(monkeypatch):
    """Sets variables of the environment, all others about proxies being absent."""
    return without_proxies(monkeypatch)


async def test_a_feed_is_asked_through_the_environments_proxy_but_for_what_no_proxy_names(server, destination, proxied):
    async with forward_proxy() as proxy:
        proxied("HTTP_PROXY", proxy.url.replace("//", "//me:p%40ss@"))
        await fetch(server, destination)
        assert proxy.asked[-1] == f"GET {server.base}{NUPKG_PATH} HTTP/1.1"
        assert set(proxy.credentials) == {f"Basic {base64.b64encode(b'me:p@ss').decode()}"}
        proxied("NO_PROXY", "127.0.0.0/8")
        before = len(proxy.asked)
        await fetch(server, destination + "2")
        assert len(proxy.asked) == before


async def test_a_proxy_looks_up_the_feeds_name_and_its_own_name_may_be_private(server, destination, proxied):
    """The policy is about where a feed leads; where the environment leads is the operator's word."""
    async with forward_proxy() as proxy:
        resolver = FixedResolver(proxy_corp=["127.0.0.1"])
        proxied("HTTP_PROXY", f"http://proxy.corp:{proxy.port}")
        # The feed's name would be refused for its address if it was looked up here.
        url = server.index.replace("127.0.0.1", "localhost")
        server.serve_index(flat=url.replace("/v3/index.json", "/flat/"))
        await fetch(server, destination, feed_url=url, resolver=resolver)
    assert set(resolver.asked) == {"proxy.corp"}


async def test_a_proxy_that_fails_is_named_and_so_is_its_variable(server, destination, proxied):
    async with forward_proxy(plain_answer(502)) as proxy:
        proxied("http_proxy", proxy.url)
        with pytest.raises(
            ProxyError, match=rf"the proxy 127.0.0.1:{proxy.port} \(of http_proxy\) answers with status 502"
        ):
            await fetch(server, destination)
    assert len(proxy.asked) == 4, "it is tried again, as a feed is"
    proxied("http_proxy", "http://127.0.0.1:1")
    with pytest.raises(ProxyError, match=r"127.0.0.1:1 \(of http_proxy\) cannot be reached: Connect"):
        await fetch(server, destination)
    proxied("http_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(UsageError, match=r"^http_proxy names"):
        await fetch(server, destination)


# --- the rules, without I/O


@pytest.mark.parametrize(
    ("address", "scope"),
    [
        ("8.8.8.8", "public"),
        ("2606:4700::1", "public"),
        ("10.0.0.1", "private"),
        ("172.16.0.1", "private"),
        ("192.168.0.1", "private"),
        ("100.64.0.1", "private"),
        ("fd00:ec2::254", "private"),
        ("0.0.0.1", "private"),
        ("127.0.0.1", "loopback"),
        ("127.255.0.9", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:10.0.0.1", "private"),
        ("64:ff9b::7f00:1", "loopback"),
        ("64:ff9b::808:808", "public"),
        ("2002:7f00:1::", "loopback"),
        ("169.254.169.254", "link-local"),
        ("::ffff:169.254.169.254", "link-local"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("0.0.0.0", "reserved"),
        ("::", "reserved"),
        ("224.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
        ("240.0.0.1", "reserved"),
    ],
)
def test_an_address_is_seen_for_what_it_reaches(address, scope):
    assert scope_of(address) == scope


@pytest.mark.parametrize(
    "url",
    [
        "",
        "feed",
        "//feed.example/index.json",
        "ftp://feed.example/",
        "https://",
        "https://user:pass@feed.example/",
        "https://feed.example:99999/",
        "https://[",
        "/nuget",
    ],
)
def test_what_is_no_feeds_url_is_refused(url):
    with pytest.raises(UsageError):
        FeedGate(url, FeedPolicy())


def test_plain_http_needs_loopback_or_the_operators_word():
    with pytest.raises(FeedPolicyError, match="--allow-http"):
        FeedGate("http://feed.example/index.json", FeedPolicy())
    FeedGate("http://feed.example/index.json", FeedPolicy(allow_http=True))
    for loopback in ("http://127.0.0.1/", "http://[::1]/", "http://localhost/"):
        FeedGate(loopback, FeedPolicy())


def test_an_https_feed_never_leads_to_plain_http():
    gate = FeedGate(
        "https://feed.example/", FeedPolicy(allow_http=True, allow_hosts=("feed.example", "feed.example:80"))
    )
    with pytest.raises(FeedPolicyError, match="plain http"):
        gate.check_url(feed_module.URL("http://feed.example/"))


def test_a_listed_host_stands_for_its_schemes_own_port_only():
    gate = FeedGate("https://feed.example/", FeedPolicy(allow_hosts=("cdn.example", "[2001:db8::1]:8443")))
    gate.check_url(feed_module.URL("https://cdn.example/x"))
    gate.check_url(feed_module.URL("https://CDN.example:443/x"))
    for other in (
        "https://cdn.example:8443/",
        "https://a.cdn.example/",
        "https://cdn.example.evil/",
        "https://cdn.example./",
    ):
        with pytest.raises(FeedPolicyError, match="--allow-host"):
            gate.check_url(feed_module.URL(other))


@pytest.mark.parametrize(
    "entry", ["", "a b", "https://cdn.example", "cdn.example/x", "u@cdn.example", "x?y", "h:99999", "x'", "x@y:1"]
)
def test_what_is_no_host_cannot_be_listed(entry):
    with pytest.raises(UsageError, match="host or host:port"):
        FeedGate("https://feed.example/", FeedPolicy(allow_hosts=(entry,)))


@pytest.mark.parametrize("host", ["2130706433", "127.1", "0x7f.0.0.1", "0177.0.0.1", "1.2.3.4.", "feed.0x7f"])
def test_a_number_that_is_no_address_in_its_usual_form_is_refused(host):
    with pytest.raises((FeedPolicyError, UsageError)):
        FeedGate(f"https://{host}/index.json", FeedPolicy())


def test_a_literal_private_feed_is_the_operators_word():
    gate = FeedGate("https://10.0.0.5/index.json", FeedPolicy())
    gate.check_address("10.0.0.5", "10.0.0.5")
    with pytest.raises(FeedPolicyError):
        gate.check_address("x", "127.0.0.1")


@given(st.text(max_size=60))
def test_any_text_as_a_feeds_url_is_taken_or_refused(text):
    with contextlib.suppress(UsageError, FeedPolicyError):
        FeedGate(f"https://{text}", FeedPolicy(allow_hosts=("cdn.example",)))


@given(st.binary(min_size=64, max_size=64))
def test_a_sha512_is_read_in_both_forms(digest):
    assert parse_sha512(digest.hex()) == parse_sha512(base64.b64encode(digest).decode()) == digest


@pytest.mark.parametrize("text", ["", "00", "zz" * 64, SHA512[:-1], "é" * 88, SHA512 + "\n"])
def test_what_is_no_sha512_is_refused(text):
    with pytest.raises(UsageError, match="SHA-512"):
        parse_sha512(text)
