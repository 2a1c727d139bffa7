"""The configurations of new models and schedulers that a recipe contains."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import AutoencoderKL

from mobius_train.assembly.load_scheduler import scheduler_class
from mobius_train.config import RunConfig
from mobius_train.errors import MobiusError, did_you_mean
from mobius_train.models.families import DEFAULT, family_of


def check_new_configs(config: RunConfig) -> None:
    """Check the names in the recipe's unet_config, vae_config and scheduler_config.

    diffusers ignores names that a class does not have.

    Raises:
        MobiusError: a class does not have one of the names, or is not supported.
    """
    if config.unet_config is not None:
        _check("unet_config", _image_model(config.unet_config), config.unet_config)
    if config.vae_config is not None:
        _check("vae_config", AutoencoderKL, config.vae_config)
    if config.scheduler_config is not None:
        _check("scheduler_config", scheduler_class(config.scheduler_config), config.scheduler_config)


def _image_model(values: dict[str, Any]) -> type[Any]:
    return family_of(values["_class_name"], values).image_model if "_class_name" in values else DEFAULT.image_model


def _check(field: str, kind: type[Any], values: dict[str, Any]) -> None:
    known = list(inspect.signature(kind.__init__).parameters)[1:]
    # Names with an underline are those of the file's format.
    unknown = [name for name in values if not name.startswith("_") and name not in known]
    if unknown:
        raise MobiusError(
            "\n".join(
                [f"{field} has names that a {kind.__name__} does not have:"]
                + [f"  - {name}{did_you_mean(name, known)}" for name in unknown]
            )
        )
