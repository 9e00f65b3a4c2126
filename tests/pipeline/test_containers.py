"""The steps in containers. What needs an engine needs the built image too: `make image`."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import pytest
from kfp import dsl

import components
from components import _containers
from components._local import execute
from filterpress.errors import BudgetError, FilterpressError
from filterpress.loop import compress
from tests import tiny

#: Of the demo, with less training: the data has to be one that the image can make by itself.
DEMO = {
    "max_size": "12x",
    "min_accuracy": "-8pp",
    "max_rounds": 1,
    "max_retrains": 1,
    "train_config": json.dumps({"epochs": 4, "precision": "float32"}),
}
LIST = "import importlib.metadata as m, json; "
LIST += "print(json.dumps({d.name: d.version for d in m.distributions()}))"


@pytest.fixture(scope="module")
def image():
    try:
        return _containers.find(components.IMAGE).name
    except FilterpressError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def in_a_container(image):
    """Run Python in the image, shut in as a step is: what it printed, and its exit code."""
    docker = pytest.importorskip("docker")
    client = docker.from_env()

    def run(code):
        container = client.containers.run(
            image,
            ["python3", "-c", code],
            detach=True,
            read_only=True,
            tmpfs={"/tmp": ""},
            cap_drop=["ALL"],
            network_mode="none",
        )
        try:
            ended = container.wait()["StatusCode"]
            return container.logs().decode(), ended
        finally:
            container.remove(force=True)

    yield run
    client.close()


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def fail(text: str):
    from filterpress import errors

    raise errors.BudgetError(text)


def pinned():
    """Read constraints.txt: the name in lower case with dashes, as the index writes it."""
    lines = (tiny.ROOT / "constraints.txt").read_text().splitlines()
    return {plain(name): v for name, _, v in (line.partition("==") for line in lines) if v}


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.container
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_pipeline_in_containers_publishes_what_the_library_publishes(image, tmp_path):
    command = [sys.executable, "pipeline.py", "run", "--image", image, *tiny.flags(DEMO)]
    ended = subprocess.run(
        [*command, "--out", tmp_path / "run", "--size-tries", "1", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tiny.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert "Found image" in (tmp_path / "run" / "run.log").read_text()
    with tiny.one_thread():
        expected = compress(tmp_path / "library", **DEMO, size_tries=1)
    assert json.loads(ended.stdout)["sha256"] == expected["sha256"]


@pytest.mark.container
def test_a_step_that_fails_in_a_container_ends_the_run_with_its_own_words(image, tmp_path):
    @dsl.pipeline(name="inner")
    def inner(text: str):
        fail(text=text)

    @dsl.pipeline(name="failing")
    def failing(text: str):
        inner(text=text)

    with pytest.raises(BudgetError, match=r"^12 bytes of 10$"):
        execute(failing, {"text": "12 bytes of 10"}, tmp_path, [].append, image)


@pytest.mark.container
def test_the_image_has_the_versions_that_were_tested_and_nothing_to_build_with(in_a_container):
    printed, ended = in_a_container(LIST)
    assert ended == 0, printed
    found = {plain(name): v.partition("+")[0] for name, v in json.loads(printed).items()}
    assert found.pop("filterpress") == version("filterpress")
    # torch with CUDA brings what CPU builds do not have
    unknown = {name for name in found if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert {name: found[name] for name in unknown} == {n: pinned().get(n) for n in unknown}
    assert not unknown & {"pip", "wheel"}
    assert {"torch", "kfp", "google-cloud-storage"} <= unknown


@pytest.mark.container
def test_the_image_is_not_run_by_root_and_computes_on_a_read_only_file_system(in_a_container):
    printed, ended = in_a_container(
        "import os; os.environ['_KFP_RUNTIME'] = 'true'; "
        "import filterpress.stages, torch, kfp.dsl.executor_main; print(os.getuid())"
    )
    assert (printed.strip(), ended) == ("1000", 0)
    printed, ended = in_a_container("open('/home/filterpress/file', 'w')")
    assert ended == 1
    assert "Read-only file system" in printed


def test_without_the_package_docker_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(FilterpressError, match="pip install docker"):
        _containers.find("any")


@pytest.fixture
def engine(monkeypatch):
    """Stand in for an engine that knows no image: its address, and what it says to a bad name."""
    pytest.importorskip("docker")

    class Engine(BaseHTTPRequestHandler):
        def do_GET(self):
            answers = {
                "/version": (200, {"ApiVersion": "1.41"}),
                "/v1.41/images/nosuch:1/json": (404, {"message": "No such image: nosuch:1"}),
            }
            invalid = 404, {"message": "invalid reference format"}
            status, said = answers.get(self.path, invalid)
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("image", "line"),
    [
        ("nosuch:1", "image nosuch:1 is not here: build or pull it first"),
        ("two words", "the engine refuses image 'two words': invalid reference format"),
    ],
)
@pytest.mark.usefixtures("engine")
def test_an_image_that_is_not_here_or_cannot_be_is_one_line(image, line):
    with pytest.raises(FilterpressError, match=f"^{line}$"):
        _containers.find(image)


def test_an_engine_that_does_not_answer_is_one_line(engine, monkeypatch):
    engine.server_close()
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    with pytest.raises(FilterpressError, match=r"^no container engine answers: "):
        _containers.find("any")


def test_the_folder_docker_of_the_repository_is_not_taken_for_the_package():
    assert (tiny.ROOT / "docker").is_dir()
    code = "import components; from kfp.local import task_dispatcher as t; "
    code += "print(getattr(t.docker_task_handler, 'docker', None))"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True, check=True
    )
    assert "namespace" not in ended.stdout


@pytest.mark.parametrize(
    "file", ["docker/stage.Dockerfile", "Makefile", "components/__init__.py", "docs/images.md"]
)
def test_the_version_of_the_image_is_that_of_the_package(file):
    text = (tiny.ROOT / file).read_text(encoding="utf-8")
    named = re.findall(r'(?:filterpress-(?:python|device):|image\.version=")([\w.]+)', text)
    assert set(named) == {version("filterpress")}


def test_what_lies_in_the_folder_of_the_run_is_not_mounted_again(tmp_path):
    given = {"store": str(tmp_path / "out" / "release"), "data": "digits"}
    assert _containers.outside(given, tmp_path / "out") == {}


def test_what_lies_elsewhere_is_mounted_and_with_a_store_the_keys_beside_it(tmp_path):
    for name in ("photos", "keys", "release", "data"):
        (tmp_path / name).mkdir()
    given = {
        "data": f"image-folder:{tmp_path / 'photos'}",
        "data_dir": str(tmp_path / "data"),
        "store": str(tmp_path / "release"),
        "weights": "gs://bucket/weights",
    }
    assert _containers.outside(given, tmp_path / "out") == {
        "data": tmp_path / "photos",
        "data_dir": tmp_path / "data",
        "store": tmp_path / "release",
        "keys": tmp_path / "keys",
    }


@pytest.mark.parametrize("name", ["weights", "data_dir", "store", "keys"])
def test_what_cannot_be_mounted_is_refused_before_a_step_loses_what_it_writes(name, tmp_path):
    with pytest.raises(ValueError, match=f"^{name} must be an absolute path that exists"):
        _containers.outside({name: str(tmp_path / "nowhere")}, tmp_path / "out")


def test_images_in_a_relative_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^data must be an absolute path"):
        _containers.outside({"data": "image-folder:docs"}, tmp_path)
