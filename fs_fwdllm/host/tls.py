"""By which certificates the processes of a run know each other, and what is wrong with files that do not fit.

A run has one authority (CA), which signs a certificate for each participant: its common name is ``server``,
``client-1``, ``client-2`` ... The server's is also for the names and addresses by which clients reach it, and for no
other is; a client's is for its own name alone, wherever it is. So neither can stand in for the other.

Everything here is Python's own ``ssl``. Files are tried before anything is loaded: a process shakes hands with itself,
as both sides of a connection, and so meets what the others would refuse.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from typing import Any

from fs_fwdllm.errors import ConfigError

__all__ = ["SERVER", "TlsFiles", "name_of", "number_of"]

#: Common name of the server's certificate.
SERVER = "server"
_CLIENT = "client-"
_SECTION = "fwdllm.tls"
_KEYS = ("ca", "certificate", "key")
_MAKE = "fs-fwdllm certificates make writes files for a trial"

#: What may be wrong with a certificate, by OpenSSL's numbers (X509_V_ERR_...), and what to do.
_CURES = {
    9: "is not valid yet; look at this machine's clock",
    10: "has expired, or the authority's certificate in fwdllm.tls.ca has; have a new one made",
    26: "is not for both ends of a connection, and here each side calls the other; have one made for both",
}
_OF_ANOTHER_NAME = (62, 64)
#: Messages that two sides need until they agree, at most, and some.
_TURNS = 6
_CONNECT_WITHIN_S, _ANSWER_WITHIN_S = 2.0, 1.0


def name_of(number: int) -> str:
    """The common name of a participant's certificate; 0 is the server."""
    return f"{_CLIENT}{number}" if number else SERVER


def number_of(name: str) -> int | None:
    """Inverse of :func:`name_of`; ``None`` where nobody has that name."""
    if name == SERVER:
        return 0
    digits = name.removeprefix(_CLIENT)
    named = digits.isascii() and digits.isdecimal() and len(digits) < 10 and name_of(int(digits)) == name
    return int(digits) if named else None


