"""Find API keys and passwords in a config, and keep them out of messages."""

import os
import re

NAMED_SECRET = r"(?:api_?key|access_?key|token|secret|password|credentials?)"
SECRET = re.compile(rf"(^|_){NAMED_SECRET}$", re.IGNORECASE)
SECRET_SETTING = re.compile(rf"\b((?:\w*_)?{NAMED_SECRET})=[^'\"]+", re.IGNORECASE)
SHORTEST_SECRET = 8  # characters; shorter values occur in ordinary words
SECRET_ADVICE = "looks like a secret, and configs are saved and logged: put it in an environment variable"
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|wandb_v1_\w{20,}|gh[pousr]_\w{20,}|AKIA[0-9A-Z]{16})|://[^/\s:]+:[^@\s]+@"
)


def environment_secrets() -> list[str]:
    """Values of the environment variables whose names say that they are secret."""
    return [value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST_SECRET]


def without_secrets(message: str) -> str:
    """The message with *** for what looks like an API key or a password."""
    for value in environment_secrets():
        message = message.replace(value, "***")
    return SECRET_VALUE.sub("***", SECRET_SETTING.sub(r"\1=***", message))
