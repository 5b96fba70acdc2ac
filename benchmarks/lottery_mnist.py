"""Lottery tickets: LeNet-300-100 on MNIST, down to 21 % of its weights, beside the dense net and new random weights.

Every round trains for the same number of steps from the same initial weights, and prunes 20 % of the weights that are
left by their magnitude over all layers. The control has the masks of the last round and other initial weights. Every
figure is the error on the 10,000 test images at the end of training, a mean over seeds.
"""

from __future__ import annotations

import copy

import torch

from benchmarks import _common as common
from benchmarks._mnist import error_on_test, facts, find_mnist, mean_rows, new_classifier, train
from lightning_compress import LotteryTicket, Select
from lightning_compress.data import ImageDataModule

DENSE = "dense"
FRACTION = 0.2


def case_of(round_: int) -> str:
    """Return how the figures of a round are called."""
    return f"ticket with {(1 - FRACTION) ** round_:.1%} of the weights" if round_ else DENSE


def control_of(rounds: int) -> str:
    """Return how the control is called."""
    return f"the masks of the {case_of(rounds)}, weights drawn anew"


def run_rounds(data: ImageDataModule, seed: int, rounds: int, epochs: int, batches: int = 0) -> dict[str, float]:
    """Return the test error of each round of one network, and of the control."""
    module, ticket = new_classifier(seed), LotteryTicket(FRACTION, select=Select())
    errors, before = {}, {}
    for round_ in range(rounds + 1):
        if round_ == rounds:
            before = {"module": copy.deepcopy(module.state_dict()), "ticket": ticket.state_dict()}
        train(module, data, epochs, [ticket], batches)
        errors[case_of(round_)] = error_on_test(module, data)
    module.load_state_dict(before["module"])
    ticket.load_state_dict(before["ticket"])
    ticket.reset = "random"
    train(module, data, epochs, [ticket], batches)
    errors[control_of(rounds)] = error_on_test(module, data)
    return errors


def main() -> None:
    """Train, print and write the table."""
    given = common.arguments(__doc__)
    torch.set_num_threads(1)
    seeds, rounds, epochs = (1, 2, 1) if given.quick else (3, 7, 10)
    about = facts(given.quick, seeds, epochs)
    errors: dict[str, list[float]] = {}
    for seed in range(seeds):
        data = find_mnist(seed)
        if data is None:
            return
        for case, error in run_rounds(data, seed, rounds, epochs).items():
            errors.setdefault(case, []).append(error)
    against = {case: DENSE for case in errors if case != DENSE} | {control_of(rounds): case_of(rounds)}
    common.publish("lottery_mnist", mean_rows(errors, against, [case_of(rounds)]), about, given.out)


if __name__ == "__main__":
    main()
