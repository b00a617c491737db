from .base import METHODS, Method, register_method, resolve_method
from .client import ClientWorker
from .parts import Parts, assemble_server, assemble_worker, check_combination
from .replica import Replica
from .server import RoundReport, RoundServer

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
