"""A model that routegrad trained, in evaluation mode. For transformers 4 and 5.

x += attention(norm(x)); x += feed_forward(norm(x)), the feed-forward SwiGLU, dense or a mixture of experts. B sequences
of S tokens make T = B S rows of width D; E experts, K of them for a token.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_routegrad import RoutegradConfig


def wide(x):
    """Converts to f32 unless the dtype is wider; norms and routers use it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RmsNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = wide(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def norm(config):
    kind = {"rmsnorm": RmsNorm, "layernorm": nn.LayerNorm}[config.norm_type]
    return kind(config.hidden_size, eps=config.norm_eps)


def rotate(x, cos, sin):
    """RoPE on x [B, S, heads, head_dim], whose halves are rotated by angles [B, S, 1, head_dim / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, self.head_dim = config.hidden_size, config.head_dim
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        self.queries_per_key = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(d, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(d, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(d, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, d, bias=False)
        self.qk_norm = config.qk_norm
        if self.qk_norm != "none":
            each = self.qk_norm == "head"
            self.q_norm = RmsNorm(self.head_dim if each else queries, config.norm_eps)
            self.k_norm = RmsNorm(self.head_dim if each else keys, config.norm_eps)

    def forward(self, x, cos, sin, mask):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.queries_per_key, 2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Swiglu(nn.Module):
    def __init__(self, d, width):
        super().__init__()
        self.gate_proj = nn.Linear(d, width, bias=False)
        self.up_proj = nn.Linear(d, width, bias=False)
        self.down_proj = nn.Linear(width, d, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def largest(scores, k):
    """Returns a mask of the k largest elements of each row; ties go to the lower expert."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[:, :k], True)


def renormalized(weights, runs, settings):
    if settings.get("renormalize"):
        return weights / weights.where(runs, 0).sum(-1, keepdim=True)
    return weights


# Each function below converts logits z [T, E] to the experts' weights [T, E] and a mask of the experts that run.
def topk(z, k, settings, bias):
    p = z.softmax(-1)
    runs = largest(p, k)
    return renormalized(p, runs, settings), runs


def dense(z, k, settings, bias):
    return z.softmax(-1), torch.ones_like(z, dtype=torch.bool)


def remoe(z, k, settings, bias):
    return z.relu(), z > 0


def lossfree(z, k, settings, bias):
    p = z.sigmoid() if settings["score"] == "sigmoid" else z.softmax(-1)
    runs = largest(p + bias, k)
    return renormalized(p, runs, settings), runs


def sparsemixer(z, k, settings, bias):
    """Selects k times the most likely remaining expert, weighted by the softmax over the experts close enough to it."""
    weights, runs = torch.zeros_like(z), torch.zeros_like(z, dtype=torch.bool)
    for _ in range(k):
        left = z.masked_fill(runs, -torch.inf)
        best = left.argmax(-1, keepdim=True)
        exact = left.double()
        top = exact.gather(-1, best)
        far = (top - exact) / torch.maximum(exact.abs(), top) > 2 * settings["epsilon"]
        p = left.masked_fill(far, -torch.inf).softmax(-1)
        weights = weights.scatter(-1, best, p.gather(-1, best))
        runs = runs.scatter(-1, best, True)
    return weights, runs


ROUTERS = {
    "topk": topk,
    "default": topk,
    "dense": dense,
    "densemixer": topk,
    "sparsemixer": sparsemixer,
    "remoe": remoe,
    "lossfree": lossfree,
}


class Router(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.k, self.settings = config.num_experts_per_tok, config.router
        self.method = ROUTERS[self.settings["name"]]
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts) if self.settings["name"] == "lossfree" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x):
        z = F.linear(wide(x), wide(self.weight))
        bias = self.e_score_correction_bias
        return self.method(z, self.k, self.settings, None if bias is None else wide(bias))


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        e, d, f = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.zeros(e, 2 * f, d))
        self.down_proj = nn.Parameter(torch.zeros(e, d, f))

    def forward(self, x, weights, runs):
        """Returns the weighted sum of the experts that run, for x [T, D]."""
        y = torch.zeros_like(x)
        for expert in range(len(self.down_proj)):
            tokens = runs[:, expert].nonzero().squeeze(-1)
            gate, up = F.linear(x[tokens], self.gate_up_proj[expert]).chunk(2, -1)
            own = F.linear(F.silu(gate) * up, self.down_proj[expert])
            y.index_add_(0, tokens, own * weights[tokens, expert, None])
        return y


