"""Captions of images and videos by a vision-language model."""

from __future__ import annotations

from typing import Literal

import torch
from PIL import Image
from pydantic import Field

from mobius_train.prepare.candidate import Candidate, Dropped
from mobius_train.prepare.stages import model_files as models
from mobius_train.prepare.stages.stage import ClipStage

KINDS = ("AutoProcessor", "AutoModelForImageTextToText")


class CaptionStage(ClipStage):
    """A chat model describes the video from all `frames` at once; a captioner (BLIP) describes each frame separately.

    All descriptions are kept in `drafts` for summarise; the first one becomes the caption.
    """

    name: Literal["caption"]
    model: str
    frames: int = Field(4, ge=1)
    prompt: str = "Describe in one sentence what happens in this video."
    language: str = "en"
    max_new_tokens: int = Field(64, ge=1)
    overwrite: bool = Field(False, description="replace existing captions in this language")

    def check(self) -> None:
        models.check(self.model, *KINDS)

    def process(self, clip: Candidate) -> None:
        if self.language in clip.captions and not self.overwrite:
            return
        pictures = models.images(clip.pixels, self.frames)
        chat = getattr(models.load(KINDS[0], self.model), "chat_template", None) is not None
        clip.drafts = [self._describe(pictures, True)] if chat else [self._describe([p], False) for p in pictures]
        written = [draft for draft in clip.drafts if draft]
        if not written:
            raise Dropped("no caption", "the model's output is empty")
        clip.captions[self.language] = written[0]

    @torch.no_grad()
    def _describe(self, pictures: list[Image.Image], chat: bool) -> str:
        processor, model = (models.load(kind, self.model) for kind in KINDS)
        if chat:
            content = [{"type": "image", "image": picture} for picture in pictures]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": self.prompt}]}]
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        else:
            inputs = processor(images=pictures, return_tensors="pt")
        written = model.generate(**inputs.to(models.device()), max_new_tokens=self.max_new_tokens, do_sample=False)
        # The output of a chat model starts with the prompt.
        answer = written[:, inputs["input_ids"].shape[1] :] if chat else written
        return str(processor.batch_decode(answer, skip_special_tokens=True)[0]).strip()
