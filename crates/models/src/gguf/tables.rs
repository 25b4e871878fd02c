//! What each architecture of GGUF is called in the Hugging Face world, tensor by tensor and field by field.
//!
//! Sources: the names of the `gguf` Python package, and llama.cpp's converter for what happens to values.

use serde_json::{Value, json};

use super::{Change, Heads, Meta};

/// Names of one tensor: in GGUF, and in the Hugging Face checkpoint. With a suffix (`.weight`) the whole name is
/// meant; without one, the suffix stays as it is.
pub(super) type Name = (&'static str, &'static str);

/// A field of `config.json`, and the key of the metadata (below the architecture's name) that holds it.
pub(super) type Field = (&'static str, &'static str);

/// One architecture.
#[derive(Clone, Copy)]
pub(super) struct Arch {
    /// `general.architecture`.
    pub name: &'static str,
    /// `model_type`.
    pub model_type: &'static str,
    /// Tensors outside of the layers.
    pub outer: &'static [Name],
    /// Where the layers stand.
    pub layers: &'static str,
    /// Tensors of a layer; what is found in an earlier table counts.
    pub block: &'static [&'static [Name]],
    /// Fields of the configuration.
    pub fields: &'static [&'static [Field]],
    /// What the conversion did to tensors, by their GGUF names without suffix. `*` stands for anything.
    pub changes: &'static [(&'static str, Change)],
    /// Fields that follow from something else; they count over `fields`.
    pub extra: fn(&Meta) -> Value,
}

const LLAMA: Arch = Arch {
    name: "llama",
    model_type: "llama",
    outer: &[
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("output", "lm_head"),
    ],
    layers: "model.layers",
    block: &[LLAMA_BLOCK],
    fields: &[LLAMA_FIELDS],
    changes: &[],
    extra: |_| json!({}),
};

