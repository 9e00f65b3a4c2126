"""The component for clusters with Kubeflow Trainer: the machines of `nodes`."""

import functools
import re
import shutil
import tempfile
from pathlib import Path

import jsonschema
import pytest

from filterpress.launching.trainjob import body
from tests.manifests.rendering import ENVIRONMENTS, FOLDER, one, overlay, render
from tests.manifests.schemas import VERSIONS, check

IMAGE = "registry.example/filterpress-python@sha256:" + "0" * 64


@functools.cache
def with_trainer(environment):
    """Render an overlay whose line about the component is not a comment any more."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(FOLDER, Path(folder) / "manifests")
        file = copy / "overlays" / environment / "kustomization.yaml"
        text, n = re.subn(r"^# (components: )", r"\1", file.read_text(), flags=re.MULTILINE)
        assert n == 1
        file.write_text(text)
        return render(file.parent)


def added(environment):
    return [found for found in with_trainer(environment) if found not in overlay(environment)]


def runtime():
    return one(with_trainer("prod"), "TrainingRuntime")


def replicated():
    (found,) = runtime()["spec"]["template"]["spec"]["replicatedJobs"]
    return found


def template():
    return replicated()["template"]["spec"]["template"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_cluster_with_trainer_takes_every_resource(environment, version):
    for found in with_trainer(environment):
        check(found, version)
        assert found["metadata"]["namespace"] == f"filterpress-{environment}"


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_cluster_without_trainer_is_given_nothing_of_it(environment):
    assert "trainer.kubeflow.org" not in str(overlay(environment))
    kinds = sorted(found["kind"] for found in added(environment))
    assert kinds == ["NetworkPolicy", "Role", "RoleBinding", "TrainingRuntime"]


def test_a_field_that_a_runtime_or_a_job_does_not_have_is_refused():
    job = body("name", IMAGE, ["-m", "module"], nodes=2, runtime="filterpress")
    check(job, VERSIONS[0])
    for found in (job, runtime()):
        with pytest.raises(jsonschema.ValidationError):
            check({**found, "spec": {**found["spec"], "podTemplateOverrides": []}}, VERSIONS[0])


def test_a_job_names_the_runtime_there_is_and_its_image_reaches_the_container():
    assert runtime()["metadata"]["name"] == "filterpress"
    assert runtime()["spec"]["mlPolicy"]["torch"] == {}
    job = replicated()
    # Trainer knows by these what the job's image, command and number of machines are for.
    assert job["name"] == "node"
    step = "trainer.kubeflow.org/trainjob-ancestor-step"
    assert job["template"]["metadata"]["labels"][step] == "trainer"
    (container,) = template()["spec"]["containers"]
    assert container["name"] == "node"


def test_a_machine_writes_to_its_own_folders_and_has_no_rights():
    spec = template()["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert not spec["automountServiceAccountToken"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts) == {"/tmp", "/dev/shm"}
    assert {v["name"] for v in spec["volumes"] if "emptyDir" in v} == set(mounts.values())
    (home,) = container["env"]
    assert home == {"name": "HOME", "value": "/tmp"}
    account = one(overlay("prod"), "ServiceAccount", "filterpress-run")
    assert spec["serviceAccountName"] == account["metadata"]["name"]


def test_the_machines_talk_to_one_another_and_nobody_else_talks_to_them():
    policy = one(added("prod"), "NetworkPolicy")["spec"]
    labels = template()["metadata"]["labels"]
    own = {"podSelector": policy["podSelector"]}
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == [{"from": [own]}]
    assert {"to": [own]} in policy["egress"]
    assert labels["sidecar.istio.io/inject"] == "false"


def test_one_account_may_make_jobs_and_no_right_is_a_wildcard():
    rules = one(added("prod"), "Role")["rules"]
    groups = [(rule["apiGroups"], rule["resources"]) for rule in rules]
    assert groups == [(["trainer.kubeflow.org"], ["trainjobs"]), ([""], ["pods"])]
    assert not [rule for rule in rules if "*" in rule["verbs"]]
    (subject,) = one(added("prod"), "RoleBinding")["subjects"]
    assert subject["name"] == template()["spec"]["serviceAccountName"]
