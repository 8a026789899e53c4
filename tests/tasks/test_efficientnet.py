import imagenet
import torch
from torch import nn


def test_photos_are_inputs_for_the_network(photos: imagenet.Photos) -> None:
    assert photos.inputs.shape == (20, 3, 224, 224)
    assert photos.inputs.dtype == torch.float32
    assert -1 <= photos.inputs.min() < -0.9 < 0.9 < photos.inputs.max() <= 1
    assert photos.labels.shape == (20,)
    assert 0 <= photos.labels.min() <= photos.labels.max() < 1000


def test_pretrained_network_knows_most_photos(efficientnet: nn.Module, photos: imagenet.Photos) -> None:
    assert not efficientnet.training
    with torch.inference_mode():
        ranked = efficientnet(photos.inputs).argsort(dim=1, descending=True)
    first = ranked[:, 0] == photos.labels
    in_five = (ranked[:, :5] == photos.labels[:, None]).any(dim=1)
    assert first.sum() >= 17
    assert in_five.sum() >= 19
