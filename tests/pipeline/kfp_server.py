"""As much of KFP's API as the pipeline is submitted to, on loopback.

It holds to what a real one does: tokens, rights, names that are taken, and references that lead
somewhere.
"""

import itertools
import json
import threading
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import yaml

TOKEN = "token-of-the-job"
NAMESPACE = "team"
ID = {
    "pipelines": "pipeline_id",
    "versions": "pipeline_version_id",
    "experiments": "experiment_id",
    "runs": "run_id",
    "recurringruns": "recurring_run_id",
}
KEYS = {"versions": "pipeline_versions", "recurringruns": "recurringRuns"}
VERBS = {"GET": "list", "POST": "create", "DELETE": "delete"}


class RefusedError(Exception):
    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class KfpServer:
    """Pipelines, versions, experiments, runs and recurring runs, in the order they were made.

    Attributes:
        found: Objects by kind.
        forbidden: Verb and kind that the token may not use, such as ("create", "runs").
        multi_user: Whether there are namespaces.
        asked: Every request, as method and path.
        page: What is answered to everything, such as the page of a login; empty for the API.
        raw: Bytes that are answered to everything in place of HTTP.
        elsewhere: Address that every request is sent on to; empty for none.
        silent: Verb and kind that are done and then not answered.
        tokens: What every request showed as its right.
    """

    def __init__(self):
        self.found = {kind: [] for kind in ID}
        self.forbidden, self.multi_user, self.asked, self.page = set(), True, [], ""
        self.raw = b""
        self.elsewhere, self.silent, self.tokens = "", set(), []
        self._numbers = itertools.count(1)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.host = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def add(self, kind, **fields):
        made = {**fields, ID[kind]: f"{kind}-{next(self._numbers)}"}
        self.found[kind].append(made)
        return made

    def names(self, kind):
        return [member["display_name"] for member in self.found[kind]]

    def answer(self, method, target, headers, body):
        """Return the status and the JSON for a request."""
        url = urlsplit(target)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = url.path.removeprefix("/apis/v2beta1/").split("/")
        try:
            if headers.get("Authorization") != f"Bearer {TOKEN}":
                raise RefusedError(401, "Unauthenticated")
            if path == ["healthz"]:
                return 200, {"multi_user": self.multi_user}
            return 200, self._object(method, path, query, headers, body)
        except RefusedError as refused:
            return refused.code, {"code": refused.code, "message": str(refused), "details": []}

    def _object(self, method, path, query, headers, body):
        verb, kind = self._wanted(method, path)
        if (verb, kind) in self.forbidden:
            raise RefusedError(403, f"may not {verb} {kind}")
        if query.get("namespace") and not self.multi_user:
            raise RefusedError(400, "In single-user mode, there are no namespaces")
        if path == ["pipelines", "upload_version"]:
            return self._upload(query, headers, body)
        if method == "POST":
            return self._create(kind, json.loads(body))
        if method == "DELETE":
            self.found[kind].remove(self._at(kind, path[-1]))
            return {}
        if len(path) % 2 == 0:
            return self._at(kind, path[-1])
        parent = {"pipeline_id": path[1]} if kind == "versions" else {}
        return {KEYS.get(kind, kind): self._matching(kind, query, parent)}

    @staticmethod
    def _wanted(method, path):
        if path == ["pipelines", "upload_version"]:
            return "create", "versions"
        return VERBS[method], path[2] if len(path) > 2 else path[0]

    def _matching(self, kind, query, parent):
        wanted = dict(parent)
        names = ("namespace", "experiment_id")
        wanted |= {name: query[name] for name in names if name in query and kind != "pipelines"}
        for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
            wanted[predicate["key"]] = predicate["stringValue"]
        if self.multi_user and kind == "experiments" and "namespace" not in wanted:
            raise RefusedError(400, "A namespace is needed")
        return [m for m in self.found[kind] if all(m.get(k) == v for k, v in wanted.items())]

    def _create(self, kind, body):
        if self.multi_user and kind == "experiments" and body.get("namespace") != NAMESPACE:
            raise RefusedError(403, f"no rights in {body.get('namespace')!r}")
        if kind in ("runs", "recurringruns"):
            reference = body["pipeline_version_reference"]
            version = self._at("versions", reference["pipeline_version_id"])
            self._at("experiments", body["experiment_id"])
            spec = version["pipeline_spec"]["pipeline_spec"]
            known = spec["root"]["inputDefinitions"]["parameters"]
            if unknown := body["runtime_config"].get("parameters", {}).keys() - known.keys():
                raise RefusedError(400, f"unknown parameters {sorted(unknown)}")
            body["namespace"] = NAMESPACE
        elif body["display_name"] in self.names(kind):
            raise RefusedError(409, f"{body['display_name']} exists already")
        return self.add(kind, **body)

    def _upload(self, query, headers, body):
        if query["name"] in self.names("versions"):
            raise RefusedError(409, f"{query['name']} exists already")
        head = f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode()
        (file,) = message_from_bytes(head + body).get_payload()
        documents = yaml.load_all(file.get_payload(decode=True), yaml.CSafeLoader)
        spec = dict(zip(("pipeline_spec", "platform_spec"), documents, strict=False))
        self._at("pipelines", query["pipelineid"])
        fields = {"pipeline_id": query["pipelineid"], "pipeline_spec": spec}
        return self.add("versions", display_name=query["name"], **fields)

    def _at(self, kind, identifier):
        for member in self.found[kind]:
            if member[ID[kind]] == identifier:
                return member
        raise RefusedError(404, f"{kind} {identifier} not found")

    def _handler(server):  # noqa: N805 (self is that of the handler)
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _do(self):
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = urlsplit(self.path).path
                server.asked.append((self.command, path))
                server.tokens.append(self.headers.get("Authorization"))
                if server.raw:
                    self.wfile.write(server.raw)
                    self.close_connection = True
                    return
                if server.elsewhere:
                    self.send_response(302)
                    self.send_header("Location", server.elsewhere)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                status, found = server.answer(self.command, self.path, self.headers, sent)
                below = path.removeprefix("/apis/v2beta1/").split("/")
                if server._wanted(self.command, below) in server.silent:
                    self.close_connection = True
                    return
                kind = "text/html" if server.page else "application/json"
                data = (server.page or json.dumps(found)).encode()
                self.send_response(200 if server.page else status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = _do  # noqa: N815 (http.server's names)

            def log_message(self, *_):
                pass

        return Handler
