"""Trackers that a recipe names in `training.report_to`, checked before anything is built.

The library has the callbacks; all that is done here is to say in time what is missing, because a
run of days should not end, or begin an hour later, with an ImportError.  Easy to get wrong: the
package of a tracker is not always called like its key.
"""

from importlib.util import find_spec

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

# Key, module, and what to install; others are checked by the library itself when they start.
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio", "trackio"),
    "mlflow": ("mlflow", "mlflow"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "swanlab": ("swanlab", "swanlab"),
    "neptune": ("neptune", "neptune"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "dvclive": ("dvclive", "dvclive"),
}


def check_trackers(report_to: str | list[str] | None) -> None:
    """Refuses trackers that do not exist or are not installed.

    Raises:
        ValueError: with the line that installs what is missing.
    """
    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"training.report_to names {name!r}, which is no tracker; take of tensorboard, "
                f"wandb, trackio, {', '.join(sorted(set(INTEGRATION_TO_CALLBACK) - set(PACKAGES)))}"
                f" or {', '.join(sorted(set(PACKAGES) - {'tensorboard', 'wandb', 'trackio'}))}."
            )
        module, package = PACKAGES.get(name, (None, name))
        if module is not None and find_spec(module) is None:
            raise ValueError(
                f"training.report_to names {name}, which is not installed; run: pip install "
                f"{package}, or take it out of the list."
            )


__all__ = ["check_trackers"]
