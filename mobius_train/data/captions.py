"""A clip's captions from text, or from JSON that may say them in several languages and variants."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from mobius_train.errors import MobiusError

SUFFIXES = (".txt", ".json")
FIELDS = ("caption", "text")
MAX_WEIGHT = 1e6
MAX_CAPTION_BYTES = 2**20  # of the file


class Caption(NamedTuple):
    """One of the captions of a clip; a sample of it takes this one with a probability in proportion to `weight`."""

    text: str
    weight: float = 1.0


def read_caption(data: bytes, suffix: str, name: str, language: str) -> tuple[Caption, ...]:
    """The captions in a .txt file, which is one, or under "caption" or "text" in a .json file.

    Raises:
        MobiusError: naming `name`, where there is no caption or none in this language.
    """
    return caption_of(_record(data, suffix, name), name, language)


def _record(data: bytes, suffix: str, name: str) -> Any:
    try:
        text = data.decode("utf-8-sig")
        return {"text": text} if suffix == ".txt" else json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise MobiusError(f"the caption of {name} is no UTF-8 {suffix[1:]}: {error}") from error


def read_captions(data: bytes, suffix: str, name: str) -> Any:
    """What the file has as its caption: words, or words by language, or anything else that someone put there.

    Raises:
        MobiusError: naming `name`, where there is none.
    """
    return _field(_record(data, suffix, name), name)


def _field(record: Any, name: str) -> Any:
    found = [record[field] for field in FIELDS if isinstance(record, dict) and record.get(field) is not None]
    if not found:
        raise MobiusError(f'{name} has no caption: give it a "caption" or a "text"')
    return found[0]


def caption_of(record: Any, name: str, language: str) -> tuple[Caption, ...]:
    """The captions of a record {"caption" or "text": C, or {language: C}}.

    C is words, or a list of variants: words, or {"text": words, "weight": number}. Variants of weight 0 are left out,
    and those of the same words are one.

    Raises:
        MobiusError: naming `name`, where there is no caption or none in this language, or a weight makes no sense.
    """
    caption = _field(record, name)
    if isinstance(caption, dict):
        if language not in caption:
            languages = ", ".join(sorted(map(str, caption))) or "none"
            raise MobiusError(f"{name} has no caption in the language {language!r}; available: {languages}")
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
            f"the caption of {name} is {'empty' if caption == '' else repr(caption)[:80]}: it wants words"
        )
    return caption.strip()


def _variant(variant: Any, name: str) -> Caption:
    if not isinstance(variant, dict):
        return Caption(_words(variant, name))
    if not set(variant) <= {"text", "weight"}:
        raise MobiusError(
            f'a caption of {name} has {", ".join(sorted(map(str, variant)))}: a variant has a "text" and a "weight"'
        )
    weight = variant.get("weight", 1.0)
    # True is an int to Python; NaN and infinity are numbers to its JSON.
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MAX_WEIGHT:
        raise MobiusError(f"a caption of {name} has the weight {weight!r}: a weight is a number from 0 to {MAX_WEIGHT}")
    return Caption(_words(variant.get("text"), name), float(weight))
