"""Data sets that are built once, in parallel, as memory-mapped Arrow files, and reused by later runs."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, SplitGenerator
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from fnl_hf.errors import UserInputError

logger = logging.get_logger(__name__)

_OS_ERROR = re.compile(r"^\w+: (\[Errno \d+\] .*)$", re.MULTILINE)  # of a traceback
# Errors from reading a damaged ``dataset_info.json``; building a data set raises others.
INFO_ERRORS = (ValueError, TypeError, LookupError, AttributeError)


class _Refused(DatasetGenerationError):
    """Carries a UserInputError through ``datasets``, which wraps every other error and, between processes, loses the
    cause."""


@dataclass
class TablesConfig(datasets.BuilderConfig):
    make_tables: Callable[..., Iterable[pa.Table]] | None = None
    pieces: list = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    def create_config_id(self, config_kwargs, custom_features=None):
        """The name of the folder in the cache."""
        return self.fingerprint


class Tables(datasets.ArrowBasedBuilder):
    """``Dataset.from_generator`` for functions that yield Arrow tables."""

    BUILDER_CONFIG_CLASS = TablesConfig

    def _info(self):
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager):
        # ``datasets`` divides this one list among the processes in contiguous parts and keeps its order.
        return [SplitGenerator(name=str(datasets.Split.TRAIN), gen_kwargs={"pieces": self.config.pieces})]

    def _generate_tables(self, pieces):
        try:
            yield from enumerate(self.config.make_tables(list(pieces), **self.config.arguments))
        except UserInputError as error:
            raise _Refused(str(error)) from error


def cached_dataset(
    name: str,
    make_tables: Callable[..., Iterable[pa.Table]],
    pieces: list,
    arguments: dict[str, Any],
    features: Features,
    fingerprint: str,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    rows_per_batch: int = 1000,
) -> Dataset:
    """The rows of ``make_tables(pieces, **arguments)``, from the cache if it has them.

    The cache is that of ``datasets``: two runs started at once wait for each other, and files of a killed run are
    written again. Files damaged by a full disk or by a cleaner of scratch disks are built again, with a warning.

    Args:
        pieces: the work, shared among ``num_proc`` processes; the rows must not depend on how it is shared.
        fingerprint: decides alone whether the cache holds these rows, so it must cover all that they depend on.
        rows_per_batch: rows in a record batch of the Arrow file.

    Raises:
        UserInputError: one raised by ``make_tables``, or the cache cannot be written.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)

    def read() -> Dataset:
        builder = Tables(
            cache_dir=cache_dir,
            dataset_name=name,
            features=features,
            writer_batch_size=rows_per_batch,
            make_tables=make_tables,
            pieces=pieces,
            arguments=arguments,
            fingerprint=fingerprint,
        )
        builder.download_and_prepare(num_proc=min(num_proc or 1, max(len(pieces), 1)))
        return _read_rows(builder, features)

    with _cache_errors(folder):
        try:
            return read()
        except INFO_ERRORS as error:
            logger.warning(f"The cache in {folder / name / fingerprint} is damaged and is built again: {error!r}")
            for info in (folder / name / fingerprint).rglob(datasets.config.DATASET_INFO_FILENAME):
                # Without it, ``datasets`` treats the folder as left by a killed run. Another process may have found the
                # damage, too.
                info.unlink(missing_ok=True)
            return read()


def _read_rows(builder: Tables, features: Features) -> Dataset:
    """All rows that were written.

    Raises:
        ValueError: some of them cannot be read.
    """
    count = builder.info.splits["train"].num_examples
    if count == 0:  # ``datasets`` cannot read a file without rows
        return Dataset.from_dict({column: [] for column in features}, features=features)
    try:
        rows = builder.as_dataset(split="train")
    except (OSError, pa.ArrowException) as error:
        raise ValueError(str(error)) from error
    if len(rows) != count:  # the stream is truncated between two record batches
        raise ValueError(f"it has {len(rows)} rows instead of {count}")
    return rows


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except _Refused as error:
        raise UserInputError(str(error)) from error
    except (OSError, DatasetGenerationError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        # In another process's traceback, which arrives as text, it is the last line.
        found = str(cause) if isinstance(cause, OSError) else "".join(_OS_ERROR.findall(str(cause))[-1:])
        if found:
            raise UserInputError(f"--cache_dir {folder}: not writable: {found}") from error
        raise
