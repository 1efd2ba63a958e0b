"""Where the base model's scores are kept between runs, by everything that decides them.

The base model answers the same held-out rows in every run of a sweep and in every cycle of work on one data set. The name of a
file of scores is a hash of weights, rows as they are encoded, the method's own keys, how scores are taken, machine and code.
"""

import hashlib
import inspect
from pathlib import Path

import transformers

from ftcore.files import PACKAGE, code_hash, home
from ftcore.methods.base import HeldOut, Method
from ftcore.models.reference import base_name
from ftcore.settings import Config, Resolved


def scores_file(config: Config, resolved: Resolved, method: Method, held_out: HeldOut) -> Path | None:
    """The file of such scores; None where code of others decides them too: their own methods and rewards."""
    if config["trust"] or not method.rows_recur:
        return None
    foundation, machine = method.foundation, resolved.machine
    shared = inspect.signature(Method.__init__).parameters
    random = foundation.new_modules or foundation.new_tokens
    said = [
        (base_name(config, resolved), transformers.__version__, code_hash(PACKAGE)),
        {key: value for key, value in config["method"].items() if key not in shared},
        (foundation.tokenizer.chat_template, held_out, config["evaluate"], config["private"]),
        (machine.strategy, machine.devices, machine.num_nodes),
        config["seed"] if random else None,
    ]
    return home() / "scores" / f"{hashlib.sha256(repr(said).encode()).hexdigest()[:16]}.json"
