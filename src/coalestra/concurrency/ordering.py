"""A total order that can be inserted into anywhere; to compare two places is to compare numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_GAP = 1 << 512
"""Between neighbours. It takes 512 insertions at one spot to use it up and renumber everything."""


class Spot:
    """A place in an `Order`: the greater the label, the further back."""

    __slots__ = ("_after", "_before", "label")

    def __init__(self) -> None:
        self.label: int = 0
        self._before: Spot = self
        self._after: Spot = self

    @property
    def before(self) -> Spot:
        """The next spot to the front; the `Order` itself at its front."""
        return self._before

    @property
    def after(self) -> Spot:
        """The next spot to the back; the `Order` itself at its back."""
        return self._after

    def link(self, after: Spot) -> None:
        """Make `after` the neighbour that follows."""
        self._after = after
        after._before = self


class Order(Spot):
    """A line of spots, closed to a ring by itself: the end of the line is also before its start."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Spot]:
        spot = self.after
        while spot is not self:
            yield spot
            spot = spot.after

    def append(self, spot: Spot) -> None:
        """Put a spot that stands nowhere at the back."""
        self._insert((spot,), self.before)

    def prepend(self, spot: Spot) -> None:
        """Put a spot that stands nowhere at the front."""
        self._insert((spot,), self)

    def remove(self, spot: Spot) -> None:
        """Take a spot out."""
        spot.before.link(spot.after)

    def move_before(self, spots: Sequence[Spot], place: Spot) -> None:
        """Put spots, in the given order, right before another that is not among them."""
        for spot in spots:
            self.remove(spot)
        self._insert(spots, place.before)

    def move_after(self, spots: Sequence[Spot], place: Spot) -> None:
        """Put spots, in the given order, right after another that is not among them."""
        for spot in spots:
            self.remove(spot)
        self._insert(spots, place)

    def _insert(self, spots: Sequence[Spot], left: Spot) -> None:
        if not spots:
            return
        right = left.after
        first, step = self._labels_between(left, right, len(spots))
        for spot in spots:
            left.link(spot)
            spot.label = first
            first += step
            left = spot
        left.link(right)
        if not step:
            self._renumber()

    def _labels_between(self, left: Spot, right: Spot, count: int) -> tuple[int, int]:
        """Return the first label and the step for new spots; step 0 means there is no room."""
        if right is self:
            return (0 if left is self else left.label + _GAP), _GAP
        if left is self:
            return right.label - _GAP * count, _GAP
        step = (right.label - left.label) // (count + 1)
        return left.label + step, step

    def _renumber(self) -> None:
        for number, spot in enumerate(self):
            spot.label = number * _GAP
