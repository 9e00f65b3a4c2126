"""Schemas of custom resources, of the fields that the manifests use and no others.

From the definitions of Kubeflow Pipelines 2.16, Argo CD 3, Flux 2 and Gateway API 1.
"""

import jsonschema
import kubernetes_validate

VERSIONS = ["1.31", "1.37"]
TEXT = {"type": "string", "minLength": 1}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def record(required=(), **properties):
    """Describe an object that has these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def resource(api, kind, spec):
    metadata = record(["name"], name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
    fixed = {"apiVersion": {"const": api}, "kind": {"const": kind}}
    return record(["apiVersion", "kind", "metadata", "spec"], **fixed, metadata=metadata, spec=spec)


KFP = "pipelines.kubeflow.org/v2beta1"
CUSTOM = {
    "Pipeline": resource(KFP, "Pipeline", record(displayName=TEXT, description=TEXT)),
    "PipelineVersion": resource(
        KFP,
        "PipelineVersion",
        record(
            ["pipelineName", "pipelineSpec"],
            pipelineName=NAME,
            displayName=TEXT,
            pipelineSpec={"type": "object"},
            platformSpec={"type": "object"},
        ),
    ),
}


def check(found, version):
    """Refuse a resource that a cluster would refuse."""
    if found["kind"] in CUSTOM:
        jsonschema.validate(found, CUSTOM[found["kind"]])
    else:
        kubernetes_validate.validate(found, version, strict=True)
