"""Addresses as users write them, and the causes that keep a process from listening, told apart."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from fs_fwdllm.errors import ConfigError, HostError
from fs_fwdllm.host.addresses import check_port, is_listening, is_own, is_wildcard, joined, parsed, require_free

#: Reserved for documentation: no machine has it.
_ELSEWHERE = "192.0.2.7"


def _listen(host: str) -> Iterator[int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.create_server((host, 0), family=family)) as door:
        yield door.getsockname()[1]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of the loopback device at which somebody listens."""
    yield from _listen("127.0.0.1")


@pytest.mark.parametrize(
    ("host", "text"),
    [("127.0.0.1", "127.0.0.1:5"), ("::1", "[::1]:5"), ("[fe80::2]", "[fe80::2]:5"), ("a.example", "a.example:5")],
)
def test_an_address_is_one_text_and_back(host: str, text: str) -> None:
    assert joined(host, 5) == text
    assert parsed(text) == (host.strip("[]"), 5)


def test_what_means_all_addresses_and_what_is_here() -> None:
    assert all(map(is_wildcard, ("0.0.0.0", "::", "[::]"))) and not any(map(is_wildcard, ("127.0.0.1", "localhost")))
    assert is_own("127.0.0.1") and is_own("localhost") and not is_own(_ELSEWHERE)


@pytest.mark.parametrize("port", [0, -1, 70000, "50051", True, 3.0, None])
def test_what_is_no_port_is_named(port: object) -> None:
    with pytest.raises(ConfigError, match=r"the\.key .*must be a port, a whole number from 1 to 65535"):
        check_port(port, "the.key")


def test_causes_are_told_apart(taken: int) -> None:
    with pytest.raises(HostError, match=rf"p\.key {taken}: something else listens at 127\.0\.0\.1:{taken}"):
        require_free("127.0.0.1", taken, "h.key", "p.key")
    with pytest.raises(HostError, match=rf"h\.key '{_ELSEWHERE}': is not an address of this machine.*; move"):
        require_free(_ELSEWHERE, taken, "h.key", "p.key", "move")
    for name in ("no-such-machine.invalid", "300.1.2.3", "a..b", ":::1"):
        with pytest.raises(HostError, match=r"h\.key .*: no address is known for that name.*IPv6"):
            require_free(name, taken, "h.key", "p.key")


def test_a_free_port_stays_free(taken: int) -> None:
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        (free,) = [port for port in _free(host)]
        require_free(host, free, "h.key", "p.key")
        require_free(host, free, "h.key", "p.key")


def _free(host: str) -> list[int]:
    with socket.socket() as door:
        door.bind(("127.0.0.1" if host != "0.0.0.0" else host, 0))
        return [door.getsockname()[1]]


def test_the_sixth_version_is_an_address_too() -> None:
    try:
        door = _listen("::1")
        port = next(door)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback address")
    with pytest.raises(HostError, match=rf"something else listens at \[::1\]:{port}"):
        require_free("[::1]", port, "h.key", "p.key")
    assert is_listening(parsed(f"[::1]:{port}")) and is_own("::1")
    door.close()  # type: ignore[attr-defined]
    assert not is_listening(("::1", port))
