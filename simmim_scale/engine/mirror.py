"""A copy of the saves at a URL (s3://, gs://, file:// ...), through fsspec: what is resumed when the run directory is lost.

As on the disk, a save is complete or invisible: its files go up first, their sizes are asked back, its manifest goes up last.
"""

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# They have no directories; asked for one, some of them make a bucket instead, of whatever name was mistyped.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "hf"}


class Mirror:
    """The directory of saves at a URL. Used by the main rank alone.

    Args:
        url: the directory; each save is a directory in it.
        options: passed to fsspec's file system.
    Raises:
        ValueError: fsspec or the package for this kind of URL is not installed, or the URL cannot be opened.
    """

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.url = url.rstrip("/")
        try:
            import fsspec

            caches = {"skip_instance_cache": True, "use_listings_cache": False}
            self._filesystem, root = fsspec.core.url_to_fs(self.url, **caches, **options)
        except ImportError as error:
            raise ValueError(f"checkpoint.mirror: {self.url} needs pip install 'simmim-scale[cloud]' ({error}).") from error
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"checkpoint.mirror: {self.url} cannot be opened ({error}). Check the URL and checkpoint.mirror_options."
            ) from error
        self._root = root.rstrip("/")
        protocols = self._filesystem.protocol
        self._is_object_store = bool(
            OBJECT_STORES & {protocols} if isinstance(protocols, str) else OBJECT_STORES & set(protocols)
        )

    def upload(self, save: Path) -> None:
        """Copy a complete save there and make sure that it arrived.

        Raises:
            OSError: it did not arrive whole; what is there has no manifest and is never resumed from.
        """
        for name, size in self._files(save).items():
            target = f"{self._root}/{save.name}/{name}"
            if not self._is_object_store:
                self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._filesystem.put_file(str(save / name), target)
            arrived = self._filesystem.size(target)
            if arrived != size:
                raise OSError(f"{self.url}/{save.name}/{name}: {arrived} of {size} bytes arrived there.")
        self._filesystem.put_file(str(save / MANIFEST), f"{self._root}/{save.name}/{MANIFEST}")

    def names(self) -> list[str]:
        """Names of the complete saves there, in no order."""
        if not self._filesystem.exists(self._root):
            return []
        found = [path.rstrip("/").rpartition("/")[2] for path in self._filesystem.ls(self._root, detail=False)]
        return [name for name in found if self._filesystem.exists(f"{self._root}/{name}/{MANIFEST}")]

    def download(self, name: str, into: Path) -> None:
        """Fetch a save's files into an existing directory, the manifest last.

        Raises:
            OSError: a file is missing there, or did not arrive whole.
        """
        manifest = self._filesystem.cat_file(f"{self._root}/{name}/{MANIFEST}")
        for file, size in json.loads(manifest)["files"].items():
            target = into / file
            target.parent.mkdir(parents=True, exist_ok=True)
            self._filesystem.get_file(f"{self._root}/{name}/{file}", str(target))
            if target.stat().st_size != size:
                raise OSError(f"{self.url}/{name}/{file}: {target.stat().st_size} bytes arrived, its manifest states {size}.")
        (into / MANIFEST).write_bytes(manifest)

    def remove(self, name: str) -> None:
        """Remove a save there, its manifest first: half removed, it must not look complete."""
        self._filesystem.rm_file(f"{self._root}/{name}/{MANIFEST}")
        self._filesystem.rm(f"{self._root}/{name}", recursive=True)

    @staticmethod
    def _files(save: Path) -> dict[str, int]:
        return json.loads((save / MANIFEST).read_text())["files"]
