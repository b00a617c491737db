"""Certificates that are made for a trial fit; what does not fit is told before anything is loaded, and what to do."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fs_fwdllm.cli.main import app
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.host import certificates
from fs_fwdllm.host.tls import TlsFiles, name_of, number_of

pytest.importorskip("cryptography", reason="certificates are made with it: pip install 'fs-fwdllm[secure]'")


@dataclass(frozen=True)
class Files:
    """Folders of two authorities that know the same names."""

    root: Path

    def of(self, name: str, authority: str = "ours") -> TlsFiles:
        folder = self.root / authority
        return TlsFiles(str(folder / "ca.pem"), str(folder / f"{name}.pem"), str(folder / f"{name}.key"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("certificates")
    for authority in ("ours", "others"):
        certificates.make_certificates(root / authority, clients=2, hosts=["127.0.0.1", "fed.example.org"])
    return Files(root)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *words: CliRunner().invoke(app, ["certificates", "make", *map(str, words)])


def test_names_and_numbers_belong_together() -> None:
    for number in (0, 1, 12, 999_999_999):
        assert number_of(name_of(number)) == number
    digits = ("", "0", "01", "-1", "²", "1 ", "9" * 5000)
    for name in ("", "Server", *(f"client-{wrong}" for wrong in digits)):
        assert number_of(name) is None, name


def test_what_is_made_is_usable_and_keys_are_private(files: Files) -> None:
    for path in files.root.rglob("*.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    for host in ("127.0.0.1", "fed.example.org", ""):
        files.of("server").require_usable(0, host, "distribute.server_host")
    for number, name in ((1, "client-1"), (2, "client-2"), (None, "client-2")):
        files.of(name).require_usable(number, "127.0.0.1", "distribute.server_host")


def test_nothing_is_overwritten(files: Files, call: Callable[..., Result]) -> None:
    before = {path: path.read_bytes() for path in (files.root / "ours").iterdir()}
    done = call(files.root / "ours", "--clients", 9)
    assert done.exit_code == 2 and "is there already, and is not overwritten" in done.stderr
    assert {path: path.read_bytes() for path in (files.root / "ours").iterdir()} == before


def test_the_command_says_which_file_goes_where(call: Callable[..., Result], tmp_path: Path) -> None:
    done = call(tmp_path / "made", "--clients", 2, "--host", "192.0.2.7", "--host", "::1", "--days", 2)
    assert done.exit_code == 0, done.output
    assert f"    key: {tmp_path / 'made' / 'server.key'}\n" in done.stdout
    assert f"    certificate: {tmp_path / 'made' / 'client-1.pem'}\n" in done.stdout
    assert "ca.key off the devices" in done.stdout
    for host in ("192.0.2.7", "::1"):
        Files(tmp_path).of("server", "made").require_usable(0, host, "distribute.server_host")
    assert call(tmp_path / "wrong", "--clients", 1, "--host", "näme").exit_code == 2


def test_without_the_extra_the_command_names_it(
    call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.x509", None)
    done = call(tmp_path / "made", "--clients", 1)
    assert done.exit_code == 2 and "pip install fs_fwdllm[secure]" in done.stderr
    assert not (tmp_path / "made").exists()


def test_running_needs_nothing_of_the_extra() -> None:
    source = "import sys, fs_fwdllm.host.tls, fs_fwdllm.host.certificates, fs_fwdllm.cli.main as main\n"
    subprocess.run([sys.executable, "-c", source + "assert 'cryptography' not in sys.modules"], check=True)


@dataclass(frozen=True)
class Mistake:
    """How client 1 is wrongly equipped, and what it is told."""

    said: str
    ca: str = "ours/ca.pem"
    certificate: str = "ours/client-1.pem"
    key: str = "ours/client-1.key"


MISTAKES = {
    "missing file": Mistake("fwdllm.tls.key '{root}/nowhere': cannot be read (No such file", key="nowhere"),
    "a folder": Mistake("fwdllm.tls.ca '{root}/ours': cannot be read (Is a directory", ca="ours"),
    "no certificate": Mistake("fwdllm.tls.certificate '{root}/ours/ca.key': holds no cert", certificate="ours/ca.key"),
    "no authority": Mistake("fwdllm.tls.ca '{root}/ours/ca.key': holds no certificate in PEM form", ca="ours/ca.key"),
    "no key": Mistake("fwdllm.tls.key '{root}/ours/ca.pem': holds no private key without a pass", key="ours/ca.pem"),
    "passphrase": Mistake("fwdllm.tls.key '{root}/locked.key': holds no private key without a pass", key="locked.key"),
    "another's key": Mistake(
        "fwdllm.tls.key '{root}/ours/client-2.key': is not the key of fwdllm.tls.certificate", key="ours/client-2.key"
    ),
    "another authority": Mistake(
        "fwdllm.tls.certificate '{root}/ours/client-1.pem': is not signed by fwdllm.tls.ca", ca="others/ca.pem"
    ),
    "another client": Mistake(
        "its common name is 'client-2', but is to be that of this process (client-1)",
        certificate="ours/client-2.pem", key="ours/client-2.key",
    ),
    "the server": Mistake(
        "its common name is 'server', but is to be that of this process (client-1)",
        certificate="ours/server.pem", key="ours/server.key",
    ),
    "expired": Mistake(
        "fwdllm.tls.certificate '{root}/old/client-1.pem': has expired", "old/ca.pem", "old/client-1.pem",
        "old/client-1.key",
    ),
    "not yet valid": Mistake(
        "fwdllm.tls.certificate '{root}/new/client-1.pem': is not valid yet", "new/ca.pem", "new/client-1.pem",
        "new/client-1.key",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_each_bad_file_is_told(kind: str, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake, root = MISTAKES[kind], files.root
    if kind == "passphrase":
        lock(root / "ours" / "client-1.key", root / "locked.key")
    elif (days := {"expired": -9, "not yet valid": 9}.get(kind)) is not None:
        make_at(days, root / mistake.ca, monkeypatch)
    equipped = TlsFiles(*(str(root / place) for place in (mistake.ca, mistake.certificate, mistake.key)))
    with pytest.raises(ConfigError) as caught:
        equipped.require_usable(1, "127.0.0.1", "distribute.server_host")
    assert mistake.said.format(root=root) in str(caught.value)


def lock(source: Path, target: Path) -> None:
    """Write a key that asks for a passphrase."""
    from cryptography.hazmat.primitives import serialization as forms

    key = forms.load_pem_private_key(source.read_bytes(), None)
    locked = key.private_bytes(
        forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.BestAvailableEncryption(b"a passphrase")
    )
    target.write_bytes(locked)


def make_at(days: int, ca: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make certificates for a day, by a clock that goes wrong by ``days``."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.now(tz) + datetime.timedelta(days=days)

    with monkeypatch.context() as patch:
        patch.setattr(certificates, "datetime", Clock)
        certificates.make_certificates(ca.parent, clients=1, days=1)


def test_a_server_is_for_the_address_that_clients_use(files: Files) -> None:
    with pytest.raises(ConfigError, match=r"is not for '192.0.2.9' \(distribute.server_host\).*make --host 192.0.2.9"):
        files.of("server").require_usable(0, "192.0.2.9", "distribute.server_host")


def test_a_client_without_an_alternative_name_is_told(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """An authority of one's own may leave it out, and the server would never reach the client."""
    from cryptography.x509 import RFC822Name

    with monkeypatch.context() as patch:
        patch.setattr("cryptography.x509.DNSName", lambda name: RFC822Name("nobody@example.org"))
        certificates.make_certificates(files.root / "nameless", clients=1)
    with pytest.raises(ConfigError, match=r"has no alternative name \(DNS\) 'client-1'"):
        files.of("client-1", "nameless").require_usable(1, "", "distribute.server_host")


@pytest.mark.parametrize("given", ["ca", "certificate", "key"])
def test_one_file_alone_names_the_others(given: str) -> None:
    section = {"ca": "", "certificate": "", "key": ""}
    assert TlsFiles.of(section) is None
    with pytest.raises(ConfigError) as caught:
        TlsFiles.of({**section, given: "x.pem"})
    named = str(caught.value).partition(": ")[0]
    assert named == " and ".join(f"fwdllm.tls.{name}" for name in section if name != given)