@dataclass(frozen=True)
class TlsFiles:
    """The PEM files of a process: whom it believes, who it is, and how it proves that."""

    ca: str
    certificate: str
    key: str

    @classmethod
    def of(cls, section: Any) -> TlsFiles | None:
        """The files that a section ``fwdllm.tls`` names; ``None`` if it names none.

        Raises:
            ConfigError: it names some of them only.
        """
        given = {name: str(section[name]) for name in _KEYS}
        missing = [f"{_SECTION}.{name}" for name in _KEYS if not given[name]]
        if len(missing) == len(_KEYS):
            return None
        if missing:
            raise ConfigError(
                f"{' and '.join(missing)}: not given; ca, certificate and key belong together, so give all three for "
                f"TLS, or none; {_MAKE}"
            )
        return cls(**given)

    def contents(self) -> tuple[bytes, bytes, bytes]:
        """What is in the three files. Raises ``ConfigError`` if one cannot be read."""
        ca, certificate, key = (self._read(name) for name in _KEYS)
        return ca, certificate, key

    def require_usable(self, number: int | None, host: str, host_key: str) -> None:
        """Check that the others will believe this process.

        Args:
            number: of the participant, 0 for the server; ``None`` for a client that takes the number it is given.
            host: by which clients reach the server; empty for a client, and where that is not known.
            host_key: where ``host`` is from.

        Raises:
            ConfigError: names the key, the file and what to do.
        """
        self.contents()
        found = self._name_within()
        if not (found == name_of(number) if number is not None else number_of(found)):
            wanted = f"this process ({name_of(number)})" if number is not None else "a client (client-1, client-2, ...)"
            raise ConfigError(
                f"{self._told('certificate')}: its common name is {found!r}, but is to be that of {wanted}; give this "
                "process its own certificate and key, and see distribute.role and distribute.data_idx"
            )
        if number == 0 and host and not self._is_for(host):
            raise ConfigError(
                f"{self._told('certificate')}: is not for {host!r} ({host_key}), by which clients reach the server; "
                f"have one made with that among its alternative names (certificates make --host {host})"
            )
        if number != 0 and not self._is_for(found):
            raise ConfigError(
                f"{self._told('certificate')}: has no alternative name (DNS) {found!r}, by which the server knows the "
                "client that it calls; have one made with it"
            )

    def complaint(self, address: tuple[str, int], name: str) -> str:
        """Why there is no secure connection to who listens at ``address``; empty if there is one, or nobody listens.

        Args:
            name: what the certificate there must be for.
        """
        context = self._context(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(["h2"])
        try:
            with (
                socket.create_connection(address, _CONNECT_WITHIN_S) as plain,
                context.wrap_socket(plain, server_hostname=name) as secure,
            ):
                # The other side looks at our certificate after our half of the handshake is over.
                secure.settimeout(_ANSWER_WITHIN_S)
                secure.recv(1)
        except ssl.SSLCertVerificationError as error:
            return f"the certificate there is refused here: {_in_words(error)}"
        except ssl.SSLError as error:
            return f"this process's certificate is refused there, or no TLS is spoken: {_in_words(error)}"
        except OSError:
            return ""
        return ""

    def _read(self, name: str) -> bytes:
        try:
            with open(getattr(self, name), "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:  # a name with a NUL in it
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{self._told(name)}: cannot be read ({reason}); {_MAKE}") from error

    def _told(self, name: str) -> str:
        return f"{_SECTION}.{name} {getattr(self, name)!r}"

    def _context(self, side: int) -> ssl.SSLContext:
        context = ssl.SSLContext(side)
        context.hostname_checks_common_name = False  # as gRPC does not, either
        try:
            context.load_verify_locations(self.ca)
        except ssl.SSLError as error:
            raise ConfigError(
                f"{self._told('ca')}: holds no certificate in PEM form ({_in_words(error)}); give the authority's"
            ) from error
        self._load_own(context)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _load_own(self, context: ssl.SSLContext) -> None:
        try:
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")  # else a terminal is asked for one
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise ConfigError(
                    f"{self._told('key')}: is not the key of {self._told('certificate')}; give the two that were made "
                    "together"
                ) from error
            broken = "key" if _holds_certificate(self.certificate) else "certificate"
            what = {"key": "private key without a passphrase", "certificate": "certificate"}[broken]
            raise ConfigError(f"{self._told(broken)}: holds no {what} in PEM form ({_in_words(error)})") from error

    def _name_within(self) -> str:
        """The common name of the certificate, once both sides of a connection have believed it."""
        try:
            subject = dict(pair for part in self._shake_hands("").get("subject", ()) for pair in part)
        except ssl.SSLError as error:
            raise ConfigError(f"{self._told('certificate')}: {self._cure(error)}") from error
        return str(subject.get("commonName", ""))

    def _is_for(self, name: str) -> bool:
        try:
            self._shake_hands(name)
        except ssl.SSLCertVerificationError as error:
            if error.verify_code in _OF_ANOTHER_NAME:
                return False
            raise
        return True

    def _shake_hands(self, name: str) -> dict[str, Any]:
        """What the certificate says, from a handshake of this process with itself; for ``name``, unless empty."""
        ours, theirs = self._context(ssl.PROTOCOL_TLS_SERVER), self._context(ssl.PROTOCOL_TLS_CLIENT)
        theirs.check_hostname = bool(name)
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        caller = theirs.wrap_bio(back, there, server_hostname=name or None)
        listener = ours.wrap_bio(there, back, server_side=True)
        for side in (caller, listener) * _TURNS:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
        return dict(caller.getpeercert() or {})

    def _cure(self, error: ssl.SSLError) -> str:
        known = _CURES.get(getattr(error, "verify_code", 0))
        return known or f"is not signed by {self._told('ca')} ({_in_words(error)}); give the two that belong together"


def _holds_certificate(path: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (OSError, ssl.SSLError):
        return False
    return True


def _in_words(error: ssl.SSLError) -> str:
    said: str = getattr(error, "verify_message", "")
    return said or str(error.reason or error.strerror or error).replace("_", " ").lower()
