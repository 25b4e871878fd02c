//! Continue a text as an async stream: `cargo run --release -p oxiformers --example stream -- MODEL "Once upon a time"`

use std::pin::pin;

use futures::StreamExt;
use oxiformers::{FromPretrained, GenerationConfig, LanguageModel};

fn main() -> Result<(), oxiformers::Error> {
    let mut args = std::env::args().skip(1);
    let source = args
        .next()
        .unwrap_or_else(|| "HuggingFaceTB/SmolLM2-135M-Instruct".into());
    let prompt = args.next().unwrap_or_else(|| "Once upon a time".into());
    let model = LanguageModel::from_pretrained(&source)?;
    let config = GenerationConfig {
        do_sample: true,
        temperature: 0.7,
        top_p: 0.9,
        max_new_tokens: Some(64),
        ..model.generation_config.clone()
    };
    let ids = model.tokenizer.encode(&prompt, true)?;
    print!("{prompt}");
    oxiformers::block_on(async {
        let generator = model.generator(config);
        let mut stream = pin!(generator.stream(&ids)?);
        while let Some(token) = stream.next().await {
            print!("{}", token?.text);
        }
        println!();
        Ok(())
    })
}
