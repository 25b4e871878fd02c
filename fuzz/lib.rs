//! What the fuzz targets share: a model of one file, read as the library reads it.

use bytes::Bytes;
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::Checkpoint;
use oxiformers_processors::tokenizer::{EncodeOptions, Padding, Tokenizer, Truncation};

/// A model of one file.
pub fn model(name: &str, data: &[u8]) -> ModelFiles {
    ModelFiles::from_memory("model", [(name.to_owned(), Bytes::copy_from_slice(data))])
}

/// Opens a checkpoint and reads every tensor. An error is fine, as long as it names the file.
pub fn checkpoint(name: &str, data: &[u8]) {
    match Checkpoint::open(&model(name, data)) {
        Ok(checkpoint) => {
            for info in checkpoint.tensors() {
                let view = checkpoint.tensor(&info.name).expect("a tensor that is listed");
                assert_eq!(Some(view.data.len()), view.dtype.num_bytes(&view.shape));
            }
        }
        Err(error) => assert!(error.to_string().contains(name), "{error}"),
    }
}

/// Lets panics unwind, to be called once before a target that reads tokenizers: the `tokenizers` crate panics on
/// some inconsistent files, and our reader makes an error of that. A panic that nobody caught still ends the run.
pub fn let_panics_unwind() {
    drop(std::panic::take_hook());
}

/// Loads a tokenizer, takes a text there and back, and cuts a pair into windows.
pub fn tokenizer(files: &ModelFiles) {
    let Ok(tokenizer) = Tokenizer::from_files(files) else {
        return;
    };
    let options = EncodeOptions {
        truncation: Some(Truncation {
            max_length: Some(9),
            stride: 2,
            ..Truncation::default()
        }),
        padding: Some(Padding::default()),
        ..EncodeOptions::default()
    };
    let _ = tokenizer.encode_batch([("a", "Hello, world!  1,000 \u{ff21}")], &options);
    if let Ok(ids) = tokenizer.encode("Hello,  world!\n\u{1F917} 世界 \u{301}a 12345", true) {
        let _ = tokenizer.decode(&ids, false);
        let mut stream = tokenizer.decode_stream(true);
        for id in ids {
            let _ = stream.push(id);
        }
    }
}
