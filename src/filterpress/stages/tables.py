"""The methods of each stage by name, and the check of what a run configures."""

from __future__ import annotations

from filterpress import settings
from filterpress.presets import DEFAULT, find, overlay
from filterpress.settings import Choice, Table


def pruners() -> Table:
    """Methods of the ``prune`` stage, the default first."""
    from filterpress.methods.drop_blocks import BlocksConfig, drop_blocks
    from filterpress.methods.learn_thresholds import ThresholdConfig, learn_thresholds
    from filterpress.methods.prune_by_macs import MacsConfig, prune_by_macs
    from filterpress.methods.prune_salient import SaliencyConfig, prune_salient
    from filterpress.methods.prune_similar import SimilarityConfig, prune_similar
    from filterpress.methods.prune_structures import StructureConfig, prune_structures

    return {
        "similarity": (prune_similar, SimilarityConfig),
        "blocks": (drop_blocks, BlocksConfig),
        "threshold": (learn_thresholds, ThresholdConfig),
        "macs": (prune_by_macs, MacsConfig),
        "saliency": (prune_salient, SaliencyConfig),
        "structured": (prune_structures, StructureConfig),
    }


def clusterers() -> Table:
    """Methods of the ``cluster`` stage, the default first."""
    from filterpress.methods.merge_filters import MergeConfig, merge_filters
    from filterpress.methods.share_kernels import KernelsConfig, share_kernels
    from filterpress.methods.share_weights import SharingConfig, share_weights

    return {
        "merge": (merge_filters, MergeConfig),
        "kernels": (share_kernels, KernelsConfig),
        "share": (share_weights, SharingConfig),
    }


def reducers() -> Table:
    """Methods of the ``reduce`` stage, the default first."""
    from filterpress.methods.convert_layers import ConversionConfig, convert_layers
    from filterpress.methods.factor_layers import FactorConfig, factor_layers
    from filterpress.methods.project_channels import ProjectionConfig, project_channels
    from filterpress.methods.quantize_jointly import JointConfig, quantize_jointly
    from filterpress.methods.quantize_weights import QuantizationConfig, quantize_weights

    return {
        "project": (project_channels, ProjectionConfig),
        "quantize": (quantize_weights, QuantizationConfig),
        "factor": (factor_layers, FactorConfig),
        "convert": (convert_layers, ConversionConfig),
        "joint": (quantize_jointly, JointConfig),
    }


def retrainers() -> Table:
    """Methods of the ``retrain`` stage."""
    from filterpress.retraining import RetrainConfig, retrain_quantized

    return {"imitate": (retrain_quantized, RetrainConfig)}


TABLES = {
    "prune": pruners,
    "cluster": clusterers,
    "reduce": reducers,
    "retrain": retrainers,
}


def chosen(stage: str, preset: str, config: str) -> Choice:
    """Choose a stage's method and its configuration.

    Args:
        stage: Name of the stage.
        preset: Name of the preset, see `presets`.
        config: JSON object of the user's own.

    Raises:
        ValueError: There is no such preset, method or field, or a value breaks its rule.
    """
    return settings.choose(TABLES[stage](), overlay(preset, stage, config))


def check_configs(preset: str = DEFAULT, train_config: str = "{}", **configs: str) -> None:
    """Refuse configurations that a stage would refuse.

    Args:
        preset: Name of the preset.
        train_config: JSON object with fields of FitConfig.
        configs: JSON objects of the other stages, by the names that `filterpress.compress` gives
            them.

    Raises:
        ValueError: There is no such method or field, or a value breaks its rule.
    """
    from filterpress.training import FitConfig

    find(preset)  # before a stage is blamed for it
    try:
        settings.configure(FitConfig, settings.parse(train_config))
    except ValueError as error:
        raise ValueError(f"train_config: {error}") from error
    for stage in TABLES:
        key = f"{stage}_config"
        try:
            chosen(stage, preset, configs.get(key, "{}"))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
