"""Hides secrets in a text before it reaches a table, a log, a message or a terminal.

These are secrets: the value of a free setting (`spark.conf`, `source.options`) whose name matches
`SECRET_KEYS`; the value after the name of a secret in any text (`password=...`); the password in a
URI; and the signature in a signed URI. `mask` hides them. It also hides every value that was passed
to `remember_secret`, wherever the value occurs in the text.
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
# The names of free settings that hold secrets. This is a text, not a compiled pattern, since Spark
# uses it too (`spark.redaction.regex`). It also matches some names without a secret (`...keyStore`
# is a path); to hide those values too does no harm.
SECRET_KEYS = (
    r"(?i)secret|passw|passphrase|pwd|token|key|credential|signature"
    r"|(?:^|[._-])(?:sas|sig)(?:[._-]|$)"
)
_SECRET_KEY = re.compile(SECRET_KEYS)
# The names of secrets in all other places: as keys of nested settings, and before `=` or `:` in a
# text. Here a `key` alone is no secret, since it is mostly the key of a table. All repeats have an
# upper limit, so that the time to search a text grows only linearly with its length.
_SECRET_NAME = (
    r"(?:[\w.-]{0,200}(?:secret|passw(?:or)?d|passphrase|passwd|pwd|token|credential|signature"
    r"|(?:access|account|api|private|shared|secret|encryption|storage)[._-]?key(?:[._-]?id)?"
    r"|accesskeyid)[\w.-]{0,200}|(?:[\w.-]{0,200}[._-])?(?:sas|sig)(?:[._-][\w.-]{0,200})?)"
)
_ONLY_SECRET_NAME = re.compile(rf"(?i)^{_SECRET_NAME}$")
# The value of a secret. It ends before a quote, a bracket, a separator or a blank.
_SECRET_VALUE = r"[^\s\"'\\&;,(){}\[\]<>]+"
# Name, `=` or `:`, and value. Two colons do not count, since they occur in the names of tests.
_ASSIGNED = re.compile(
    rf"(?i)(?<![\w.-])({_SECRET_NAME}[\"']?\s?[=:](?!:)\s?[\"']?)({_SECRET_VALUE})"
)
# Credentials after `Bearer` or `Basic`, as in an HTTP header. To tell them from ordinary words,
# they have at least 8 characters, among them a digit, `+`, `/` or `=`.
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+(?=[\w.~+/-]{0,500}[\d+/=])([\w.~+/-]{8,}+=*+)(?!\*)")
# The password of a URI (scheme://user:password@host). It may hold an unquoted `@` or `/`, so it
# goes up to the last `@` of the word. Digits between `:` and `/` are a port, not a password.
_URI_PASSWORD = re.compile(
    r"(?<![\w+.-])([A-Za-z][\w+.-]{0,30}://[^\s/:@\"'?#]{0,200}):(?!\d{1,5}/)([^\s\"'<>]{1,500})@"
)
# The user of a web address without a password; it may be an access token.
_WEB_USER = re.compile(r"(?i)(https?://)[^\s/@:\"'<>]{1,500}@")
# Values that are no secrets: words of YAML, numbers, dates, and the empty text.
_PLAIN_VALUE = re.compile(r"(?i)^(true|false|null|none|yes|no|[\d.,:_-]*)$")
# A setting whose name has one of these endings says how a secret is used; its value is no secret.
_NAME_OF_NO_SECRET = re.compile(
    r"(?i)(provider|class|impl|enabled|type|algorithm|location|path|file)s?$"
)
_MIN_LENGTH = 6  # a shorter value occurs in texts by chance

_known_secrets: set[str] = set()


def is_secret(name: str) -> bool:
    """Return whether a free setting called `name` holds a secret.

    >>> is_secret("spark.hadoop.fs.s3a.secret.key"), is_secret("spark.ui.enabled")
    (True, False)
    """
    return bool(_SECRET_KEY.search(name))


def remember_secret(name: str, value: str) -> None:
    """Make `mask` hide `value`, the value of the secret `name`, wherever it occurs from now on.

    Some values are not remembered, since they are no secrets: numbers, words of YAML (`true`),
    texts of less than 6 characters, and values whose name ends in a word such as `class` or `path`.
    """
    if (
        len(value) >= _MIN_LENGTH
        and not _PLAIN_VALUE.match(value)
        and not _NAME_OF_NO_SECRET.search(name)
    ):
        _known_secrets.add(value)


def mask(text: str) -> str:
    """Return `text` with its secrets hidden. A text without secrets is returned unchanged.

    >>> mask("s3a://AKIA:hidden@lake/x"), mask("https://lake/x?sv=1&sig=abc%3D")
    ('s3a://AKIA:***@lake/x', 'https://lake/x?sv=1&sig=***')
    >>> mask("spark.hadoop.fs.s3a.secret.key=hidden"), mask("abfss://box@account.example/x")
    ('spark.hadoop.fs.s3a.secret.key=***', 'abfss://box@account.example/x')
    """
    for value in sorted(_known_secrets, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = _WEB_USER.sub(rf"\1{HIDDEN}@", text)
    text = _URI_PASSWORD.sub(rf"\1:{HIDDEN}@", text)
    text = _ASSIGNED.sub(rf"\1{HIDDEN}", text)
    return _BEARER.sub(rf"\1 {HIDDEN}", text)


def presentable(text: object, keep: str = "") -> str:
    """Return `text` as a terminal or a log may show it: secrets are hidden, and control characters
    are replaced by their escapes. The characters in `keep` are not replaced.
    """
    return printable(mask(str(text)), keep)


def mask_free(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return free settings (name -> value) with their secrets hidden: the values of secret names,
    and secrets within other values.
    """
    return {
        name: HIDDEN if is_secret(name) and value is not None else mask_value(value)
        for name, value in settings.items()
    }


def mask_value(value: Any) -> Any:
    """Return a value of texts, numbers, lists and dicts with its secrets hidden: secrets within its
    texts, and the texts under keys that name a secret.
    """
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {
            key: HIDDEN
            if isinstance(inner_value, str) and inner_value and _ONLY_SECRET_NAME.match(str(key))
            else mask_value(inner_value)
            for key, inner_value in value.items()
        }
    if isinstance(value, list | tuple):
        return [mask_value(inner_value) for inner_value in value]
    return value


def guard_output() -> None:
    """Hide secrets in the log records of this process, and in tracebacks of unhandled errors."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(existing_filter, _Masked) for existing_filter in handler.filters):
            handler.addFilter(_Masked())
    sys.excepthook = _print_masked


class _Masked(logging.Filter):
    """Hides the secrets of every log record; drops no record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = mask(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = mask("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return True


def _print_masked(
    error_type: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    text = "".join(traceback.format_exception(error_type, error, trace))
    sys.stderr.write(mask(text))
