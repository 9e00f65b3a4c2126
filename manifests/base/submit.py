"""Start a run of the version of the pipeline that git names: what the CronJob does.

A job starts one run, however often its pod is tried: a run has the name of its job and the
beginning of its UID, for names come again. Python is all it needs; the image of the steps has no
client of KFP.
"""

import http.client
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

PIPELINE = "filterpress"
FILES = "/etc/filterpress"
TOKENS = "/var/run/secrets/kubeflow/pipelines"
TIMEOUT_SECONDS = 30


class Api:
    """The part of KFP's API that starts a run."""

    def __init__(self, host: str, namespace: str, token: str) -> None:
        self.host, self.namespace, self._token = host.rstrip("/"), namespace, token

    def call(self, path: str, body: dict[str, Any] | None = None, **query: str) -> dict[str, Any]:
        """Ask for a path below the API, or send it a body.

        Raises:
            RuntimeError: There is no answer, or a refusal; in words for whoever runs it.
        """
        request = urllib.request.Request(
            f"{self.host}/apis/v2beta1/{path}?{urllib.parse.urlencode(query)}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        # Not sent on to a login elsewhere.
        request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(self._refusal(error)) from error
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise RuntimeError(f"{self.host} does not answer: {reason}; check HOST") from error
        except (ValueError, http.client.HTTPException) as error:
            raise RuntimeError(f"{self.host} does not answer as KFP does; check HOST") from error

    def find(self, path: str, name: str, **query: str) -> dict[str, Any] | None:
        """Return the member of a collection that has a name, if there is one."""
        key = "pipeline_versions" if path.endswith("/versions") else path
        wanted = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
        members = self.call(path, filter=json.dumps({"predicates": [wanted]}), **query).get(key, [])
        return next((member for member in members if member["display_name"] == name), None)

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        if error.code == 401:
            return (
                f"{self.host} refuses the token (401); its audience must be pipelines.kubeflow.org"
            )
        if error.code == 403:
            return (
                f"{self.host} allows no runs in {self.namespace} (403); "
                "bind the Role filterpress-submit there"
            )
        try:
            said = json.load(error)["message"]
        except (ValueError, KeyError, TypeError):
            said = error.reason
        return f"{self.host} refuses the run: {error.code} {said}"


def start(api: Api, version: str, run: str, account: str, parameters: dict[str, Any]) -> str:
    """Start a run, unless it has been started.

    Args:
        api: The API.
        version: Name of the version.
        run: Name of the run.
        account: Service account of its steps.
        parameters: What differs from the pipeline's defaults.

    Returns:
        Its identifier.

    Raises:
        RuntimeError: There is no such version, or the API refuses.
    """
    # An installation for one user has no namespaces, and refuses to be asked for one.
    where = {"namespace": api.namespace} if api.call("healthz").get("multi_user") else {}
    pipeline = api.find("pipelines", PIPELINE, **where)
    if pipeline is None:
        raise RuntimeError(f"no pipeline {PIPELINE} in {api.namespace}; apply the manifests there")
    reference = {"pipeline_id": pipeline["pipeline_id"]}
    found = api.find(f"pipelines/{pipeline['pipeline_id']}/versions", version)
    if found is None:
        raise RuntimeError(f"{PIPELINE} has no version {version}; apply the manifests")
    reference["pipeline_version_id"] = found["pipeline_version_id"]
    experiment = api.find("experiments", PIPELINE, **where) or api.call(
        "experiments", {"display_name": PIPELINE, **where}
    )
    where["experiment_id"] = experiment["experiment_id"]
    started = api.find("runs", run, **where) or api.call(
        "runs",
        {
            "display_name": run,
            "experiment_id": experiment["experiment_id"],
            "pipeline_version_reference": reference,
            "runtime_config": {"parameters": parameters},
            "service_account": account,
        },
    )
    return started["run_id"]


def main() -> int:
    """Read the job's settings, start its run, and say which."""
    given, files = os.environ, Path(os.environ.get("FILES", FILES))
    try:
        token = (Path(given.get("TOKENS", TOKENS)) / "token").read_text().strip()
        parameters = json.loads((files / "parameters.json").read_text())
        api = Api(given["HOST"], given["NAMESPACE"], token)
        name = f"{given['JOB']}-{given['JOB_UID'][:8]}"
        run = start(api, given["VERSION"], name, given["SERVICE_ACCOUNT"], parameters)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{api.host}/#/runs/details/{run}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
