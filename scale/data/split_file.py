"""Split files: the TOML of STATE and cell-load, found by path or by name, and read strictly.

Whatever contradicts itself, or means nothing, is an error with the place named: such a file makes
a benchmark of something else than it says. The splits of published benchmarks ship with the
package, in ``configs/splits``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale.config import config_dir
from scale.types import Perturbation, SourceError, SplitError, did_you_mean

TRAIN, VAL, TEST = "train", "val", "test"
_TABLES = ("datasets", "training", "zeroshot", "fewshot", "scale", "source")
_CONTEXTS = ("cell_type", "batch")


@dataclass(frozen=True, slots=True)
class FewShot:
    """Labels of one context that are held out; all others of it are training data."""

    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SplitFile:
    """The tables of a split file; contexts and labels as they are written."""

    context: str
    is_training: bool
    zeroshot: Mapping[str, str]
    fewshot: Mapping[str, FewShot]


def find_split_file(split: Path | str) -> Path:
    """Return the file that a setting means: a bare name is a split that ships, all else a path.

    A bare name has neither a folder nor an ending: ``tahoe100m_fewshot`` ships with the package,
    ``tahoe100m_fewshot.toml`` and ``./tahoe100m_fewshot`` are files of the user.

    Raises
    ------
    SplitError
        If no split of that name ships, or there is no such file.
    """
    text, path = str(split), Path(split)
    folder = config_dir() / "splits"
    if text == path.stem:
        path = folder / f"{text}.toml"
        if not path.is_file():
            known = sorted(file.stem for file in folder.glob("*.toml"))
            raise SplitError(
                f"no split {text!r} ships in {folder}: {did_you_mean(text, known)} "
                f"For a file of your own give its path, {text}.toml or ./{text}"
            )
    elif not path.is_file():
        raise SplitError(
            f"split {text} cannot be read: there is no such file in {path.absolute().parent}; "
            f"a bare name is a split that ships in {folder}"
        )
    return path


def read_split_file(path: Path | str) -> SplitFile:
    """Return what a split file says.

    Parameters
    ----------
    path
        A file, or the bare name of a split that ships (see :func:`find_split_file`).

    Raises
    ------
    SplitError
        If there is no such file, it cannot be read, has a table, key or value that means nothing,
        or contradicts itself.
    """
    file = find_split_file(path)
    try:
        tables = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SplitError(f"split {path} cannot be read: {error}") from error
    return _from_tables(str(path), tables)


def _from_tables(name: str, tables: dict[str, Any]) -> SplitFile:
    for table, content in tables.items():
        if table not in _TABLES:
            raise SplitError(f"{name}: unknown table [{table}]; {did_you_mean(table, _TABLES)}")
        if not isinstance(content, dict):
            raise SplitError(f"{name}: {table} is {content!r}; expected a table")
    datasets = set(tables.get("datasets", {}))
    for dataset in datasets:
        if "." in dataset:
            raise SplitError(
                f"{name}: dataset {dataset!r} has a dot, at which contexts are split off; rename it"
            )
    training = tables.get("training", {})
    for dataset, part in training.items():
        if part != TRAIN:
            raise SplitError(f'{name}: [training] {dataset} = {part!r}; expected "train"')
    named = {*training}
    zeroshot: dict[str, str] = {}
    for key, part in tables.get("zeroshot", {}).items():
        dataset, context = _split_key(name, "zeroshot", key)
        named.add(dataset)
        if part not in (VAL, TEST):
            raise SplitError(f'{name}: [zeroshot] "{key}" = {part!r}; expected "val" or "test"')
        _add_context(name, zeroshot, context, part)
    fewshot: dict[str, FewShot] = {}
    for key, lists in tables.get("fewshot", {}).items():
        dataset, context = _split_key(name, "fewshot", key)
        named.add(dataset)
        _add_context(name, fewshot, context, _read_lists(name, key, lists))
    if both := sorted(set(zeroshot) & set(fewshot)):
        raise SplitError(
            f"{name}: {listed(both)} in [zeroshot] and in [fewshot]; a context can be in one only"
        )
    for dataset in sorted(named - datasets):
        raise SplitError(
            f"{name}: dataset {dataset!r} is not in [datasets]; "
            f"{did_you_mean(dataset, sorted(datasets)) if datasets else 'add it there'}"
        )
    if len(named) > 1:
        raise SplitError(
            f"{name} is about {len(named)} datasets ({listed(sorted(named))}), but a store is "
            "one; write one file for each"
        )
    context = _read_context(name, tables.get("scale", {}))
    return SplitFile(context, bool(training), zeroshot, fewshot)


def _read_context(name: str, table: dict[str, Any]) -> str:
    for key in table:
        if key != "context":
            raise SplitError(f"{name}: unknown key {key!r} in [scale]; known: context")
    context = str(table.get("context", "cell_type"))
    if context not in _CONTEXTS:
        raise SplitError(f'{name}: [scale] context = "{context}"; expected "cell_type" or "batch"')
    return context


def _read_lists(name: str, key: str, lists: Any) -> FewShot:
    if not isinstance(lists, dict):
        raise SplitError(f'{name}: [fewshot] "{key}" = {lists!r}; expected lists val and test')
    values = {}
    for part, labels in lists.items():
        if part not in (VAL, TEST):
            raise SplitError(
                f'{name}: unknown list {part!r} in [fewshot."{key}"]; known: val, test'
            )
        if not isinstance(labels, list) or not all(isinstance(text, str) for text in labels):
            raise SplitError(f'{name}: {part} of [fewshot."{key}"] is no list of labels')
        if any(not text.strip() for text in labels):
            raise SplitError(f'{name}: {part} of [fewshot."{key}"] holds an empty label; remove it')
        values[part] = tuple(labels)
    few_shot = FewShot(**values)
    if not few_shot.val and not few_shot.test:
        raise SplitError(
            f'{name}: [fewshot."{key}"] holds nothing out; list labels under val or test, or '
            "remove the table"
        )
    val, test = (
        {canonical_label(text): text for text in part} for part in (few_shot.val, few_shot.test)
    )
    if both := sorted(val[label] for label in val.keys() & test.keys()):
        raise SplitError(
            f'{name}: {len(both)} labels of [fewshot."{key}"] are in val and in test '
            f"({listed(both)}); remove them from one of the lists"
        )
    return few_shot


def _split_key(name: str, table: str, key: str) -> tuple[str, str]:
    dataset, dot, context = key.partition(".")
    if not dot or not dataset or not context.strip():
        raise SplitError(
            f'{name}: [{table}] "{key}" is no context; expected "dataset.context" in quotes'
        )
    return dataset, context.strip()


def _add_context(name: str, contexts: dict[str, Any], context: str, value: object) -> None:
    if context in contexts:
        raise SplitError(f"{name}: context {context!r} is named twice; merge the entries")
    contexts[context] = value


def listed(names: Sequence[str], shown: int = 5) -> str:
    """Return the first names, for a message."""
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def canonical_label(text: str) -> str:
    """Return the canonical label of a text; combinations without doses in the order of names."""
    try:
        label = Perturbation.parse(text).label
        if label.startswith("[("):
            return label
        return Perturbation.parse(text, separator="+").label
    except SourceError:
        return text.strip()
