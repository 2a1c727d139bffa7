"""DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True).

The package mobius_train must be installed.
"""

from mobius_train.pipeline import TextToVideoPipeline

__all__ = ["TextToVideoPipeline"]
