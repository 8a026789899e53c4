"""What is done to a user's network without touching it: a structural clone, a choice of parameters, replay."""

from .clone import structural_clone
from .isolation import Noise, preserved_rng, twice_differentiable, uncached_casts
from .linear import is_linear, is_transposed
from .live import LiveNetwork
from .network import Network
from .passes import Recording
from .scope import ParameterRow, check_finite, explain, select
from .slots import GATE, given, noted, with_slots
from .taps import Seen, moved, tapped, with_taps

__all__ = [
    "GATE",
    "LiveNetwork",
    "Network",
    "Noise",
    "ParameterRow",
    "Recording",
    "Seen",
    "check_finite",
    "explain",
    "given",
    "is_linear",
    "is_transposed",
    "moved",
    "noted",
    "preserved_rng",
    "select",
    "structural_clone",
    "tapped",
    "twice_differentiable",
    "uncached_casts",
    "with_slots",
    "with_taps",
]