const LLAMA_BLOCK: &[Name] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Norms before and after both parts of a layer.
const FOUR_NORMS: &[Name] = &[
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

const EXPERTS: &[Name] = &[
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_exps", "mlp.experts.gate_proj"),
    ("ffn_up_exps", "mlp.experts.up_proj"),
    ("ffn_down_exps", "mlp.experts.down_proj"),
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
    ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
];

const LLAMA_FIELDS: &[Field] = &[
    ("hidden_size", "embedding_length"),
    ("num_hidden_layers", "block_count"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("intermediate_size", "feed_forward_length"),
    ("max_position_embeddings", "context_length"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("layer_norm_eps", "attention.layer_norm_epsilon"),
    ("sliding_window", "attention.sliding_window"),
    ("num_experts_per_tok", "expert_used_count"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
    (
        "shared_expert_intermediate_size",
        "expert_shared_feed_forward_length",
    ),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
];

/// Queries and keys as llama.cpp rotates them: neighbouring dimensions, where the checkpoint pairs halves.
const PERMUTED: &[(&str, Change)] = &[
    ("attn_q", Change::HalvesToPairs(Heads::Query)),
    ("attn_k", Change::HalvesToPairs(Heads::KeyValue)),
];

/// Norms that add one to their weight; GGUF stores the sum.
const NORMS_PLUS_ONE: &[(&str, Change)] = &[("*norm", Change::PlusOne)];

/// All queries, all keys, all values, where the checkpoint groups them by key/value head.
const UNGROUPED: &[(&str, Change)] = &[("attn_qkv", Change::GroupsToStack)];

const FALCON: Arch = Arch {
    name: "falcon",
    model_type: "falcon",
    outer: &[
        ("token_embd", "transformer.word_embeddings"),
        ("output_norm", "transformer.ln_f"),
        ("output", "lm_head"),
    ],
    layers: "transformer.h",
    block: &[FALCON_BLOCK],
    fields: &[
        LLAMA_FIELDS,
        &[
            ("num_kv_heads", "attention.head_count_kv"),
            ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
        ],
    ],
    changes: UNGROUPED,
    extra: |m| {
        let two_norms = m.has("attn_norm_2.weight");
        let kv_heads = m.u64("attention.head_count_kv");
        json!({
            "new_decoder_architecture": two_norms || kv_heads.is_some_and(|heads| heads > 1),
            "multi_query": kv_heads == Some(1),
            "parallel_attn": true,
            "num_ln_in_parallel_attn": if two_norms { 2 } else { 1 },
            "bias": m.has("attn_qkv.bias"),
            "alibi": false,
            "ffn_hidden_size": m.rows("ffn_up.weight"),
        })
    },
};

const FALCON_BLOCK: &[Name] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_qkv", "self_attention.query_key_value"),
    ("attn_output", "self_attention.dense"),
    ("ffn_up", "mlp.dense_h_to_4h"),
    ("ffn_down", "mlp.dense_4h_to_h"),
];

/// Every architecture that can be read.
pub(super) const ARCHITECTURES: &[Arch] = &[
    Arch {
        changes: PERMUTED,
        extra: |m| json!({"attention_bias": m.has("attn_output.bias"), "mlp_bias": m.has("ffn_up.bias")}),
        ..LLAMA
    },
    Arch {
        // Mixtral: the metadata say llama, with experts.
        name: "llama-experts",
        model_type: "mixtral",
        block: &[
            &[
                ("ffn_gate_inp", "block_sparse_moe.gate"),
                ("ffn_gate_exps", "block_sparse_moe.experts.w1"),
                ("ffn_up_exps", "block_sparse_moe.experts.w3"),
                ("ffn_down_exps", "block_sparse_moe.experts.w2"),
            ],
            LLAMA_BLOCK,
        ],
        fields: &[LLAMA_FIELDS, &[("num_local_experts", "expert_count")]],
        changes: PERMUTED,
        ..LLAMA
    },
    Arch {
        name: "qwen2",
        model_type: "qwen2",
        ..LLAMA
    },
    Arch {
        name: "qwen2moe",
        model_type: "qwen2_moe",
        block: &[EXPERTS, LLAMA_BLOCK],
        fields: &[LLAMA_FIELDS, &[("num_experts", "expert_count")]],
        ..LLAMA
    },
    Arch {
        name: "qwen3",
        model_type: "qwen3",
        ..LLAMA
    },
    Arch {
        name: "qwen3moe",
        model_type: "qwen3_moe",
        block: &[EXPERTS, LLAMA_BLOCK],
        fields: &[LLAMA_FIELDS, &[("num_experts", "expert_count")]],
        extra: |_| json!({"norm_topk_prob": true}),
        ..LLAMA
    },
    Arch {
        name: "gemma",
        model_type: "gemma",
        changes: NORMS_PLUS_ONE,
        ..LLAMA
    },
    Arch {
        name: "gemma2",
        model_type: "gemma2",
        block: &[FOUR_NORMS, LLAMA_BLOCK],
        changes: NORMS_PLUS_ONE,
        // The largest model alone scales by its hidden size instead of its heads.
        extra: |m| {
            let largest = m.u64("block_count") == Some(46);
            json!({"query_pre_attn_scalar": if largest { m.hidden_per_head() } else { m.head_dim() }})
        },
        ..LLAMA
    },
    Arch {
        name: "gemma3",
        model_type: "gemma3_text",
        block: &[FOUR_NORMS, LLAMA_BLOCK],
        changes: NORMS_PLUS_ONE,
        extra: |m| {
            let largest = m.u64("block_count") == Some(62);
            let local = m.f64("rope.freq_base_swa").unwrap_or(10_000.0);
            json!({
                "query_pre_attn_scalar": if largest { m.hidden_per_head() } else { m.head_dim() },
                "rope_parameters": {
                    "full_attention": m.rope_parameters(),
                    "sliding_attention": {"rope_type": "default", "rope_theta": local},
                },
            })
        },
        ..LLAMA
    },
    Arch {
        name: "granite",
        model_type: "granite",
        fields: &[
            LLAMA_FIELDS,
            &[
                ("attention_multiplier", "attention.scale"),
                ("embedding_multiplier", "embedding_scale"),
                ("residual_multiplier", "residual_scale"),
                ("logits_scaling", "logit_scale"),
            ],
        ],
        changes: PERMUTED,
        extra: |m| json!({"attention_bias": m.has("attn_output.bias"), "mlp_bias": m.has("ffn_up.bias")}),
        ..LLAMA
    },
    Arch {
        name: "smollm3",
        model_type: "smollm3",
        changes: PERMUTED,
        extra: |m| json!({"attention_bias": m.has("attn_output.bias"), "mlp_bias": m.has("ffn_up.bias")}),
        ..LLAMA
    },
    Arch {
        name: "phi3",
        model_type: "phi3",
        block: &[
            &[("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj")],
            LLAMA_BLOCK,
        ],
        ..LLAMA
    },
    Arch {
        name: "olmo2",
        model_type: "olmo2",
        block: &[FOUR_NORMS, LLAMA_BLOCK],
        extra: |m| json!({"attention_bias": m.has("attn_q.bias")}),
        ..LLAMA
    },
    Arch {
        name: "command-r",
        model_type: "cohere",
        fields: &[LLAMA_FIELDS, &[("logit_scale", "logit_scale")]],
        extra: |m| json!({"attention_bias": m.has("attn_q.bias"), "use_qk_norm": m.has("attn_q_norm.weight")}),
        ..LLAMA
    },
    Arch {
        name: "deepseek2",
        model_type: "deepseek_v3",
        block: &[
            &[
                ("attn_q_a", "self_attn.q_a_proj"),
                ("attn_q_a_norm", "self_attn.q_a_layernorm"),
                ("attn_q_b", "self_attn.q_b_proj"),
                ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
                ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
                ("attn_kv_b", "self_attn.kv_b_proj"),
                // Keys and values of the latent, apart: both become one tensor again.
                ("attn_k_b", "self_attn.kv_b_proj"),
                ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
                ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
                ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
                ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
            ],
            EXPERTS,
            LLAMA_BLOCK,
        ],
        fields: &[
            LLAMA_FIELDS,
            &[
                ("q_lora_rank", "attention.q_lora_rank"),
                ("kv_lora_rank", "attention.kv_lora_rank"),
                ("qk_rope_head_dim", "rope.dimension_count"),
                ("n_routed_experts", "expert_count"),
                ("n_shared_experts", "expert_shared_count"),
                ("n_group", "expert_group_count"),
                ("topk_group", "expert_group_used_count"),
                ("routed_scaling_factor", "expert_weights_scale"),
                ("first_k_dense_replace", "leading_dense_block_count"),
            ],
        ],
        changes: &[("attn_k_b", Change::LatentApart)],
        extra: |m| {
            let rotated = m.u64("rope.dimension_count").unwrap_or(0);
            let key = m
                .u64("attention.key_length_mla")
                .or(m.u64("attention.key_length"));
            let mut rope = m.rope_parameters();
            rope["partial_rotary_factor"] = Value::Null;
            if let Some(log) = m.f64("rope.scaling.yarn_log_multiplier") {
                rope["mscale"] = json!(10.0 * log);
                rope["mscale_all_dim"] = json!(10.0 * log);
            }
            json!({
                "qk_nope_head_dim": key.unwrap_or(0).saturating_sub(rotated),
                "v_head_dim": m.u64("attention.value_length_mla").or(m.u64("attention.value_length")),
                "n_group": m.u64("expert_group_count").unwrap_or(1),
                "topk_group": m.u64("expert_group_used_count").unwrap_or(1),
                "norm_topk_prob": m.bool("expert_weights_norm").unwrap_or(false),
                "attention_bias": m.has("attn_kv_a_mqa.bias"),
                "rope_parameters": rope,
            })
        },
        ..LLAMA
    },
    Arch {
        name: "gpt-oss",
        model_type: "gpt_oss",
        block: &[
            &[
                ("attn_sinks.weight", "self_attn.sinks"),
                ("post_attention_norm", "post_attention_layernorm"),
                ("ffn_gate_inp", "mlp.router"),
            ],
            EXPERTS,
            LLAMA_BLOCK,
        ],
        fields: &[LLAMA_FIELDS, &[("num_local_experts", "expert_count")]],
        extra: |m| {
            let mut rope = m.rope_parameters();
            rope["truncate"] = json!(false);
            json!({"attention_bias": m.has("attn_q.bias"), "rope_parameters": rope})
        },
        ..LLAMA
    },
    Arch {
        name: "gpt2",
        model_type: "gpt2",
        outer: &[
            ("token_embd", "transformer.wte"),
            ("position_embd", "transformer.wpe"),
            ("output_norm", "transformer.ln_f"),
            ("output", "lm_head"),
        ],
        layers: "transformer.h",
        block: &[&[
            ("attn_norm", "ln_1"),
            ("attn_qkv", "attn.c_attn"),
            ("attn_output", "attn.c_proj"),
            ("ffn_norm", "ln_2"),
            ("ffn_up", "mlp.c_fc"),
            ("ffn_down", "mlp.c_proj"),
        ]],
        fields: &[&[
            ("n_embd", "embedding_length"),
            ("n_layer", "block_count"),
            ("n_head", "attention.head_count"),
            ("n_positions", "context_length"),
            ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
        ]],
        extra: |m| json!({"n_inner": m.rows("ffn_up.weight")}),
        ..LLAMA
    },
    Arch {
        name: "gptneox",
        model_type: "gpt_neox",
        outer: &[
            ("token_embd", "gpt_neox.embed_in"),
            ("output_norm", "gpt_neox.final_layer_norm"),
            ("output", "embed_out"),
        ],
        layers: "gpt_neox.layers",
        block: &[&[
            ("attn_norm", "input_layernorm"),
            ("attn_qkv", "attention.query_key_value"),
            ("attn_output", "attention.dense"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_up", "mlp.dense_h_to_4h"),
            ("ffn_down", "mlp.dense_4h_to_h"),
        ]],
        fields: &[
            LLAMA_FIELDS,
            &[("use_parallel_residual", "use_parallel_residual")],
        ],
        changes: UNGROUPED,
        extra: |m| json!({"attention_bias": m.has("attn_qkv.bias")}),
    },
    Arch {
        name: "bloom",
        model_type: "bloom",
        outer: &[
            ("token_embd", "transformer.word_embeddings"),
            ("token_embd_norm", "transformer.word_embeddings_layernorm"),
            ("output_norm", "transformer.ln_f"),
            ("output", "lm_head"),
        ],
        layers: "transformer.h",
        block: &[&[
            ("attn_norm", "input_layernorm"),
            ("attn_qkv", "self_attention.query_key_value"),
            ("attn_output", "self_attention.dense"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_up", "mlp.dense_h_to_4h"),
            ("ffn_down", "mlp.dense_4h_to_h"),
        ]],
        fields: &[&[
            ("hidden_size", "embedding_length"),
            ("n_layer", "block_count"),
            ("n_head", "attention.head_count"),
            ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
        ]],
        changes: UNGROUPED,
        ..LLAMA
    },
    FALCON,
    Arch {
        // Two norms side by side, as in the larger models.
        name: "falcon-two-norms",
        block: &[
            &[("attn_norm", "ln_mlp"), ("attn_norm_2", "ln_attn")],
            FALCON_BLOCK,
        ],
        ..FALCON
    },
    Arch {
        name: "mpt",
        model_type: "mpt",
        outer: &[
            ("token_embd", "transformer.wte"),
            ("output_norm", "transformer.norm_f"),
            ("output", "lm_head"),
        ],
        layers: "transformer.blocks",
        block: &[&[
            ("attn_norm", "norm_1"),
            ("attn_qkv", "attn.Wqkv"),
            ("attn_output", "attn.out_proj"),
            ("ffn_norm", "norm_2"),
            ("ffn_up", "ffn.up_proj"),
            ("ffn_down", "ffn.down_proj"),
        ]],
        fields: &[&[
            ("d_model", "embedding_length"),
            ("n_layers", "block_count"),
            ("n_heads", "attention.head_count"),
            ("max_seq_len", "context_length"),
            ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
        ]],
        extra: |m| {
            let bias = m.f64("attention.max_alibi_bias").unwrap_or(0.0);
            json!({"attn_config": {
                "alibi": bias > 0.0,
                "alibi_bias_max": bias,
                "clip_qkv": m.f64("attention.clamp_kqv"),
            }})
        },
        ..LLAMA
    },
    Arch {
        name: "phi2",
        model_type: "phi",
        outer: &[
            ("token_embd", "model.embed_tokens"),
            ("output_norm", "model.final_layernorm"),
            ("output", "lm_head"),
        ],
        block: &[
            &[
                ("attn_output", "self_attn.dense"),
                ("ffn_up", "mlp.fc1"),
                ("ffn_down", "mlp.fc2"),
            ],
            LLAMA_BLOCK,
        ],
        extra: |m| json!({"intermediate_size": m.rows("ffn_up.weight")}),
        ..LLAMA
    },
    Arch {
        name: "stablelm",
        model_type: "stablelm",
        block: &[
            &[
                ("attn_q_norm", "self_attn.q_layernorm"),
                ("attn_k_norm", "self_attn.k_layernorm"),
            ],
            LLAMA_BLOCK,
        ],
        extra: |m| {
            json!({
                "use_qkv_bias": m.has("attn_q.bias"),
                "qk_layernorm": m.has("attn_q_norm.weight"),
                "use_parallel_residual": !m.has("ffn_norm.weight"),
            })
        },
        ..LLAMA
    },
    Arch {
        name: "starcoder2",
        model_type: "starcoder2",
        block: &[&[("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")], LLAMA_BLOCK],
        fields: &[LLAMA_FIELDS, &[("norm_epsilon", "attention.layer_norm_epsilon")]],
        extra: |m| json!({"use_bias": m.has("attn_q.bias")}),
        ..LLAMA
    },
];
