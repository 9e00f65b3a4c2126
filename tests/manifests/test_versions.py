"""The pipeline as Kubernetes resources: names after their content, images by digest."""

import hashlib
import json
import re
import shutil

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec

from components._lint import images_are_pinned
from components._manifests import read_ir, version_name, write
from filterpress.errors import FilterpressError
from tests.manifests.rendering import ENVIRONMENTS, FOLDER, one, overlay

DIGEST = re.compile("sha256:[0-9a-f]{64}")


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "manifests")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def pin(folder, environment, digest):
    file = folder / "overlays" / environment / "kustomization.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(DIGEST.sub(digest, text), encoding="utf-8")


def name_in(folder, environment):
    file = folder / "overlays" / environment / "version.yaml"
    (name,) = {operation["value"] for operation in yaml.safe_load(file.read_text())}
    return name


def test_the_committed_manifests_are_what_make_manifests_gives(copy):
    written = [path for path in copy.rglob("*.yaml") if "do not edit" in path.read_text()]
    assert len(written) == 2 + 2 * len(ENVIRONMENTS)
    written.append(copy / "pipeline.yaml")
    for path in written:
        path.unlink()
    write(copy, FOLDER / "pipeline.yaml")
    assert contents(copy) == contents(FOLDER), "run: make manifests"


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_version_is_named_after_the_content_that_the_cluster_gets(environment):
    version = one(overlay(environment), "PipelineVersion")
    content = {key: value for key, value in version["spec"].items() if key.endswith("Spec")}
    numbers = json.loads(json.dumps(content), parse_int=float)
    canonical = json.dumps(numbers, sort_keys=True, separators=(",", ":"))
    digits = hashlib.sha256(canonical.encode()).hexdigest()[:10]
    assert re.fullmatch(rf"filterpress-[0-9-]+-{digits}", version["metadata"]["name"])
    assert version["spec"]["displayName"] == version["metadata"]["name"]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_step_runs_the_image_of_its_environment_by_digest(environment):
    version = one(overlay(environment), "PipelineVersion")
    assert list(images_are_pinned(version["spec"]["pipelineSpec"])) == []
    assert "filterpress-python:" not in json.dumps(overlay(environment))


def test_but_for_the_image_the_cluster_gets_the_compiled_pipeline():
    given = one(overlay("prod"), "PipelineVersion")["spec"]
    text = DIGEST.sub("", json.dumps(given["pipelineSpec"]))
    text = text.replace("registry.example/filterpress-python@", "filterpress-python:0.1.0")
    got = json_format.Parse(text, PipelineSpec())
    compiled = read_ir(FOLDER / "pipeline.yaml")["pipelineSpec"]
    assert got == json_format.ParseDict(compiled, PipelineSpec())
    assert given["pipelineName"] == compiled["pipelineInfo"]["name"]


def test_another_image_is_another_version_and_the_same_one_is_the_same(copy):
    pin(copy, "dev", "sha256:" + "1" * 64)
    pin(copy, "staging", "sha256:" + "1" * 64)
    write(copy, copy / "pipeline.yaml")
    names = {environment: name_in(copy, environment) for environment in ENVIRONMENTS}
    assert names["dev"] == names["staging"] != names["prod"] == name_in(FOLDER, "prod")


def test_another_pipeline_is_another_version(copy):
    file = copy / "pipeline.yaml"
    before = version_name(read_ir(file))
    file.write_text(file.read_text().replace("default 12x", "default 13x").replace("12x", "13x"))
    assert version_name(read_ir(file)) != before


def test_what_is_for_one_platform_is_part_of_the_version(copy):
    file = copy / "pipeline.yaml"
    whole = read_ir(file)
    text, platform = file.read_text().split("---\n")
    file.write_text(text)
    assert whole == {**read_ir(file), "platformSpec": yaml.safe_load(platform)}
    assert version_name(read_ir(file)) != version_name(whole)


@pytest.mark.parametrize("digest", ["", "latest", "sha256:12"])
def test_an_overlay_without_a_digest_is_refused_and_nothing_is_written(copy, digest):
    pin(copy, "staging", digest)
    pin(copy, "dev", "sha256:" + "2" * 64)
    before = contents(copy)
    other = copy.with_name("pipeline.yaml")
    other.write_text((copy / "pipeline.yaml").read_text().replace("12x", "13x"))
    with pytest.raises(FilterpressError, match=r"staging.* must give the digest of filterpress-p"):
        write(copy, other)
    assert contents(copy) == before
