"""Quotes an API's answer without the session id, in whatever form the answer repeats it.

An API may repeat a session id as it was sent, cut off, escaped, encoded twice or in base64, and the possible forms are
not known. So a word is quoted only if it looks like a word of a language, a short number, a code or a path. If the
result still shares eight characters with the session id, nothing is quoted.
"""

from __future__ import annotations

import re

#: Longest message in logs and dead letters, in characters.
LONGEST_MESSAGE = 200
#: Characters of a text that are read.
_LONGEST_TEXT = 2000
#: A quote must not share this many consecutive characters with the session id.
_SHARED = 8
#: A session id of at least this many characters is searched within words.
_SHORT = 4
#: A part of a word. No encoding of a session id looks like this, except a very short one by chance.
_PART = r"(?:[0-9]{1,5}|[0-9]{0,3}(?:[A-Z]?[a-z]+|[A-Z]{1,8})[0-9]{0,3})"
_WORD = re.compile(rf"[\"'(\[/]*{_PART}(?:[-_./:'?]+{_PART})*[\"')\].,:;!?/]*")
_A_PART = re.compile(_PART)
_BETWEEN_SIGNS = re.compile(r"[^-_./:]+")
_LEFT_OUT = "…"


def clean(text: str, session_id: str) -> str:
    """*text* from outside as words on one line, at most 200 characters, without *session_id*."""
    kept = " ".join(_kept(word, _WORD, session_id) for word in one_line(text[:_LONGEST_TEXT]).split())
    kept = re.sub(f"{_LEFT_OUT}( {_LEFT_OUT})+", _LEFT_OUT, kept)
    return _LEFT_OUT if _shares(kept, session_id) else clip(kept)


def clean_url(url: str, session_id: str) -> str:
    """*url*, which has neither query nor fragment, without the parts that may contain *session_id*."""
    kept = _BETWEEN_SIGNS.sub(lambda part: _kept(part[0], _A_PART, session_id), url[:_LONGEST_TEXT])
    return _LEFT_OUT if _shares(kept, session_id) else clip(kept)


def _kept(word: str, form: re.Pattern[str], session_id: str) -> str:
    parts = [_bare(word), *_words(word)]
    is_in_session = any(len(part) >= _SHORT and part in _bare(session_id) for part in parts)
    return word if form.fullmatch(word) and not is_in_session else _LEFT_OUT


def _shares(text: str, session_id: str) -> bool:
    """Whether *text* shares too much with the session id, without regard to case and punctuation."""
    shown, secret = _bare(text), _bare(session_id)
    if len(secret) >= _SHORT:
        return any(secret[at : at + _SHARED] in shown for at in range(max(len(secret) - _SHARED, 0) + 1))
    plainly = len(session_id) >= _SHORT and session_id.casefold() in text.casefold()
    return plainly or secret in _words(text)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _bare(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).casefold()


def one_line(text: str) -> str:
    """*text* with one space in place of each sequence of unprintable characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def clip(text: str) -> str:
    """*text* on one line, cut to :data:`LONGEST_MESSAGE`."""
    text = one_line(text)
    return text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 1] + "…"
