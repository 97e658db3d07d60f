from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import UsageError
from relay.network.proxies import proxy_of

PROXY = {"HTTP_PROXY": "http://proxy.corp:3128", "HTTPS_PROXY": "http://secure.corp:3129"}
PASSWORD = "pass-word"


def is_direct(url: str, no_proxy: str) -> bool:
    return proxy_of(url, PROXY | {"NO_PROXY": no_proxy}) is None


@pytest.mark.parametrize(
    ("environment", "variable", "url"),
    [
        ({"HTTPS_PROXY": "http://a:1"}, "HTTPS_PROXY", "http://a:1"),
        ({"HTTPS_PROXY": "http://a:1", "https_proxy": "http://b:2"}, "https_proxy", "http://b:2"),
        ({"HTTPS_PROXY": " http://a:1/\n"}, "HTTPS_PROXY", "http://a:1"),
        ({"HTTPS_PROXY": "HTTP://a"}, "HTTPS_PROXY", "http://a"),
        ({"HTTPS_PROXY": "a.corp:3128"}, "HTTPS_PROXY", "http://a.corp:3128"),
        ({"HTTPS_PROXY": "http://[::1]:3128"}, "HTTPS_PROXY", "http://[::1]:3128"),
        ({"HTTPS_PROXY": "http://me:p%40ss@a:1"}, "HTTPS_PROXY", "http://me:p%40ss@a:1"),
        ({"ALL_PROXY": "http://c:3"}, "ALL_PROXY", "http://c:3"),
        ({"ALL_PROXY": "socks5://c:3", "HTTPS_PROXY": "http://a:1"}, "HTTPS_PROXY", "http://a:1"),
    ],
)
def test_a_proxy_is_the_one_that_the_first_variable_names(environment, variable, url):
    proxy = proxy_of("https://relay.example:7443", environment)
    assert proxy is not None
    assert (proxy.variable, proxy.url) == (variable, url)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HTTPS_PROXY": ""},
        {"HTTPS_PROXY": "http://a:1", "https_proxy": " "},
        {"HTTPS_PROXY": "", "ALL_PROXY": "socks5://a"},
        {"HTTP_PROXY": "nonsense://"},
        {"HTTPS_PROXY": "socks5://a", "no_proxy": "*"},
        {"NO_PROXY": "10.0.0.0/99"},
    ],
)
def test_what_is_empty_or_not_meant_for_a_request_has_no_part_in_it(environment):
    assert proxy_of("https://relay.example", environment) is None


@pytest.mark.parametrize("kind", ["socks4", "socks5", "SOCKS5H", "https", "quic+x"])
def test_a_kind_of_proxy_that_is_not_supported_is_refused_by_name(kind):
    with pytest.raises(
        UsageError, match=rf"^HTTPS_PROXY .*{kind.lower().replace('+', '.')}://, which is not"
    ) as refused:
        proxy_of("https://relay.example", {"HTTPS_PROXY": f"{kind}://me:{PASSWORD}@proxy:1080"})
    assert PASSWORD not in str(refused.value)


@pytest.mark.parametrize(
    "value",
    [
        "http://",
        "http://:3128",
        "http:///",
        "://proxy:3128",
        "http:proxy",
        "http://proxy:port",
        "http://proxy:99999",
        "http://proxy:0",
        "http://proxy:",
        "http://pro xy:3128",
        "http://proxy\n.corp:3128",
        "http://[::1:3128",
        "http://[nonsense]:3128",
        "http://proxy:3128/path",
        "http://proxy:3128?x",
        "http://me:pa#ss@proxy:3128",
        "user@",
        "http://http://proxy:3128",
        "3128:proxy",
        "ht!tp://proxy",
        "\udcff",
    ],
)
@pytest.mark.parametrize("variable", ["https_proxy", "ALL_PROXY"])
def test_a_malformed_proxy_is_refused_under_its_variables_name(variable, value):
    with pytest.raises(UsageError, match=f"^{variable} is not the URL of a proxy"):
        proxy_of("https://relay.example", {variable: value})


def test_a_malformed_proxy_for_other_urls_is_refused_as_well_but_not_where_no_proxy_is_used():
    environment = {"HTTP_PROXY": "http://proxy:port"}
    with pytest.raises(UsageError, match=r"^HTTP_PROXY is not the URL of a proxy"):
        proxy_of("https://relay.example", environment)
    assert proxy_of("https://relay.example", environment | {"NO_PROXY": "example"}) is None


