"""Comparisons of a model that was made faster with the same one as it is. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvd_scale.training.teachers.cuda_graph import CudaGraphTeacher


@dataclass(frozen=True)
class Call:
    """Arguments of a frozen encoder."""

    pixels: Tensor
    output_tokens: Tensor


def relative(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference of two tensors over the norm of the second one; infinite if values are not finite."""
    got, wanted = got.detach().double(), wanted.detach().double()
    error = float((got - wanted).norm() / wanted.norm())
    return error if error < float("inf") else float("inf")


def gradient_errors(
    fast: nn.Module, plain: nn.Module, call: Callable[[nn.Module], Mapping[str, Tensor]]
) -> dict[str, float]:
    """Compare outputs and gradients of two models with equal weights, for the sum over tokens of mean squares.

    Args:
        fast: model that was made faster; its parameters have the order of those of `plain`.
        plain: model as it is.
        call: function that calls a model and returns its outputs by name.

    Returns:
        largest relative errors of `outputs` and of `gradients`.
    """
    outputs = [call(model) for model in (fast, plain)]
    for named in outputs:
        torch.stack([output.float().square().mean(-1).sum() for output in named.values()]).sum().backward()
    ours, theirs = ([parameter.grad for parameter in model.parameters()] for model in (fast, plain))
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if len(pairs) < len(ours):
        raise ValueError("some parameters have no gradient")
    # Gradients that cancel, such as those of key biases, are noise in both: they are compared with the largest one.
    largest = max(float(b.double().norm()) for _, b in pairs)
    return {
        "outputs": max(relative(outputs[0][name], outputs[1][name]) for name in outputs[1]),
        "gradients": max(float((a.double() - b.double()).norm()) for a, b in pairs) / largest,
    }


def graph_errors(plain: nn.Module, ours: nn.Module, calls: Sequence[Call]) -> dict[str, float]:
    """Compare a frozen encoder with a CUDA graph of an equal one.

    Args:
        plain: encoder without a graph; its weights are changed at the end.
        ours: encoder with the same weights, possibly compiled; the graph is captured here.
        calls: calls of equal shapes, of which every second one is made on another stream.

    Returns:
        relative errors: of all calls together (`replays`), of a smaller batch, which the graph does not fit
        (`another shape`), after the weights of both have moved (`moved weights`), and how far they moved the features
        (`change by the move`).
    """
    device = calls[0].pixels.device
    graphed, recorded = CudaGraphTeacher(ours), []
    for number, call in enumerate(calls):
        # One micro batch after the other, on either stream.
        stream = torch.cuda.Stream(device) if number % 2 else torch.cuda.current_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            recorded.append(_features(graphed, call))
    torch.cuda.synchronize(device)
    with torch.no_grad():
        # After all calls: no later one has written over the features of an earlier one.
        replays = max(
            relative(features, _features(plain, call)) for features, call in zip(recorded, calls, strict=True)
        )
        few = Call(calls[-1].pixels[:1], calls[-1].output_tokens[:1])
        another = relative(_features(graphed, few), _features(plain, few))
        # A moving average.
        for moved, parameter in zip(ours.parameters(), plain.parameters(), strict=True):
            parameter.mul_(1.1)
            moved.data.copy_(parameter)
        features = _features(graphed, calls[0])
        return {
            "replays": replays,
            "another shape": another,
            "moved weights": relative(features, _features(plain, calls[0])),
            "change by the move": relative(features, recorded[0]),
        }


def _features(model: nn.Module, call: Call) -> Tensor:
    features: Tensor = model(call.pixels, output_tokens=call.output_tokens)
    return features
