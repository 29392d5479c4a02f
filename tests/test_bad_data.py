"""Generated input to image sets: their pixels as they are, or a refusal that names the argument."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from generated import anything, changed, counts, generated, junk, refused_clearly, slowly, tensors
from hypothesis import given
from PIL import Image

from fastdiff import data, images
from fastdiff.data import ImageSet, drop_labels
from fastdiff.data.captions import ADJECTIVES, NOUNS, Captions, tokenize
from fastdiff.data.shards import Shards

BYTES = st.sampled_from([torch.uint8] * 6 + [torch.float32])
PIXELS = torch.arange(120, dtype=torch.uint8).reshape(5, 1, 4, 6)
pictures = tensors(st.tuples(st.integers(0, 4), *map(st.just, (1, 4, 6))), BYTES) | tensors() | junk
whole = st.lists(st.integers(-2, 12), max_size=6).map(lambda v: torch.tensor(v).long())
labels = whole | tensors() | junk
places = st.integers(-2, 9) | counts | junk


@generated
@given(
    changed(
        images=pictures,
        labels=labels,
        class_names=st.just(("a", "b")) | junk,
        flip=st.booleans() | junk,
        pad=st.integers(0, 3) | counts | junk,
    ),
    changed(step=places, size=places, seed=places, rank=places, world=places),
)
def test_image_sets(made, dealt):
    made = {"images": PIXELS, **made}
    found = refused_clearly(lambda: ImageSet(**made), *made)
    if found is None:
        return
    dealt = {"step": 1, "size": 4, "seed": 0, **dealt}
    index = refused_clearly(lambda: found.indices(**dealt), *dealt)
    if index is None:
        return
    world, size, n = dealt.get("world", 1), dealt["size"], len(found)
    assert len(index) == size // world and index.min() >= 0 and index.max() < n
    x0, told = found.batch(**dealt)
    plain = made["images"][index].float() / 127.5 - 1
    pad, (height, width) = found.pad, plain.shape[2:]
    inside = x0[:, :, pad : pad + height, pad : pad + width]
    for got, wanted in zip(inside, plain, strict=True):
        same = torch.isclose(got, wanted, atol=1e-6).all()
        assert same or (found.flip and torch.isclose(got, wanted.flip(2), atol=1e-6).all())
    assert (told is None) == (found.labels is None)
    if 0 < size * (dealt["step"] + 1) <= 60 and world == 1:  # an epoch sees each image once
        seen = torch.cat([found.indices(k, size, dealt["seed"]) for k in range(dealt["step"] + 1)])
        assert all(len(set(part.tolist())) == len(part) for part in seen.split(n))


@generated
@given(
    changed(
        labels=labels,
        probability=st.floats(0, 1) | anything,
        seed=places,
        step=places,
        first=places,
        null=whole | junk,
    )
)
def test_dropped_labels(changes):
    given = {"labels": torch.arange(5), "probability": 0.5, "seed": 0, "step": 3, **changes}
    found = refused_clearly(lambda: drop_labels(**given), *given)
    if found is not None:
        kept, null = given["labels"], given.get("null")
        null = torch.full_like(kept, -1) if null is None else null
        assert ((found == kept) | (found == null)).all() and found.dtype == torch.int64
        if given["probability"] in (0, 1):
            assert torch.equal(found, null if given["probability"] else kept)


words = st.sampled_from(["a", *NOUNS, *filter(None, sum(ADJECTIVES, ())), "odd", "", "\0", "À"])


@generated
@given(
    st.lists(st.lists(words, max_size=6).map(" ".join) | st.text(max_size=4), max_size=3)
    | st.lists(anything, max_size=2)
    | anything,
    st.integers(1, 9) | counts | junk,
)
def test_tokens(captions, length):
    tokens = refused_clearly(lambda: tokenize(captions, length), "captions", "length")
    if tokens is not None:
        assert tokens.shape == (len(captions), length) and tokens.dtype == torch.int64
        for row, text in zip(tokens.tolist(), captions, strict=True):
            said = row[1 : row.index(2)]
            assert row[0] == 1 and len(said) == len(text.split()) and not any(row[len(said) + 2 :])


SEEN = torch.arange(40 * 16, dtype=torch.int64).mul(37).remainder(256).to(torch.uint8)
SEEN = SEEN.reshape(40, 1, 4, 4)


@slowly
@given(changed(images=pictures, labels=labels))
def test_captions(changes):
    given = {"images": SEEN, "labels": torch.arange(40) % 10, **changes}
    refused_clearly(lambda: Captions(**given), *given)
    said = refused_clearly(lambda: Captions(SEEN, torch.arange(40) % 10).of(**given), *given)
    if said is not None:
        assert [text.split()[-1] for text in said] == [NOUNS[k] for k in given["labels"]]


class Items:
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, k):
        return self.items[k]


item = (
    tensors(st.just((1, 3, 2)), BYTES)
    | st.tuples(tensors(st.just((1, 3, 2)), BYTES), st.integers(-1, 4) | junk)
    | st.just(Image.new("L", (2, 3), 7))
    | junk
)


@pytest.mark.filterwarnings("ignore")
@generated
@given(
    st.lists(item, max_size=4).map(Items) | junk,
    changed(
        channels=st.sampled_from([1, 3, 2]) | junk,
        value_range=st.tuples(st.floats(), st.floats()) | anything,
        pad=st.integers(0, 2) | junk,
        workers=st.sampled_from([0, -1, 1.5, "odd", None]),
    ),
)
def test_datasets(dataset, how):
    how = {"progress": False, **how}
    said = *how, "dataset", "labels", "Items", "item"
    found = refused_clearly(lambda: data.from_dataset(dataset, **how), *said)
    if found is not None:
        assert found.images.dtype == torch.uint8 and 0 < len(found) <= len(dataset)


@slowly
@given(anything)
def test_paths(value):
    """Of no file: OSError with the name; of no name: TypeError that names the argument."""
    for call, argument in (
        (lambda: data.folder_images(value, 8), "folder"),
        (lambda: data.npz_images(value), "path"),
        (lambda: data.idx_images(value), "images"),
        (lambda: data.read_idx(value, 3), "path"),
        (lambda: data.fashion_mnist(value, "test"), "folder"),
        (lambda: data.ShardedImages(value), "folder"),
        (lambda: data.export_png(value, "/nowhere"), "folder"),
    ):
        if value is None and argument == "folder":
            continue  # Fashion-MNIST's own
        try:
            assert refused_clearly(call, argument, str(value) or "nothing", r"\.") is None
        except OSError as error:
            assert isinstance(value, str) and value in str(error)


@slowly
@given(
    changed(
        size=places, channels=st.sampled_from([1, 3]) | anything, cache=junk, classes=st.booleans()
    )
)
def test_folders(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "pictures"
    if not folder.exists():
        folder.mkdir()
        Image.new("RGB", (4, 4), (7, 7, 7)).save(folder / "0.png")
    given = {"folder": folder, "size": 4, "progress": False, **changes}
    if isinstance(given["size"], int) and given["size"] > 100:
        with pytest.raises(ValueError, match="size"):
            data.folder_images(**{**given, "size": max(given["size"], 2**40)})
        return
    found = refused_clearly(lambda: data.folder_images(**given), *given)
    if found is not None:
        assert found.shape == (given.get("channels", 3), given["size"], given["size"])
        assert found.images.eq(7).all()


@slowly
@given(changed(num=places, shape=st.lists(places, max_size=4).map(tuple), per_shard=places))
def test_shards(tmp_path_factory, changes):
    given = {"num": 5, "shape": (1, 2, 2), "per_shard": 2, **changes}
    folder = tmp_path_factory.mktemp("shards")
    shards = refused_clearly(lambda: Shards(folder, **given, made_of={}), *given)
    if shards is None or shards.num > 100:
        return
    shards.begin()
    assert Shards.open(folder) == shards
    assert sum(shards.span(k)[1] for k in range(len(shards))) == shards.num


@generated
@given(
    changed(
        x=tensors(st.tuples(st.integers(0, 4), *map(st.just, (1, 2, 3)))) | tensors() | junk,
        columns=places,
        gap=places,
        scale=places,
    )
)
def test_grids(changes):
    given = {"x": torch.zeros(3, 1, 2, 3), "columns": 2, "gap": 1, "scale": 1, **changes}
    picture = refused_clearly(lambda: images.grid(**given), *given)
    if picture is not None:
        batch, _, height, width = given["x"].shape
        across = given["columns"] or int(np.ceil(np.sqrt(batch)))
        down, gap, scale = -(-batch // across), given["gap"], given["scale"]
        size = across * (width + gap) - gap, down * (height + gap) - gap
        assert picture.size == (size[0] * scale, size[1] * scale)
