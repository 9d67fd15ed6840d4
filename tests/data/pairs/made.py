"""Small real files of every format, written by the libraries that people write them with."""

from __future__ import annotations

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image


def jpeg(shade: int, size: tuple[int, int] = (40, 30), format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, shade // 256, 100)).save(buffer, format)
    return buffer.getvalue()


def shade(content: bytes) -> int:
    """What `jpeg` was given, of a lossless format."""
    red, green, _ = Image.open(io.BytesIO(content)).getpixel((0, 0))
    return red + 256 * green


def tar(path: pathlib.Path, samples: dict[str, dict[str, bytes]]) -> pathlib.Path:
    with tarfile.open(path, "w") as file:
        for key, files in samples.items():
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return path


def texts_tar(path: pathlib.Path, texts: list[str], first: int = 0) -> pathlib.Path:
    """PNGs of shades first, first + 1, ..., one a text."""
    return tar(path, {f"{i:05d}": {"png": jpeg(i, format="PNG"), "txt": text.encode()}
                      for i, text in enumerate(texts, first)})


def parquet(path: pathlib.Path, columns: dict, row_group: int = 4) -> pathlib.Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=row_group)
    return path


def hugging_face(images: list[bytes | None], paths: list[str | None] | None = None):
    """A column as `datasets` stores an Image feature."""
    import pyarrow as pa

    rows = [{"bytes": image, "path": path} for image, path in zip(images, paths or [None] * len(images))]
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def array_record(path: pathlib.Path, records: list[bytes]) -> pathlib.Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def example(**features) -> bytes:
    """A tf.train.Example, by the protocol buffer that TFDS writes with; a value is a list of bytes, ints or floats."""
    from tensorflow_datasets.proto import tf_example_pb2
    from tensorflow_datasets.proto import tf_feature_pb2 as pb

    def feature(values):
        if values and isinstance(values[0], bytes):
            return pb.Feature(bytes_list=pb.BytesList(value=values))
        if values and isinstance(values[0], float):
            return pb.Feature(float_list=pb.FloatList(value=values))
        return pb.Feature(int64_list=pb.Int64List(value=values))

    named = {name.replace("__", "/"): feature(values) for name, values in features.items()}
    return tf_example_pb2.Example(features=pb.Features(feature=named)).SerializeToString()


def tfds(folder: pathlib.Path, captions: list[list[str]], shards: int = 1) -> pathlib.Path:
    """COCO's features, prepared by TFDS as array_record. Returns the folder of the version."""
    import tensorflow_datasets as library

    class Captioned(library.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = library.core.Version("1.0.0")
        url_infos = {}  # nothing is downloaded; to find that out, TFDS would import a package it does not require

        def _info(self):
            texts = library.features.Sequence({"id": np.int64, "text": library.features.Text()})
            features = {"image": library.features.Image(encoding_format="png"), "image/id": np.int64, "captions": texts}
            return library.core.DatasetInfo(builder=self, features=library.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, texts in enumerate(captions):
                rows = [{"id": 10 * i + n, "text": text} for n, text in enumerate(texts)]
                yield i, {"image": io.BytesIO(jpeg(i, format="PNG")), "image/id": i, "captions": rows}

    config = library.download.DownloadConfig(num_shards=shards)
    builder = Captioned(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(download_config=config)
    return pathlib.Path(builder.data_dir)
