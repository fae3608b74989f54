"""A record of named fields, from whatever kind of table, becomes a document."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import email.utils
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

from t5style.corpus.document import Document, valid
from t5style.corpus.parts import Quarantined

TIMES = ("time", "date", "timestamp", "published")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class Fields(Protocol):
    """What a source of records says of them: which fields hold text and id, and what holds for records that
    do not say themselves.
    """

    @property
    def text_field(self) -> str: ...
    @property
    def id_field(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def license(self) -> str: ...
    @property
    def language(self) -> str: ...


def document(
    record: dict[str, Any], fields: Fields, file: str, id: str, position: str
) -> Document | Quarantined:
    """The record as a document.

    Its own source, url, license and language are taken where they are strings, the first of time, date,
    timestamp and published that says a time as the time, and ``meta`` where it is an object, or says one in
    JSON; all other fields become meta. Meta has the file too, and the position in it where the id does not
    say that already, unless the record has fields of these names: a corpus that is read again keeps its
    lineage.

    Args:
      record: its fields; it is changed.
      fields: the source.
      file: where the record is from.
      id: for records without one; says the position.
      position: of the record in the file, as people call it.
    """
    text = record.pop(fields.text_field, None)
    if not isinstance(text, str):
        found = "is missing" if text is None else f"is a {type(text).__name__}"
        return Quarantined(file, position, "no text", f"the field {fields.text_field!r} {found}")
    meta = record.pop("meta", None)
    if isinstance(meta, str) and meta.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):  # else it only looked like JSON
            meta = json.loads(meta)
    if meta is None:
        meta = {}
    elif not isinstance(meta, dict):
        meta = {"meta": meta}
    given = record.pop(fields.id_field, None)
    own: dict[str, Any] = {
        "source": fields.source,
        "url": "",
        "license": fields.license,
        "language": fields.language,
    }
    for name in own:
        if isinstance(record.get(name), str):
            own[name] = record.pop(name) or own[name]
    time = ""
    for name in TIMES:
        if name in record and (time := iso_time(record[name])):
            del record[name]
            break
    lineage = {"file": file}
    if given not in (None, ""):
        id = str(given)
        lineage["position"] = position
    return Document(text, id, **own, meta=lineage | meta | record, time=time)


def iso_time(value: Any) -> str:
    """ISO 8601 for a time that is said so, as in mail and HTTP (RFC 5322), or in seconds or milliseconds
    since 1970; empty where it is no time. Text in ISO 8601 stays as it is.
    """
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, str):
        try:
            datetime.datetime.fromisoformat(value.strip())
            return value.strip()
        except ValueError:
            pass
        try:
            return email.utils.parsedate_to_datetime(value).isoformat()
        except (ValueError, TypeError, IndexError):
            pass
        try:
            value = float(value)
        except ValueError:
            return ""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return ""
    # 1e8 s is 1973; smaller numbers are years, days or something else. 1e11 s would be the year 5138.
    if 1e11 <= value < 1e14:
        value /= 1000
    if not 1e8 <= value < 1e11:
        return ""
    return datetime.datetime.fromtimestamp(value, datetime.UTC).isoformat()


def plain(value: Any) -> Any:
    """The value with nothing in it but what JSON can say: times as ISO 8601, decimals as text, bytes left out
    (None), numbers that are none as None, lone surrogates as U+FFFD.
    """
    if isinstance(value, str):
        return valid(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return None
    if isinstance(value, Mapping):
        return {valid(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's
        return plain(value.tolist())
    return valid(str(value))


def from_json(line: bytes) -> dict[str, Any] | Quarantined:
    """The object in a line of JSON; what is wrong with it has neither file nor position."""
    try:
        record = json.loads(line.decode())
        # A JSON string may hold half a surrogate pair, which no file can: U+FFFD stands for it from here.
        if _SURROGATE_ESCAPE.search(line):
            record = json.loads(valid(json.dumps(record, ensure_ascii=False)))
    except UnicodeDecodeError as error:
        return Quarantined("", "", "not utf-8", f"byte {error.start} of the line: {error.reason}")
    except (ValueError, RecursionError) as error:
        return Quarantined("", "", "malformed JSON", str(error))
    if not isinstance(record, dict):
        return Quarantined("", "", "not a JSON object", type(record).__name__)
    return record