class Mixture(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, router = config.hidden_size, config.router
        self.gate = Router(config)
        self.experts = Experts(config)
        stand_in = router["name"] == "default" and router["pass_forward"] and router["use_at_evaluation"]
        self.register_buffer("default_vectors", torch.zeros(config.num_experts, d) if stand_in else None)
        running = stand_in and router["shrink"] == "running"
        self.register_buffer("shrink_sums", torch.zeros(2) if running else None)
        self.shrink = router["shrink"] if stand_in else None
        scaled = router["name"] == "sparsemixer" and router["version"] == "v1"
        self.register_parameter("omega", nn.Parameter(torch.ones(d)) if scaled else None)
        self.shared_expert = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = Swiglu(d, config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(d, 1, bias=False)

    def scale(self):
        """Returns the factors of the default vectors."""
        if self.shrink_sums is None:
            return self.shrink
        along, square = self.shrink_sums
        return (along / square).clamp(0, 2) if square > 0 else 1

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, 1)
        weights, runs = self.gate(x)
        weights = weights.to(x.dtype)
        y = self.experts(x, weights, runs)
        if self.default_vectors is not None:
            y = y + self.scale() * (weights.masked_fill(runs, 0) @ self.default_vectors)
        if self.omega is not None:
            y = y * self.omega
        if self.shared_expert is not None:
            y = y + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return y.view(shape)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = norm(config)
        dense = layer in config.mlp_only_layers
        self.mlp = Swiglu(config.hidden_size, config.intermediate_size) if dense else Mixture(config)

    def forward(self, x, cos, sin, mask):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = norm(config)
        # Set by `gradient_checkpointing_enable`.
        self.gradient_checkpointing = False

    def forward(self, x, attention_mask, positions, output_hidden_states):
        """Returns the output [B, S, D] for embeddings [B, S, D] and, if requested, the states before each layer and after
        the last norm. `attention_mask` [B, S] is 0 for padding tokens, to which no other token attends."""
        at = torch.arange(x.shape[1], device=x.device)
        mask = (at[:, None] >= at)[None, None]
        if positions is None:
            positions = at[None] if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)
        if attention_mask is not None:
            # Padding attends to itself, so that its rows stay finite.
            mask = mask & (attention_mask.bool()[:, None, None] | (at[:, None] == at))
        exponents = torch.arange(0, self.head_dim, 2, device=x.device, dtype=torch.float64) / self.head_dim
        angles = (positions[..., None] * self.theta**-exponents)[:, :, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        states = []
        for layer in self.layers:
            states.append(x)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, cos, sin, mask)
            else:
                x = layer(x, cos, sin, mask)
        x = self.norm(x)
        return x, (*states, x) if output_hidden_states else None


def refuse(arguments):
    """Raises an error for requested features that other models of transformers support and this model does not."""
    asked = sorted(name for name, value in arguments.items() if value is not None and value is not False)
    if asked:
        raise TypeError(f"routegrad models do not support {', '.join(asked)}: leave it out, or pass None or False")


def sequence_loss(logits, labels, num_items_in_batch):
    """Mean cross-entropy of the next tokens; labels [B, S] are -100 where there is no target. If `num_items_in_batch` is given
    (the number of labels in all micro-batches of a step), the sum divided by it, so that gradients of micro-batches add up."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    loss = F.cross_entropy(wide(logits).flatten(0, 1), targets.to(logits.device), reduction=reduction)
    if num_items_in_batch is None:
        return loss
    return loss / torch.as_tensor(num_items_in_batch, device=loss.device)


class RoutegradForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = RoutegradConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # The Trainer passes `num_items_in_batch`, and the model divides by it.
    accepts_loss_kwargs = True
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        use_cache=None,
        **others,
    ):
        # There is no cache, although generation requests one by default; every step processes all tokens instead.
        refuse(others)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass input_ids [B, S] or inputs_embeds [B, S, D], one of the two")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"expected attention_mask [B, S] of 0 and 1, got {attention_mask.dim()} dimensions")
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        states_wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden, states = self.model(x, attention_mask, position_ids, states_wanted)
        # A loss needs the logits of all positions.
        keep = 0 if labels is not None else logits_to_keep
        logits = self.lm_head(hidden[:, -keep:] if isinstance(keep, int) else hidden[:, keep])
        loss = None if labels is None else sequence_loss(logits, labels, num_items_in_batch)
        output = CausalLMOutput(loss=loss, logits=logits, hidden_states=states)
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, inputs_embeds=None, logits_to_keep=0, **_):
        # There is no cache: every step processes all tokens.
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": logits_to_keep}
        if inputs_embeds is not None and inputs_embeds.shape[1] >= input_ids.shape[1]:
            inputs |= {"input_ids": None, "inputs_embeds": inputs_embeds}
        return inputs
