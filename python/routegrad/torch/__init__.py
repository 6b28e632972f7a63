"""Default MoE (arXiv 2504.12463) for PyTorch models.

``default_moe(model)`` adds default vectors to the MoE layers of a model. ``router_gradient_similarity`` and
``expert_load`` measure the routers. ``routegrad.torch.ops`` contains the kernels as operators. Models of transformers
use them with ``experts_implementation="routegrad"``.
"""

from . import experts_interface
from .adapters import MoeAdapter
from .analysis import RouterGradient, expert_load, router_gradient_similarity
from .convert import default_moe, default_vectors, frozen, remove_default_moe, set_micro_batches
from .layer import DefaultMoeLayer, Settings
from .pretrained import from_pretrained

__all__ = [
    "DefaultMoeLayer",
    "MoeAdapter",
    "RouterGradient",
    "Settings",
    "default_moe",
    "default_vectors",
    "expert_load",
    "from_pretrained",
    "frozen",
    "remove_default_moe",
    "router_gradient_similarity",
    "set_micro_batches",
]

experts_interface.register()
