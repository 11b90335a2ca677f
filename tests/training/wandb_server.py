"""A stand-in for W&B's server: the little of its HTTP interface that a run and the dashboard use."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbServer(ThreadingHTTPServer):
    """Keeps what it is sent. A context manager; ``url`` goes into ``WANDB_BASE_URL``.

    Args:
        fails: Whether it opens runs, and then answers whatever they send with an error.
        refuses: What it answers whoever wants to save a view with.

    Attributes:
        history: Rows by run.
        projects: Names of those that there are.
        views: What saved workspaces and reports are made of, in the order in which they came.
    """

    daemon_threads = True

    def __init__(self, fails: bool = False, refuses: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fails, self.refuses = fails, refuses
        self.refused = 0
        self.history: dict[str, list[dict]] = {}
        self.projects: list[str] = []
        self.views: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def values(self, run, key):
        """Optimiser step -> value of one metric, as far as it has arrived."""
        return {row["trainer/global_step"]: row[key] for row in self.history.get(run, ()) if key in row}


def _project(name):
    ids = {"id": "project", "name": name, "entityName": "somebody"}
    return {**ids, "createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path == "/graphql":
            asked = json.loads(body)
            if self.server.refuses and "upsertView" in asked["query"]:
                self._answer(200, {"errors": [{"message": self.server.refuses}]})
            else:
                self._answer(200, {"data": self._graphql(asked)})
        elif self.server.fails:
            self.server.refused += 1
            self._answer(503, {})
        else:
            if self.path.endswith("/file_stream"):
                self._rows(self.path.split("/")[-2], json.loads(body))
            self._answer(200, {})

    do_GET = do_PUT = do_POST  # noqa: N815 (the names are the library's)

    def _graphql(self, asked):
        variables = asked.get("variables") or {}
        if "createRunFiles" in asked["query"]:
            files = [{"name": name, "uploadUrl": f"{self.server.url}/up/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        if "upsertBucket" in asked["query"]:
            names = {"name": variables.get("name"), "displayName": variables.get("displayName")}
            project = {
                "id": "project",
                "name": variables.get("project"),
                "entity": {"id": "entity", "name": "somebody"},
            }
            bucket = {"id": "run", **names, "config": "{}", "project": project, "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "upsertView" in asked["query"]:
            self.server.views.append({**variables, "spec": json.loads(variables["spec"])})
            project = {"id": "project", "name": variables["projectName"], "entityName": variables["entityName"]}
            names = {name: variables[name] for name in ("type", "name", "displayName", "description", "spec")}
            view = {"id": "view", **names, "project": project, "updatedAt": "2026-01-01T00:00:00"}
            return {"upsertView": {"view": view, "inserted": True}}
        if "upsertModel" in asked["query"]:
            self.server.projects.append(variables["input"]["name"])
            return {"result": {"project": None, "model": None, "inserted": True}}
        if "models(" in asked["query"]:
            nodes = [{"node": _project(name)} for name in self.server.projects]
            return {"models": {"pageInfo": {"endCursor": None, "hasNextPage": False}, "edges": nodes}}
        if "internalId" in asked["query"]:
            known = variables["projectName"] in self.server.projects
            return {"project": {"id": "project", "internalId": "42"} if known else None}
        return {"viewer": {"id": "user", "entity": "somebody", "flags": "{}"}, "model": None, "project": None}

    def _rows(self, run, message):
        rows = message.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.server.history.setdefault(run, []).extend(map(json.loads, rows))

    def _answer(self, status, content):
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
