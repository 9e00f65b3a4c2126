"""Schemas of custom resources, of the fields that the manifests use and no others.

From the definitions of Kubeflow Pipelines 2.16, Kubeflow Trainer 2.0 to 2.3, which do not differ in
these fields, Argo CD 3 and Flux 2.
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

CUSTOM["Application"] = resource(
    "argoproj.io/v1alpha1",
    "Application",
    record(
        ["project", "source", "destination"],
        project=TEXT,
        source=record(["repoURL", "path"], repoURL=TEXT, targetRevision=TEXT, path=TEXT),
        destination=record(["server", "namespace"], server=TEXT, namespace=NAME),
        syncPolicy=record(
            automated=record(prune={"type": "boolean"}, selfHeal={"type": "boolean"}),
            syncOptions={"type": "array", "items": {"pattern": "^[A-Z][A-Za-z]+=(true|false)$"}},
            retry=record(
                limit={"type": "integer"},
                backoff=record(duration=TEXT, factor={"type": "integer"}, maxDuration=TEXT),
            ),
        ),
    ),
)
DURATION = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"}
CUSTOM["GitRepository"] = resource(
    "source.toolkit.fluxcd.io/v1",
    "GitRepository",
    record(
        ["interval", "url"],
        interval=DURATION,
        url={"type": "string", "pattern": "^(http|https|ssh)://"},
        ref=record(branch=TEXT),
    ),
)
CUSTOM["Kustomization"] = resource(
    "kustomize.toolkit.fluxcd.io/v1",
    "Kustomization",
    record(
        ["interval", "prune", "sourceRef"],
        interval=DURATION,
        dependsOn={"type": "array", "items": record(["name"], name=NAME)},
        sourceRef=record(["kind", "name"], kind={"const": "GitRepository"}, name=NAME),
        path={"type": "string", "pattern": r"^\./"},
        targetNamespace=NAME,
        prune={"type": "boolean"},
        wait={"type": "boolean"},
        patches={
            "type": "array",
            "items": record(["patch"], target=record(kind=TEXT, name=NAME), patch=TEXT),
        },
    ),
)
TRAINER = "trainer.kubeflow.org/v1alpha1"
COUNT = {"type": "integer", "minimum": 1}
CUSTOM["TrainJob"] = resource(
    TRAINER,
    "TrainJob",
    record(
        ["runtimeRef"],
        # Without a kind it is a runtime of the whole cluster.
        runtimeRef=record(["name", "kind"], name=NAME, kind={"const": "TrainingRuntime"}),
        trainer=record(
            image=TEXT,
            command={"type": "array", "items": TEXT},
            args={"type": "array", "items": {"type": "string"}},
            numNodes=COUNT,
        ),
    ),
)
CUSTOM["TrainingRuntime"] = resource(
    TRAINER,
    "TrainingRuntime",
    record(
        ["template"],
        mlPolicy=record(numNodes=COUNT, torch=record()),
        template=record(
            spec=record(
                replicatedJobs={
                    "type": "array",
                    "items": record(
                        ["name", "template"],
                        name=NAME,
                        template=record(["spec"], metadata=record(labels=TEXTS), spec={}),
                    ),
                }
            )
        ),
    ),
)


def check(found, version):
    """Refuse a resource that a cluster would refuse."""
    if found["kind"] in CUSTOM:
        jsonschema.validate(found, CUSTOM[found["kind"]])
        for job in found["spec"].get("template", {}).get("spec", {}).get("replicatedJobs", []):
            kind = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
            kubernetes_validate.validate(
                kind | {"spec": job["template"]["spec"]}, version, strict=True
            )
    else:
        kubernetes_validate.validate(found, version, strict=True)
