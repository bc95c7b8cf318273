"""A pytree of tensors as its leaves, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils import _pytree as pytree

Tree: TypeAlias = Any
"""Any pytree of tensors."""


class Structure:
    """The structure of a pytree.

    Args:
        name: what the user calls it, for errors.
        tree: the pytree.

    Attributes:
        leaves: its tensors, in the order of ``torch.utils._pytree``.

    Raises:
        TypeError: a leaf is not a floating-point tensor.
    """

    def __init__(self, name: str, tree: Tree) -> None:
        self._name = name
        self.leaves, self._spec = pytree.tree_flatten(tree)
        for index, leaf in enumerate(self.leaves):
            _check(leaf, lambda index=index: self.names[index])

    @property
    def names(self) -> list[str]:
        """A name per leaf, as in ``upper['weight'][0]``."""
        found, _ = pytree.tree_flatten_with_path(self.tree(self.leaves))
        return [self._name + pytree.keystr(path) for path, _ in found]

    def tree(self, leaves: Sequence[Tensor]) -> Tree:
        """The pytree with these leaves."""
        return pytree.tree_unflatten(list(leaves), self._spec)

    def leaves_of(self, other_name: str, other: Tree) -> list[Tensor]:
        """The leaves of another pytree; ``ValueError`` unless structure and shapes are the same."""
        leaves, spec = pytree.tree_flatten(other)
        if spec != self._spec:
            raise ValueError(f"{other_name} has structure {spec}, {self._name} has {self._spec}")
        for leaf, like in zip(leaves, self.leaves, strict=True):
            _check(leaf, lambda: f"a leaf of {other_name}")
            if leaf.shape != like.shape:
                raise ValueError(
                    f"a {other_name} tensor has shape {tuple(leaf.shape)}, the {self._name} one it "
                    f"belongs to {tuple(like.shape)}"
                )
        return leaves


def _check(leaf: Any, name: Callable[[], str]) -> None:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
        raise TypeError(f"{name()} must be a floating-point tensor, got {kind}")
