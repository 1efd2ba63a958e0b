"""The base model's scores, cached under a hash of everything they depend on.

The base model answers the same held-out rows in every run of a sweep and in every cycle of work on one data set. The hash is
over weights, encoded rows, the method's own keys, how scores are taken, machine and code.
"""

import hashlib
from pathlib import Path

import transformers

from ftcore.files import PACKAGE, code_hash, home
from ftcore.methods.base import HeldOut, Method, own_settings
from ftcore.models.reference import base_key
from ftcore.settings import Config, Resolved


def scores_file(config: Config, resolved: Resolved, method: Method, held_out: HeldOut) -> Path | None:
    """The cache file of these scores; None where they also depend on the user's own code or on sampled completions."""
    if config["trust"] or not method.rows_recur:
        return None
    foundation, machine = method.foundation, resolved.machine
    depends_on = [
        (base_key(config, resolved), transformers.__version__, code_hash(PACKAGE)),
        own_settings(config["method"]),
        (foundation.tokenizer.chat_template, held_out, config["evaluate"], config["private"]),
        (machine.strategy, machine.devices, machine.num_nodes),
        config["seed"] if foundation.new_modules or foundation.new_tokens else None,  # their weights are random
    ]
    return home() / "scores" / f"{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]}.json"
