"""Images in tar files of the WebDataset layout, read from front to back."""

from __future__ import annotations

import contextlib
import random
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sf_mllm.data.augment import ImageKey
from sf_mllm.data.image_sources import IMAGE_SUFFIXES, RawImage, digest
from sf_mllm.errors import InputError


class TarShards:
    """Tar files whose members of one base name form a sample, one of them the image.

    Args:
        urls: local paths, or what `webdataset.gopen` opens: pipe:COMMAND, https://HOST/PATH and so on.
        image_extension: of the image in a sample, such as "jpg"; needed where a sample holds several images.

    Raises:
        InputError: a local file does not exist.
    """

    def __init__(self, urls: Sequence[str], image_extension: str | None = None) -> None:
        self.urls = list(urls)
        self.image_extension = image_extension
        local = [(url, Path(url)) for url in urls if is_local(url)]
        missing = [url for url, path in local if not path.is_file()]
        if missing:
            raise InputError(
                f"Tar shard '{missing[0]}' does not exist ({len(missing)} of {len(self.urls)} are missing); correct "
                "the range in data.images, or use * for the files that are there."
            )
        sizes = [Path(url).stat().st_size if is_local(url) else "remote" for url in self.urls]
        names = [Path(url).name if is_local(url) else url for url in self.urls]
        self.fingerprint = digest("tar", image_extension, *names, *sizes)

    def __len__(self) -> int:
        return len(self.urls)

    def group(self, number: int) -> str:
        """Return the group in the keys of a shard's images."""
        return f"shard-{number:06d}"

    def read(self, number: int) -> Iterator[RawImage]:
        """Yield the images of a shard in its order, undecoded.

        A sample without an image comes without content: its place counts.

        Raises:
            InputError: the shard cannot be read to its end, holds no image, or a sample holds several.
        """
        import webdataset  # only runs on tar shards need it

        url, row, stream = self.urls[number], -1, None
        try:
            stream = webdataset.gopen(url)
            files = webdataset.tariterators.tar_file_expander([{"url": url, "stream": stream}])
            for row, sample in enumerate(webdataset.tariterators.group_by_keys(files)):
                name = f"{url}, {sample['__key__']}"
                yield RawImage(ImageKey(self.group(number), row), name, self._image_of(sample, name))
            while stream.read(2**20):  # a command that could not write its last block would count as failed
                pass
            stream.close()  # raises if a command failed
        except InputError:
            raise
        except (OSError, ValueError, EOFError, tarfile.TarError, zlib.error) as error:
            raise InputError(
                f"Tar shard '{url}' cannot be read to its end ({_reason(error)}); repair it or leave it out of "
                "data.images."
            ) from error
        finally:
            if stream is not None:  # closed already, unless what is left of the shard is not wanted
                with contextlib.suppress(OSError):
                    stream.close()
        if row < 0:
            raise InputError(f"Tar shard '{url}' holds no sample; leave it out of data.images.")

    def read_shuffled(self, number: int, buffer: int, seed: str) -> Iterator[RawImage]:
        """Yield the images of a shard in an order that depends on the seed, holding at most `buffer` of them."""
        import webdataset

        return webdataset.shuffle(buffer, initial=buffer, rng=random.Random(seed))(self.read(number))

    def _image_of(self, sample: dict[str, Any], name: str) -> bytes | None:
        extensions = [key for key in sample if self._is_image(key)]
        if len(extensions) > 1:
            raise InputError(
                f"Sample {name} holds {len(extensions)} images ({', '.join(extensions)}); set data.image_column to one."
            )
        return sample[extensions[0]] if extensions else None

    def _is_image(self, extension: str) -> bool:
        if self.image_extension is not None:
            return extension == self.image_extension
        return f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES


def _reason(error: Exception) -> str:
    """What went wrong, without the objects that webdataset adds to an exception's arguments."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error.args[0]).partition(" @ ")[0] if error.args else type(error).__name__
    failed = re.search(r"exit (-?\d+) \(read\)", text)  # of webdataset's Pipe, after the whole command
    return f"the command that reads it ended with status {failed[1]}" if failed else text


def is_local(url: str) -> bool:
    """Whether a shard is a file of this machine."""
    return "://" not in url and not url.startswith("pipe:")
