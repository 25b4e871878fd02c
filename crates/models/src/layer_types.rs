//! Which layers have a sliding window.

use oxiformers_nn::{Error, Result};

/// The window of layer `i`: `window` where `layer_types` says so, or where it is absent and `otherwise` does.
pub(crate) fn window(
    layer_types: &Option<Vec<String>>,
    i: usize,
    window: Option<usize>,
    otherwise: bool,
) -> Result<Option<usize>> {
    let slides = match layer_types {
        Some(types) => {
            let message = || format!("names {} layers, which are not all", types.len());
            types
                .get(i)
                .ok_or_else(|| Error::config("layer_types", message()))?
                == "sliding_attention"
        }
        None => otherwise,
    };
    Ok(window.filter(|_| slides))
}
