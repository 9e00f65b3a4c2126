"""The compiled pipeline as Kubernetes resources, for clusters that keep their pipelines as such.

The specification of a ``PipelineVersion`` never changes, so its name carries a digest of it: other
content is another resource. Environments differ in the image, and with it in the name.
"""

import hashlib
import json
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from components._ir import is_pinned
from filterpress import files
from filterpress.errors import FilterpressError

Document = dict[str, Any]

API = "pipelines.kubeflow.org/v2beta1"
_HEADER = "# Written by `make manifests`; do not edit.\n"
#: What keeps a resource that runs point to when git has it no more, or the application is deleted.
_KEPT = {
    "argocd.argoproj.io/compare-options": "IgnoreExtraneous",
    "argocd.argoproj.io/sync-options": "Prune=false,Delete=false",
    "kustomize.toolkit.fluxcd.io/prune": "disabled",
}


def read_ir(file: Path) -> Document:
    """Read a compiled pipeline as the API takes it.

    Args:
        file: Compiled pipeline: its specification, and what is for one platform, if anything is.

    Returns:
        ``pipelineSpec``, and ``platformSpec`` where there is one.
    """
    found = yaml.load_all(file.read_text(encoding="utf-8"), yaml.CSafeLoader)
    return dict(zip(("pipelineSpec", "platformSpec"), found, strict=False))


def version_name(ir: Document) -> str:
    """Name a version of the pipeline after its content.

    Args:
        ir: Compiled pipeline, as `read_ir` gives it.

    Returns:
        Pipeline, release and the first ten digits of a SHA-256: a name that Kubernetes allows.
    """
    # 0.0 becomes 0 on the way to a cluster; a JSON number is a double there.
    doubles = json.loads(json.dumps(ir), parse_int=float)
    content = json.dumps(doubles, sort_keys=True, separators=(",", ":"))
    digits = hashlib.sha256(content.encode()).hexdigest()[:10]
    release = version("filterpress").replace(".", "-").replace("+", "-")
    return f"{_name(ir)}-{release}-{digits}"


def write(folder: Path, compiled: Path) -> None:
    """Write the generated part of the manifests, from the compiled pipeline and the overlays.

    Nothing is written unless all of it can be.

    Args:
        folder: ``base``, and ``overlays/*/kustomization.yaml``, which pin the image by digest.
        compiled: Compiled pipeline, for ``pipeline.yaml`` of the folder.

    Raises:
        FilterpressError: An overlay does not pin the image.
    """
    ir = read_ir(compiled)
    base = folder / "base"
    written = {
        base / "pipeline" / "pipeline.yaml": _pipeline(ir),
        base / "pipelineversion.yaml": _pipeline_version(ir),
    }
    for overlay in sorted((folder / "overlays").glob("*/kustomization.yaml")):
        pinned = _with_image(ir, _pinned_image(overlay, _repository(ir)))
        paths = ("/metadata/name", "/spec/displayName")
        names = [{"op": "replace", "path": p, "value": version_name(pinned)} for p in paths]
        written[overlay.with_name("version.yaml")] = names
        written[overlay.with_name("fields.yaml")] = _fields(ir)
    files.write(folder / "pipeline.yaml", compiled.read_bytes())
    for file, content in written.items():
        text = yaml.dump(content, Dumper=yaml.CSafeDumper, sort_keys=False, width=100)
        files.write(file, (_HEADER + text).encode())


def _pipeline(ir: Document) -> Document:
    info = ir["pipelineSpec"]["pipelineInfo"]
    annotations = {"argocd.argoproj.io/sync-wave": "0", **_KEPT}
    return {
        "apiVersion": API,
        "kind": "Pipeline",
        "metadata": {"name": info["name"], "annotations": annotations},
        "spec": {"displayName": info["name"], "description": info["description"]},
    }


def _pipeline_version(ir: Document) -> Document:
    name = version_name(ir)
    annotations = {"argocd.argoproj.io/sync-wave": "1", **_KEPT}
    return {
        "apiVersion": API,
        "kind": "PipelineVersion",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"pipelineName": _name(ir), "displayName": name, **ir},
    }


def _fields(ir: Document) -> Document:
    """Tell kustomize where the images are: it knows the fields of built-in kinds only."""
    path = "spec/pipelineSpec/deploymentSpec/executors/{}/container/image"
    executors = ir["pipelineSpec"]["deploymentSpec"]["executors"]
    return {"images": [{"kind": "PipelineVersion", "path": path.format(e)} for e in executors]}


def _pinned_image(overlay: Path, repository: str) -> str:
    for image in yaml.safe_load(overlay.read_text(encoding="utf-8")).get("images", []):
        pinned = f"{image.get('newName', image['name'])}@{image.get('digest')}"
        if image["name"] == repository and is_pinned(pinned):
            return pinned
    raise FilterpressError(f"{overlay} must give the digest of {repository} under images")


def _repository(ir: Document) -> str:
    executors = ir["pipelineSpec"]["deploymentSpec"]["executors"].values()
    (image,) = {executor["container"]["image"] for executor in executors}
    return image.partition("@")[0].rpartition(":")[0] or image


def _with_image(ir: Document, image: str) -> Document:
    pinned = deepcopy(ir)
    for executor in pinned["pipelineSpec"]["deploymentSpec"]["executors"].values():
        executor["container"]["image"] = image
    return pinned


def _name(ir: Document) -> str:
    return ir["pipelineSpec"]["pipelineInfo"]["name"]
