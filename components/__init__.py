"""The stages as Kubeflow components: one file a stage, and what they share.

A component is an interface: imports, one call into the library, and the record of what the stage
found. There is no decision and no arithmetic in it, so that the same function runs as a library
call, from the command line, and in a container.
"""

import os
import sys
from functools import partial
from importlib.util import find_spec

from kfp import dsl

# kfp.local tries `import docker`. Where that package is not installed, Python would take the folder
# docker/ of the repository for it.
if not getattr(find_spec("docker"), "origin", None):
    sys.modules["docker"] = None

#: The image of every step, read when the pipeline is compiled; a release pins it by digest.
IMAGE = os.environ.get("FILTERPRESS_IMAGE", "filterpress-python:0.1.0")

stage = partial(dsl.component, base_image=IMAGE, install_kfp_package=False)
