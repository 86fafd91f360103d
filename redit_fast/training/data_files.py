"""The rows of JSONL and Parquet files and of data sets of the hub, one at a time.

A row of any of them is a dict of what JSON has: text, numbers, true and false, null, lists and objects. Parquet and hub
data are read a batch of rows after the other; nothing is downloaded but what a name of the hub asks for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from redit_fast import extras
from redit_fast.foreign import Foreign
from redit_fast.training.config_file import distinct
from redit_fast.training.data_names import Hub, hub_of

Rows = Iterator[tuple[int, dict]]
BATCH = 1000  # rows that are Arrow's and Python's at a time
JSON = "extension<arrow.json>"  # Arrow's type of texts that are JSON
PLAIN = (OSError, ValueError)  # of pyarrow and datasets: their words are for a user


def rows(source: str, columns: Collection[str] | None = None) -> Rows:
    """(number, row) for each row of Parquet and hub data, for each line of JSONL that is not blank, from 1 on.

    Args:
        source: FILE.jsonl, FILE.parquet, or a name as `data_names.hub_of` has it.
        columns: those to read, where the data has its columns apart; a line of JSONL is read whole. None: all.

    Raises:
        ValueError: one sentence with the source and, where there are such, row or line and column.
        MissingExtra: pyarrow or datasets is not installed, where the source needs it.
    """
    check(source)
    if (hub := hub_of(source)) is not None:
        return _of_hub(source, hub, columns)
    return _of_jsonl(source) if source.endswith(".jsonl") else _of_parquet(source, columns)


def check(source: str) -> None:
    """Asks nothing but the name and what is installed.

    Raises:
        ValueError, MissingExtra: as `rows`, of a source that cannot be read here whatever is in it.
    """
    if hub_of(source) is not None or source.endswith(".parquet"):
        extras.need("data", f"data {source}")
    elif not source.endswith(".jsonl"):
        raise ValueError(
            f"data {source}: needs a .jsonl or .parquet file, or hub:OWNER/NAME for a data set of the Hugging Face hub"
        )


def commit_of(source: str, hub: Hub) -> str:
    """The commit that a data set of the hub is read at.

    Raises:
        ValueError: it cannot be loaded.
    """
    files = [Path(file["filename"]) for file in _loaded(source, hub).cache_files]
    return " ".join(sorted({file.parent.name for file in files}))  # OWNER___NAME/CONFIG/VERSION/COMMIT/NAME-SPLIT.arrow


def check_regular(file: Path, what: str, error: type[ValueError] = ValueError) -> None:
    """Refuses what may be waited for for ever when it is opened, or never ends; a file that is not there passes.

    Raises:
        ValueError: of the type `error`, one sentence that begins with `what`.
    """
    if file.is_fifo() or file.is_char_device() or file.is_socket():
        raise error(f"{what}: needs a regular file, since it is read more than once")


def _opened(path: str) -> IO[bytes]:
    try:
        check_regular(Path(path), f"data {path}")
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"data {path}: {error.strerror}") from None


def _of_jsonl(path: str) -> Rows:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):  # a line ends at a line feed alone
            if line.strip():
                yield number, _object(f"{path}:{number}", line.removesuffix(b"\n"))


def _object(place: str, line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=distinct)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}:{error.start + 1}: malformed line: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}:{error.colno}: malformed line: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a key twice, a number of over 4300 digits, brackets 1000 deep
        raise ValueError(f"{place}: malformed line: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: malformed line: needs a JSON object, got {type(row).__name__}")
    return row


def _of_parquet(path: str, columns: Collection[str] | None) -> Rows:
    from pyarrow.parquet import ParquetFile

    with _opened(path) as opened:
        with Foreign(f"{path}: no Parquet file that can be read", plain=PLAIN):
            file = ParquetFile(opened)
            schema = file.schema_arrow
        yield from _of_arrow(path, schema, columns, lambda names: file.iter_batches(BATCH, columns=names))


def _of_hub(source: str, hub: Hub, columns: Collection[str] | None) -> Rows:
    found = _loaded(source, hub)

    def batches(names: list[str]) -> Iterator[Any]:
        return found.select_columns(names).with_format("arrow").iter(BATCH)

    yield from _of_arrow(source, found.features.arrow_schema, columns, batches)


@lru_cache(maxsize=2)  # train and held-out data: what a run is known by is then what it reads, whatever the hub has now
def _loaded(source: str, hub: Hub) -> Any:
    extras.need("data", f"data {source}")
    from datasets import load_dataset

    with Foreign(f"data {source}: cannot be loaded", plain=PLAIN):
        # By a URL, so that a folder OWNER/NAME here does not take its place.
        return load_dataset(f"hf://datasets/{hub.name}", hub.config, split=hub.split, keep_in_memory=False)


def _of_arrow(
    source: str, schema: Any, columns: Collection[str] | None, batches: Callable[[list[str]], Iterator[Any]]
) -> Rows:
    """The rows of Arrow's batches of some columns, which the schema is asked about first."""
    names = list(schema.names) if columns is None else [name for name in schema.names if name in columns]
    for name in columns or ():
        if name not in names:
            raise ValueError(f"{source}: no column {name!r}, found {', '.join(map(repr, schema.names)) or 'none'}")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{source}: column {name!r} is there twice")
        if not _is_json(schema.field(name).type):
            raise ValueError(
                f"{source}: column {name!r} has the type {schema.field(name).type}, needs what JSON has: text, "
                "numbers, true and false, lists, objects; to leave it out, name the others in columns"
            )
    kinds = {name: schema.field(name).type for name in names}
    as_json = {name: kind for name, kind in kinds.items() if JSON in str(kind)}
    chats = [name for name, kind in kinds.items() if _is_chat(kind)]
    number = 0
    with Foreign(f"{source}: cannot be read", plain=PLAIN):
        of_names = batches(names)
    while True:
        with Foreign(f"{source}: cannot be read behind row {number}", plain=PLAIN):
            batch = next(of_names, None)
            found = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        for row in found:
            number += 1
            for name, kind in as_json.items():
                try:
                    row[name] = _loaded_json(row[name], kind)
                except (ValueError, RecursionError) as error:  # as in `_object`
                    raise ValueError(f"{source}:{number}: column {name!r}: malformed: {error}") from None
            for name in chats:
                row[name] = _without_nulls(row[name])
            yield number, row


def _is_json(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind) or _is_list(kind):
        return _is_json(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(kind.field(i).type) for i in range(kind.num_fields))
    plain = (types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_string,
             types.is_large_string)  # fmt: skip
    return str(kind) == JSON or any(of(kind) for of in plain)


def _loaded_json(value: Any, kind: Any) -> Any:
    """What datasets keeps as JSON, since the rows have other keys or types each, anywhere in a column's values."""
    if value is None:
        return None
    if _is_list(kind):
        return [_loaded_json(item, kind.value_type) for item in value]
    if isinstance(value, dict):
        return {key: _loaded_json(item, kind.field(key).type) for key, item in value.items()}
    return json.loads(value, object_pairs_hook=distinct) if str(kind) == JSON else value


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_chat(kind: Any) -> bool:
    """Whether it is of lists of messages."""
    from pyarrow import types

    return _is_list(kind) and types.is_struct(kind.value_type) and kind.value_type.get_field_index("role") >= 0


def _without_nulls(messages: list | None) -> list | None:
    """A struct has the keys of all messages: those that this one has not are null."""
    if messages is None:
        return None
    return [m and {key: value for key, value in m.items() if value is not None} for m in messages]
