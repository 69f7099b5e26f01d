"""The training engine's way through a network of transformers: packs, shared beginnings, a head that is never whole.

Nothing of transformers is patched. Attention over packs is a function in its own table; what is swapped while a network
trains is a module of ours that answers the same; and what a network can do is found out by trying it.
"""

from metier.models.lean.attention import uncompiled
from metier.models.lean.head import CHUNK, PLAIN, Finish, Teacher, cross_entropy, divergence, likeliest, top_shares
from metier.models.lean.layout import PADDED, Layout, at_first_tokens, hidden_states, inputs, layout, revised
from metier.models.lean.numbers import exact, working
from metier.models.lean.pack import LEAST_SHARED, Node, Pack, Packed, in_order, lay
from metier.models.lean.pointwise import has_triton
from metier.models.lean.rotary import rotary
from metier.models.lean.swap import Pointwise, agree, swapped
from metier.models.lean.trunk import Store, drops, remembered, trunk_depth
from metier.models.structure import output_layer

__all__ = [
    "CHUNK",
    "LEAST_SHARED",
    "PADDED",
    "PLAIN",
    "Finish",
    "Layout",
    "Node",
    "Pack",
    "Packed",
    "Pointwise",
    "Store",
    "Teacher",
    "agree",
    "at_first_tokens",
    "cross_entropy",
    "divergence",
    "drops",
    "exact",
    "has_triton",
    "hidden_states",
    "in_order",
    "inputs",
    "lay",
    "layout",
    "likeliest",
    "output_layer",
    "remembered",
    "revised",
    "rotary",
    "swapped",
    "top_shares",
    "trunk_depth",
    "uncompiled",
    "working",
]
