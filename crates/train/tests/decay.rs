//! Which parameters decay, by the names that Transformers' Trainer spares.

use oxiformers_train::decay::decays;

#[test]
fn biases_and_norms_are_spared() {
    for name in [
        "model.layers.0.mlp.down_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "encoder.normalizer.weight",
    ] {
        assert!(decays(name), "{name}");
    }
    for name in [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "encoder.block.0.layer.0.layer_norm.weight",
        "bert.embeddings.LayerNorm.weight",
        "norm.weight",
    ] {
        assert!(!decays(name), "{name}");
    }
}
