"""State dicts in the layout in which networks are published."""

import re

from torch import Tensor, nn


class Published(nn.Module):
    """A network whose files omit `prefix`, a regular expression, from the keys; equal keys are the same tensor."""

    prefix: str

    def _names(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for key in self.state_dict():
            names.setdefault(re.sub(f"^{self.prefix}", "", key), []).append(key)
        return names

    def published_state_dict(self) -> dict[str, Tensor]:
        state = self.state_dict()
        return {name: state[keys[0]] for name, keys in self._names().items()}

    def load_published_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of published_state_dict; strict."""
        names = self._names()
        self.load_state_dict({key: value for name, value in state.items() for key in names.get(name, [name])})
