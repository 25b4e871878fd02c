//! What hubs and package indexes send, and how models are named: the indexes of shards, the pages of a package
//! index in both forms, the text after `pypi:` and the like.
#![no_main]

use oxiformers_hub::checkpoint::Checkpoint;
use oxiformers_hub::{Source, read_index_page};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    for name in ["model.safetensors.index.json", "pytorch_model.bin.index.json"] {
        let _ = Checkpoint::open(&oxiformers_fuzz::model(name, data));
    }
    if let Ok(text) = std::str::from_utf8(data) {
        read_index_page(text);
        if let Ok(source) = text.parse::<Source>() {
            let _ = source.to_string();
        }
    }
});
