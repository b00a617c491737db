"""Certificates for a trial: an authority, and what it signs for a server and its clients (:mod:`.tls` has the names).

Who has an authority of their own needs nothing of this; a run takes its files as they are. ``cryptography`` is needed
here alone, and imported when something is made.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.host.tls import name_of

__all__ = ["AUTHORITY", "make_certificates"]

#: The files of the authority have this name, those of participants the participant's.
AUTHORITY = "ca"
_TITLE = "fs-fwdllm trial authority"
#: What the authority's key is not for.
_OTHER_USES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "encipher_only", "decipher_only",
)  # fmt: skip
_CLOCKS_DIFFER_BY = timedelta(hours=1)
_MOST_DAYS = 36_500


def make_certificates(folder: Path, clients: int, hosts: Sequence[str] = (), days: int = 365) -> list[Path]:
    """Write an authority's certificate and key, and those of a server and of clients 1 to ``clients``.

    Args:
        hosts: names and addresses by which clients reach the server.
        days: from now on, how long all of them are valid.

    Returns:
        The files, all new: ``ca.pem``, ``ca.key``, ``server.pem``, ``server.key``, ``client-1.pem`` ...

    Raises:
        ConfigError: the extra ``secure`` is not installed, a file is there already, or nothing can be written.
    """
    if clients < 1 or not 1 <= days <= _MOST_DAYS:
        raise ConfigError(f"{clients} clients for {days} days: needs at least one client, and 1 to {_MOST_DAYS} days")
    names = [name_of(number) for number in range(clients + 1)]
    there = [path for name in (AUTHORITY, *names) for path in _places(folder, name) if path.exists()]
    if there:
        raise ConfigError(f"{there[0]}: is there already, and is not overwritten; name another folder, or move it away")
    authority = _Authority(days)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return list(_write(folder, authority, names, hosts))
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be written ({error.strerror})") from error


def _write(folder: Path, authority: _Authority, names: Sequence[str], hosts: Sequence[str]) -> Iterator[Path]:
    made = [(AUTHORITY, authority.certificate, authority.key)]
    made += [(name, *authority.sign(name, hosts if name == name_of(0) else ())) for name in names]
    for name, certificate, key in made:
        for path, content, mode in zip(_places(folder, name), (certificate, key), (0o644, 0o600), strict=True):
            # Made with its mode, so that a key can be read by nobody else at any moment.
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
            yield path


def _places(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.pem", folder / f"{name}.key"


class _Authority:
    """A key, and what it signs. Raises ``ConfigError`` without the extra ``secure``."""

    def __init__(self, days: int) -> None:
        try:
            self._x509: Any = importlib.import_module("cryptography.x509")
        except ImportError as error:
            raise ConfigError(
                f"certificates cannot be made here: {error}; pip install fs_fwdllm[secure] brings what it takes (a run "
                "with certificates needs nothing of it)"
            ) from error
        self._hashes, self._primitives = _part("hashes"), _part("serialization")
        self._own_key = self._new_key()
        self._from = datetime.now(timezone.utc) - _CLOCKS_DIFFER_BY
        self._until = self._from + _CLOCKS_DIFFER_BY + timedelta(days=days)

    @property
    def key(self) -> bytes:
        return self._pem_of_key(self._own_key)

    @property
    def certificate(self) -> bytes:
        builder = self._builder(_TITLE, self._own_key)
        builder = builder.add_extension(self._x509.BasicConstraints(ca=True, path_length=0), critical=True)
        signs_only = self._x509.KeyUsage(**dict.fromkeys(_OTHER_USES, False), key_cert_sign=True, crl_sign=True)
        return self._signed(builder.add_extension(signs_only, critical=True))

    def sign(self, name: str, hosts: Sequence[str]) -> tuple[bytes, bytes]:
        """A certificate for both ends of a connection, and its key."""
        x509, key = self._x509, self._new_key()
        purposes = x509.oid.ExtendedKeyUsageOID
        alternatives = [x509.DNSName(name), *map(self._alternative, dict.fromkeys(hosts))]
        builder = self._builder(name, key)
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        both = x509.ExtendedKeyUsage([purposes.SERVER_AUTH, purposes.CLIENT_AUTH])
        return self._signed(builder.add_extension(both, critical=False)), self._pem_of_key(key)

    def _builder(self, name: str, key: Any) -> Any:
        x509 = self._x509
        builder = x509.CertificateBuilder(
            self._named(_TITLE), self._named(name), key.public_key(), x509.random_serial_number(),
            self._from, self._until,
        )  # fmt: skip
        own, signers = key.public_key(), self._own_key.public_key()
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(own), critical=False)
        return builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signers), critical=False)

    def _named(self, name: str) -> Any:
        return self._x509.Name([self._x509.NameAttribute(self._x509.oid.NameOID.COMMON_NAME, name)])

    def _alternative(self, host: str) -> Any:
        with suppress(ValueError):
            return self._x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
        try:
            return self._x509.DNSName(host)
        except ValueError as error:
            raise ConfigError(f"--host {host!r}: is no name and no address ({error})") from error

    def _new_key(self) -> Any:
        curves = _part("asymmetric.ec")
        return curves.generate_private_key(curves.SECP256R1())

    def _signed(self, builder: Any) -> bytes:
        certificate = builder.sign(self._own_key, self._hashes.SHA256())
        return bytes(certificate.public_bytes(self._primitives.Encoding.PEM))

    def _pem_of_key(self, key: Any) -> bytes:
        forms = self._primitives
        return bytes(key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption()))


def _part(name: str) -> ModuleType:
    return importlib.import_module(f"cryptography.hazmat.primitives.{name}")
