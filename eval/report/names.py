"""Names, order and colours of systems and states in a report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..systems import SYSTEMS
from ..systems.setting import Setting

__all__ = ["IN_MEMORY", "OURS", "PAPER", "REFERENCES", "RELOAD", "Rival", "Setting"]

RECOMPUTE = "recompute"
IN_MEMORY = "in_memory"
RELOAD = "reload"
NO_PREFIX = "no_prefix"
ATTENTIONSTORE = "attentionstore"
PAPER = "contiguouskv_paper"
OURS = "contiguouskv"
# They store nothing on disk, so they stand beside every state.
REFERENCES = (RECOMPUTE, IN_MEMORY, NO_PREFIX)
MEMORY = Setting(IN_MEMORY, 1.0)
# The suffix alone: the floor of all times.
FLOOR = Setting(NO_PREFIX, 1.0)

# In the order in which a request finds more and more in memory.
STATES = {
    "cold": "nothing of the prefix is in memory, and the request opens the store",
    "open": "the store is open, and nothing of the prefix is in memory",
    "keys_resident": "the store is open, and what tells which tokens matter is in memory",
    "warm_host": "all that the request uses is in host memory",
    "warm_device": "all that the request uses is in the accelerator's memory",
}

_LABELS = {
    "no_prefix": "no prefix",
    "recompute": "recompute",
    "in_memory": "in memory",
    "reload": "reload",
    "flexgen": "FlexGen",
    "attentionstore": "AttentionStore",
    "attentionstore_h2o": "AttentionStore + H2O",
    "impress": "IMPRESS",
    "contiguouskv_paper": "ContiguousKV (published)",
    "contiguouskv": "ContiguousKV (ours)",
    "kept_tokens": "kept tokens in memory",
}
_COLOURS = {
    "no_prefix": "#d9d9d9",
    "recompute": "#b3b3b3",
    "in_memory": "#5c5c5c",
    "reload": "#9c755f",
    "flexgen": "#d1495b",
    "attentionstore": "#2b6ca3",
    "attentionstore_h2o": "#8e6bb0",
    "impress": "#e0a03c",
    "contiguouskv_paper": "#7bbf8e",
    "contiguouskv": "#1f7a45",
    "kept_tokens": "#a8c686",
}
_OTHER_COLOURS = ("#c2458a", "#2fa3a3", "#a3a32a", "#d96c6c", "#4b4ba8")
_MARKERS = {
    "no_prefix": "|",
    "recompute": "*",
    "in_memory": "p",
    "reload": "v",
    "flexgen": "<",
    "attentionstore": "s",
    "attentionstore_h2o": "P",
    "impress": "X",
    "contiguouskv_paper": "h",
    "kept_tokens": "D",
}


@dataclass(frozen=True)
class Rival:
    """The system that times are divided by.

    Attributes:
        system, options: the system.
        budget: its budget; `None` for the budget of the system that is compared with it. (An exact system has one.)
    """

    system: str = RELOAD
    options: tuple[str, ...] = ()
    budget: float | None = None

    @classmethod
    def parse(cls, text: str) -> Rival:
        """The rival that `NAME[@BUDGET][+OPTION...]` stands for.

        Raises:
            ValueError: there is no such system, budget or option.
        """
        (setting,) = Setting.parse(text, (1.0,))
        return cls(setting.system, setting.options, setting.budget if "@" in text else None)

    @property
    def label(self) -> str:
        """Its name for readers."""
        name = label(Setting(self.system, 1.0, self.options))
        return name if self.budget is None else f"{name} at {self.budget * 100:.4g}%"


def written(setting: Setting) -> str:
    """A setting as it is written on the command line, always with its budget."""
    return "+".join((f"{setting.system}@{setting.budget:.12g}", *setting.options))


def answering(setting: Setting) -> Setting:
    """The setting whose answers a setting gives; of a system that is not known here, itself."""
    return setting.answers_as() if setting.system in SYSTEMS else setting


def is_reference(setting: Setting) -> bool:
    """Whether a setting stands beside every state."""
    return setting.system in REFERENCES


def label(setting: Setting) -> str:
    """A setting's name for readers, without its budget."""
    return " ".join((_LABELS.get(setting.system, setting.system), *(f"+{option}" for option in setting.options)))


def colour(setting: Setting, settings: Iterable[Setting]) -> str:
    """A setting's colour. Options make it lighter; unknown systems get the spare colours, in the order of their names.

    Args:
        setting: the setting.
        settings: all settings of the picture.
    """
    settings = list(settings)
    if setting.system in _COLOURS:
        own = _COLOURS[setting.system]
    else:
        strangers = sorted({one.system for one in settings} - set(_COLOURS))
        own = _OTHER_COLOURS[strangers.index(setting.system) % len(_OTHER_COLOURS)]
    variants = sorted({one.options for one in settings if one.system == setting.system} | {setting.options, ()})
    # Each variant is lighter than the one before.
    part = 1 - 0.65 ** variants.index(setting.options) if len(variants) > 1 else 0.0
    part = min(part, 0.7)
    levels = [int(own[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{round(level + (255 - level) * part):02x}" for level in levels)


def marker(setting: Setting) -> str:
    """A setting's marker in pictures, for readers who cannot distinguish the colours."""
    return _MARKERS.get(setting.system, "o")


def ordered(settings: Iterable[Setting]) -> list[Setting]:
    """Settings by budget, the whole prefix first; within a budget in the order listed here, unknown systems last."""
    places = {name: place for place, name in enumerate(_LABELS)}

    def place(setting: Setting) -> tuple[float, int, str, tuple[str, ...]]:
        first = -1.0 if setting.budget >= 1 else setting.budget
        return first, places.get(setting.system, len(places)), setting.system, setting.options

    return sorted(set(settings), key=place)


def states_in_order(states: Iterable[str]) -> list[str]:
    """States, the coldest first; unknown states last."""
    places = {name: place for place, name in enumerate(STATES)}
    return sorted(set(states), key=lambda state: (places.get(state, len(places)), state))
