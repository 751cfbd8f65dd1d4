"""Counts are exact, whoever sees which batch."""

import pytest
import torch

from simmim_scale.tasks.classification.evaluators import CrossEntropy, TopK, ranks_of_labels


def test_ties_go_to_the_lower_class_as_in_argmax_and_nan_is_wrong():
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, torch.nan, 0.0], [1.0, 1.0, 1.0]])
    label = torch.tensor([0, 1, 2, 1, 2])
    assert ranks_of_labels(logits, label).tolist() == [0, 1, 1, 3, 2]
    generator = torch.Generator().manual_seed(0)
    many, right = torch.randint(0, 4, (500, 6), generator=generator).float(), torch.randint(0, 6, (500,), generator=generator)
    assert torch.equal(ranks_of_labels(many, right) == 0, many.argmax(1) == right)


def results(parts: list[list[dict]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for kind in (TopK, CrossEntropy):
        states = []
        for batches in parts:
            evaluator = kind()
            for batch in batches:
                evaluator.update(batch, batch)
            states.append(evaluator.state())
        figures |= kind().result(states)
    return figures


def test_figures_do_not_depend_on_how_samples_were_dealt(generator):
    logits = torch.randn(23, 7, generator=generator)
    label = torch.randint(0, 7, (23,), generator=generator)
    loss = torch.nn.functional.cross_entropy(logits, label, reduction="none")

    def batch(rows: list[int], padding: int = 0) -> dict:
        valid = torch.tensor([True] * len(rows) + [False] * padding)
        rows = [*rows, *([22] * padding)]
        return {
            "logits": logits[rows],
            "label": label[rows],
            "loss_per_sample": loss[rows],
            "sample": torch.tensor(rows),
            "valid": valid,
        }

    alone = results([[batch(list(range(23)))]])
    assert alone["val_top1"] == pytest.approx(100 * float((logits.argmax(1) == label).double().mean()))
    five = logits.topk(5).indices.eq(label[:, None]).any(1).double().mean()
    assert alone["val_top5"] == pytest.approx(100 * float(five))
    assert alone["val_loss"] == pytest.approx(float(loss.double().mean()))
    two = [[batch(list(range(0, 23, 2)))], [batch(list(range(1, 23, 2)), padding=1)]]
    three = [[batch(list(range(16, 23)), padding=1)], [batch(list(range(8, 16)))], [batch(list(range(8)))]]
    assert results(two) == alone
    assert results(three) == alone
    assert results([[batch([], padding=2)]]) == {}
