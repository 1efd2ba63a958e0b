"""`ui`: serve the page in the browser, on this machine alone."""

import secrets
import socket
import webbrowser
from pathlib import Path
from typing import Any

from ftcore.console import plain
from ftcore.errors import ConfigError, HardwareError
from ftcore.files import expanded
from ftcore.settings import Config
from ftcore.ui import LOOPBACK


def ui(config: Config) -> None:
    """Serve the page until Ctrl-C. Raises `ConfigError` for an address that others reach, `HardwareError` for a port in use."""
    host, port = config["ui"]["host"], config["ui"]["port"]
    if host not in LOOPBACK:
        raise ConfigError(
            f"ui.host={host}: the page shows rows and starts jobs, so it is served on this machine alone. From another one: "
            f"ssh -L {port}:localhost:{port} <this machine>, then open it there."
        )
    folder, token = expanded(config["output_dir"]).resolve(), secrets.token_urlsafe(24)
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    server = _server(folder, config["ui"]["show_private"], token, f"ftcore-{port}")
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/?token={token}"
    plain.print(f"The runs below {folder}: {address}\nCtrl-C ends the page; what is queued goes on.")
    if config["ui"]["open"]:
        webbrowser.open(address)
    server.run([listener])


def _server(folder: Path, show_private: bool, token: str, cookie: str) -> Any:
    """uvicorn's server of the pages. Raises `ConfigError` where what it needs is not installed."""
    try:
        import python_multipart  # noqa: F401 (it reads forms)
        import sse_starlette  # noqa: F401 (it keeps pages live)
        import uvicorn

        from ftcore.ui.server import application
    except ModuleNotFoundError as error:
        raise ConfigError(f"ui needs the package {error.name}: pip install 'ftcore[ui]'.") from None
    app = application(folder, show_private, token, cookie)
    return uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1))


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the port. Raises `HardwareError` when another process has it."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        raise HardwareError(
            f"Port {port} cannot be used: {error.strerror}. Choose another: ui port=0 takes any."
        ) from None
    return listener
