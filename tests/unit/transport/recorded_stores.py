"""A writer's stores, held back to be made one by one: what a reader may see between any two of them."""

from typing import Any

import numpy as np


class RecordedStores:
    """An array whose stores are put on a list instead, element by element; loads see them, as a processor sees its own."""

    def __init__(self, array: np.ndarray, stores: list[tuple[np.ndarray, int, Any]]) -> None:
        self.array, self.stores, self.own = array.reshape(-1), stores, array.copy()
        self.places = np.arange(array.size).reshape(array.shape)

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, place: Any) -> Any:
        return self.own[place]

    def take(self, places: Any, axis: int | None = None) -> Any:
        return self.own.take(places, axis=axis)

    def __setitem__(self, place: Any, value: Any) -> None:
        self.own[place] = value
        written = self.own.reshape(-1)
        self.stores.extend((self.array, int(at), written[at]) for at in np.ravel(self.places[place]))
