from .client import ClientWorker
from .combination import check_combination
from .parts import Parts, Recipe, assemble_server, assemble_worker, recipe_of
from .replica import Replica
from .server import RoundReport, RoundServer

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
