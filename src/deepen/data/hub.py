"""Datasets of the hub, read by the library `datasets`, which comes with `pip install deepen[data]`."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from deepen.core.errors import AddressError, DeepenError
from deepen.data.records import Record

PREFIX = "hub:"


def hub_records(address: str) -> Iterator[Record]:
    """The rows of `hub:OWNER/NAME`, or of one of its configurations, `hub:OWNER/NAME:CONFIGURATION`.

    Of its splits `train` is read, or the only one: which documents are held back is decided by their text, as with
    every other corpus. Rows come one by one over the network; code that comes with a dataset never runs.

    Raises `AddressError` if the library is missing, or the dataset can't be found or opened.
    """
    name, _, configuration = address.removeprefix(PREFIX).partition(":")
    if find_spec("datasets") is None:
        raise AddressError(f"{address} needs the library datasets: pip install 'deepen[data]', or give a local file")
    if "/" not in name or not all(name.split("/")):
        raise AddressError(f"{address} is no dataset's address; write it as hub:OWNER/NAME or hub:OWNER/NAME:CONFIG")
    return _rows(_open(address, name, configuration or None), address)


def _open(address: str, name: str, configuration: str | None) -> Any:
    import datasets

    try:
        splits = datasets.load_dataset(name, configuration, streaming=True)
    except Exception as cause:  # it passes on whatever its many readers and the network raise
        raise AddressError(f"can't open {address}: {type(cause).__name__}: {cause}") from cause
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise AddressError(f"{address} has no split train, and several others: {', '.join(splits)}")


def _rows(rows: Any, address: str) -> Iterator[Record]:
    numbered = enumerate(rows, start=1)
    while True:
        try:
            number, fields = next(numbered)
        except StopIteration:
            return
        except Exception as cause:
            raise DeepenError(f"{address} broke off: {type(cause).__name__}: {cause}") from cause
        yield Record(dict(fields), f"{address}, row {number}")
