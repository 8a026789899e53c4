"""Edits come from where they should, are reproducible, and a sampler with nothing to give says so."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from weightpatch.constraints import Classified
from weightpatch.errors import InvalidInput
from weightpatch.training import Episode, Listed, Mistakes, Mixed, RandomLabels, RankMatched, Sampler

N, CLASSES = 60, 4
X = torch.arange(N, dtype=torch.float32)[:, None]
LABELS = torch.arange(N) % CLASSES
WRONG = set(range(5, N, 12))


def network(x: Tensor) -> Tensor:
    """Ranks the true label first, but third for the items in WRONG."""
    item = x[:, 0].long()
    order = (LABELS[item][:, None] + torch.arange(CLASSES)) % CLASSES
    wrong = torch.tensor([int(i) in WRONG for i in item])
    order[wrong] = order[wrong][:, [1, 2, 0, 3]]
    return torch.zeros(len(x), CLASSES).scatter(1, order, torch.arange(CLASSES, 0, -1.0).repeat(len(x), 1))


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def asked(episodes: list[Episode]) -> list[tuple[int, int]]:
    return [(int(e.constraint.inputs[0, 0]), int(e.constraint.labels)) for e in episodes]


SAMPLERS = {
    "random": RandomLabels(X, CLASSES),
    "mistakes": Mistakes(X, LABELS, candidates=7),
    "ranks": RankMatched(X, LABELS),
    "listed": Listed([Classified(X[i : i + 1], LABELS[i : i + 1]) for i in range(9)]),
    "mixed": Mixed([RandomLabels(X, CLASSES), Mistakes(X, LABELS)], [1.0, 3.0]),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_draw_depends_on_the_generator_alone(name: str):
    sampler = SAMPLERS[name]
    before = torch.get_rng_state()
    one, two, other = (asked(sampler.draw(4, network, generator(seed))) for seed in (0, 0, 1))
    assert one == two != other
    assert len(one) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_random_labels_are_uniform():
    drawn = asked(RandomLabels(X, CLASSES).draw(4000, network, generator()))
    for column, many in zip(zip(*drawn, strict=True), (N, CLASSES), strict=True):
        counts = torch.tensor(column).bincount(minlength=many).double()
        assert len(counts) == many
        assert float(((counts - 4000 / many) ** 2 / (4000 / many)).sum()) < many + 4 * (2 * many) ** 0.5


def test_mistakes_are_mistakes_and_get_the_true_label():
    drawn = asked(Mistakes(X, LABELS, candidates=7).draw(100, network, generator()))
    assert sorted(drawn) == sorted((i, i % CLASSES) for i in WRONG)  # all there are, each once


def test_rank_matched_labels_have_the_rank_of_true_labels_of_mistakes():
    for item, label in asked(RankMatched(X, LABELS).draw(40, network, generator())):
        order = network(X[item : item + 1]).argsort(-1, descending=True)[0]
        assert int(order[2]) == label


def test_rank_matched_without_mistakes_asks_for_the_second_class():
    right = network(X).argmax(1)
    for item, label in asked(RankMatched(X, right).draw(10, network, generator())):
        assert int(network(X[item : item + 1]).argsort(-1, descending=True)[0, 1]) == label


def test_altered_copies_are_asked_in_addition():
    def altered(x: Tensor, generator: Generator) -> Tensor:
        return x + torch.rand(3, 1, generator=generator)

    (episode,) = RandomLabels(X, CLASSES, altered, margin=0.5).draw(1, network, generator())
    assert episode.constraint.margin == 0.5
    assert isinstance(episode.also, Classified)
    assert episode.also.labels.tolist() == episode.constraint.labels.tolist() * 3
    assert len({float(v) for v in episode.also.inputs}) == 3


def test_mixed_draws_from_each_in_proportion():
    drawn = Mixed([Listed([Classified(X[:1], LABELS[:1])]), RandomLabels(X[1:], CLASSES)], [1, 9]).draw(
        500, network, generator()
    )
    assert 440 < sum(int(e.constraint.inputs[0, 0]) != 0 for e in drawn) <= 500


def test_inputs_may_be_several_tensors():
    (episode,) = RandomLabels((X, 2 * X), CLASSES).draw(1, network, generator())
    assert [tuple(part.shape) for part in episode.constraint.inputs] == [(1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mistakes(X, network(X).argmax(1)).draw(2, network, generator()), "makes no mistake on its 60 items"),
        (lambda: Listed([]), "no constraints"),
        (lambda: RandomLabels(X, 1), "classes=1"),
        (lambda: RandomLabels(X[:0], 3), "empty"),
        (lambda: Mistakes(X, LABELS[1:]), r"labels of shape \(59,\)"),
        (lambda: RankMatched(X, LABELS, candidates=0), "candidates=0"),
        (lambda: Mistakes(X, LABELS - 1), "Mistakes was given labels from -1 to"),
        (lambda: Mistakes(X, LABELS.float()), "expected integers"),
        (lambda: Mistakes(X, LABELS + 1).draw(2, network, generator()), f"expected 0 to {CLASSES - 1}"),
        (lambda: RankMatched(X, LABELS + 1).draw(2, network, generator()), f"expected 0 to {CLASSES - 1}"),
        (lambda: Mixed([RandomLabels(X, 2)], [0.0]), "above 0"),
    ],
)
def test_what_cannot_be_drawn_is_said(make, message: str):
    with pytest.raises(InvalidInput, match=message):
        make()


def test_a_sampler_of_your_own_needs_draw():
    with pytest.raises(TypeError):
        Sampler()  # type: ignore[abstract]
