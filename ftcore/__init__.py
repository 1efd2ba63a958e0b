"""ftcore: a declarative framework for fine-tuning language models.

Importing this package costs nothing: torch and the rest are imported once a config has been checked.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ftcore")
except PackageNotFoundError:  # running from a checkout that is not installed
    __version__ = "0+unknown"
