"""The host's message types under any protobuf release.

FederatedScope carries message classes generated for protobuf 3.19. Later releases refuse to build them, or build them
without their maps. The description of the messages inside that generated file is as good as ever, so it is read from
the file's text (nothing of it is executed) and the classes are built from it by the installed release.
"""

from __future__ import annotations

import ast
import sys
import types
from importlib import metadata
from pathlib import Path

__all__ = ["provide_messages"]

_MODULE = "federatedscope.core.proto.gRPC_comm_manager_pb2"
_LAST_RELEASE_THAT_BUILDS_THEM = (3, 20)


def provide_messages(package: types.ModuleType) -> None:
    """Put the message classes in the place where the host will look for them, if its own would fail.

    Args:
        package: the imported package ``federatedscope``.
    """
    release = tuple(int(part) for part in metadata.version("protobuf").split(".")[:2])
    if release <= _LAST_RELEASE_THAT_BUILDS_THEM or _MODULE in sys.modules:
        return
    path = Path(package.__path__[0]) / "core" / "proto" / "gRPC_comm_manager_pb2.py"
    described = _description(path.read_text(encoding="utf-8"))
    if described is not None:
        sys.modules[_MODULE] = _build(described)


def _description(source: str) -> bytes | None:
    """The serialised description in a generated file; ``None`` where the file was made by a later compiler."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb" and isinstance(node.value, ast.Constant):
            return node.value.value if isinstance(node.value.value, bytes) else None
    return None


def _build(described: bytes) -> types.ModuleType:
    from google.protobuf import descriptor_pool
    from google.protobuf.internal import builder

    module = types.ModuleType(_MODULE)
    descriptor = descriptor_pool.Default().AddSerializedFile(described)
    module.__dict__["DESCRIPTOR"] = descriptor
    builder.BuildMessageAndEnumDescriptors(descriptor, module.__dict__)
    builder.BuildTopDescriptorsAndMessages(descriptor, _MODULE, module.__dict__)
    return module
