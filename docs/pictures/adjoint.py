"""What a hypergradient is: f along the curve of lower solutions.

g(u, v) = (v - 2u)^2 / 2, so v*(u) = 2u;  f(u, v) = (v - 1)^2 / 2 + (u + 1)^2 / 2.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes


def f(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The upper loss."""
    return ((v - 1) ** 2 + (u + 1) ** 2) / 2


def draw(folder: Path) -> None:
    """Left the plane of u and v, right f(u, v*(u)) with its slope and that of u alone."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    _plane(left)
    _slopes(right)
    figure.savefig(folder / "adjoint.png", dpi=110)
    plt.close(figure)


def _plane(axes: Axes) -> None:
    u, v = torch.linspace(-1.6, 1, 100), torch.linspace(-2.8, 2, 100)
    axes.contour(u, v, f(u[None], v[:, None]), levels=12, cmap="Greys", linewidths=0.8)
    axes.plot(u, 2 * u, color="C0", label="v*(u), where v minimises g")
    axes.plot(-1, 1, "o", color="C3", label="least f anywhere")
    axes.plot(0.2, 0.4, "o", color="C0", label="least f on the curve")
    axes.annotate("", (-0.1, -0.2), (-0.5, -1), arrowprops={"color": "C0", "width": 2})
    axes.annotate("", (-0.95, -1), (-0.5, -1), arrowprops={"color": "C3", "width": 2})
    axes.set(xlabel="u", ylabel="v", xlim=(-1.6, 1), ylim=(-2.8, 2))
    axes.legend(loc="lower right", fontsize="small")


def _slopes(axes: Axes) -> None:
    u, at = torch.linspace(-1.6, 1, 100), -0.5
    height = f(torch.tensor(at), torch.tensor(2 * at))
    near = torch.linspace(at - 0.4, at + 0.5, 2)
    axes.plot(u, f(u, 2 * u), color="C0", label="f(u, v*(u))")
    axes.plot(near, height + (5 * at - 1) * (near - at), "--", color="C2", label="its slope, -3.5")
    axes.plot(near, height + (at + 1) * (near - at), "--", color="C3", label="∇f by u alone, 0.5")
    axes.plot(at, height, "o", color="black")
    axes.set(xlabel="u", ylim=(0, 7))
    axes.legend(fontsize="small")
