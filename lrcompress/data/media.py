"""Images and sounds as inputs of a model, opened and processed when they are taken."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lrcompress.data.examples import IGNORED, Examples, decoder_inputs, label_numbers, pad_of, written
from lrcompress.data.rows import Media, Rows
from lrcompress.errors import DataError


@final
class Images(Examples):
    """Images as the model's own processor makes them."""

    def __init__(self, media: Sequence[Media], labels: list[int] | None, processor: Any) -> None:
        self.media, self.labels, self.processor = media, labels, processor

    def __len__(self) -> int:
        return len(self.media)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`pixel_values` [B, C, H, W], and `labels` [B] where the data have them."""
        images = [_image(self.media[i]) for i in indices]
        batch = {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}
        if self.labels is not None:
            batch["labels"] = torch.tensor([self.labels[i] for i in indices])
        return batch


def images(rows: Rows, processor: Any, label_ids: Mapping[str, int]) -> Images:
    """Rows of images with the model's class numbers. Raises DataError for other labels, and without Pillow."""
    _image(rows.inputs[0])  # one that cannot be opened is told early
    labels = None if rows.labels is None else label_numbers(rows.labels, rows.origin, label_ids)
    return Images(rows.inputs, labels, processor)


def _image(media: Media) -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise DataError("images cannot be read here", got="no Pillow", do="pip install pillow") from error
    try:
        opened = PIL.Image.open(io.BytesIO(media.read()))
        if opened.mode.startswith("I"):  # 16 bits of gray, which `convert` would cut off at 255
            opened = opened.convert("I").point(lambda value: value / 256).convert("L")
        return opened.convert("RGB")
    except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise DataError(
            "a file of the data is no image", got=f"{media.place}: {error}", do="remove it, or correct it"
        ) from error


@final
class Sounds(Examples):
    """Sounds as the model's own feature extractor makes them, with what is said."""

    def __init__(
        self, media: Sequence[Media], targets: list[list[int]], processor: Any, start: int, prompt: int
    ) -> None:
        """`start` and `prompt` further tokens are given to the decoder, not asked of it."""
        self.media, self.targets, self.processor, self.start, self.prompt = media, targets, processor, start, prompt

    def __len__(self) -> int:
        return len(self.media)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`input_features` [B, mels, frames], `labels` [B, U] and the decoder's inputs."""
        extractor = self.processor.feature_extractor
        waves = [_wave(self.media[i]) for i in indices]
        features = extractor(waves, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
        targets = [self.targets[i] for i in indices]
        pad = pad_of(self.processor.tokenizer)
        batch = {"input_features": features} | decoder_inputs(targets, pad, self.start, features.shape[-1])
        batch["labels"][:, : self.prompt] = IGNORED
        return batch


def sounds(rows: Rows, processor: Any, length: int, start: int) -> Sounds:
    """Rows of sounds with what is said, cut at `length` tokens.

    Raises DataError without the texts, for sounds at another rate than the model's, and without soundfile.
    """
    texts, wanted = written(rows), processor.feature_extractor.sampling_rate
    longest = processor.feature_extractor.chunk_length
    for media in rows.inputs:
        opened = _opened(media)
        rate = opened.samplerate
        if opened.frames > longest * rate:
            raise DataError(
                f"{rows.origin}: a sound is longer than the model hears",
                got=f"{media.place}: {opened.frames / rate:.1f} s",
                allowed=f"{longest} s", do="cut it, with its text, or leave it out",
            )  # fmt: skip
        if rate != wanted:
            raise DataError(
                f"{rows.origin}: a sound has another sampling rate than the model takes",
                got=f"{media.place}: {rate} Hz", allowed=f"{wanted} Hz",
                do=f"resample the files: ffmpeg -i in.wav -ar {wanted} out.wav",
            )  # fmt: skip
    ids: list[list[int]] = processor.tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    said = [row[1:] if row[0] == start else row for row in ids]
    prompt = [token for token in getattr(processor.tokenizer, "prefix_tokens", []) if token != start]
    return Sounds(rows.inputs, said, processor, start, len(prompt))


def _wave(media: Media) -> Any:
    """One channel, [samples] float32."""
    return _opened(media).read(dtype="float32", always_2d=True).mean(axis=1)


def _opened(media: Media) -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise DataError(
            "sounds cannot be read here", got="no soundfile", do="pip install 'lrcompress[audio]'"
        ) from error
    try:
        return soundfile.SoundFile(io.BytesIO(media.read()))
    except soundfile.LibsndfileError as error:
        raise DataError(
            "a file of the data is no sound", got=f"{media.place}: {error}", do="remove it, or write it as wav or flac"
        ) from error
