"""Federated methods: a client's worker, a server, and a registration that combines them from shared parts."""

from fs_fwdllm.method.base import METHODS, Method, register_method, resolve_method
from fs_fwdllm.method.client import ClientWorker
from fs_fwdllm.method.parts import Parts, assemble_server, assemble_worker, check_combination
from fs_fwdllm.method.replica import Replica
from fs_fwdllm.method.server import RoundReport, RoundServer

__all__ = [
    "METHODS",
    "ClientWorker",
    "Method",
    "Parts",
    "Replica",
    "RoundReport",
    "RoundServer",
    "assemble_server",
    "assemble_worker",
    "check_combination",
    "register_method",
    "resolve_method",
]
