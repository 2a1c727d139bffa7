"""The text of PixArt: one text encoder, of whose padding the image model must know.

Legend: L text tokens.
"""

from __future__ import annotations

from mobius_train.conditions import MASK, Conditions
from mobius_train.encoders.text_encoder import TextEncoder, Tokens
from mobius_train.pretrained.model_files import read_json
from mobius_train.pretrained.model_names import local_folder, resolve_package
from mobius_train.pretrained.pipeline_index import INDEX

# Tokens of a caption, by diffusers' class of the pipeline; ours write theirs into the index.
PIPELINE_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}


class MaskedText(TextEncoder):
    """A text encoder that also gives `mask`, (L,): false for padding; see TextEncoder.

    Captions are in lower case, as in diffusers' pipelines of PixArt.
    """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See TextEncoding."""
        return super().shapes() | {MASK: (self.max_tokens,)}

    def identity(self) -> dict[str, str]:
        """See TextEncoding."""
        return super().identity() | {"mask": "of padding", "captions": "in lower case"}

    def tokenize(self, caption: str, where: str = "") -> Tokens:
        """See TextEncoder."""
        return super().tokenize(caption.lower().strip(), where)

    def embed(self, tokens: Tokens) -> Conditions:
        """See TextEncoder."""
        return super().embed(tokens) | Conditions({MASK: tokens.mask[0].bool().to(self.device)})


def pipeline_tokens(name_or_path: str) -> int | None:
    """The number of tokens with which a pipeline encodes captions, diffusers' or ours; None if it does not say.

    Raises:
        MobiusError: the pipeline's index is damaged.
    """
    folder = local_folder(resolve_package(name_or_path))
    if folder is None or not (folder / INDEX).is_file():
        return None
    index = read_json(folder / INDEX)
    return index.get("max_text_tokens") or PIPELINE_TOKENS.get(index.get("_class_name", ""))
