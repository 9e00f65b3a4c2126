"""The manifests as a cluster gets them: valid on old and new Kubernetes, and in their place."""

import json
import shutil

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.manifests.rendering import ENVIRONMENTS, FOLDER, one, overlay, render
from tests.manifests.schemas import VERSIONS, check


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_cluster_takes_every_resource(environment, version):
    for found in overlay(environment):
        check(found, version)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_resource_is_in_the_namespace_of_its_environment(environment):
    for found in overlay(environment):
        assert found["metadata"]["namespace"] == f"filterpress-{environment}", found


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_resource_has_a_name_of_its_own(environment):
    names = [(found["kind"], found["metadata"]["name"]) for found in overlay(environment)]
    assert len(set(names)) == len(names)


def test_a_field_that_a_resource_does_not_have_is_refused():
    for found in overlay("prod"):
        wrong = json.loads(json.dumps(found))
        wrong.setdefault("spec", wrong)["nosuchfield"] = "x"
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check(wrong, VERSIONS[0])


@pytest.mark.parametrize("kind", ["Pipeline", "PipelineVersion"])
def test_what_runs_point_to_outlives_its_place_in_git(kind):
    annotations = one(overlay("prod"), kind)["metadata"]["annotations"]
    assert annotations["argocd.argoproj.io/sync-options"] == "Prune=false,Delete=false"
    assert annotations["kustomize.toolkit.fluxcd.io/prune"] == "disabled"


def test_a_prefix_and_a_suffix_change_every_name_and_what_points_to_it(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "manifests")
    renamed = {"resources": ["manifests/overlays/dev"], "namePrefix": "a-", "nameSuffix": "-b"}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(renamed))
    found = render(tmp_path)
    assert one(found, "PipelineVersion")["spec"]["pipelineName"] == "a-filterpress-b"
    assert one(found, "Pipeline")["metadata"]["name"] == "a-filterpress-b"
    accounts = {r["metadata"]["name"] for r in found if r["kind"] == "ServiceAccount"}
    job = one(found, "CronJob", "a-filterpress-submit")["spec"]["jobTemplate"]["spec"]["template"]
    told = {e["name"]: e.get("value") for e in job["spec"]["containers"][0]["env"]}
    assert {told["SERVICE_ACCOUNT"], job["spec"]["serviceAccountName"]} <= accounts
    assert told["VERSION"] == one(found, "PipelineVersion")["spec"]["displayName"]


def test_the_pipeline_comes_before_its_version():
    wave = "argocd.argoproj.io/sync-wave"
    kinds = ("Pipeline", "PipelineVersion")
    waves = [int(one(overlay("prod"), kind)["metadata"]["annotations"][wave]) for kind in kinds]
    assert waves[0] < waves[1]


def test_a_cluster_takes_the_example_of_a_gateway():
    found = render(FOLDER / "gateway")
    for version in VERSIONS:
        for resource in found:
            check(resource, version)
    assert {resource["metadata"]["namespace"] for resource in found} == {"filterpress-gateway"}


def test_what_the_gateway_points_to_is_there():
    found = render(FOLDER / "gateway")
    deployment, service = one(found, "Deployment")["spec"], one(found, "Service")["spec"]
    pod = deployment["template"]
    labels = pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    configuration = one(found, "ConfigMap")
    selectors = [service["selector"], deployment["selector"]["matchLabels"]]
    kinds = {"NetworkPolicy": "podSelector", "PodDisruptionBudget": "selector"}
    selectors += [one(found, kind)["spec"][key]["matchLabels"] for kind, key in kinds.items()]
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert {port["targetPort"] for port in service["ports"]} <= ports
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == {
        mount["name"] for mount in container["volumeMounts"]
    }
    assert configuration["metadata"]["name"] in json.dumps(pod["spec"]["volumes"])
    assert pod["spec"]["serviceAccountName"] == one(found, "ServiceAccount")["metadata"]["name"]
