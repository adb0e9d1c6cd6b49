"""What may be quoted of an answer: words, never a session, in whatever form the answer repeats it.

An API may repeat a session as it came, cut short, escaped, encoded twice or in base64, and nobody knows all such
forms. So a word is quoted only where it looks like one of a language, a short number, a code or a path; and nothing is
quoted where what is left still shares eight characters with the session.
"""

from __future__ import annotations

import re

#: Characters of a message, as it goes to logs and dead letters.
LONGEST_MESSAGE = 200
#: Characters of a text that are looked at.
_LONGEST_TEXT = 2000
#: Characters that a text may not share with the session, in a row.
_SHARED = 8
#: Characters from which on a short session is looked for within words.
_SHORT = 4
#: A part of a word: no encoding of a session looks like this, but for very short ones by chance.
_PART = r"(?:[0-9]{1,5}|[0-9]{0,3}(?:[A-Z]?[a-z]+|[A-Z]{1,8})[0-9]{0,3})"
_WORD = re.compile(rf"[\"'(\[/]*{_PART}(?:[-_./:'?]+{_PART})*[\"')\].,:;!?/]*")
_A_PART = re.compile(_PART)
_BETWEEN_SIGNS = re.compile(r"[^-_./:]+")
_LEFT_OUT = "…"


def clean(text: str, session_id: str) -> str:
    """*text* from outside as words on one line, at most 200 characters, without the session *session_id*."""
    kept = " ".join(_kept(word, _WORD, session_id) for word in one_line(text[:_LONGEST_TEXT]).split())
    kept = re.sub(f"{_LEFT_OUT}( {_LEFT_OUT})+", _LEFT_OUT, kept)
    return _LEFT_OUT if _shares(kept, session_id) else clip(kept)


def clean_url(url: str, session_id: str) -> str:
    """*url*, which has neither query nor fragment, without the parts that may hold the session *session_id*."""
    kept = _BETWEEN_SIGNS.sub(lambda part: _kept(part[0], _A_PART, session_id), url[:_LONGEST_TEXT])
    return _LEFT_OUT if _shares(kept, session_id) else clip(kept)


def _kept(word: str, form: re.Pattern[str], session_id: str) -> str:
    parts = [_bare(word), *_words(word)]
    is_in_session = any(len(part) >= _SHORT and part in _bare(session_id) for part in parts)
    return word if form.fullmatch(word) and not is_in_session else _LEFT_OUT


def _shares(text: str, session_id: str) -> bool:
    """Whether *text* has too much of the session, whatever case and signs are between."""
    said, secret = _bare(text), _bare(session_id)
    if len(secret) >= _SHORT:
        return any(secret[at : at + _SHARED] in said for at in range(max(len(secret) - _SHARED, 0) + 1))
    plainly = len(session_id) >= _SHORT and session_id.casefold() in text.casefold()
    return plainly or secret in _words(text)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _bare(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).casefold()


def one_line(text: str) -> str:
    """*text* with a space for each run of what can't be printed."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def clip(text: str) -> str:
    """*text* on one line, cut to :data:`LONGEST_MESSAGE`."""
    text = one_line(text)
    return text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 1] + "…"
