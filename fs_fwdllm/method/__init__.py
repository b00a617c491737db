"""Federated methods: a client's worker, a server, and a recipe that combines them from shared parts."""

from fs_fwdllm.method.client import ClientWorker
from fs_fwdllm.method.combination import check_combination
from fs_fwdllm.method.parts import Parts, Recipe, assemble_server, assemble_worker, recipe_of
from fs_fwdllm.method.replica import Replica
from fs_fwdllm.method.server import RoundReport, RoundServer

__all__ = [
    "ClientWorker",
    "Parts",
    "Recipe",
    "Replica",
    "RoundReport",
    "RoundServer",
    "assemble_server",
    "assemble_worker",
    "check_combination",
    "recipe_of",
]
