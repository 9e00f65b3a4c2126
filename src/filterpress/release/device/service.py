"""An example of a service on a vehicle: it answers requests and updates itself on the way.

A request is answered by the model that was newest when it came. The next model is loaded beside
the old one and takes its place between two requests, so none is dropped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from filterpress.errors import ReleaseError
from filterpress.release.device.vehicle import Model, Vehicle

_log = logging.getLogger(__name__)

_MAX_BODY = 2**26
_SILENCE_S = 30


@dataclass(frozen=True)
class Network:
    """A model that is loaded.

    Attributes:
        session: Of the runtime.
        model: Which model it is.
    """

    session: Any
    model: Model

    @classmethod
    def load(cls, model: Model) -> Network:
        """Load a model.

        Args:
            model: What the vehicle runs.

        Returns:
            The network.

        Raises:
            ReleaseError: The file has changed since it was checked.
        """
        import onnxruntime

        data = model.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != model.manifest.model_sha256:
            raise ReleaseError(f"{model.path} has changed since it was checked")
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        return cls(session, model)

    def answer(self, body: bytes) -> dict[str, Any]:
        """Answer a request.

        Args:
            body: One image, as little-endian float32.

        Returns:
            The first output for it, and which release gave it.

        Raises:
            ValueError: It has another size.
        """
        (entry,) = self.session.get_inputs()
        image = np.frombuffer(body, "<f4").reshape(1, *entry.shape[1:])
        outputs = self.session.run(None, {entry.name: image})[0]
        return {
            "release_counter": self.model.manifest.release_counter,
            "sha256": self.model.manifest.sha256,
            "outputs": outputs.ravel().tolist(),
        }


class Service:
    """Answers requests with the newest good model of a vehicle."""

    def __init__(self, vehicle: Vehicle) -> None:
        self._vehicle = vehicle
        self._network: Network | None = None
        self._over = threading.Event()

    def refresh(self) -> None:
        """Look for an update, try it, and answer with it from now on if it is good."""
        try:
            self._vehicle.update()
        except ReleaseError as error:
            _log.warning("%s", error)
        self.load()

    def load(self) -> None:
        """Answer with what the vehicle runs now."""
        model = self._vehicle.boot()
        if model and (self._network is None or self._network.model != model):
            self._network = Network.load(model)
            _log.info("running release %d", model.manifest.release_counter)

    def keep_fresh(self, every_s: float) -> None:
        """Refresh now and then, until `stop`.

        Args:
            every_s: Seconds between two refreshes.
        """
        while not self._over.is_set():
            try:
                self.refresh()
            except Exception:  # noqa: BLE001 (see below)
                # Whatever went wrong, the network that runs goes on, and there is a next time.
                _log.exception("the update failed")
            self._over.wait(every_s)

    def stop(self) -> None:
        """End `keep_fresh`."""
        self._over.set()

    def answer(self, body: bytes) -> tuple[int, Mapping[str, Any]]:
        """Answer a request.

        Args:
            body: One image, as little-endian float32.

        Returns:
            HTTP status and JSON values.
        """
        network = self._network  # once: another one may take its place meanwhile
        if network is None:
            return 503, {"error": "no release has passed its trial here yet"}
        try:
            return 200, network.answer(body)
        except ValueError as error:
            return 400, {"error": str(error)}

    def status(self) -> Mapping[str, Any]:
        """Return the signed report of the vehicle."""
        return self._vehicle.status()


def serve(service: Service, port: int) -> ThreadingHTTPServer:
    """Open the service on loopback.

    Args:
        service: What answers.
        port: 0 for any that is free.

    Returns:
        The server, listening; ``serve_forever`` is the caller's.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = _SILENCE_S

        def do_GET(self) -> None:
            self._send(200, service.status())

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > _MAX_BODY:
                self.close_connection = True
                self._send(413, {"error": f"a body has at most {_MAX_BODY} bytes, and a length"})
                return
            self._send(*service.answer(self.rfile.read(int(length))))

        def _send(self, status: int, values: Mapping[str, Any]) -> None:
            body = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            _log.debug(format, *args)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def run(vehicle: Vehicle, *, port: int, every_s: float) -> None:
    """Answer requests and keep fresh, until interrupted.

    Args:
        vehicle: The vehicle.
        port: On loopback; 0 for any that is free.
        every_s: Seconds between two looks at the store.
    """
    service = Service(vehicle)
    service.load()  # what is there answers at once, whatever the network does
    keeper = threading.Thread(target=service.keep_fresh, args=(every_s,), daemon=True)
    with serve(service, port) as server:
        _log.info("answering on http://127.0.0.1:%d", server.server_port)
        keeper.start()
        try:
            server.serve_forever()
        finally:
            service.stop()
