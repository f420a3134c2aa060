"""Documents from a prepared tensorflow-datasets dataset, read without TensorFlow.

for document in examples(DataConfig(source="tfds", tfds_name="my_text", tfds_dir="datasets")):
    ...
"""

import contextlib
import os
from collections.abc import Iterator

import tensorflow_datasets as tfds

from core.config import UserError
from data.config import DataConfig
from data.texts.document import Document, field_bytes


def examples(config: DataConfig) -> Iterator[Document]:
    """The examples of a prepared tfds dataset, read without TensorFlow."""
    label = config.tfds_name or config.tfds_dir
    with opening(f"data: the dataset {label} cannot be opened"):
        builder = _builder(config)
    if not builder.info.splits:
        raise UserError(
            f"data.tfds_name={label} is not prepared in {builder.data_dir}; first run\n  "
            f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{config.tfds_name}', "
            f"data_dir={config.tfds_dir or None!r}, file_format='array_record')"
            '.download_and_prepare()"'
        )
    if config.text_field not in builder.info.features:
        has = ", ".join(builder.info.features)
        raise UserError(f"data.text_field={config.text_field!r} is not in {label} (it has {has})")
    has = ", ".join(builder.info.splits)
    try:
        with opening(f"data.tfds_split={config.tfds_split!r} cannot be read; it has {has}"):
            rows = builder.as_data_source(config.tfds_split)
    except NotImplementedError:
        raise UserError(
            f"data: {label} in {builder.data_dir} is not stored as array_record, which is the one "
            "format that is read without TensorFlow; prepare it again with "
            "file_format='array_record'"
        ) from None
    for number in range(len(rows)):
        with opening(f"data: {label}:{number} cannot be read"):
            value = rows[number][config.text_field]
        yield Document(
            f"{label}:{number}", field_bytes(value, f"{label}:{number}", config.text_field)
        )


@contextlib.contextmanager
def opening(what: str) -> Iterator[None]:
    """Says `what` in a UserError, whatever a damaged dataset or a wrong name makes tfds raise."""
    try:
        yield
    except (UserError, NotImplementedError):
        raise
    except Exception as error:  # ValueError, AssertionError, errors of JSON, of the network, ...
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{what}: {reason}") from None


def _builder(config: DataConfig) -> tfds.core.DatasetBuilder:
    folder = os.path.expanduser(config.tfds_dir)
    if os.path.isfile(os.path.join(folder, "dataset_info.json")):
        return tfds.builder_from_directory(folder)
    if not config.tfds_name:
        raise UserError(
            f"data.tfds_dir={config.tfds_dir} holds no dataset_info.json; "
            "name the folder of one version (.../name/1.0.0) or set data.tfds_name"
        )
    try:
        return tfds.builder(config.tfds_name, data_dir=folder or None)
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"data.tfds_name={config.tfds_name} is neither prepared in "
            f"{folder or '~/tensorflow_datasets'} nor known to tensorflow-datasets; "
            "check the name and data.tfds_dir"
        ) from None
