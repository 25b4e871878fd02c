//! Which parameters weight decay applies to.

use std::sync::LazyLock;

use regex::Regex;

/// Whether weight decay applies to a parameter of this name: to all but biases and norms, which Transformers' Trainer
/// knows by their names. It also spares the weights of every `torch.nn.LayerNorm`, whatever they are called.
pub fn decays(name: &str) -> bool {
    static SPARED: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)").ok());
    let name = name.to_lowercase();
    !SPARED.as_ref().is_some_and(|spared| spared.is_match(&name))
}
