"""Captions of a clip, from text or from JSON with several languages and variants."""

from __future__ import annotations

from typing import Any, NamedTuple

from mobius_train.data.texts import clean_text, decode_text, legible_name, parse_json
from mobius_train.errors import MobiusError

SUFFIXES = (".txt", ".json")
FIELDS = ("caption", "text", "prompt")
MAX_WEIGHT = 1e6
MAX_CAPTION_BYTES = 2**20  # file size


class Caption(NamedTuple):
    """One caption of a clip. A sample draws it with probability proportional to `weight`."""

    text: str
    weight: float = 1.0


def read_caption(data: bytes, suffix: str, name: str, language: str) -> tuple[Caption, ...]:
    """The captions of a file: the text of a .txt, or the "caption" or "text" of a .json.

    Raises:
        MobiusError: there is no caption, or none in this language; names `name`.
    """
    return caption_of(read_record(data, suffix, name), name, language)


def read_record(data: bytes, suffix: str, name: str) -> Any:
    """The contents of a caption file; those of a .txt as {"text": …}.

    Raises:
        MobiusError: it is no valid JSON; names `name`.
    """
    text = decode_text(data)
    return {"text": text} if suffix == ".txt" else parse_json(text, f"the caption of {name}")


def read_captions(data: bytes, suffix: str, name: str) -> Any:
    """The unchecked caption value of a file: text, text by language, or anything else the file contains.

    Raises:
        MobiusError: there is none; names `name`.
    """
    return _field(read_record(data, suffix, name), name)


def caption_field(record: Any) -> Any:
    """The unchecked caption value of a record, the first of FIELDS; None if there is none."""
    values = [record[field] for field in FIELDS if isinstance(record, dict) and record.get(field) is not None]
    return values[0] if values else None


def _field(record: Any, name: str) -> Any:
    value = caption_field(record)
    if value is None:
        raise MobiusError(f'{name} has no caption: add a "caption" or a "text"')
    return value


def caption_of(record: Any, name: str, language: str) -> tuple[Caption, ...]:
    """The captions of a record {"caption", "text" or "prompt": C, or {language: C}}.

    C is a string or a list of variants; a variant is a string or {"text": string, "weight": number}. Variants of
    weight 0 are dropped, and variants with the same text are merged.

    Raises:
        MobiusError: there is no caption, none in this language, or an invalid weight; names `name`.
    """
    caption = _field(record, name)
    if isinstance(caption, dict):
        if language not in caption:
            languages = legible_name(", ".join(sorted(map(str, caption)))) or "none"
            raise MobiusError(f"{name} has no caption in language {language!r}; available: {languages}")
        caption = caption[language]
    if not isinstance(caption, list):
        return (Caption(_words(caption, name)),)
    weights: dict[str, float] = {}
    for variant in caption:
        text, weight = _variant(variant, name)
        weights[text] = weights.get(text, 0.0) + weight
    variants = tuple(Caption(text, weight) for text, weight in weights.items() if weight > 0)
    if not variants:
        raise MobiusError(f"none of the {len(caption)} captions of {name} has a weight above 0")
    return variants


def _words(caption: Any, name: str) -> str:
    if not isinstance(caption, str) or not caption.strip():
        raise MobiusError(
            f"the caption of {name} is {'empty' if caption == '' else repr(caption)[:80]}: it must be non-empty text"
        )
    return clean_text(caption.strip())


def _variant(variant: Any, name: str) -> Caption:
    if not isinstance(variant, dict):
        return Caption(_words(variant, name))
    if not set(variant) <= {"text", "weight"}:
        keys = legible_name(", ".join(sorted(map(str, variant))))
        raise MobiusError(f'a caption of {name} has the keys {keys}: only "text" and "weight" are allowed')
    weight = variant.get("weight", 1.0)
    # In Python True is an int, and json accepts NaN and infinity.
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MAX_WEIGHT:
        raise MobiusError(f"a caption of {name} has weight {weight!r}: it must be a number from 0 to {MAX_WEIGHT}")
    return Caption(_words(variant.get("text"), name), float(weight))
