"""Small transformers over tokens of all families, and what differs between the families' tests."""

from __future__ import annotations

from typing import Any

import pixart
import sd3
import torch
from torch import Tensor

from mobius_train.models import ParallelPixArt, ParallelSD3
from mobius_train.models.pixart.backbone import PixArtBackbone
from mobius_train.models.sd3.backbone import SD3Backbone

KINDS = (*sd3.CONFIGS, *pixart.CONFIGS)
Batch = sd3.SD3Batch | pixart.PixArtBatch


def tiny_model(kind: str = "sd3", **changes: Any) -> Any:
    return pixart.tiny_pixart(kind, **changes) if kind in pixart.CONFIGS else sd3.tiny_sd3(kind, **changes)


def is_pixart(model: Any) -> bool:
    return type(model).__name__ == "PixArtTransformer2DModel"


def batch_for(model: Any, **sizes: Any) -> Any:
    """See `sd3_batch` and `pixart_batch`."""
    return (pixart.pixart_batch if is_pixart(model) else sd3.sd3_batch)(model, **sizes)


def backbone_of(model: Any) -> Any:
    return PixArtBackbone(model) if is_pixart(model) else SD3Backbone(model)


def parallel_of(model: Any, *shape: Any) -> Any:
    return (ParallelPixArt if is_pixart(model) else ParallelSD3).from_transformer(model, *shape)


def untouched(model: Any, batch: Batch) -> Tensor:
    """diffusers' prediction for the folded frames, (N, C, H, W); of PixArt without the variance, as in its pipeline."""
    with torch.no_grad():
        prediction = model(**batch.pictures(), return_dict=False)[0]
    channels = batch.sample.shape[1]
    return prediction.chunk(2, dim=1)[0] if prediction.shape[1] == 2 * channels else prediction


def cast(batch: Batch, dtype: torch.dtype) -> Any:
    return type(batch)(*(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in batch))
