"""Secrets are hidden here, before a text reaches a table, a log, a message or a terminal.

What is a secret: the value of a free setting (`spark.conf`, `source.options`) whose name says so
(`SECRET_KEYS`), what stands behind such a name in any text (`password=...`), the password of a URI,
and the signature of one that is signed. `mask` hides them, and every value that `learn` was told of,
wherever it is repeated.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from recspark.terminal import printable

HIDDEN = "***"
# In the names of free settings; as a text, since Spark reads it too. It hides more than secrets
# (`...keyStore`, a path): that costs nothing.
SECRET_KEYS = (
    r"(?i)secret|passw|passphrase|pwd|token|key|credential|signature"
    r"|(?:^|[._-])(?:sas|sig)(?:[._-]|$)"
)
_KEY = re.compile(SECRET_KEYS)
# In other names, and before `=` or `:` in a text: there a `key` is mostly that of a table. Repeats are
# bounded, so that a text of any size is read in time that grows as its length.
_NAME = (
    r"(?:[\w.-]{0,200}(?:secret|passw(?:or)?d|passphrase|passwd|pwd|token|credential|signature"
    r"|(?:access|account|api|private|shared|secret|encryption|storage)[._-]?key(?:[._-]?id)?"
    r"|accesskeyid)[\w.-]{0,200}|(?:[\w.-]{0,200}[._-])?(?:sas|sig)(?:[._-][\w.-]{0,200})?)"
)
_NARROW = re.compile(rf"(?i)^{_NAME}$")
# Ends before what may stand around a value: quotes, brackets, separators.
_VALUE = r"[^\s\"'\\&;,(){}\[\]<>]+"
# Two colons are the name of a test, not a value.
_ASSIGNED = re.compile(rf"(?i)(?<![\w.-])({_NAME}[\"']?\s?[=:](?!:)\s?[\"']?)({_VALUE})")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+(?=[\w.~+/-]{0,500}[\d+/=])([\w.~+/-]{8,}+=*+)(?!\*)")
# A password may hold `@` and `/` where nobody quoted them: up to the last `@` of the word. Digits
# before a `/` are a port.
_PASSWORD = re.compile(
    r"(?<![\w+.-])([A-Za-z][\w+.-]{0,30}://[^\s/:@\"'?#]{0,200}):(?!\d{1,5}/)([^\s\"'<>]{1,500})@"
)
_WEB_USER = re.compile(r"(?i)(https?://)[^\s/@:\"'<>]{1,500}@")
_PLAIN = re.compile(r"(?i)^(true|false|null|none|yes|no|[\d.,:_-]*)$")
# A secret's name with this at its end says what is done with it.
_NO_SECRET = re.compile(r"(?i)(provider|class|impl|enabled|type|algorithm|location|path|file)s?$")
_MIN_LENGTH = 6  # a shorter value is repeated by chance

_known: set[str] = set()


def is_secret(name: str) -> bool:
    """Return whether a free setting of this name holds a secret.

    >>> is_secret("spark.hadoop.fs.s3a.secret.key"), is_secret("spark.ui.enabled")
    (True, False)
    """
    return bool(_KEY.search(name))


def learn(name: str, value: str) -> None:
    """Hide the `value` of secret `name` wherever it is repeated from now on; a number, a word of YAML,
    a very short text or the name of a class is not learnt.
    """
    if len(value) >= _MIN_LENGTH and not _PLAIN.match(value) and not _NO_SECRET.search(name):
        _known.add(value)


def mask(text: str) -> str:
    """Return `text` with its secrets hidden; what holds none stays as it is, to the letter.

    >>> mask("s3a://AKIA:hidden@lake/x"), mask("https://lake/x?sv=1&sig=abc%3D")
    ('s3a://AKIA:***@lake/x', 'https://lake/x?sv=1&sig=***')
    >>> mask("spark.hadoop.fs.s3a.secret.key=hidden"), mask("abfss://box@account.example/x")
    ('spark.hadoop.fs.s3a.secret.key=***', 'abfss://box@account.example/x')
    """
    for value in sorted(_known, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = _WEB_USER.sub(rf"\1{HIDDEN}@", text)
    text = _PASSWORD.sub(rf"\1:{HIDDEN}@", text)
    text = _ASSIGNED.sub(rf"\1{HIDDEN}", text)
    return _BEARER.sub(rf"\1 {HIDDEN}", text)


def presentable(text: object, keep: str = "") -> str:
    """Return `text` as a terminal or a log may show it: secrets hidden, control characters as their
    escapes but those of `keep`.
    """
    return printable(mask(str(text)), keep)


def mask_free(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return free settings, name to value, with the values of secret names hidden."""
    return {
        name: HIDDEN if is_secret(name) and value is not None else mask_value(value)
        for name, value in settings.items()
    }


def mask_value(value: Any) -> Any:
    """Return a value of plain Python with every secret in its texts hidden, and texts of secret
    names.
    """
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {
            name: HIDDEN
            if isinstance(inner, str) and inner and _NARROW.match(str(name))
            else mask_value(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [mask_value(inner) for inner in value]
    return value


def guard_output() -> None:
    """Hide secrets in what this process logs, and in the traceback of an error nobody handles."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(present, _Masked) for present in handler.filters):
            handler.addFilter(_Masked())
    sys.excepthook = _print_masked


class _Masked(logging.Filter):
    """Lets every record pass, its secrets hidden."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = mask(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = mask("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return True


def _print_masked(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(mask(text))
