"""Where the base model's scores are kept between runs, by everything that decides them.

The base model answers the same held-out rows in every run of a sweep and in every cycle of work on one data set. The name of a
file of scores is a hash of weights, rows as they are encoded, the method's own keys, how scores are taken, machine and code.
"""

import hashlib
import inspect
from pathlib import Path
from typing import Any

import transformers

from ftcore.evaluate.score import HeldOut
from ftcore.files import PACKAGE, code_hash, home
from ftcore.methods.base import Method
from ftcore.models.reference import base_name


def scores_file(config: dict[str, Any], method: Method, held_out: HeldOut) -> Path | None:
    """The file of such scores; None where code of others decides them too: their own methods and rewards."""
    if config["trust"] or not method.rows_recur:
        return None
    foundation, hardware = method.foundation, config["hardware"]
    shared = inspect.signature(Method.__init__).parameters
    random = foundation.new_modules or foundation.new_tokens
    said = [
        (base_name(config), transformers.__version__, code_hash(PACKAGE)),
        {key: value for key, value in config["method"].items() if key not in shared},
        (foundation.tokenizer.chat_template, held_out, config["evaluate"], config["private"]),
        (hardware["strategy"], hardware["devices"], hardware["num_nodes"]),
        config["seed"] if random else None,
    ]
    return home() / "scores" / f"{hashlib.sha256(repr(said).encode()).hexdigest()[:16]}.json"
