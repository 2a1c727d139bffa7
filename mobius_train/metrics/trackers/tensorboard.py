"""TensorBoard: event files in logs/."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch.utils.tensorboard import SummaryWriter

from mobius_train.metrics.trackers.tracker import About, Outcome, Sample


class TensorBoard:
    """A resumed run hides the events of the steps that it takes again."""

    identity = ""

    def __init__(self, about: About, known: str | None = None) -> None:
        about.logs.mkdir(parents=True, exist_ok=True)
        self._writer = SummaryWriter(str(about.logs), purge_step=about.first_step)
        for name, text in (("overview", about.overview), ("recipe", about.recipe_text)):
            # Markdown shows indented lines as they are.
            lines = [f"    {line}" for line in text.splitlines()]
            self._writer.add_text(name, "\n".join(lines), about.first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def samples(self, step: int, samples: list[Sample]) -> None:
        for name, path, caption in samples:
            with Image.open(path) as picture:
                width, height = picture.size
            # The file as it is: TensorBoard's pages show an animated GIF, which add_video would encode again.
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
            value = Summary.Value(
                tag=f"samples/{name}", image=image, metadata=SummaryMetadata(summary_description=caption)
            )
            self._writer._get_file_writer().add_summary(Summary(value=[value]), step)

    def close(self, outcome: Outcome) -> None:
        self._writer.close()
