"""One document as it was found, before anything is judged or decoded."""

import dataclasses

from core.config import UserError


@dataclasses.dataclass(frozen=True)
class Document:
    """`id` says where it was found, `raw` is what, in any encoding."""

    id: str
    raw: bytes


def field_bytes(value: str | bytes | None, where: str, field: str) -> bytes:
    """The bytes of a row's field; null is empty. UserError when it is not text."""
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        kind = type(value).__name__
        raise UserError(f"data: {where}: field {field!r} is {kind}, not text; set data.text_field")
    # JSON can name half of a surrogate pair: curation must see it, so it may not fail here.
    return value.encode("utf-8", "surrogatepass")
