"""Default MoE (arXiv 2504.12463) for PyTorch models.

``default_moe(model)`` gives the MoE layers of a model default vectors. ``router_gradient_similarity`` and
``expert_load`` measure what the routers do. ``routegrad.torch.ops`` holds the kernels as operators, and
``experts_implementation="routegrad"`` has models of transformers use them.
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
