"""What a run refuses before anything is spent on it."""

from __future__ import annotations

import pytest

from filterpress import stages
from filterpress.presets import PRESETS

BAD = [
    ("sizes", ["8x", "tiny"], "max_size must be bytes"),
    ("model", "resnet2o", "model must be one of small, resnet20"),
    ("model", "torchvision:resnet19", "model must be torchvision: and one of"),
    ("model", "no.such.module:network", "importing no.such.module failed"),
    ("data", "imagenet", "data must be one of digits"),
    ("data", "image-folder:", "data must be one of digits"),
    ("image_size", -1, "image_size must be 0 or positive, got -1"),
    ("task", "math:tasks", "math has no such name"),
    ("max_size", "12 parsecs", "max_size must be bytes"),
    ("min_accuracy", "-1", "min_accuracy must be a fraction"),
    ("max_rounds", 0, "max_rounds must be at least 1, got 0"),
    ("max_retrains", -1, "max_retrains must be at least 0, got -1"),
    ("max_minutes", -1, "max_minutes must be at least 0, got -1"),
    ("size_tries", 0, "size_tries must be at least 1, got 0"),
    ("nodes", 0, "nodes must be at least 1, got 0"),
    ("accelerators", "two", "accelerators must be a whole number, got 'two'"),
    ("nodes", 2, "scratch must be a bucket that all machines reach"),
    ("scratch", "s3://bucket/runs", "scratch must be a directory or gs://bucket/prefix"),
    ("store", "ftp://host/models", "store must be a directory or gs://bucket/prefix"),
    ("store", "gs://bucket/models", "keys must name the folder of signing keys"),
    ("channel", "stable", "channel must be a kind of vehicle and a name, such as any/stable"),
    ("channel", "../x/stable", "hardware must be letters"),
    ("percent", 101.0, "percent must be"),
    ("train_config", "{", "train_config: config must be a JSON object"),
    ("prune_config", '{"method": "prune"}', "prune_config: method must be one of"),
    ("cluster_config", '{"images": 0}', "cluster_config: images must be at least 1, got 0"),
    ("reduce_config", '{"bits": 4}', "reduce_config: ProjectionConfig has fields"),
    ("retrain_config", '{"margin": 2}', "retrain_config: margin must be in"),
]


def test_the_defaults_can_be_used():
    assert stages.check() == {"stage": "check", "accelerators": "0"}


@pytest.mark.parametrize(("accelerators", "one"), [("0", "0"), ("1", "1"), ("8", "1")])
def test_prune_and_reduce_get_one_accelerator_where_one_of_them_trains(accelerators, one):
    train = {"deep-compression", "saliency-birch", "learned-threshold", "mac-budget", "joint"}
    for preset in PRESETS:
        found = stages.check(accelerators=accelerators, preset=preset)["accelerators"]
        assert found == (one if preset in train else "0")
    found = stages.check(accelerators=accelerators, prune_config='{"method": "saliency"}')
    assert found["accelerators"] == one


def test_a_channel_and_a_store_may_be_left_out_and_a_bucket_be_named():
    stages.check(channel="", percent=300.0)
    stages.check(store="gs://bucket/models", keys="/etc/keys", max_size="smallest")


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_a_setting_that_breaks_its_rule_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        stages.check(**{name: value})


@pytest.mark.parametrize("name", ["max_rounds", "max_retrains"])
def test_more_than_there_are_steps_for_is_refused(name):
    bounds = {"rounds": 3, "retrains": 3}
    stages.check(**{name: 3}, **bounds)
    with pytest.raises(ValueError, match=f"{name} must be at most 3, as the pipeline was compiled"):
        stages.check(**{name: 4}, **bounds)
