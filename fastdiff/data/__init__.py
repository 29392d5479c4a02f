"""Image sets: where they come from, and the order in which training sees them."""

from collections.abc import Callable

from .dataset import from_dataset
from .folder import folder_images
from .idx import FASHION_CLASSES, fashion_mnist, idx_images, read_idx
from .image_set import ImageSet
from .npz import npz_images
from .order import drop_labels
from .shards import ShardedImages, export_png

# by the name that a recipe's "data" gives; its other entries are arguments
READERS: dict[str, Callable[..., ImageSet]] = {
    "fashion-mnist": fashion_mnist,
    "folder": folder_images,
    "idx": idx_images,
    "npz": npz_images,
}

__all__ = [
    "FASHION_CLASSES",
    "READERS",
    "ImageSet",
    "ShardedImages",
    "drop_labels",
    "export_png",
    "fashion_mnist",
    "folder_images",
    "from_dataset",
    "idx_images",
    "npz_images",
    "read_idx",
]
