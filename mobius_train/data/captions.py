"""A clip's caption from text, or from JSON that may say it in several languages."""

from __future__ import annotations

import json
from typing import Any

from mobius_train.errors import MobiusError

SUFFIXES = (".txt", ".json")
FIELDS = ("caption", "text")


def read_caption(data: bytes, suffix: str, name: str, language: str) -> str:
    """The caption in a .txt file, or under "caption" or "text" in a .json file.

    Raises:
        MobiusError: naming `name`, where there is no caption or none in this language.
    """
    content = _content(data, suffix, name)
    return caption_of({"text": content} if suffix == ".txt" else content, name, language)


def _content(data: bytes, suffix: str, name: str) -> Any:
    try:
        text = data.decode("utf-8-sig")
        return text if suffix == ".txt" else json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise MobiusError(f"the caption of {name} is no UTF-8 {suffix[1:]}: {error}") from error


def read_captions(data: bytes, suffix: str, name: str) -> Any:
    """What the file has as its caption: words, or words by language, or anything else that someone put there.

    Raises:
        MobiusError: naming `name`, where there is none.
    """
    content = _content(data, suffix, name)
    record = {"text": content} if suffix == ".txt" else content
    found = [record[field] for field in FIELDS if isinstance(record, dict) and record.get(field) is not None]
    if not found:
        raise MobiusError(f'{name} has no caption: it wants a "caption" or a "text"')
    return found[0]


def caption_of(record: Any, name: str, language: str) -> str:
    """The caption of a record {"caption" or "text": words, or {language: words}}.

    Raises:
        MobiusError: naming `name`, where there is no caption or none in this language.
    """
    field = next((field for field in FIELDS if isinstance(record, dict) and record.get(field) is not None), None)
    if field is None:
        raise MobiusError(f'{name} has no caption: it wants a "caption" or a "text"')
    caption = record[field]
    if isinstance(caption, dict):
        if language not in caption:
            languages = ", ".join(sorted(map(str, caption))) or "none"
            raise MobiusError(f"{name} has no caption in the language {language!r}; available: {languages}")
        caption = caption[language]
    if not isinstance(caption, str) or not caption.strip():
        raise MobiusError(
            f"the caption of {name} is {'empty' if caption == '' else repr(caption)[:80]}: it wants words"
        )
    return caption.strip()
