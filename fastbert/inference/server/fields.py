"""What a request's body may hold."""

from collections.abc import Collection, Mapping
from typing import Any

import orjson

from fastbert.inference.server.refusals import EMPTY, FIELD, NOT_JSON, Refusal

Texts = list[str]
Ids = list[list[int]]


class Fields:
    """The fields of a body, a JSON object. What no field of `known` is called is refused: a slip in a name would change
    the results in silence.

    Raises:
        Refusal: here and in the methods, naming the field.
    """

    def __init__(self, body: bytes, known: Collection[str]) -> None:
        try:
            fields = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise Refusal(NOT_JSON, f"the body is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise Refusal(FIELD, f"the body must be a JSON object, but is {_kind(fields)}")
        for name in fields:
            if name not in known:
                raise Refusal(FIELD, f"unknown field {name!r}; known are {', '.join(known)}", param=name)
        self._fields: Mapping[str, Any] = fields

    def boolean(self, name: str, default: bool) -> bool:
        return default if (value := self._fields.get(name)) is None else self._of(bool, name, value)

    def string(self, name: str) -> str | None:
        return None if (value := self._fields.get(name)) is None else self._of(str, name, value)

    def integer(self, name: str) -> int | None:
        return None if (value := self._fields.get(name)) is None else self._of(int, name, value)

    def one_of(self, name: str, choices: Collection[str]) -> str | None:
        """The value, or None where there is none."""
        value = self.string(name)
        if value is not None and value not in choices:
            raise Refusal(FIELD, f"{name} must be {' or '.join(choices)}, but is {value!r}", param=name)
        return value

    def needed(self, name: str) -> Any:
        value = self._fields.get(name)
        if value is None:
            raise Refusal(FIELD, f"{name} is missing", param=name)
        if value == []:
            raise Refusal(EMPTY, f"{name} is empty", param=name)
        return value

    def needed_string(self, name: str) -> str:
        text: str = self._of(str, name, self.needed(name))
        return text

    def texts(self, name: str) -> Texts:
        """A list of strings, at least one."""
        value = self.needed(name)
        if not isinstance(value, list):
            raise Refusal(FIELD, f"{name} must be a list of strings, but is {_kind(value)}", param=name)
        for i, text in enumerate(value):
            if not isinstance(text, str):
                raise Refusal(FIELD, f"{name} must be strings, but number {i} is {_kind(text)}", param=name)
        return value

    def texts_or_ids(self, name: str) -> Texts | Ids:
        """A string, a list of strings, a list of token ids, or a list of such lists."""
        value = self.needed(name)
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list) or isinstance(value[0], str):
            return self.texts(name)
        ids: Ids = value if isinstance(value[0], list) else [value]
        for i, row in enumerate(ids):
            if not isinstance(row, list):
                raise Refusal(FIELD, f"{name} must be lists of token ids, but number {i} is {_kind(row)}", param=name)
            if not row:
                raise Refusal(EMPTY, f"number {i} of {name} is empty", param=name)
            for token in row:
                if type(token) is not int:
                    what = "must be strings, or lists of token ids"
                    raise Refusal(FIELD, f"{name} {what}, but holds {_kind(token)}", param=name)
        return ids

    def _of(self, kind: type[Any], name: str, value: Any) -> Any:
        if type(value) is not kind:  # a boolean is no integer
            raise Refusal(FIELD, f"{name} must be {_NAMES[kind]}, but is {_kind(value)}", param=name)
        return value


_NAMES = {
    bool: "a boolean",
    str: "a string",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def _kind(value: Any) -> str:
    return _NAMES[type(value)]
