"""Names and families of the Fluent Emoji, from the code points in their file names.

A file name is the code point sequence of its emoji (`1f44b-1f3fb.webp`). The names in words come from the PyPI package
`emoji`.
"""

from __future__ import annotations

import re
from functools import lru_cache

from mobius_train.errors import MobiusError

LANGUAGES = ("en", "zh")
SKIN_TONES = frozenset(("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"))
END_OF_TAG = "\U000e007f"  # ends the code of a region; omitted in the file names
EMOJI_STYLE = "fe0f"  # selects the coloured presentation; does not identify the emoji
# Emoji of two people are a single code point without skin tones, and a joined sequence with them.
JOINED = {
    "1f469-200d-1f91d-200d-1f469": "1f46d",  # women holding hands
    "1f469-200d-1f91d-200d-1f468": "1f46b",  # woman and man holding hands
    "1f468-200d-1f91d-200d-1f468": "1f46c",  # men holding hands
    "1faf1-200d-1faf2": "1f91d",  # handshake
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",  # kiss
    "1f9d1-200d-2764-200d-1f9d1": "1f491",  # couple with heart
}


def has_skin_tone(key: str) -> bool:
    return not SKIN_TONES.isdisjoint(key.split("-"))


def family(key: str) -> str:
    """The key shared by all skin-tone variants of an emoji: '1f44b' for both '1f44b-1f3fb' and '1f44b'."""
    left = "-".join(part for part in key.split("-") if part != EMOJI_STYLE and part not in SKIN_TONES)
    return JOINED.get(left, left)


def names(key: str) -> dict[str, str] | None:
    """Names by language, such as {"en": "grinning face", "zh": "笑脸"}; None if the emoji has no name."""
    try:
        # Three flags (England, Scotland, Wales) join some of their code points with underscores.
        sign = "".join(chr(int(part, 16)) for part in re.split("[-_]", key) if part != EMOJI_STYLE)
    except (ValueError, OverflowError):  # the file name is not a code point sequence
        return None
    by_language = _names().get(sign) or _names().get(sign + END_OF_TAG)
    return dict(by_language) if by_language else None


@lru_cache(maxsize=1)
def _names() -> dict[str, dict[str, str]]:
    try:
        import emoji
    except ImportError as error:
        raise MobiusError("emoji names need the package emoji: pip install 'mobius-train[emoji]'") from error
    emoji.config.load_language(list(LANGUAGES))
    return {
        sign.replace(chr(int(EMOJI_STYLE, 16)), ""): {
            language: entry[language].strip(":").replace("_", " ") for language in LANGUAGES
        }
        for sign, entry in emoji.EMOJI_DATA.items()
        if all(language in entry for language in LANGUAGES)
    }
