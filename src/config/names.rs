//! Maps names that other programs use to keys of the configuration.

/// Each key with the names that other programs use for it.
pub(super) const COMMON: &[(&str, &[&str])] = &[
    (
        "model.dense_ffn_width",
        &["intermediate_size", "ffn_dim", "d_ff"],
    ),
    (
        "model.expert_ffn_width",
        &["moe_intermediate_size", "expert_dim"],
    ),
    (
        "model.heads",
        &["n_heads", "n_head", "num_heads", "num_attention_heads"],
    ),
    (
        "model.hidden",
        &["hidden_size", "d_model", "n_embd", "dim", "width"],
    ),
    ("model.kv_heads", &["num_key_value_heads", "n_kv_heads"]),
    (
        "model.layers",
        &[
            "n_layers",
            "n_layer",
            "num_layers",
            "num_hidden_layers",
            "depth",
        ],
    ),
    (
        "model.num_experts",
        &[
            "n_experts",
            "experts",
            "num_local_experts",
            "n_routed_experts",
        ],
    ),
    (
        "model.sequence_length",
        &[
            "seq_len",
            "seq_length",
            "block_size",
            "context_length",
            "max_position_embeddings",
        ],
    ),
    (
        "model.tied_embeddings",
        &["tie_word_embeddings", "weight_tying"],
    ),
    ("model.top_k", &["k", "num_experts_per_tok", "topk"]),
    (
        "balance.aux_coefficient",
        &[
            "aux_loss",
            "aux_loss_coef",
            "router_aux_loss_coef",
            "load_balancing_weight",
        ],
    ),
    (
        "balance.z_coefficient",
        &["z_loss", "z_loss_coef", "router_z_loss_coef"],
    ),
    ("data.source", &["dataset", "data_path", "train_data"]),
    (
        "train.betas",
        &["beta1", "beta2", "adam_beta1", "adam_beta2"],
    ),
    (
        "train.checkpoint_interval",
        &["save_steps", "save_interval", "save_every"],
    ),
    ("train.eps", &["adam_eps", "adam_epsilon", "epsilon"]),
    (
        "train.eval_interval",
        &["eval_steps", "eval_every", "evaluation_interval"],
    ),
    (
        "train.gradient_clip",
        &["grad_clip", "clip", "max_grad_norm", "clip_grad_norm"],
    ),
    ("train.learning_rate", &["lr", "max_lr"]),
    ("train.final_rate", &["min_lr", "min_lr_ratio", "lr_min"]),
    (
        "train.micro_batch",
        &[
            "micro_batch_size",
            "per_device_train_batch_size",
            "device_batch_size",
        ],
    ),
    (
        "train.recompute",
        &["gradient_checkpointing", "activation_checkpointing"],
    ),
    (
        "train.schedule",
        &[
            "lr_schedule",
            "lr_scheduler",
            "lr_scheduler_type",
            "scheduler",
        ],
    ),
    (
        "train.sequences_per_step",
        &[
            "batch",
            "batch_size",
            "global_batch_size",
            "train_batch_size",
        ],
    ),
    (
        "train.steps",
        &[
            "max_steps",
            "max_iters",
            "num_steps",
            "iterations",
            "train_steps",
        ],
    ),
    (
        "train.warmup_fraction",
        &["warmup", "warmup_ratio", "warmup_steps"],
    ),
    ("train.weight_decay", &["wd"]),
];

/// Returns the key that another program's name corresponds to.
pub(super) fn common_name(key: &str) -> Option<&'static str> {
    let last = key.rsplit('.').next().unwrap_or(key);
    COMMON
        .iter()
        .find(|(_, names)| names.contains(&last))
        .map(|(key, _)| *key)
}