def test_credentials_are_shown_nowhere():
    proxy = proxy_of("https://relay.example", {"HTTPS_PROXY": f"http://me:{PASSWORD}@proxy:3128"})
    assert PASSWORD not in f"{proxy} {proxy!r}"
    assert str(proxy) == "the proxy proxy:3128 (of HTTPS_PROXY)"
    with pytest.raises(UsageError) as refused:
        proxy_of("https://relay.example", {"HTTPS_PROXY": f"http://me:{PASSWORD}@proxy:x"})
    assert PASSWORD not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "no_proxy"),
    [
        ("http://relay.example.test", "*"),
        ("http://relay.example.test", "a,*"),
        ("http://relay.example.test", "relay.example.test"),
        ("http://relay.example.test", "example.test"),
        ("http://relay.example.test", ".example.test"),
        ("http://relay.example.test", "*.example.test"),
        ("http://example.test", ".example.test"),
        ("http://relay.example.test.", "relay.example.test"),
        ("http://relay.example.test", "relay.EXAMPLE.test."),
        ("http://RELAY.example.test", "relay.example.test"),
        ("http://relay.example.test", "other, relay.example.test"),
        ("http://relay.example.test", "other relay.example.test"),
        ("http://relay.example.test", ",,relay.example.test,"),
        ("http://relay.example.test:7443", "relay.example.test:7443"),
        ("http://relay.example.test", "relay.example.test:80"),
        ("https://relay.example.test", "example.test:443"),
        ("http://fra-7.example.test", "fra-*.example.test"),
        ("http://10.1.2.3", "10.1.2.3"),
        ("http://10.1.2.3:7443", "10.1.2.3:7443"),
        ("http://10.1.2.3", "10.0.0.0/8"),
        ("http://10.1.2.3", "10.9.9.9/8"),
        ("http://10.1.2.3:80", "10.0.0.0/8:80"),
        ("http://10.1.2.3", "10.*"),
        ("http://[::ffff:10.1.2.3]", "10.0.0.0/8"),
        ("http://[::ffff:a01:203]", "10.1.2.3"),
        ("http://10.1.2.3", "::ffff:10.0.0.0/104"),
        ("http://[2001:db8::1]", "2001:db8::/32"),
        ("http://[2001:db8::1]", "[2001:db8::]/32"),
        ("http://[2001:db8::1]", "[2001:db8::/32]"),
        ("http://[2001:db8::1]", "2001:DB8:0::1"),
        ("http://[2001:db8::1]", "[2001:db8::1]"),
        ("http://[2001:db8::1]:81", "[2001:db8::1]:81"),
        ("http://localhost:7443", "localhost"),
    ],
)
def test_no_proxy_names_hosts_domains_addresses_and_networks(url, no_proxy):
    assert is_direct(url, no_proxy)


@pytest.mark.parametrize(
    ("url", "no_proxy"),
    [
        ("http://relay.example.test", ""),
        ("http://relay.example.test", "ample.test"),
        ("http://relay.example.test", "."),
        ("http://relay.example.test", "<local>"),
        ("http://relay.example.test:7443", "relay.example.test:80"),
        ("https://relay.example.test", "relay.example.test:80"),
        ("http://11.1.2.3", "10.0.0.0/8"),
        ("http://10.1.2.3:81", "10.0.0.0/8:80"),
        ("http://10.relay.test", "10.0.0.0/8"),
        ("http://[2001:db9::1]", "2001:db8::/32"),
        ("http://10.1.2.3", "2001:db8::/32"),
        ("http://[2001:db8::1]:81", "[2001:db8::1]:82"),
        ("http://127.0.0.1", "localhost"),
    ],
)
def test_no_proxy_names_no_more_than_it_says(url, no_proxy):
    assert not is_direct(url, no_proxy)


@pytest.mark.parametrize(
    "entry",
    ["10.0.0.0/33", "10.0.0/8", "2001:db8::/129", "relay:port", "relay:99999", "[::1", "::1::2", "http://relay"],
)
@pytest.mark.parametrize("others", ["", "*,"])
def test_an_entry_of_no_proxy_that_cannot_be_read_is_refused_by_name(entry, others):
    with pytest.raises(UsageError, match=r"^no_proxy has an entry that cannot be read"):
        proxy_of("http://relay.example", PROXY | {"no_proxy": f"{others}{entry}"})


@given(st.text(), st.text(), st.sampled_from(["http://relay.example", "https://[::1]:7443", "http://10.0.0.1"]))
def test_no_value_of_a_variable_raises_anything_else(proxy, exempt, url):
    with contextlib.suppress(UsageError):
        found = proxy_of(url, {"ALL_PROXY": proxy, "NO_PROXY": exempt})
        assert found is None or found.url.startswith("http://")
