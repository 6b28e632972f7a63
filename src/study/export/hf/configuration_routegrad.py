"""Configuration of a model that routegrad trained."""

from transformers import PretrainedConfig


class RoutegradConfig(PretrainedConfig):
    """Shapes of the transformer, and under `router` the router's name and settings."""

    model_type = "routegrad"

    def __init__(
        self,
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=1,
        moe_intermediate_size=352,
        intermediate_size=352,
        mlp_only_layers=(0,),
        norm_type="layernorm",
        norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        attention_bias=False,
        qk_norm="none",
        shared_expert_intermediate_size=0,
        max_position_embeddings=256,
        router=None,
        **others,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        # Width of dense feed-forward layers.
        self.intermediate_size = intermediate_size
        self.mlp_only_layers = list(mlp_only_layers)
        # "layernorm" or "rmsnorm".
        self.norm_type = norm_type
        self.norm_eps = norm_eps
        self.rope_theta = rope_theta
        # Biases of the query, key and value projections.
        self.attention_bias = attention_bias
        # Norms of queries and keys: "none", "head" (over each head), "full" (over all heads together).
        self.qk_norm = qk_norm
        # Width of the shared expert; 0 for no shared expert.
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.router = {"name": "topk"} if router is None else dict(router)
        # The model does not cache keys and values.
        self.use_cache = others.pop("use_cache", False)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)
