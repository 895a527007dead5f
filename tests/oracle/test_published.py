"""The oracle and the product compute the same loss and the same gradients."""

import torch

from mvd_scale.data.batch import ClipBatch
from mvd_scale.targets import MaskedDistillation
from tests.oracle.compare import SMALL, build
from tests.oracle.published import Published


def test_the_same_loss_and_gradients() -> None:
    student, targets = build("distill/b_from_b", SMALL)
    student.eval()  # the oracle has no stochastic depth
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    hidden = torch.tensor([[True, False, True, True], [True, True, False, True]]).repeat(1, 2)
    visible, masked = ((hidden == kind).nonzero()[:, 1].view(2, -1) for kind in (False, True))
    nothing = torch.zeros(2, dtype=torch.int64)

    ours, _ = MaskedDistillation(targets)(student, ClipBatch(pixels, visible, masked, nothing, nothing, {}))
    ours.backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()
    published = Published(student, {name: target.teacher for name, target in targets.items()})(pixels, hidden)
    torch.testing.assert_close(ours, published)
    published.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
