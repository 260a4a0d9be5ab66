"""What a user types on a command line: names checked, text quoted, mistakes explained in one line.

Apart from ``config`` because it knows no setting: it reads names and types from a root dataclass
that is handed to it. Nothing heavy is imported, so that a typo is answered at once.
"""

import types
import typing
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import OmegaConfBaseException

from scale.types import did_you_mean, nearest

_GROUPS_WITHOUT_FIELD = ("experiment",)


def check_keys(schema: type, overrides: Sequence[str]) -> list[str]:
    """Return the overrides as Hydra wants them, or raise naming the nearest known setting.

    Text that Hydra's grammar would stumble over (``control=DMSO (vehicle)``) is quoted where the
    setting is a text, and entries of a free mapping (``where.plate=[a]``) need no leading ``+``.

    Parameters
    ----------
    schema
        Root dataclass of the task.
    overrides
        ``key=value``, ``group=option``, with Hydra's prefixes or without.

    Raises
    ------
    ValueError
        If a key is no setting.

    Examples
    --------
    >>> from scale.config import PrepareConfig
    >>> check_keys(PrepareConfig, ["control=DMSO (vehicle)", "where.plate=[1]"])
    ['control="DMSO (vehicle)"', '++where.plate=[1]']
    >>> check_keys(PrepareConfig, ["contorl=DMSO"])
    Traceback (most recent call last):
    ValueError: no setting 'contorl' in 'the config' (contorl=DMSO); did you mean 'control'?
    """
    return [_check(schema, override) for override in overrides]


def _check(schema: type, override: str) -> str:
    left, equals, value = override.partition("=")
    key = left.lstrip("+~").strip()
    prefix = left[: len(left) - len(left.lstrip("+~"))]
    name = key.partition("@")[0]
    if name.split(".")[0].split("/")[0] == "hydra":
        return override
    if not equals and prefix != "~":
        raise ValueError(f"{override!r} is no setting; settings are written key=value")
    kind = _kind(schema, name, override)
    if kind is _Free:
        return f"{prefix or '++'}{key}={value}"
    return f"{prefix}{key}{equals}{_quoted(value, kind)}"


class _Free:
    """Kind of a setting inside a mapping with free keys."""


def _kind(schema: type, name: str, override: str) -> Any:
    """Return the declared type of a dotted name."""
    kind: Any = schema
    place = "the config"
    for depth, part in enumerate(name.split(".")):
        if typing.get_origin(kind) is dict:
            return _Free
        section = _section(kind)
        if section is None:
            raise ValueError(f"{place!r} is one value and has no {part!r} ({override})")
        known = typing.get_type_hints(section)
        if part not in known:
            if depth == 0 and part in _GROUPS_WITHOUT_FIELD:
                return Any
            hint = _hint(part, known, schema if depth == 0 else None)
            raise ValueError(f"no setting {part!r} in {place!r} ({override}); {hint}")
        kind = known[part]
        place = part if depth == 0 else f"{place}.{part}"
    return kind


def _hint(part: str, known: dict[str, Any], root: type | None) -> str:
    """Say what was meant; a name without its section is looked for in all sections."""
    if root is not None and not nearest(part, known):
        inside = {
            f"{group}.{field}": field
            for group, kind in known.items()
            if (section := _section(kind)) is not None
            for field in typing.get_type_hints(section)
        }
        close = nearest(part, inside.values())
        full = [name for name, field in inside.items() if close and field == close[0]]
        if full:
            return f"did you mean {' or '.join(repr(name) for name in full)}?"
    return did_you_mean(part, list(known))


def _section(kind: Any) -> Any:
    """Return the dataclass behind ``Group`` or ``Group | None``, or None for a leaf."""
    return next((choice for choice in _choices(kind) if is_dataclass(choice)), None)


def _choices(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return typing.get_args(kind)
    return (kind,)


def _quoted(value: str, kind: Any) -> str:
    """Quote text that Hydra cannot read as it stands."""
    is_text = str in _choices(kind) or kind is Any
    is_list = typing.get_origin(kind) is list or kind is Any
    if not (is_text or is_list) or _is_readable(value):
        return value
    if is_list and value.startswith("[") and value.endswith("]"):
        items = [item.strip() for item in _split(value[1:-1])]
        return f"[{','.join(i if _is_readable(i) else _quote(i) for i in items)}]"
    return _quote(value)


def _is_readable(value: str) -> bool:
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return False
    return True


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    items, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0 and not quote:
            items.append("")
        else:
            items[-1] += letter
    return items


def _quote(text: str) -> str:
    # inside quotes a backslash is special only before a quote, the closing one included
    mark = "'" if '"' in text and "'" not in text else '"'
    escaped = text.replace(f"\\{mark}", f"\\\\{mark}").replace(mark, f"\\{mark}")
    tail = len(escaped) - len(escaped.rstrip("\\"))
    return mark + escaped + "\\" * tail + mark


def explain(error: Exception, folder: Path) -> str:
    """Return one line for an error of the settings, without the words of the libraries below.

    Parameters
    ----------
    error
        Of Hydra, of OmegaConf, or one's own.
    folder
        With the yaml files of all groups.
    """
    match error:
        case MissingConfigException(missing_cfg_file=str(name)):
            group, _, option = name.partition("/")
            files = (folder / group).rglob("*.yaml")
            options = [f.relative_to(folder / group).with_suffix("").as_posix() for f in files]
            hint = did_you_mean(option, options)
            known = "" if hint.startswith("known") else f" Known: {', '.join(sorted(options))}"
            return f"no option {option!r} in {group!r}; {hint}{known}"
        case OverrideParseException(override=override):
            return (
                f"cannot read {override!r}; put text with brackets, quotes, commas or blanks into "
                "quotes of its own, as 'key=\"some, text\"'"
            )
        case ConfigCompositionException(__cause__=OmegaConfBaseException() as cause):
            return explain(cause, folder)
        case OmegaConfBaseException(full_key=str(key), msg=str(text)) if key:
            return f"{_first_line(text)} ({key})"
    return _first_line(str(error)) if isinstance(error, OmegaConfBaseException) else _joined(error)


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0]


def _joined(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
