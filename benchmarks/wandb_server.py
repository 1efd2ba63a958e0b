"""A stand-in for W&B's server, enough for the client to log steps to it, which can go away and come back."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RUN = {
    "id": "run", "name": "run", "displayName": "run", "config": "{}", "history": "[]", "events": "[]",
    "historyLineCount": 0, "logLineCount": 0, "eventsLineCount": 0,
    "project": {"id": "project", "name": "ftcore", "entity": {"id": "team", "name": "team"}},
}  # fmt: skip
# One answer to every query: a client takes the fields it asked for.
ANSWER = {
    "data": {
        "viewer": {"id": "user", "entity": "team", "username": "user", "flags": "{}", "teams": {"edges": []}},
        "serverInfo": {"cliVersionInfo": {"max_cli_version": "99"}, "latestLocalVersionInfo": None, "features": []},
        "upsertBucket": {"bucket": RUN, "inserted": True},
        # Committed: a table's file is there already, so the client does not send it.
        "createArtifact": {
            "artifact": {
                "id": "artifact", "state": "COMMITTED", "artifactSequence": {"id": "tables", "latestArtifact": None},
            }
        },
        "createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []},
        "model": None,
        **{f"{kind}Type": {"fields": []} for kind in ("Query", "Mutation", "ServerInfo")},
    }
}  # fmt: skip


def _answer(query: bytes) -> dict[str, Any]:
    """`ANSWER` about the run that a query names."""
    name = json.loads(query or b"{}").get("variables", {}).get("name") or "run"
    run = {**RUN, "id": name, "name": name, "displayName": name}
    return {"data": {**ANSWER["data"], "upsertBucket": {"bucket": run, "inserted": True}}}


class Server:
    """Listens on a free port of this machine and keeps the steps it was sent."""

    def __init__(self, port: int = 0, leave_after: int | None = None) -> None:
        self.steps: list[dict[str, Any]] = []
        self.leave_after = leave_after
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What makes a client log here."""
        address = {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_MODE": "online"}
        return {**address, "WANDB_API_KEY": "local-" + "0" * 40}

    def leave(self) -> None:
        """Answer nobody any more."""
        self.server.shutdown()
        self.server.server_close()

    def received(self, body: bytes) -> None:
        """Keep the history lines of a request; leave when there are enough."""
        history = json.loads(body or b"{}").get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.steps += [json.loads(line) for line in history]
        if self.leave_after is not None and len(self.steps) >= self.leave_after:
            threading.Thread(target=self.leave, daemon=True).start()
            self.leave_after = None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer = json.dumps(_answer(body) if self.path.startswith("/graphql") else {}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
                if self.path.endswith("/file_stream"):
                    server.received(body)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        return Handler
