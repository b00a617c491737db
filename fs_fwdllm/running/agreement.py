"""What a server and its clients must have in common, compared when a client joins.

A client's slopes are of the server's loss, along the server's directions, only if both were configured alike. Digests
of the parameters do not tell: a client with another radius, template or source of slopes replays every round exactly
and uploads numbers that mean something else. So each says, key by key, a short hash of what determines a client's
work, and a difference is refused with the name of the key.

Left out is what the server alone uses (its optimiser, gate, rounds, deadlines, evaluation, files), what it sends with
each piece of work (learning rates), what may honestly differ between machines (device, threads, memory, paths, the
dtype that a base computes in, where a process listens), and which rows a client holds.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

from fs_fwdllm.config.section import Section
from fs_fwdllm.core.wire import WIRE_VERSION
from fs_fwdllm.errors import shown
from fs_fwdllm.model.base.identity import refusal_of_base
from fs_fwdllm.model.basis_file import basis_file, basis_fingerprint
from fs_fwdllm.running.session import Session

__all__ = ["refusal_of", "settings_of_work", "settings_text"]

#: Sections and keys that determine a client's work, by their dotted names; a section stands for all that is in it.
_DETERMINE_WORK = (
    "seed", "llm.tok_len", "dataloader.batch_size", "dataloader.shuffle", "model.task", "train.local_update_steps",
    "train.batch_or_epoch", "train.optimizer.type", "train.optimizer.weight_decay", "train.optimizer.momentum",
    "fwdllm.estimator", "fwdllm.direction", "fwdllm.directions", "fwdllm.direction_groups", "fwdllm.probes",
    "fwdllm.radius", "fwdllm.radius_scale", "fwdllm.parts", "fwdllm.fleet", "fwdllm.upload", "fwdllm.pooling",
    "fwdllm.feature_scale", "fwdllm.sampling", "fwdllm.data.regression", "fwdllm.data.stride",
    "fwdllm.data.template", "fwdllm.data.unanswerable", "fwdllm.data.prompt", "fwdllm.data.label_words",
    "fwdllm.ext",
)  # fmt: skip
#: The same where clients train blocks of the model's own weights.
_DETERMINE_VISITS = ("train.scheduler", "grad", "fwdllm.blocks")
#: Whose values a server does not tell to who is not taken in: what directions follow from, and what is not ours.
_KEPT = ("seed", "fwdllm.ext")

_HASH_BYTES = 4
_NAMED_AT_MOST, _SHOWN_CHARACTERS = 8, 80
_ENTRY = re.compile(r"([\w.]{1,80}):([\w-]{6})")


def settings_of_work(session: Session) -> dict[str, Any]:
    """What determines a client's work, by dotted key; where a key leaves something open, what it came to."""
    config, loaded = session.config, session.loaded
    arguments = dict(loaded.arguments)
    if file := basis_file(arguments):
        arguments["basis"] = basis_fingerprint(file)  # it may lie elsewhere on another machine
    keys = (*_DETERMINE_WORK, *(_DETERMINE_VISITS if config.method.trains_blocks else ()))
    return {
        **{name: value for key in keys for name, value in _values(config, key)},
        "federate.method": config.method.name,
        "llm.adapter.args": [loaded.peft_method, arguments],
        "fwdllm.data.labels": list(session.data.label_names),
        "wire.version": WIRE_VERSION,
    }


def settings_text(settings: Mapping[str, Any]) -> str:
    """What a client says as it joins: every key with a short hash of its value, about a kilobyte."""
    return " ".join(f"{name}:{_hash(value)}" for name, value in sorted(settings.items()))


def refusal_of(session: Session, base: bytes, said: str) -> str:
    """Why a server does not take a client, as both sides are told; empty if it takes it.

    Args:
        session: the server's.
        base: the client's :attr:`~fs_fwdllm.running.session.Session.base_digest`; empty is not compared.
        said: the client's :func:`settings_text`.
    """
    return refusal_of_base(session.base_digest, base) or _refusal_of_settings(settings_of_work(session), said)


def _refusal_of_settings(own: Mapping[str, Any], said: str) -> str:
    theirs = dict(_ENTRY.findall(said))
    if not theirs:
        return (
            "the server does not take this client: it does not say how it is configured; install the server's version "
            "of this package there, and start it again"
        )
    differing = [name for name in sorted({*own, *theirs}) if name not in own or theirs.get(name) != _hash(own[name])]
    if not differing:
        return ""
    named = [f"{name} ({_told(name, own)})" for name in differing[:_NAMED_AT_MOST]]
    rest = len(differing) - len(named)
    return (
        "the server does not take this client: it is configured for other work than the server's in "
        f"{', '.join(named)}{f' and {rest} more' if rest else ''}; give it the server's values, and start it again"
    )


def _told(name: str, own: Mapping[str, Any]) -> str:
    if name not in own:
        return "unknown to the server, so that its package is of another version"
    if name.startswith(_KEPT):
        return "the server has another"
    return f"the server has {shown(own[name], _SHOWN_CHARACTERS)}"


def _values(node: Any, key: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a key, or of all keys of a section, as plain data."""
    first, _, rest = key.partition(".")
    value, name = getattr(node, first), f"{prefix}{first}"
    if not isinstance(value, Section):
        yield name, _plain(value)
        return
    for below in [rest] if rest else type(value).model_fields:
        yield from _values(value, below, f"{name}.")


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    digest = blake2b(text.encode(errors="surrogatepass"), digest_size=_HASH_BYTES).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
