"""A pytree of tensors as its leaves, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
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
    """

    def __init__(self, name: str, tree: Tree) -> None:
        self._name = name
        self.leaves, self._spec = pytree.tree_flatten(tree)

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
            if leaf.shape != like.shape:
                raise ValueError(
                    f"a {other_name} tensor has shape {tuple(leaf.shape)}, the {self._name} one it "
                    f"belongs to {tuple(like.shape)}"
                )
        return leaves
