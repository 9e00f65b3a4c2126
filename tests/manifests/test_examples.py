"""The examples for Argo CD and Flux: they apply what the overlay is, in an order that works."""

import shutil

import pytest
import yaml

from tests.manifests.rendering import ENVIRONMENTS, FOLDER, one, overlay, render
from tests.manifests.schemas import VERSIONS, check

ARGO_CD, FLUX = FOLDER / "argocd" / "application.yaml", FOLDER / "flux" / "filterpress.yaml"


def documents(file):
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def applied_by_flux(step, folder):
    """Render a step of Flux with kustomize, as Flux itself does."""
    spec = step["spec"]
    made = {"resources": [f"source/{spec['path'].removeprefix('./manifests/')}"]}
    made |= {"patches": spec["patches"]} if "patches" in spec else {}
    made |= {"namespace": spec["targetNamespace"]} if "targetNamespace" in spec else {}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(made))
    return render(folder)


def name(found):
    return found["kind"], found["metadata"]["name"], found["metadata"]["namespace"]


@pytest.mark.parametrize("file", [ARGO_CD, FLUX])
def test_what_the_examples_say_is_what_their_tools_understand(file):
    for found in documents(file):
        check(found, VERSIONS[0])


def test_argo_cd_applies_an_overlay_that_there_is_to_its_own_namespace():
    (application,) = documents(ARGO_CD)
    environment = application["spec"]["source"]["path"].removeprefix("manifests/overlays/")
    assert environment in ENVIRONMENTS
    namespaces = {found["metadata"]["namespace"] for found in overlay(environment)}
    assert namespaces == {application["spec"]["destination"]["namespace"]}


def test_argo_cd_never_keeps_a_copy_of_the_pipeline_in_an_annotation():
    (application,) = documents(ARGO_CD)
    assert "ServerSideApply=true" in application["spec"]["syncPolicy"]["syncOptions"]


def test_flux_applies_the_pipeline_first_and_everything_once(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "source")
    source, first, second = documents(FLUX)
    before, after = (applied_by_flux(step, tmp_path) for step in (first, second))
    assert [found["kind"] for found in before] == ["Pipeline"]
    wanted = {name(found) for found in overlay("prod")}
    assert sorted(map(name, before + after)) == sorted(wanted)
    assert second["spec"]["dependsOn"] == [{"name": first["metadata"]["name"]}]
    assert first["spec"]["wait"]
    for step in (first, second):
        assert step["spec"]["sourceRef"]["name"] == source["metadata"]["name"]
    assert one(before, "Pipeline")["spec"] == one(overlay("prod"), "Pipeline")["spec"]
