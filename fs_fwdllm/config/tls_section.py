"""``fwdllm.tls``: by which files a process of a distributed FederatedScope run proves who it is."""

from __future__ import annotations

from pydantic import Field
from pydantic.config import JsonDict

from fs_fwdllm.config.section import Section

__all__ = ["TlsConfig"]

_HOST_ONLY: JsonDict = {"host_only": True}


class TlsConfig(Section):
    ca: str = Field(
        "",
        description="certificate of the authority that this run believes, a PEM file; with the two others, processes "
        "speak with each other by mutual TLS, and with nobody else",
        json_schema_extra=_HOST_ONLY,
    )
    certificate: str = Field(
        "",
        description="certificate of this process, a PEM file: its common name is server, client-1, client-2 ...",
        json_schema_extra=_HOST_ONLY,
    )
    key: str = Field(
        "", description="private key of that certificate, a PEM file without a passphrase", json_schema_extra=_HOST_ONLY
    )
