"""The methods of each stage by name, and the check of what a run configures."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filterpress.settings import Table


def pruners() -> Table:
    """Methods of the ``prune`` stage, the default first."""
    from filterpress.methods.prune_similar import SimilarityConfig, prune_similar

    return {"similarity": (prune_similar, SimilarityConfig)}


def clusterers() -> Table:
    """Methods of the ``cluster`` stage, the default first."""
    from filterpress.methods.merge_filters import MergeConfig, merge_filters

    return {"merge": (merge_filters, MergeConfig)}


def reducers() -> Table:
    """Methods of the ``reduce`` stage, the default first."""
    from filterpress.methods.project_channels import ProjectionConfig, project_channels
    from filterpress.methods.quantize_weights import QuantizationConfig, quantize_weights

    return {
        "project": (project_channels, ProjectionConfig),
        "quantize": (quantize_weights, QuantizationConfig),
    }


def check_configs(**configs: str) -> None:
    """Refuse configurations that a stage would refuse.

    Args:
        configs: JSON text by the names that `filterpress.compress` gives them.

    Raises:
        ValueError: There is no such method or field, or a value breaks its rule.
    """
    from filterpress import settings
    from filterpress.retraining import RetrainConfig
    from filterpress.training import FitConfig

    tables = {"prune": pruners, "cluster": clusterers, "reduce": reducers}
    kinds = {"train": FitConfig, "retrain": RetrainConfig}
    for key, text in configs.items():
        stage = key.removesuffix("_config")
        try:
            if stage in kinds:
                settings.configure(kinds[stage], settings.parse(text))
            else:
                settings.choose(tables[stage](), text)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
