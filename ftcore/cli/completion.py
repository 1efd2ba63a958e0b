"""Shell completion of the shipped conf/, by Hydra's plugins: `eval "$(ftcore -sc install=bash)"`, or zsh, or fish."""

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from ftcore.errors import ConfigError
from ftcore.files import resources

SHELLS = ("bash", "zsh", "fish")


def complete(words: list[str]) -> None:
    """Print what the shell asks for. Raises `ConfigError` for words that are not `install=`, `uninstall=` or `query=` a shell."""
    if words not in [[f"{do}={shell}"] for do in ("install", "uninstall", "query") for shell in SHELLS]:
        raise ConfigError(f"-sc takes one word: install=, uninstall= or query=, and one of {', '.join(SHELLS)}.")
    with initialize_config_dir(str(resources() / "conf"), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra
        hydra.shell_completion("config", words)
