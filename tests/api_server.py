"""As much of a Kubernetes API server as filterpress talks to, over TLS, on loopback.

It holds to what a real one does: tokens, rights, names that are taken, versions that have moved on,
fields that belong to whoever applied them, and objects that must be valid.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import re
import ssl
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import jsonschema
import kubernetes_validate
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.manifests.schemas import check

TOKEN = "token-of-the-pod"
NAMESPACE = "fleet"
_PATH = re.compile(
    r"/(?:api/v1|apis/[a-z0-9.]+/v1(?:alpha1)?)/namespaces/fleet/([a-z]+)(?:/([a-z0-9.-]+))?"
)


_VERBS = {**{"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}}


class RefusedError(Exception):
    def __init__(self, code, reason, message):
        super().__init__(message)
        self.code, self.reason = code, reason


class ApiServer:
    """Objects of one namespace, by kind and name.

    Attributes:
        objects: What there is.
        kinds: Kinds that it knows.
        forbidden: Verb and kind that the service account may not use, such as ("patch", "leases").
        asked: Verbs and kinds that were asked for.
        token: What it lets in.
        troubles: Statuses of the next answers, whatever is asked.
        owners: Who applied which keys of ``data``, by kind and name.
    """

    kinds = frozenset({"configmaps", "events", "leases", "pods"})

    def __init__(self, folder):
        self.objects, self.forbidden, self.owners = {}, set(), {}
        self.asked, self.token, self.troubles = set(), TOKEN, []
        self._versions, self._lock = itertools.count(1), threading.Lock()
        certificate, key = _certificate()
        (folder / "ca.crt").write_bytes(certificate)
        (folder / "server.pem").write_bytes(key + certificate)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem")
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        serve = partial(self._server.serve_forever, poll_interval=0.01)  # it ends that soon
        threading.Thread(target=serve, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def of(self, kind):
        """Return the objects of a kind, in the order in which they were made."""
        return [found for (its, _), found in self.objects.items() if its == kind]

    def apply(self, kind, body, manager, *, force=False):
        """Apply ``data``: set what is given, drop what its manager gave before, keep the rest."""
        where = kind, body["metadata"]["name"]
        owned = self.owners.setdefault(where, {})
        data = dict(self.objects.get(where, {}).get("data", {}))
        for key, value in body["data"].items():
            others = [m for m, keys in owned.items() if m != manager and key in keys]
            if others and data[key] != value:
                if not force:
                    raise RefusedError(409, "Conflict", f"{key} is managed by {others[0]}")
                for other in others:
                    owned[other].discard(key)
        for key in owned.get(manager, set()) - body["data"].keys():
            data.pop(key, None)
        owned[manager] = set(body["data"])
        return self._keep(where, {**body, "data": data | body["data"]})

    def _keep(self, where, body):
        try:
            check(body, "1.31")
        except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
            raise RefusedError(422, "Invalid", error.message) from error
        old = self.objects.get(where, {}).get("metadata", {})
        version, now = str(next(self._versions)), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        made = {"uid": old.get("uid", f"uid-{version}"), "creationTimestamp": now}
        body = {**body, "metadata": {**body["metadata"], **made, "resourceVersion": version}}
        self.objects[where] = body
        return body

    def answer(self, method, target, headers, body):
        """Return the status and the JSON for a request."""
        url = urlsplit(target)
        found = _PATH.fullmatch(url.path)
        try:
            if headers.get("Authorization", "").lower() != f"bearer {self.token}":
                raise RefusedError(401, "Unauthorized", "Unauthorized")
            if self.troubles:
                raise RefusedError(self.troubles.pop(0), "Trouble", "the server is in trouble")
            if found is None or found[1] not in self.kinds:
                return 404, "404 page not found\n"
            kind, name = found.groups()
            verb = "list" if method == "GET" and not name else _VERBS[method]
            self.asked.add((verb, kind))
            if (verb, kind) in self.forbidden:
                raise RefusedError(403, "Forbidden", f"{kind} is forbidden: cannot {verb} {kind}")
            with self._lock:
                handle = getattr(self, f"_{verb}")
                return 200, handle((kind, name), body, headers, parse_qs(url.query))
        except RefusedError as refused:
            return refused.code, {
                **{"kind": "Status", "apiVersion": "v1", "status": "Failure"},
                **{"message": str(refused), "reason": refused.reason, "code": refused.code},
            }

    def _get(self, where, *_):
        if where not in self.objects:
            raise RefusedError(404, "NotFound", f'{where[0]} "{where[1]}" not found')
        return self.objects[where]

    def _list(self, where, body, headers, query):
        ((key, value),) = [term.split("=") for term in query["labelSelector"]]
        labelled = [f for f in self.of(where[0]) if f["metadata"]["labels"].get(key) == value]
        return {"kind": "List", "items": labelled}

    def _delete(self, where, *_):
        self._get(where)
        return self.objects.pop(where)

    def _create(self, where, body, *_):
        where = where[0], body["metadata"]["name"]
        if where in self.objects:
            raise RefusedError(409, "AlreadyExists", f'{where[0]} "{where[1]}" already exists')
        return self._keep(where, body)

    def _update(self, where, body, *_):
        if self._get(where)["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"]:
            raise RefusedError(409, "Conflict", "the object has been modified")
        return self._keep(where, body)

    def _patch(self, where, body, headers, query):
        if headers.get("Content-Type") != "application/apply-patch+yaml":
            raise RefusedError(415, "UnsupportedMediaType", "only apply is supported here")
        if "fieldManager" not in query:
            raise RefusedError(400, "BadRequest", "fieldManager is required for apply patch")
        return self.apply(
            where[0], body, query["fieldManager"][0], force=query.get("force") == ["true"]
        )

    def _handler(server):  # noqa: N805 (self is that of the handler)
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _do(self):
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(sent) if sent else None
                status, found = server.answer(self.command, self.path, self.headers, body)
                text = isinstance(found, str)
                data = (found if text else json.dumps(found)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain" if text else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _do  # noqa: N815 (http.server's names)

            def log_message(self, *_):
                pass

        return Handler


def _certificate():
    """Make a certificate for 127.0.0.1 that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.now(UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM), private
