"""split_images and join_images."""

from dataclasses import replace

import pytest
import torch

from comemo_kernels import ImageMemory, append_images, distance_table, join_images, split_images

LAYERS, HEADS, DIM, WIDTH = [1, 4], 2, 16, 8
TABLE = distance_table(DIM, 1e4, 64, torch.device("cpu"))


def grown(*sizes, capacity=None, dtype=torch.float32, tile=4, seed=0):
    """A memory built by `append_images`, with spare capacity."""
    draw = torch.Generator().manual_seed(seed)
    memory = ImageMemory.allocate(
        capacity or sum(sizes) + 3, LAYERS, HEADS, DIM, TABLE, dtype, tile
    )
    media = torch.randn(sum(sizes), WIDTH, generator=draw)
    weights = [torch.randn(2 * HEADS * DIM, WIDTH, generator=draw) for _ in LAYERS]
    ids = torch.cat([torch.arange(size) for size in sizes])
    append_images(memory, media, ids, sizes, weights, biases=list(range(5, 5 + len(sizes))))
    memory.media = media
    return memory


def assert_same(found, wanted):
    """All rows of all images are the same in both memories."""
    assert found.sizes == wanted.sizes
    for name in ("media", "ids", "starts"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    m = len(wanted)
    for name in ("keys", "values"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert list(ours) == list(theirs) == LAYERS
        for layer in LAYERS:
            assert torch.equal(ours[layer][:m].float(), theirs[layer][:m].float())


def test_splitting_and_joining_gives_the_same_memory():
    memory = grown(3, 1, 5)
    images = split_images(memory)
    assert [image.sizes for image in images] == [(3,), (1,), (5,)]
    for image, start in zip(images, (0, 3, 4), strict=True):
        assert (image.spans, image.active) == (None, None)
        assert image.starts.tolist() == [0]
        assert image.biases.tolist() == [[0]]
        assert image.table is memory.table
        assert image.capacity == len(image)
        for held, whole in ((image.keys, memory.keys), (image.values, memory.values)):
            for layer in LAYERS:  # views, nothing is copied
                assert held[layer].data_ptr() == whole[layer][start].data_ptr()
        assert image.media.data_ptr() == memory.media[start].data_ptr()
        assert image.ids.tolist() == list(range(len(image)))
    spans = torch.tensor([[[0, 9]], [[3, 4]]])
    joined = join_images(images, spans, torch.tensor([[9, 20, 30], [1, 2, 3]]))
    assert_same(joined, memory)
    assert joined.capacity == 9
    assert joined.spans is spans
    assert joined.biases.tolist() == [[9, 20, 30], [1, 2, 3]]
    assert joined.biases.dtype == joined.starts.dtype == torch.int32
    assert joined.table is memory.table
    assert join_images(images).biases.tolist() == [[0, 0, 0]]


def test_memories_of_several_images_and_prompts_are_joined():
    first, second = grown(2, 3), grown(4, seed=1)
    first.biases = torch.tensor([[5, 6], [7, 8]], dtype=torch.int32)
    joined = join_images([first, second])
    assert joined.sizes == (2, 3, 4)
    assert joined.starts.tolist() == [0, 2, 5]
    assert joined.biases.tolist() == [[5, 6, 5], [7, 8, 5]]
    for image, wanted in zip(
        split_images(joined), [*split_images(first), *split_images(second)], strict=True
    ):
        assert_same(image, wanted)
    second.biases = torch.zeros(3, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"for the same prompts, got those of \[2, 3\]"):
        join_images([first, second])


def test_a_single_memory_is_not_copied():
    memory = grown(3, 2)
    memory.spans, memory.active = torch.tensor([[[0, 3]]]), torch.tensor([[[True]]])
    joined = join_images([memory])
    assert (joined.spans, joined.active) == (None, None)
    assert joined.biases is memory.biases
    for layer in LAYERS:
        assert joined.keys[layer] is memory.keys[layer]
    joined.update(7, memory.keys[1], memory.values[1])
    assert 7 not in memory.keys, "the dictionaries are not shared"


def test_memories_without_keys_are_joined_too():
    memories = [ImageMemory.from_media(torch.randn(n, 4), torch.arange(n), [n]) for n in (3, 2)]
    joined = join_images(memories)
    assert (joined.keys, joined.values, joined.table) == ({}, {}, None)
    assert joined.ids.tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(joined.media[3:], memories[1].media)
    for memory in memories:
        memory.media = None
    assert join_images(memories).media is None


def test_float8_keeps_its_scales():
    memory = grown(8, 4, dtype=torch.float8_e4m3fn)
    images = split_images(memory)
    assert [len(image.scales[1].keys) for image in images] == [2, 1]
    joined = join_images([images[1], images[0]])
    back = split_images(joined)
    for image, wanted in zip(back, images[::-1], strict=True):
        assert_same(image, wanted)
        for layer in LAYERS:
            assert image.scales[layer].tile == 4
            for part in (0, 1):
                assert torch.equal(image.scales[layer][part], wanted.scales[layer][part])
    uneven = replace(grown(8, dtype=torch.float8_e4m3fn), sizes=(6, 2), biases=None)
    with pytest.raises(ValueError, match=r"must start at a tile of 4, got sizes \[6, 2\]"):
        split_images(uneven)
    uneven.sizes = (5,)
    with pytest.raises(ValueError, match="an id for each of its tokens"):
        join_images([uneven, images[0]])
    short = grown(4, dtype=torch.float8_e4m3fn)
    short.sizes, short.ids, short.media = (3,), short.ids[:3], short.media[:3]
    with pytest.raises(ValueError, match="whole tiles of 4 except for the last"):
        join_images([short, images[0]])
    assert join_images([images[0], short]).sizes == (8, 3)


def test_memories_that_cannot_be_split():
    absolute = ImageMemory.from_media(torch.randn(4, 8), torch.arange(4), [4], absolute=True)
    with pytest.raises(ValueError, match="ids that are not absolute, got absolute ones"):
        split_images(absolute)
    with pytest.raises(ValueError, match="not absolute, got none"):
        split_images(ImageMemory(media=torch.randn(4, 8), sizes=(4,)))
    assert split_images(ImageMemory.from_media(torch.randn(0, 8), torch.arange(0), [0])) == []


def changed(**fields):
    memory = grown(3, seed=1)
    for name, value in fields.items():
        setattr(memory, name, value)
    return memory


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (lambda: changed(absolute=True), "all absolute or none, got absolute=True"),
        (lambda: changed(ids=None), "an id for each of its tokens"),
        (lambda: changed(keys={}, values={}), r"the same layers, got \[1, 4\] and \[\]"),
        (lambda: changed(values={}), "the same layers"),
        (lambda: changed(media=None), "all memories must have media and float8 scales, or none"),
        (lambda: changed(media=torch.randn(3, WIDTH + 1)), "the widths, dtypes and devices"),
        (lambda: changed(media=torch.randn(3, WIDTH).double()), "the widths, dtypes and devices"),
        (lambda: changed(media=torch.randn(3, WIDTH, device="meta")), "and devices"),
        (
            lambda: grown(4, dtype=torch.float8_e4m3fn),
            "all memories must have media and float8 scales, or none",
        ),
        (lambda: changed(table=(TABLE[0] + 1, TABLE[1])), "one table of angles"),
    ],
)
def test_memories_that_cannot_be_joined(second, said):
    with pytest.raises(ValueError, match=f"^join_images: .*{said}"):
        join_images([grown(3), second()])


def test_gradients_pass_through_a_joined_memory():
    images = [grown(3), grown(2)]
    for image in images:
        image.keys = {layer: key.clone().requires_grad_() for layer, key in image.keys.items()}
    joined = join_images(images)
    (2 * joined.keys[LAYERS[0]]).sum().backward()
    for image in images:
        grad = image.keys[LAYERS[0]].grad
        assert (grad[: len(image)] == 2).all()
        assert (grad[len(image) :] == 0).all()


def test_joining_no_memory_or_with_wrong_biases():
    with pytest.raises(ValueError, match="at least one memory, got none"):
        join_images([])
    for images in ([grown(3)], [grown(3), grown(2)]):
        with pytest.raises(ValueError, match=r"biases must be for the \d images, .* \(5,\)"):
            join_images(images, biases=torch.arange(5))
