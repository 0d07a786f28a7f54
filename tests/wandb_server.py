"""As much of a W&B server as a run needs: it keeps runs, their history by offset, and artifacts with aliases.

A sweep's agents get the points that a test has put into `points`, one when they have nothing to do.

The client is the real one, over HTTP. An operation that it does not know is answered with nothing.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

ENTITY = "someone"


@dataclass
class KeptRun:
    """What the server has of a run."""

    first: dict[str, Any]
    """The variables of its first UpsertBucket: names, group, job type, tags."""
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By offset: a line that is sent again takes the place of the one before."""
    used: list[str] = field(default_factory=list)
    """Ids of artifacts it says it used."""


class WandbServer:
    """Serves while the block runs."""

    def __init__(self) -> None:
        self.runs: dict[str, KeptRun] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        """Id -> the input of its CreateArtifact."""
        self.uploaded: dict[str, bytes] = {}
        self.views: list[dict[str, Any]] = []
        self.sweeps: dict[str, dict[str, Any]] = {}
        """Id -> what `wandb sweep` has sent, read."""
        self.points: list[dict[str, Any]] = []
        """Parameter -> value, still to be tried."""
        self.unknown: set[str] = set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._answer({})

            def do_PUT(self) -> None:
                server.uploaded[self.path] = self._body()
                self._answer({})

            def do_POST(self) -> None:
                body = self._body()
                if self.path.endswith("/graphql"):
                    asked = json.loads(body)
                    self._answer({"data": server.graphql(asked["query"], asked.get("variables") or {})})
                else:
                    if found := re.search(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                        server.stream(found[1], json.loads(body))
                    self._answer({})

            def _body(self) -> bytes:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

            def _answer(self, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.http.shutdown()
        self.http.server_close()

    def stream(self, run: str, body: dict[str, Any]) -> None:
        """Lines of history."""
        chunk = body.get("files", {}).get("wandb-history.jsonl")
        if chunk:
            for number, line in enumerate(chunk["content"]):
                self.runs[run].history[chunk["offset"] + number] = json.loads(line)

    def steps(self, run: str, metric: str) -> list[int]:
        """The steps at which a metric stands in the history, in its order."""
        history = self.runs[run].history
        return [history[line]["_step"] for line in sorted(history) if metric in history[line]]

    def named(self, name: str) -> str | None:
        """The id of `NAME:ALIAS`."""
        collection, _, alias = name.rpartition("/")[2].partition(":")
        for key, made in self.artifacts.items():
            known = [one["alias"] for one in made["aliases"]]
            if made["artifactCollectionName"] == collection and alias in known:
                return key
        return None

    def graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """The answer to an operation."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = found[1] if found else query
        answer = getattr(self, f"_{operation}", None)
        if answer is None:
            self.unknown.add(operation)
            return {}
        result: dict[str, Any] = answer(given)
        return result

    def _Viewer(self, _: Any) -> Any:
        teams = {"edges": []}
        return {"viewer": {"id": "u", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": teams}}

    def _RunResumeStatus(self, given: Any) -> Any:
        project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": ENTITY}}
        kept = self.runs.get(given["name"])
        if kept is None:
            return {"model": {**project, "bucket": None}}
        tail = [json.dumps(kept.history[max(kept.history)])] if kept.history else []
        bucket = {
            "id": "r",
            "name": given["name"],
            "displayName": kept.first["displayName"],
            "historyLineCount": len(kept.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "config": json.dumps(kept.config),
            "tags": [],
            "notes": None,
            "wandbConfig": '{"t": 1}',
        }
        return {"model": {**project, "bucket": bucket}}

    def _UpsertBucket(self, given: Any) -> Any:
        is_new = given["name"] not in self.runs
        kept = self.runs.setdefault(given["name"], KeptRun(given))
        kept.config |= json.loads(given["config"] or "{}")
        project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": ENTITY}}
        bucket = {"id": "r", "name": given["name"], "displayName": kept.first["displayName"]}
        bucket |= {"project": project, "historyLineCount": len(kept.history)}
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _CreateRunFiles(self, given: Any) -> Any:
        files = [{"name": name, "uploadUrl": f"{self.address}/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, given: Any) -> Any:
        found = self.named(given["name"])
        return {"project": {"artifact": {"artifactType": {"name": "model"}} if found else None}}

    def _CreateArtifact(self, given: Any) -> Any:
        key = f"artifact-{len(self.artifacts)}"
        self.artifacts[key] = given["input"]
        made = {"id": key, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": made}}

    def _CreateArtifactManifest(self, given: Any) -> Any:
        file = {"id": "f", "uploadUrl": f"{self.address}/{given['artifactID']}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _CreateArtifactFiles(self, given: Any) -> Any:
        edges = [
            {
                "node": {
                    "storagePath": None,
                    "uploadUrl": f"{self.address}/{file['artifactID']}/{file['name']}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": file["artifactID"]},
                }
            }
            for file in given["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, given: Any) -> Any:
        key = given.get("artifactID") or given["input"]["artifactID"]
        return {"commitArtifact": {"artifact": {"id": key, "digest": "d"}}}

    def _ArtifactMembershipByName(self, given: Any) -> Any:
        key = self.named(given["name"])
        if key is None:
            return {"project": {"artifactCollectionMembership": None}}
        project = {"id": "p", "internalId": "p", "name": given["project"], "entity": {"name": ENTITY}}
        name = self.artifacts[key]["artifactCollectionName"]
        collection = {"__typename": "ArtifactSequence", "name": name, "project": project}
        artifact = {
            "__typename": "Artifact",
            "id": key,
            "artifactSequence": collection,
            "versionIndex": 0,
            "artifactType": {"name": "model"},
            "description": None,
            "metadata": self.artifacts[key]["metadata"],
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": 0,
            "state": "COMMITTED",
            "size": 1,
            "digest": self.artifacts[key]["digest"],
            "commitHash": "c",
            "fileCount": 1,
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": "2026-01-01T00:00:00Z",
        }
        membership = {
            "__typename": "ArtifactCollectionMembership",
            "id": "m",
            "versionIndex": 0,
            "createdAt": "2026-01-01T00:00:00Z",
            "aliases": [],
            "artifactCollection": collection,
            "artifact": artifact,
        }
        return {"project": {"artifactCollectionMembership": membership}}

    def _UseArtifact(self, given: Any) -> Any:
        used = given.get("input") or given
        self.runs[used["runName"]].used.append(used["artifactID"])
        return {"useArtifact": {"artifact": {"id": used["artifactID"]}}}

    def _UpsertSweep(self, given: Any) -> Any:
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = yaml.safe_load(given["config"])
        project = {"id": "p", "name": given["projectName"], "entity": {"id": "e", "name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": []}}

    def _SweepWithRuns(self, given: Any) -> Any:
        kept = self.sweeps[given["sweep"]]
        sweep = {"id": "s", "name": given["sweep"], "config": yaml.safe_dump(kept), "runs": {"edges": []}}
        return {"project": {"sweep": sweep}}

    def _CreateAgent(self, given: Any) -> Any:
        return {"createAgent": {"agent": {"id": given["sweep"]}}}

    def _Heartbeat(self, given: Any) -> Any:
        """`id` is the agent's, and `runState` names what it runs."""
        commands: list[dict[str, Any]] = []
        if not json.loads(given["runState"]):
            commands = [{"type": "exit"}]
            if self.points:
                point = {key: {"value": value} for key, value in self.points.pop(0).items()}
                number = f"drawn{len(self.points)}"
                run = {"type": "run", "run_id": number, "program": self.sweeps[given["id"]]["program"]}
                commands = [run | {"args": point}]
        return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}}

    def _UpsertView2(self, given: Any) -> Any:
        self.views.append(given)
        return {"upsertView": {"view": {"id": "v", "name": given["name"]}, "inserted": True}}
