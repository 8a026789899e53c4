"""A real ImageNet network's real mistakes on real photos, patched."""

from __future__ import annotations

import copy

import imagenet
import torch
import zoo
from torch import nn

import weightpatch as wp
from weightpatch.constraints import Classified, Kept
from weightpatch.editing import Result
from weightpatch.editors import RMSProp, Shrink


def test_a_mistaken_photo_is_patched_and_the_others_keep_their_answers(
    efficientnet: nn.Module, photos: imagenet.Photos
):
    with torch.no_grad():
        answers = efficientnet(photos.inputs).argmax(1)
    wrong = int((answers != photos.labels).nonzero()[0])
    others = torch.arange(len(answers)) != wrong
    fix = Classified(photos.inputs[wrong : wrong + 1], photos.labels[wrong : wrong + 1], margin=0.1)
    untouched = zoo.digest(efficientnet)
    found = wp.edit(
        efficientnet,
        fix & Kept(photos.inputs[others]),
        Shrink(RMSProp(lr=1e-4, max_steps=50)),
        keep=wp.Locality(photos.inputs[others]),
        parameters="_fc.*",
    )
    assert zoo.digest(efficientnet) == untouched
    assert found.result is Result.satisfied, found
    assert found.drift < 0.1
    model = copy.deepcopy(efficientnet)
    found.patch.apply(model)
    with torch.no_grad():
        edited = model(photos.inputs).argmax(1)
    assert edited[wrong] == photos.labels[wrong]
    assert torch.equal(edited[others], answers[others])


def test_a_late_block_is_edited_from_train_mode(efficientnet: nn.Module, photos: imagenet.Photos):
    model = copy.deepcopy(efficientnet).train()
    with torch.no_grad():
        answers = efficientnet(photos.inputs).argmax(1)
    wrong = (answers != photos.labels).nonzero().squeeze(1)[:1]
    fix = Classified(photos.inputs[wrong], photos.labels[wrong])
    untouched = zoo.digest(model)
    found = wp.edit(model, fix, RMSProp(lr=1e-4, max_steps=50), parameters="_conv_head.*")
    assert zoo.digest(model) == untouched
    assert found.result is Result.satisfied, found
    model.eval()
    found.patch.apply(model)
    assert fix.satisfied(model)
