"""The op that batches come through: against numpy in float64, its checks, and far strides."""

import numpy as np
import pytest
import torch
from helpers import inputs_of

from fastdiff.op import missing
from fastdiff.ops import OPS, load_images

OP = OPS["load_images"]
IMAGES = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
INDEX = torch.tensor([3, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_is_its_number_rounded_once(dtype):
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x0 = load_images(every, torch.tensor([0]), dtype=dtype)
    exact = torch.from_numpy((2 * np.arange(256.0) - 255) / 255).reshape(1, 1, 16, 16)
    assert torch.equal(x0, exact.float().to(dtype))
    assert x0.min() == -1 and x0.max() == 1
    assert torch.equal(x0, -x0.flip(2, 3))  # symmetric about grey


@pytest.mark.parametrize("case", [case.name for case in OP.cases() if not case.large])
def test_cases_against_numpy_image_by_image(case):
    images, index, flips, pad, dtype, channels_last = inputs_of("load_images", case)
    x0 = load_images(images, index, flips, pad, dtype=dtype, channels_last=channels_last)
    for k, i in enumerate(index):
        image = images[i].numpy()[..., :: -1 if flips is not None and flips[k] else 1]
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        expected = torch.from_numpy(padded / 127.5 - 1)
        assert torch.allclose(x0[k].double(), expected, rtol=0, atol=torch.finfo(dtype).eps / 2)
    assert len(x0) == len(index) and x0.dtype == dtype
    assert not channels_last or x0.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(bool(missing("cpp")), reason="needs the C++ kernels")
def test_an_index_out_of_range_never_reaches_memory():
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=rf"index={bad}: must be in \[0, 4\)"):
            OP.call(IMAGES, torch.tensor([0, bad]), None, 0, torch.float32, False)


BAD = {
    "images: must be a torch.Tensor": ([1], INDEX),
    "images: has dtype float32, must be uint8": (IMAGES.float(), INDEX),
    "images: has shape (3, 2, 2), must be [N, C, H, W]": (IMAGES[0], INDEX),
    "index: has dtype int32, must be int64": (IMAGES, INDEX.int()),
    "index: has shape (1, 2), must be [B]": (IMAGES, INDEX[None]),
    "index: is on meta": (IMAGES, INDEX.to("meta")),
    "index: spans 0 to 3, must be within 0 and 2": (IMAGES[:3], INDEX),
    "flips: has dtype int64, must be bool": (IMAGES, INDEX, INDEX),
    "flips: has shape (1,), must be (2,)": (IMAGES, INDEX, INDEX[:1] > 0),
    "pad=-1: must be an int from 0": (IMAGES, INDEX, None, -1),
    "pad=1.0: must be an int": (IMAGES, INDEX, None, 1.0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises((ValueError, TypeError)) as caught:
        load_images(*BAD[message])
    assert str(caught.value).startswith(message)
    with pytest.raises(ValueError, match=r"dtype=torch\.float64: must be one of"):
        load_images(IMAGES, INDEX, dtype=torch.float64)


def test_results_are_the_same_bits_on_any_number_of_threads():
    images = torch.randint(256, (9, 3, 65, 67), dtype=torch.uint8)
    index, before, results = torch.arange(9), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(load_images(images, index, index % 2 == 0, 3))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
