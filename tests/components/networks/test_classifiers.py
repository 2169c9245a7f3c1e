import pytest
import torch

from components.networks.classifiers import CropAndFlip, ResNet, SmallConvNet


@pytest.mark.parametrize(("size", "channels"), [(8, (4, 6)), (28, (4, 6, 8)), (13, (4,))])
def test_small_network(size, channels):
    made = SmallConvNet((2, size, size), channels, features=11)
    assert made(torch.randn(3, 2, size, size)).shape == (3, 11)


def test_residual_network_has_the_published_size():
    """0.46 million parameters for ResNet-32 with ten classes (arXiv 1512.03385, table 6)."""
    made = ResNet((3, 32, 32))
    count = sum(parameter.numel() for parameter in made.parameters()) + 64 * 10 + 10
    assert count == 464_154
    assert made(torch.randn(2, 3, 32, 32)).shape == (2, 64)


def test_crops_and_mirror_images_are_those_of_the_image():
    torch.manual_seed(0)
    x = torch.randint(1, 256, (40, 3, 6, 6), dtype=torch.uint8)
    found = CropAndFlip(2)(x)
    assert found.dtype == torch.uint8
    padded = torch.nn.functional.pad(x, (2,) * 4)
    seen = set()
    for image, own in zip(found, padded):
        places = [
            (row, column, mirrored)
            for row in range(5)
            for column in range(5)
            for mirrored in (False, True)
            if torch.equal(
                image, (lambda part: part.flip(2) if mirrored else part)(own[:, row : row + 6, column : column + 6])
            )
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len({mirrored for _, _, mirrored in seen}) == 2
    assert len({row for row, _, _ in seen}) == 5
    torch.testing.assert_close(CropAndFlip(0)(x[:1]).sum(), x[:1].sum())
